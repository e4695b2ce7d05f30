"""From what a caller writes for `speculate` to who proposes tokens. Knows models and executors; not how drafts are
judged."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from haomiao.engine.speculate.costs import StepCosts
from haomiao.engine.speculate.own_plane import OwnPlaneProposer
from haomiao.engine.speculate.proposer import Proposer
from haomiao.engine.speculate.speculator import Speculator
from haomiao.engine.speculate.suffix import SuffixProposer
from haomiao.errors import InputError
from haomiao.types import POINTS, Executor, KvType

if TYPE_CHECKING:
    from haomiao.models.open import OpenedModel
    from haomiao.text.tokenizer import Tokenizer

WAYS = ("auto", "off", "suffix", "self")
OWN_DRAFT = "int4"
"""The point at which a model drafts for itself."""
_COMPARED = 8192
"""Tokens of two vocabularies that are compared, evenly spread."""

Opener = Callable[[str, int], "tuple[OpenedModel, Executor, Tokenizer | None]"]
"""Opens a draft model by name for sequences of so many tokens."""


def check_way(way: Any) -> str:
    """The name of a way, or of a draft model. Raises `InputError` for anything else."""
    if isinstance(way, os.PathLike):
        return str(os.fspath(way))
    if not isinstance(way, str) or not way:
        raise InputError(f"speculate must be {', '.join(WAYS)} or a draft model, not {way!r:.40}", param="speculate")
    return way


def make_speculator(
    way: str, executor: Executor, max_context: int, tokenizer: Tokenizer | None, open_draft: Opener
) -> Speculator:
    """Everything that can draft for a model: requests may choose among it; `way` is the default.

    Suffixes always, the model's own int4 plane where it may follow another point, and the draft model if `way` names
    one."""
    costs = StepCosts()
    proposers: list[Proposer] = [SuffixProposer()]
    if OWN_DRAFT in executor.points and len(executor.points) > 1:
        proposers.append(OwnPlaneProposer(executor, OWN_DRAFT, costs))
    elif way == "self":
        raise InputError("speculate='self' needs a model with the points int4 and int8", param="speculate")
    if way not in WAYS:
        proposers.append(_draft_model(way, executor, max_context, tokenizer, open_draft, costs))
        way = "draft"
    return Speculator(proposers, way, costs=costs)


def _draft_model(
    name: str, executor: Executor, max_context: int, tokenizer: Tokenizer | None, open_draft: Opener, costs: StepCosts
) -> Proposer:
    from haomiao.engine.speculate.draft_model import DraftModelProposer

    opened, draft_executor, draft_tokenizer = open_draft(name, max_context)
    try:
        _check_vocabulary(name, executor, draft_executor, tokenizer, draft_tokenizer)
    except BaseException:
        draft_executor.close()
        raise
    return DraftModelProposer(draft_executor, opened.default_point, opened.plan.max_context, costs)


def _check_vocabulary(
    name: str, executor: Executor, draft: Executor, tokenizer: Tokenizer | None, draft_tokenizer: Tokenizer | None
) -> None:
    """Raise `InputError` unless the two models mean the same by a token id."""
    same = executor.vocab_size == draft.vocab_size
    if same and tokenizer is not None and draft_tokenizer is not None:
        size = min(tokenizer.vocab_size, draft_tokenizer.vocab_size)
        same = tokenizer.vocab_size == draft_tokenizer.vocab_size and all(
            tokenizer.token_bytes(token_id) == draft_tokenizer.token_bytes(token_id)
            for token_id in range(0, size, max(1, size // _COMPARED))
        )
    if not same:
        raise InputError(
            f"{name:.60} cannot draft for this model: its vocabulary is another one "
            f"({draft.vocab_size} and {executor.vocab_size} tokens)",
            param="speculate",
        )


def kv_type_of(opened: OpenedModel) -> KvType:
    """How a draft model keeps K and V."""
    return POINTS[opened.default_point].default_kv
