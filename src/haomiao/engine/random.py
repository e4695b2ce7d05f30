"""Counter-based random numbers: uniform = f(seed, position, sample), with no state to carry or to share.

Philox-4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011): the seed is
the key, the position and the sample index are the counter. A token's random number therefore depends on nothing but
these three, whatever else is in the batch and however often the sequence was preempted. Knows nothing about sampling.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from haomiao.types import F64

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the key is bumped by these each round
_MASK = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 10
_MANY = 12
"""Numbers from which numpy makes them sooner than Python."""


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words out of a 128-bit counter and a 64-bit key (ten rounds; words are given least first)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & _MASK, (first >> 32) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int, sample: int = 0) -> float:
    """A float in [0, 1) with 53 random bits, for the token at absolute `position` of sample number `sample`.

    Of `seed` and `position` the low 64 bits count, of `sample` the low 32.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    x0, x1, _, _ = philox4x32((position & _MASK, (position >> 32) & _MASK, sample & _MASK, 0), key)
    return ((x0 >> 5) * 67108864 + (x1 >> 6)) / 9007199254740992.0


def uniforms(counters: Sequence[tuple[int, int, int]]) -> F64:
    """`uniform` of many (seed, position, sample) at once, float64 [numbers]."""
    if len(counters) < _MANY:
        return np.array([uniform(*each) for each in counters], np.float64)
    mask, half = np.uint64(_MASK), np.uint64(32)
    flat = np.fromiter((number & _MASK64 for counter in counters for number in counter), np.uint64, 3 * len(counters))
    seeds, positions, samples = flat.reshape(-1, 3).T
    key = np.stack([seeds & mask, seeds >> half])
    even = np.stack([positions & mask, samples & mask])  # words 0 and 2 of the counter
    odd = np.stack([positions >> half, np.zeros_like(samples)])
    bumps = np.arange(_ROUNDS, dtype=np.uint64)[:, None] * np.array(_WEYL, np.uint64)
    multipliers = np.array(_MULTIPLIERS, np.uint64)[:, None]
    for bumped in (key + bumps[:, :, None]) & mask:
        product = (multipliers * even)[::-1]
        even, odd = (product >> half) ^ odd ^ bumped, product & mask
    found: F64 = ((even[0] >> np.uint64(5)) * np.uint64(67108864) + (odd[0] >> np.uint64(6))) / 9007199254740992.0
    return found


def fresh_seed() -> int:
    """A seed nobody can guess, in [0, 2^53) so that it survives a JSON reader that only knows doubles."""
    return secrets.randbits(53)
