"""Mixed precision: which second planes to keep, by the KL that each one saves, measured.

A nested model whose second planes are dropped where they matter least is smaller and, at `int8`, faster; `int4` is not
touched. Each plane's worth is the KL of `int8` with that one plane missing, on a few held-out samples; then as many go,
the least worth per byte first, as the measured KL on all of them allows. KL is measured at every step rather than
summed: errors of layers do not add up (EvoPress, Sieberling et al. 2410.14649, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from haomiao.kernels.packed import PackedTensor

Measure = Callable[[Mapping[str, PackedTensor]], float]
"""KL of the model with some matrices replaced, nats per token."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Names in the order in which they went, and the KL of what is left."""

    names: tuple[str, ...]
    kl: float
    bytes: int


def without_lo(tensor: PackedTensor) -> PackedTensor:
    """The first plane alone."""
    return replace(tensor, lo_shift=0, lo=None)


def drop_planes(
    tensors: Mapping[str, PackedTensor], names: Sequence[str], few: Measure, all_of_it: Measure, max_kl: float
) -> Dropped:
    """Drop second planes of `names` while the KL stays at or below `max_kl`. `few` is quick and ranks, `all_of_it`
    decides. Nothing is dropped if even the whole model is above."""
    single = {name: without_lo(tensors[name]) for name in names if tensors[name].lo is not None}
    least = few({})
    worth = {name: (few({name: alone}) - least) / max(_lo_bytes(tensors[name]), 1) for name, alone in single.items()}
    ranked = sorted(worth, key=lambda name: (worth[name], name))

    def kl(count: int) -> float:
        return all_of_it({name: single[name] for name in ranked[:count]})

    low, high, found = 0, len(ranked), kl(0)
    while low < high:  # the greatest count within the limit, as far as KL grows with the count
        middle = (low + high + 1) // 2
        measured = kl(middle)
        if measured <= max_kl:
            low, found = middle, measured
        else:
            high = middle - 1
    gone = tuple(ranked[:low])
    return Dropped(gone, found, sum(_lo_bytes(tensors[name]) for name in gone))


def _lo_bytes(tensor: PackedTensor) -> int:
    return 0 if tensor.lo is None else int(tensor.lo.nbytes)
