"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from haomiao.errors import InputError
from haomiao.serve import asking
from haomiao.serve.answers import token_text
from haomiao.serve.jsonbody import dump
from haomiao.serve.schemas import DetokenizeRequest, TokenizeRequest
from haomiao.serve.service import Service


async def tokenize(request: Request) -> Response:
    """Token ids of a prompt or a conversation."""
    service: Service = request.app.state.service
    body = await service.read(request, TokenizeRequest)
    service.check_model(body.model)
    hello, prompts = service.hello, service.prompts
    if (body.prompt is None) == (body.messages is None):
        raise InputError("give one of prompt and messages", param="prompt")
    if body.messages is not None:
        ids = await prompts.chat(
            body.messages,
            body.tools,
            body.chat_template_kwargs,
            source=body.chat_template,
            add_generation_prompt=body.add_generation_prompt,
        )
    else:
        text, tokenizer = body.prompt or "", prompts.tokenizer
        ids = await prompts.encoded([text], "prompt", lambda: tokenizer.encode(text, body.add_special_tokens))
    about: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": hello.max_request_tokens}
    if body.return_token_strs:
        about["token_strs"] = [token_text(prompts.tokenizer, id_)[0] for id_ in ids]
    return Response(dump(about), media_type="application/json")


async def detokenize(request: Request) -> Response:
    """Text of token ids, control tokens included."""
    service: Service = request.app.state.service
    body = await service.read(request, DetokenizeRequest)
    service.check_model(body.model)
    tokenizer = service.prompts.tokenizer
    ids = asking.check_tokens(body.tokens, tokenizer.vocab_size, "tokens") if body.tokens else []
    text = await service.prompts.run(lambda: tokenizer.decode(ids, skip_special=False))
    return Response(dump({"prompt": text}), media_type="application/json")
