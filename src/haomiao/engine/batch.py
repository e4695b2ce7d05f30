"""Between live sequences and the two that never see them: views for the scheduler, batches for the executor.

Knows tokens and KV; nothing about why sequences are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from haomiao.engine.choice import ChoicePrompt, option_tokens
from haomiao.engine.cost import StepShape
from haomiao.engine.draw import Drawing, row_draws
from haomiao.engine.forecast import Work
from haomiao.engine.generation import Generation
from haomiao.engine.scheduler import Branches, SequenceView
from haomiao.engine.sequence import Job, Sequence
from haomiao.engine.state import BlockPool, blocks_for
from haomiao.types import KV_BLOCK_TOKENS, StepBatch


@dataclass(slots=True)
class Share:
    """A sequence's part of a step: `tokens` computed, logits of the last `rows` of them wanted, and final hidden states
    of the last `hidden`."""

    sequence: Sequence
    tokens: int
    rows: int
    branches: list[Share] = field(default_factory=list)
    """Sequences that branch off this one within the step; those that compute something follow it among the shares."""
    parent: Share | None = None
    hidden: int = 0

    def take_back(self) -> None:
        """It was not computed after all."""
        if self.parent is None:
            self.sequence.cut(self.tokens)
        elif self.sequence.key < 0 and self.sequence.state is not None:  # nobody took it in
            self.sequence.state.release()
            self.sequence.state = None


def reusable(sequence: Sequence) -> int:
    """How many of its first tokens need not be computed: never the last, nor one whose logits are wanted."""
    wanted = min(sequence.target - 1, sequence.hidden_from)
    return wanted if sequence.rows_from is None else min(wanted, sequence.rows_from)


def rows_wanted(sequence: Sequence, tokens: int) -> int:
    """Rows of logits wanted if the next `tokens` tokens are computed."""
    end, wanted = sequence.length + tokens, _rows_from(sequence)
    if wanted is None:
        return 1 if end >= sequence.target else 0
    return max(0, end - max(sequence.length, wanted))


def hidden_wanted(sequence: Sequence, tokens: int) -> int:
    """Final hidden states wanted if the next `tokens` tokens are computed."""
    return max(0, sequence.length + tokens - max(sequence.length, sequence.hidden_from))


def _rows_from(sequence: Sequence) -> int | None:
    """A draft is judged by the row before it and by its own."""
    return sequence.target - 1 if sequence.draft else sequence.rows_from


def view_of(sequence: Sequence, pool: BlockPool, found: list[int], point: str, waits: bool) -> SequenceView:
    """What the scheduler sees. `found` are blocks of the prefix cache that a sequence without KV would start from,
    `point` is where it would run now; `waits` says that it gets no more than the floor."""
    request, state = sequence.job.request, sequence.state
    length = len(found) * KV_BLOCK_TOKENS if state is None else state.length
    pending = sequence.target - length
    drafted = 0 if state is None else len(sequence.draft)
    deadlines = [request.deadline_ns, None if sequence.produced else request.ttft_deadline_ns]
    return SequenceView(
        key=sequence.key,
        point=point,
        pending=pending + drafted,
        drafted=drafted,
        decoding=sequence.produced > 0 and pending <= KV_BLOCK_TOKENS,
        arrival_ns=sequence.job.arrival_ns,
        deadline_ns=min((deadline for deadline in deadlines if deadline is not None), default=None),
        itl_ns=request.itl_ns,
        last_served_ns=sequence.last_served_ns,
        length=length,
        running=state is not None,
        blocks_alone=0 if state is None else state.blocks_alone,
        claim=sum(1 for block in found if not pool.holders(block)),
        tail_shared=state is not None and state.tail_shared,
        rows_from=_rows_from(sequence) if drafted else sequence.rows_from,
        waits=waits,
        branches=_branches(sequence) if isinstance(sequence, ChoicePrompt) else None,
    )


def _branches(prompt: ChoicePrompt) -> Branches | None:
    """What the options of a choice need in the step that ends its prompt."""
    lengths, past = [each for each in prompt.option_tokens if each], prompt.target
    if not lengths:
        return None
    blocks = sum(blocks_for(past + each) - past // KV_BLOCK_TOKENS for each in lengths)
    return Branches(sum(lengths), sum(lengths), len(lengths), blocks)


def work_of(sequence: Sequence) -> Work:
    """What the sequence still needs. One that never ran is taken to find what it found when it was submitted."""
    job, request = sequence.job, sequence.job.request
    length = sequence.length
    if sequence.state is None and job.started_ns is None:
        length = job.cached_tokens
    pending = max(1, sequence.target - length)
    decode = least = 0
    width = rows = 1
    first = request.ttft_deadline_ns
    if isinstance(sequence, Generation):
        produced, params = sequence.produced, request.sampling
        if request.on_budget == "refuse":
            decode = least = params.max_tokens - produced
        else:
            decode = max(1, min(params.max_tokens, max(job.expected, produced + 1)) - produced)
            least = min(decode, max(0, job.least - produced))
        width = sequence.samples
        if produced and pending <= KV_BLOCK_TOKENS:
            pending, first = 0, None
        else:  # the step that ends prefill brings a token already
            decode, least = max(0, decode - 1), max(0, least - 1)
    elif isinstance(sequence, ChoicePrompt):
        pending, width, rows = _with_options(job, pending)
    return _work(job, sequence.key, pending, decode, least, length, width, first, rows)


def work_of_new(job: Job) -> Work:
    """What a request needs that is no sequence yet."""
    request, cached = job.request, job.cached_tokens
    pending = max(1, len(request.prompt_ids) - cached)
    decode = least = 0
    width = rows = 1
    if request.work == "generate":
        width = request.sampling.n
        decode = (request.sampling.max_tokens if request.on_budget == "refuse" else job.expected) - 1
        least = decode if request.on_budget == "refuse" else min(decode, job.least - 1)
    elif request.work == "choose":
        pending, width, rows = _with_options(job, pending)
    return _work(job, -job.id, pending, decode, least, cached, width, request.ttft_deadline_ns, rows)


def _with_options(job: Job, pending: int) -> tuple[int, int, int]:
    """A choice is one prefill, its options included: tokens, sequences, rows of logits of its last step."""
    lengths = [each for each in option_tokens(job) if each]  # one without tokens is read off the prompt's last row
    return pending + sum(lengths), 1 + len(lengths), 1 + sum(lengths)


def _work(
    job: Job, key: int, prefill: int, decode: int, least: int, length: int, width: int, first: int | None, rows: int
) -> Work:
    return Work(
        key,
        prefill,
        decode,
        least,
        length=length,
        width=width,
        rows=rows,
        top=job.top,
        bottom=job.bottom,
        arrival_ns=job.arrival_ns,
        deadline_ns=job.request.deadline_ns,
        first_ns=first,
        delivery_ns=job.request.delivery_ns,
    )


def make_batch(point: str, shares: list[Share], draws: bool = False) -> StepBatch:
    """The step's tokens, one sequence after the other. Room for them was made already. `draws`: the executor draws rows
    by itself where that is all that is wanted of them."""
    token_ids: list[int] = []
    starts = [0]
    past: list[int] = []
    rows: list[int] = []
    hidden: list[int] = []
    greedy: list[bool] = []
    drawings: list[Drawing | None] = []
    copies: list[tuple[int, int]] = []
    tables = np.full((len(shares), max(len(share.sequence.kv.blocks) for share in shares)), -1, dtype=np.int32)
    for index, share in enumerate(shares):
        state = share.sequence.kv
        before = state.length - share.tokens
        token_ids += share.sequence.tokens[before : state.length]
        token_ids += share.sequence.draft
        rows += range(len(token_ids) - share.rows, len(token_ids))
        hidden += range(len(token_ids) - share.hidden, len(token_ids))
        greedy += [share.sequence.argmax_suffices] * share.rows
        if draws:
            drawings += share.sequence.drawings(share.rows)
        starts.append(len(token_ids))
        past.append(before)
        tables[index, : len(state.blocks)] = state.snapshot()
        copies += _copies(share, starts[index])
    return StepBatch(
        np.array(token_ids, dtype=np.int32),
        np.array(starts, dtype=np.int32),
        np.array(past, dtype=np.int32),
        tables,
        np.array(rows, dtype=np.int32),
        point,
        np.array(greedy, dtype=np.bool_),
        np.array(copies, dtype=np.int32) if copies else None,
        np.array(hidden, dtype=np.int32) if hidden else None,
        row_draws(drawings),
    )


def _copies(share: Share, first: int) -> list[tuple[int, int]]:
    """Where else the share's K and V go: into the blocks that what branches off it has for itself. `first` is the
    index of its first token."""
    blocks, end = share.sequence.kv.blocks, share.sequence.length
    begin = max(end - share.tokens, end // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS)  # only the last block is ever copied
    tails = [each.sequence.kv.blocks[end // KV_BLOCK_TOKENS] for each in share.branches if each.tokens]
    if begin == end or not tails:
        return []
    return [
        (first + position - (end - share.tokens), tail)
        for position in range(begin, end)
        for tail in tails
        if tail != blocks[-1]
    ]


def shape_of(point: str, shares: list[Share]) -> StepShape:
    """What the step's time depends on."""
    decode = sum(share.tokens for share in shares if share.sequence.produced)
    total = sum(share.tokens for share in shares)
    context = sum(
        share.tokens * (share.sequence.length - share.tokens) + share.tokens * (share.tokens + 1) // 2
        for share in shares
    )
    rows = sum(share.rows for share in shares)
    return StepShape(point, decode, total - decode, context, rows, len(shares))
