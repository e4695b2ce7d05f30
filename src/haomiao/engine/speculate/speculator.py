"""The face of speculation: what the engine's loop calls before, in and after a step.

`propose` gives sequences their drafts before the step is planned, `fill` lets models draft once there is room,
`observe` and `settle` learn from the step what it cost and what stood. How a draft is verified is the sequence's own
matter (`Generation.consume`). Knows no scheduler and no executor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from haomiao.engine.batch import Share
from haomiao.engine.generation import Generation
from haomiao.engine.sequence import Sequence as Live
from haomiao.engine.speculate.acceptance import Acceptance
from haomiao.engine.speculate.costs import Allowance, StepCosts
from haomiao.engine.speculate.lengths import Candidate, choose_lengths
from haomiao.engine.speculate.proposer import Ask, Offer, Proposer
from haomiao.errors import InputError
from haomiao.types import KV_BLOCK_TOKENS

MOST_DRAFTED = 8
"""Tokens drafted for one sequence in one step, at most."""
PLAIN_EVERY = 32
"""A plain step is taken now and then, so that what a draft is compared with stays known."""
LOOK_AGAIN_EVERY = 256
"""After so many steps in which drafts were to be had and none seemed worth it, a few tokens are drafted all the same:
what was measured once may have been a neighbour's doing."""
UNKNOWN_ROUND = 0.3
"""What a drafting round is taken to cost before one was seen, in plain steps: low, so that it is tried."""
SLACK = 1.5
"""A step with drafts is expected to end this many times sooner than the nearest deadline."""


@dataclass(slots=True)
class _Drafted:
    """A draft on its way through a step."""

    sequence: Generation
    proposer: Proposer
    offer: Offer
    count: int = 0
    accepted: int = 0
    """What the sequence had accepted before."""


class Speculator:
    """Drafts for the sequences of one engine."""

    def __init__(
        self,
        proposers: Iterable[Proposer],
        default: str = "auto",
        *,
        costs: StepCosts | None = None,
        most: int = MOST_DRAFTED,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`default` is what a request without a wish gets: "off", "auto" (the first proposer) or a proposer's name."""
        self._proposers = {proposer.name: proposer for proposer in proposers}
        self.names = ("off", "auto", *self._proposers)
        self.check(default)
        self.default = default
        self.costs = costs or StepCosts()
        self.allowance = Allowance()
        self._most = most
        self._clock = clock
        self._acceptance = {name: Acceptance(each.expected) for name, each in self._proposers.items()}
        self._drafted: dict[int, _Drafted] = {}  # by key, in this step
        self._failed: set[str] = set()
        self._in_a_row = 0
        self._passed = 0  # steps since the last draft in which there was something to draft
        self._decoding = False  # the step that runs computes no prompt
        self._plain_tokens = 0  # of the step that runs
        self._taken_ns = 0.0  # by drafting, then by the step too

    def check(self, wish: str | None) -> None:
        """Raise `InputError` for a way to speculate that this engine does not have."""
        if wish is not None and wish not in self.names:
            raise InputError(f"speculate must be one of {', '.join(self.names)}, not {wish!r:.60}", param="speculate")

    # ---- before the step ------------------------------------------------------------------------------------------

    def propose(self, now: int, live: Iterable[Live], max_step_tokens: int) -> None:
        """Set `Sequence.draft` of those for which it is worth it. A draft that a model has yet to make is all zeros."""
        self._drafted.clear()
        everyone = list(live)
        for sequence in everyone:
            sequence.draft = []
        decoding: dict[str, list[Generation]] = {}
        for sequence in everyone:
            if isinstance(sequence, Generation) and _decodes(sequence):
                decoding.setdefault(sequence.point, []).append(sequence)
        if not self.allowance.open or self._in_a_row >= PLAIN_EVERY - 1:
            self._in_a_row = 0
            return
        limit = _limit_ns(now, everyone)
        for point, streams in decoding.items():
            if self.costs.knows(point):
                self._propose_at(point, streams, len(everyone), max_step_tokens, limit)

    def _propose_at(
        self, point: str, streams: list[Generation], everyone: int, max_step_tokens: int, limit: float | None
    ) -> None:
        """Choose lengths for the sequences that decode at one point."""
        candidates: list[Candidate] = []
        rounds = ""  # the name under which rounds are timed
        pending = sum(sequence.target - sequence.length for sequence in streams)
        if not self._could_pay(point, pending):
            return
        for sequence in streams:
            drafted = self._offer(sequence, point)
            if drafted is None:
                continue
            self._drafted[sequence.key] = drafted
            chance = self._acceptance[drafted.proposer.name].estimate(sequence.key, drafted.offer.trust)
            rounds = drafted.proposer.costs or rounds
            in_rounds = drafted.offer.tokens is None
            candidates.append(Candidate(sequence.key, chance, drafted.offer.count, in_rounds))
        lengths = choose_lengths(
            candidates,
            pending,
            lambda tokens: self.costs.predict(point, tokens) or 1.0,
            lambda width: self._round_ns(rounds, point, width),
            spare=min((max_step_tokens - pending) // 2, 2 * max(self.costs.widest(point), pending) - pending),
            limit_ns=limit,
            alone=len(candidates) == everyone,
        )
        if candidates and not lengths:
            self._passed += 1
            if self._passed >= LOOK_AGAIN_EVERY and limit is None:
                hopeful = max(candidates, key=lambda candidate: candidate.chance)
                lengths = {hopeful.key: min(hopeful.most, 2)}
        if lengths:
            self._passed = 0
        for sequence in streams:
            count = lengths.get(sequence.key, 0)
            if not count:
                self._drafted.pop(sequence.key, None)
                continue
            known = self._drafted[sequence.key].offer.tokens
            sequence.draft = [0] * count if known is None else list(known[:count])

    def _could_pay(self, point: str, pending: int) -> bool:
        """False where even a token that is sure to stand costs more than it is worth: nobody need look for one."""
        return self.costs.ratio(point, pending + 1) * pending < self.costs.ratio(point, pending) * (pending + 1)

    def _offer(self, sequence: Generation, point: str) -> _Drafted | None:
        """What the request's way of speculating has for it. The last token of an answer needs no draft."""
        wish = sequence.job.request.speculate or self.default
        if wish == "auto":
            wish = next(iter(self._proposers), "off")
        proposer = self._proposers.get(wish)
        most = min(self._most, sequence.job.request.sampling.max_tokens - sequence.produced - 1)
        if proposer is None or wish in self._failed or most < 1 or not sequence.may_speculate:
            return None
        offer = proposer.offer(sequence, most, point)
        return None if offer is None else _Drafted(sequence, proposer, offer)

    def _round_ns(self, name: str, point: str, width: int) -> float:
        known = self.costs.predict(name, width)
        return known if known is not None else UNKNOWN_ROUND * (self.costs.predict(point, width) or 1.0)

    # ---- in the step ----------------------------------------------------------------------------------------------

    def fill(self, point: str, shares: Sequence[Share]) -> None:
        """Let models make the drafts for which there is room now; what they do not make is cut off the shares."""
        began = self._clock()
        here = {share.sequence.key: share for share in shares if share.sequence.draft}
        asks: dict[str, list[Ask]] = {}
        for key, share in here.items():
            drafted = self._drafted[key]
            drafted.accepted = share.sequence.accepted
            if drafted.offer.tokens is None:
                computed = share.sequence.length - share.tokens
                asks.setdefault(drafted.proposer.name, []).append(
                    Ask(drafted.sequence, computed, len(share.sequence.draft))
                )
        for name, wanted in asks.items():
            for ask, tokens in zip(wanted, self._ask(name, wanted, point), strict=True):
                _give(here[ask.sequence.key], tokens)
        for key in list(self._drafted):
            if key in here and here[key].sequence.draft:
                self._drafted[key].count = len(here[key].sequence.draft)
            else:
                del self._drafted[key]
        self._taken_ns = float(self._clock() - began) if asks else 0.0

    def _ask(self, name: str, asks: list[Ask], point: str) -> list[list[int]]:
        """Drafts of one proposer. One that fails drafts no more; the answers do not suffer."""
        proposer = self._proposers[name]
        if proposer.costs == point:  # the step runs at the drafting point after all
            return [[] for _ in asks]
        try:
            return proposer.draft(asks)
        except Exception:
            logging.getLogger(__name__).exception("drafting with %s failed; it is off from now on", name)
            self._failed.add(name)
            return [[] for _ in asks]

    # ---- after the step -------------------------------------------------------------------------------------------

    def observe(self, point: str, shares: Sequence[Share], nanoseconds: int) -> None:
        """The step took so long. Called before the shares are consumed."""
        self._plain_tokens = sum(share.tokens - len(share.sequence.draft) for share in shares)
        self._taken_ns += nanoseconds
        self._decoding = all(share.sequence.produced and share.tokens <= KV_BLOCK_TOKENS for share in shares)
        if self._decoding:
            self.costs.observe(point, sum(share.tokens for share in shares), nanoseconds)

    def settle(self, point: str, shares: Sequence[Share]) -> None:
        """The shares were consumed: learn what stood."""
        for share in shares:
            if share.sequence.key not in self._drafted and isinstance(share.sequence, Generation):
                for acceptance in self._acceptance.values():
                    acceptance.idle(share.sequence.key)
        self._in_a_row = self._in_a_row + 1 if self._drafted else 0
        stood = 0
        for key, drafted in self._drafted.items():
            accepted = drafted.sequence.accepted - drafted.accepted
            stood += accepted
            acceptance = self._acceptance[drafted.proposer.name]
            acceptance.observe(key, drafted.offer.trust, drafted.count, accepted)
            if drafted.sequence.state is None:  # it ended with this step, and was released before it was counted
                acceptance.release(key)
        plain = self.costs.predict(point, self._plain_tokens) if self._decoding else None
        if plain and self._drafted:
            self.allowance.settle(self._taken_ns, plain, 1 + stood / len(shares))
        elif plain:
            self.allowance.settle(plain, plain, 1.0)
        self._drafted.clear()

    def release(self, key: int) -> None:
        """A sequence is gone; idempotent."""
        for proposer in self._proposers.values():
            proposer.release(key)
        for acceptance in self._acceptance.values():
            acceptance.release(key)

    def close(self) -> None:
        """Close the proposers; idempotent."""
        for proposer in self._proposers.values():
            proposer.close()


def _decodes(sequence: Live) -> bool:
    """Nothing but the token before the next one, and what a grammar forced, is still to be computed."""
    return bool(
        sequence.state is not None and sequence.produced and sequence.target - sequence.length <= KV_BLOCK_TOKENS
    )


def _limit_ns(now: int, live: Iterable[Live]) -> float | None:
    """The longest that a step may take without hurting anybody's budget."""
    limits: list[float] = []
    for sequence in live:
        request = sequence.job.request
        if request.itl_ns is not None:
            limits.append(float(request.itl_ns))
        for deadline in (request.deadline_ns, None if sequence.produced else request.ttft_deadline_ns):
            if deadline is not None:
                limits.append((deadline - now) / SLACK)
    return min(limits, default=None)


def _give(share: Share, tokens: list[int]) -> None:
    """Make `tokens` the draft of a share that was given room for more."""
    missing = len(share.sequence.draft) - len(tokens)
    if missing:
        share.sequence.kv.truncate(share.sequence.length - missing)
    share.sequence.draft = tokens
    share.tokens -= missing
    share.rows -= missing
