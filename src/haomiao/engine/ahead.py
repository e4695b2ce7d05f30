"""Beginnings of prompts that were refused for want of time: computed ahead, in time that nobody needs.

A tight budget that would be kept if the prompt's beginning were in the prefix cache is refused while it is not; and
since what is refused is never computed, so would be all that begin like it, for good. The second refusal shows what
they have in common: its full blocks are computed as a request without a budget, one such at a time, and the third is
let in. Knows names of blocks; nothing about time.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict

from haomiao.engine.request import EngineRequest
from haomiao.engine.sequence import Job
from haomiao.types import KV_BLOCK_TOKENS

KEPT = 256
"""Latest refused prompts that are remembered, by their names alone."""
KEPT_BLOCKS = 512
"""Of each, at most: what is alike beyond is left to the next time, and memory stays bounded whatever is asked."""


class RefusedPrompts:
    """What refused prompts begin with. `note` and `take` may be called from any thread."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, list[bytes]] = OrderedDict()  # names of missing blocks, by the first of them
        self._wanted: EngineRequest | None = None
        self._lock = threading.Lock()

    def note(self, job: Job) -> bool:
        """Note a request that was refused. True if something is to be computed ahead now."""
        request, first = job.request, job.cached_tokens // KV_BLOCK_TOKENS
        if job.names is None or request.session is not None:
            return False
        full = (len(request.prompt_ids) - 1) // KV_BLOCK_TOKENS
        missing = job.names.names(request.prompt_ids, full, job.point)[first : first + KEPT_BLOCKS]
        if not missing:
            return False
        with self._lock:
            other = self._seen.pop(missing[0], None)
            self._seen[missing[0]] = missing
            if len(self._seen) > KEPT:
                self._seen.popitem(last=False)
            if other is None:
                return False
            pairs = zip(missing, other, strict=False)
            alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            prompt = list(request.prompt_ids[: (first + alike) * KV_BLOCK_TOKENS])
            self._wanted = EngineRequest(prompt, work="prefill", point=job.point, salt=request.salt)
            return True

    def take(self) -> EngineRequest | None:
        """What is to be computed, once."""
        with self._lock:
            wanted, self._wanted = self._wanted, None
            return wanted
