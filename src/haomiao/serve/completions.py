"""/v1/completions: text or token ids, one prompt or several, with echo and the prompt's own log-probabilities."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from haomiao.errors import HaomiaoError, InputError
from haomiao.serve import asking
from haomiao.serve.answers import (
    Sample,
    account,
    account_failure,
    account_of,
    collect,
    haomiao_of,
    plain_logprobs,
    server_timing,
)
from haomiao.serve.budgets import Budget
from haomiao.serve.chat import best_of
from haomiao.serve.client import Answer
from haomiao.serve.jsonbody import dump
from haomiao.serve.messages import Done, Submit
from haomiao.serve.schemas import CompletionRequest
from haomiao.serve.service import Service, new_name
from haomiao.serve.sse import EventStream, cancelled_with_client, frame
from haomiao.types import SamplingParams, TokenLogprob

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this route


@dataclass(slots=True)
class Prompt:
    """One prompt of a request."""

    text: str
    ids: list[int]
    options: list[list[int]] = field(default_factory=list)
    """Token ids of the options of a single-prefill choice."""


@dataclass(slots=True)
class Completion:
    """One request while it is answered."""

    service: Service
    body: CompletionRequest
    name: str
    budget: Budget
    facts: dict[str, Any]
    choices: list[str] | None = None
    prompts: list[Prompt] = field(default_factory=list)
    id: str = field(default_factory=lambda: new_name("cmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def samples(self) -> int:
        """Answers to each prompt."""
        return self.body.n or 1


async def completions(request: Request) -> Response:
    """Continue prompts."""
    service: Service = request.app.state.service
    body = await service.read(request, CompletionRequest)
    budget = service.budget(request, body)
    state = request.scope["state"]
    asked = Completion(service, body, service.check_model(body.model), budget, state.setdefault("facts", {}))
    answers: list[Answer] = []
    try:
        submits = await make_submits(asked, state.get("salt", b""))
        try:
            answers += [service.submit(submit) for submit in submits]
            if body.stream:
                return await _stream(asked, answers)
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        async with cancelled_with_client(request, answers):
            samples = await asyncio.gather(*(collect(answer, asked.samples) for answer in answers))
    except HaomiaoError as error:
        account_failure(service, error, budget.given)
        raise
    return _whole(asked, samples)


async def make_submits(asked: Completion, salt: bytes) -> list[Submit]:
    """What the engine is asked, one message a prompt. Raises what is wrong with the body."""
    service, body = asked.service, asked.body
    service.check_points(body)
    hello = service.hello
    if body.best_of is not None and body.best_of != asked.samples:
        raise InputError("best_of other than n is not supported", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise InputError("max_tokens must be at least 1 (0 goes with echo, to score a prompt)", param="max_tokens")
    if body.echo and body.stream:
        raise InputError("echo is not streamed: leave one of echo and stream out", param="echo")
    constraint = asking.constraint_of(body.response_format, body.structured_outputs)
    choices = asking.choices_of(body) if body.logprobs is None and not body.echo else None
    asked.choices = choices
    asked.prompts = await _prompts(asked, hello.vocab_size, salt)
    submits = []
    for prompt in asked.prompts:
        if choices is not None:
            submits.append(
                asking.submit_of(
                    service.new_id(),
                    prompt.ids,
                    asked.budget,
                    point=body.point,
                    salt=salt,
                    work="choose",
                    options=prompt.options,
                )
            )
            continue
        wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = asking.sampling_of(body, hello, len(prompt.ids), max_tokens=max(1, wanted), logprobs=body.logprobs)
        of_prompt = body.prompt_logprobs if body.prompt_logprobs is not None else body.logprobs if body.echo else None
        submits.append(
            asking.submit_of(
                service.new_id(),
                prompt.ids,
                asked.budget,
                sampling=sampling if wanted else _scoring(sampling),
                constraint=constraint if wanted else None,
                point=body.point,
                salt=salt,
                prompt_logprobs=of_prompt,
            )
        )
    return submits


def _scoring(sampling: SamplingParams) -> SamplingParams:
    """To score a prompt costs one token that nobody sees."""
    return SamplingParams(max_tokens=1, logprobs=sampling.logprobs)


async def _prompts(asked: Completion, vocab_size: int, salt: bytes) -> list[Prompt]:
    """Prompts in any of the four forms: text, ids, lists of either."""
    given, service = asked.body.prompt, asked.service
    if isinstance(given, str):
        forms: list[Any] = [given]
    elif all(type(each) is int for each in given):
        forms = [given]
    else:
        forms = list(given)
    if len(forms) > MAX_PROMPTS:
        raise InputError(f"{len(forms)} prompts; at most {MAX_PROMPTS} are allowed in one request", param="prompt")
    found = []
    for form in forms:
        if isinstance(form, int):
            raise InputError("prompt mixes token ids and texts", param="prompt")
        found.append(await _prompt(service, form, asked.choices, vocab_size, salt))
    return found


async def _prompt(
    service: Service, form: str | list[int], choices: list[str] | None, vocab_size: int, salt: bytes
) -> Prompt:
    if not isinstance(form, str):
        ids = asking.check_tokens(form, vocab_size)
        return Prompt("", ids, [] if choices is None else await service.prompts.choices(choices))
    if not form and choices is None:
        ids = await service.prompts.text("")
        if not ids:
            raise InputError("the prompt is empty", param="prompt")
        return Prompt(form, ids)
    if choices is not None:
        text, known = form, service.prompts.tokenizer
        if (codes := known.codes(choices)) is not None:
            return Prompt(form, await service.prompts.text(form, salt=salt), codes)
        encode = service.prompts.encoder(salt)
        ids, options = await service.prompts.options(
            text, lambda more: [*known.prefix_ids, *encode(text + more, True)], choices
        )
        return Prompt(form, ids, options)
    return Prompt(form, await service.prompts.text(form, salt=salt))


# ---- whole --------------------------------------------------------------------------------------------------------


def _whole(asked: Completion, found: list[list[Sample]]) -> Response:
    choices: list[dict[str, Any]] = []
    ends: list[Done] = []
    prompt_tokens = completion_tokens = cached = 0
    more: dict[str, Any] = {}
    for prompt, samples in zip(asked.prompts, found, strict=True):
        for sample in samples:
            end = sample.end
            account(asked.service, asked.facts, end)
            tokens = end.receipt.completion_tokens
            if asked.choices is not None:
                best = best_of(end)
                sample.text, tokens = asked.choices[best], len(prompt.options[best])
                more = {"scores": dict(zip(asked.choices, end.scores or [], strict=False))}
            elif asked.body.max_tokens == 0:
                sample.text, sample.logprobs, tokens = "", [], 0
            completion_tokens += tokens
            choices.append(_choice(asked, prompt, sample, len(choices)))
            ends.append(end)
        prompt_tokens += samples[0].end.receipt.prompt_tokens
        cached += samples[0].end.receipt.cached_tokens
    numbered = [end if index == end.sample else _numbered(end, index) for index, end in enumerate(ends)]
    body = {
        "id": asked.id,
        "object": "text_completion",
        "created": asked.created,
        "model": asked.name,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
        "haomiao": {**haomiao_of(numbered), **more},
    }
    return Response(dump(body), 200, server_timing(ends[0].receipt), "application/json")


def _numbered(end: Done, index: int) -> Done:
    """The same end, as the choice of that number."""
    return Done(
        id=end.id, sample=index, finish_reason=end.finish_reason, finish_detail=end.finish_detail, receipt=end.receipt
    )


def _choice(asked: Completion, prompt: Prompt, sample: Sample, index: int) -> dict[str, Any]:
    body, tokenizer = asked.body, asked.service.prompts.known_tokenizer
    text = sample.text
    entries: list[TokenLogprob | int] = list(sample.logprobs)
    if body.echo:
        if not prompt.text and tokenizer is not None:
            prompt.text = tokenizer.decode([id_ for id_ in prompt.ids if id_ < tokenizer.vocab_size])
        text = prompt.text + text
        entries = [prompt.ids[0], *(sample.end.prompt_logprobs or ()), *entries]
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": "length" if body.max_tokens == 0 else sample.end.finish_reason,
    }
    if body.logprobs is not None:
        offset = 0 if body.echo else len(prompt.text)
        choice["logprobs"] = plain_logprobs(tokenizer, entries, body.logprobs, offset)
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [
            None,
            *(
                {str(id_): {"logprob": value} for id_, value in [(each.token_id, each.logprob), *each.top]}
                for each in sample.end.prompt_logprobs or ()
            ),
        ]
    return choice


# ---- stream -------------------------------------------------------------------------------------------------------


async def _stream(asked: Completion, answers: list[Answer]) -> Response:
    """The stream begins with the first event of the first prompt, so that a refusal still has its status."""
    first = await answers[0].some()

    async def events() -> AsyncIterator[bytes]:
        try:
            async for data in _chunks(asked, answers, first):
                yield data
        except HaomiaoError as error:
            account_failure(asked.service, error, asked.budget.given)
            raise

    return EventStream(events(), answers)


async def _chunks(asked: Completion, answers: list[Answer], first: list[Any]) -> AsyncIterator[bytes]:
    """Events of all prompts as they come."""
    body = asked.body
    ends: list[Done] = []
    prompt_tokens: dict[int, int] = {}
    completion_tokens = 0
    async for number, event in _merged(answers, first):
        index = number * asked.samples + event.sample
        if not isinstance(event, Done):
            if event.text or event.logprobs:
                yield frame(_chunk(asked, index, event.text, event.logprobs))
            continue
        account(asked.service, asked.facts, event)
        ends.append(_numbered(event, index))
        prompt_tokens[number] = event.receipt.prompt_tokens
        completion_tokens += event.receipt.completion_tokens
        about = account_of(event)
        text = ""
        if asked.choices is not None:
            best = best_of(event)
            text = asked.choices[best]
            completion_tokens += len(asked.prompts[number].options[best])
            about["scores"] = dict(zip(asked.choices, event.scores or [], strict=False))
        yield frame({**_chunk(asked, index, text, None, event.finish_reason), "haomiao": about})
    if body.stream_options is not None and body.stream_options.include_usage and ends:
        prompt = sum(prompt_tokens.values())
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt + completion_tokens,
        }
        yield frame({**_chunk(asked), "usage": usage, "haomiao": haomiao_of(ends)})


async def _merged(answers: list[Answer], first: list[Any]) -> AsyncIterator[tuple[int, Any]]:
    """(number of the prompt, event) of several answers, in order of arrival."""
    for event in first:
        yield 0, event
    waiting = {asyncio.ensure_future(answer.some()): number for number, answer in enumerate(answers)}
    try:
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ready:
                number = waiting.pop(task)
                found = task.result()
                if found:
                    waiting[asyncio.ensure_future(answers[number].some())] = number
                for event in found:
                    yield number, event
    finally:
        for task in waiting:
            task.cancel()


def _chunk(
    asked: Completion,
    index: int | None = None,
    text: str = "",
    logprobs: list[TokenLogprob] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """One chunk; without an index the one that carries only usage."""
    chunk = {"id": asked.id, "object": "text_completion", "created": asked.created, "model": asked.name}
    if index is None:
        return {**chunk, "choices": []}
    about = None
    if asked.body.logprobs is not None and logprobs is not None:
        about = plain_logprobs(asked.service.prompts.known_tokenizer, list(logprobs), asked.body.logprobs, 0)
    return {**chunk, "choices": [{"index": index, "text": text, "logprobs": about, "finish_reason": reason}]}
