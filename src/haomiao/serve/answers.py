"""What all answers have in common: collecting events, usage, receipts, log-probabilities in OpenAI's two forms.

Knows the tokenizer for the texts of tokens; nothing about routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from haomiao.engine.request import FinishDetail
from haomiao.errors import EngineError, HaomiaoError
from haomiao.serve.client import Answer
from haomiao.serve.messages import Done
from haomiao.serve.service import Service
from haomiao.text.tokenizer import Tokenizer
from haomiao.types import FinishReason, Receipt, TokenLogprob


@dataclass(slots=True)
class Sample:
    """One whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    done: Done | None = None

    @property
    def end(self) -> Done:
        """How it ended."""
        if self.done is None:
            raise EngineError("the engine ended an answer without a word")
        return self.done


async def collect(answer: Answer, samples: int) -> list[Sample]:
    """All samples of a request. Raises its error."""
    found = [Sample() for _ in range(samples)]
    async for event in answer:
        sample = found[event.sample]
        if isinstance(event, Done):
            sample.done = event
        else:
            sample.text += event.text
            sample.token_ids += event.token_ids
            sample.logprobs += event.logprobs or ()
    return found


def account(service: Service, facts: dict[str, Any], done: Done) -> None:
    """Count an answer, and note it for the log line."""
    receipt = done.receipt
    service.metrics.finish(receipt, done.finish_reason)
    facts["prompt_tokens"] = receipt.prompt_tokens
    facts["completion_tokens"] = facts.get("completion_tokens", 0) + receipt.completion_tokens
    facts["finish"] = done.finish_detail
    facts["outcome"] = receipt.outcome
    facts["engine_ms"] = max(facts.get("engine_ms", 0.0), round(receipt.total_ms, 3))
    facts["points"] = "+".join(dict.fromkeys(entry.point for entry in receipt.schedule)) or None


def account_failure(service: Service, error: HaomiaoError, budgeted: bool) -> None:
    """Count a request with a budget that got no answer."""
    from haomiao.errors import BudgetError, DeadlineError, OverloadError

    if budgeted and isinstance(error, DeadlineError):
        service.metrics.budgets.labels("missed").inc()
    elif budgeted and isinstance(error, (BudgetError, OverloadError)):
        service.metrics.outcome(None, refused=True)


def usage_of(receipts: Sequence[Receipt], completion_tokens: int | None = None) -> dict[str, Any]:
    """OpenAI's count of tokens."""
    prompt = receipts[0].prompt_tokens if receipts else 0
    completion = sum(r.completion_tokens for r in receipts) if completion_tokens is None else completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": receipts[0].cached_tokens if receipts else 0},
    }


def account_of(done: Done) -> dict[str, Any]:
    """Our own part of an answer."""
    return {"receipt": done.receipt, "finish_detail": done.finish_detail}


def haomiao_of(ends: Sequence[Done]) -> dict[str, Any]:
    """The same for the whole body: of the first sample, and of each one where there are several."""
    about = account_of(ends[0])
    if len(ends) > 1:
        about["choices"] = [{"index": end.sample, **account_of(end)} for end in ends]
    return about


def server_timing(receipt: Receipt) -> dict[str, str]:
    """The receipt as a Server-Timing header, which browsers show in their timelines."""
    parts = [f"{name};dur={getattr(receipt, f'{name}_ms'):.3f}" for name in ("queue", "prefill", "decode", "total")]
    if receipt.budget_ms is not None:
        parts.append(f"budget;dur={receipt.budget_ms:.3f}")
    if receipt.predicted_ms is not None:
        parts.append(f"predicted;dur={receipt.predicted_ms:.3f}")
    if receipt.outcome is not None:
        parts.append(f'outcome;desc="{receipt.outcome}"')
    return {"server-timing": ", ".join(parts)}


def ended_by_length(detail: FinishDetail, reason: FinishReason) -> bool:
    """True if there would have been more."""
    return reason == "length" or detail == "budget_exhausted"


# ---- log-probabilities --------------------------------------------------------------------------------------------


def token_text(tokenizer: Tokenizer | None, token_id: int) -> tuple[str, list[int]]:
    """Text and bytes of a token; a token beyond the vocabulary (a padded head) stands for nothing."""
    if tokenizer is None or token_id >= tokenizer.vocab_size:
        return f"<{token_id}>", []
    data = tokenizer.token_bytes(token_id)
    return data.decode("utf-8", "replace"), list(data)


def chat_logprobs(tokenizer: Tokenizer | None, logprobs: Sequence[TokenLogprob], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of chat completions."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(tokenizer, token_id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": data}

    return {
        "content": [
            {
                **entry(each.token_id, each.logprob),
                "top_logprobs": [entry(token_id, value) for token_id, value in each.top[:top]],
            }
            for each in logprobs
        ],
        "refusal": None,
    }


def plain_logprobs(
    tokenizer: Tokenizer | None, logprobs: Sequence[TokenLogprob | int], wanted: int, offset: int
) -> dict[str, Any]:
    """`choices[].logprobs` of completions: parallel lists. A bare id is a prompt's first token, which nothing predicts.

    Texts are made so that they concatenate to the whole: a character that several tokens make up stands with the last.
    """
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for each in logprobs:
        token_id = each if isinstance(each, int) else each.token_id
        data = bytes(token_text(tokenizer, token_id)[1])
        text = decoder.decode(data)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if isinstance(each, int):
            values.append(None)
            tops.append(None)
            continue
        values.append(max(each.logprob, -9999.0))
        top = {token_text(tokenizer, id_)[0]: max(value, -9999.0) for id_, value in each.top[:wanted]}
        top.setdefault(token_text(tokenizer, token_id)[0], max(each.logprob, -9999.0))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops if wanted else None,
        "text_offset": offsets,
    }
