"""The bodies of requests, in the field names of OpenAI's API and of vLLM's extensions, and our own.

Every field has its type and range here, and the OpenAPI document is made of these classes. Fields in `HARMLESS` are
accepted and change nothing; those in `REFUSED` are known to other servers, and refused by name. Knows no model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

MAX_INT = (1 << 53) - 1
Count: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 31)]
Natural: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 31)]
Probability: TypeAlias = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2.0, le=2.0)]
Milliseconds: TypeAlias = Annotated[float, Meta(gt=0.0, le=86_400_000.0)]
Seed: TypeAlias = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
StopText: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1024)]
Stops: TypeAlias = StopText | Annotated[list[StopText], Meta(max_length=16)]
Name: TypeAlias = Annotated[str, Meta(max_length=256)]


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A JSON object whose fields are all known."""


class StreamOptions(Body, kw_only=True):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(Body, kw_only=True):
    """vLLM's ways to constrain an answer; exactly one."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchemaFormat(Body, kw_only=True):
    """The schema of `response_format`."""

    name: Name | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Body, kw_only=True):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Timed(Body, kw_only=True):
    """What every request to the model may say about time and accuracy."""

    model: Name | None = None
    budget_ms: Milliseconds | None = None
    """Milliseconds from the request's headers to the answer's last byte."""
    on_budget: Literal["degrade", "truncate", "refuse"] | None = None
    point: Literal["full", "bf16", "int8", "int4"] | None = None
    """Run at this operating point, and no other."""
    min_point: Literal["full", "bf16", "int8", "int4"] | None = None
    """The least accurate operating point allowed."""
    max_kl: Annotated[float, Meta(ge=0.0, le=1e9)] | None = None
    """Greatest mean KL to `full`, nats per token, of the points used."""
    user: str | None = None


class Budgeted(Timed, kw_only=True):
    """What every generating request may say beside, about its first token and chance."""

    ttft_ms: Milliseconds | None = None
    """Milliseconds from the request's headers to the first token."""
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Probability | None = None
    seed: Seed | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Sampled(Budgeted, kw_only=True):
    """What chat and plain completions share."""

    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Natural], Meta(max_length=16)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=1024)] | None = None
    max_tokens: Count | None = None
    min_tokens: Natural | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    """0 and -1 keep all."""
    min_p: Probability | None = None
    ignore_eos: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class Part(Body, kw_only=True):
    """A part of a message's content. Text only: nothing is fetched or decoded."""

    type: Name
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    video_url: Any = None
    audio_url: Any = None
    annotations: Any = None
    logprobs: Any = None


class FunctionCall(Body, kw_only=True):
    """What a tool call calls."""

    name: Name
    arguments: str = ""


class ToolCall(Body, kw_only=True):
    """A call that the assistant made."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Natural | None = None


class ChatMessage(Body, kw_only=True):
    """One message of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    tool_call_id: Name | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


class Function(Body, kw_only=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body, kw_only=True):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body, kw_only=True):
    """The name of a function that must be called."""

    name: Name


class NamedTool(Body, kw_only=True):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(Sampled, kw_only=True):
    """/v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    verbosity: str | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template: Annotated[str, Meta(max_length=1 << 20)] | None = None
    """Refused unless the server was started with --request-templates."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, out of an allowlist."""
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None


class CompletionRequest(Sampled, kw_only=True):
    """/v1/completions"""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    max_tokens: Natural | None = None
    """0 goes with echo: the prompt is scored."""
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=16)] | None = None
    suffix: str | None = None


class ResponseText(Body, kw_only=True):
    """The form of the answer of /v1/responses."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseReasoning(Body, kw_only=True):
    """How much a model that reasons should."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: str | None = None


class ResponsesRequest(Budgeted, kw_only=True):
    """/v1/responses, without stored conversations"""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    truncation: Literal["disabled"] | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    max_tool_calls: Any = None
    prompt: Any = None


class TokenizeRequest(Body, kw_only=True):
    """/tokenize: a prompt, or a conversation through the template."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None
    chat_template: Annotated[str, Meta(max_length=1 << 20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body, kw_only=True):
    """/detokenize"""

    model: Name | None = None
    tokens: list[int]


class EmbeddingsRequest(Timed, kw_only=True):
    """/v1/embeddings"""

    input: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    """The model's own number; no other is possible."""


REFUSED: dict[str, str] = {
    "audio": "audio is not supported",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "nothing is fetched from the network",
    "functions": "functions were replaced by tools",
    "function_call": "function_call was replaced by tool_choice",
    "suffix": "suffix is not supported: the model continues, it does not fill in",
    "previous_response_id": "responses are not stored: send the conversation as input",
    "conversation": "conversations are not stored: send them as input",
    "background": "there is no background mode",
    "max_tool_calls": "tools are called by the client",
    "prompt": "prompt templates are not stored here",
}
"""Fields that are understood and cannot be served: field -> one line."""
ELSEWHERE: dict[str, str] = {
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "json_schema": "response_format or structured_outputs.json",
    "grammar": "structured_outputs.grammar",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "n_probs": "logprobs",
    "cache_prompt": "always done",
    "content": "prompt",
}
"""What vLLM once called, and llama-server calls, what exists here under another name."""
