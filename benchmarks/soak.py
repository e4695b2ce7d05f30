"""Hours of work in one process: the same request always gives the same answer, and memory does not grow.

    python benchmarks/soak.py [MODEL] --seconds 7200

Mixes lengths, seeds, points and abandoned streams over a few requests whose first answers are remembered. Ends with a
status other than 0 at the first answer that differs, or if resident memory grows by more than 32 MB after warm-up.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from haomiao.api import LLM

GROWTH_LIMIT = 32 << 20
WARMUP_REQUESTS = 50


def resident_bytes() -> int | None:
    """Resident set size, or None where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * 4096


def main() -> int:
    """Work until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--seconds", type=float, default=7200)
    args = parser.parse_args()
    llm = LLM(args.model)
    rng = random.Random(0)
    requests = [
        {"prompt": [rng.randrange(llm.vocab_size) for _ in range(length)], "seed": seed, "temperature": temperature}
        for length in (1, 31, 32, 33, 100)
        for seed, temperature in ((0, 0.0), (1, 0.8))
    ]
    known: dict[int, list[int]] = {}
    start, done, base = time.monotonic(), 0, None
    while time.monotonic() - start < args.seconds:
        index = rng.randrange(len(requests))
        request = dict(requests[index])
        prompt = request.pop("prompt")
        stream = llm.stream(prompt, max_tokens=24, ignore_eos=True, **request)
        if rng.random() < 0.2:  # a reader that goes away
            next(iter(stream))
            stream.close()
            continue
        ids = [token for chunk in stream for token in chunk.token_ids]
        if known.setdefault(index, ids) != ids:
            print(f"request {index} answered differently after {done} requests", file=sys.stderr)
            return 1
        done += 1
        now = resident_bytes()
        if done == WARMUP_REQUESTS:
            base = now
        if base is not None and now is not None and now - base > GROWTH_LIMIT:
            print(f"resident memory grew by {(now - base) >> 20} MB after {done} requests", file=sys.stderr)
            return 1
    print(json.dumps({"benchmark": "soak", "requests": done, "resident_bytes": resident_bytes()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
