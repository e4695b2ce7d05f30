"""Drawing tokens from rows of logits: temperature, top-k, top-p, min-p, and the inverse of the cumulative distribution.

The rule is that of `engine.draw`. Four kernels: the greatest of each chunk of a row and the sum of its weights; all
entries that are at least as good as the LOOK-th of those, which are few; these in order; the walk down them. What
the few do not decide is left open, and so is what is not finite. Sums are float64 and their order is fixed, so that a
token depends on its row and its numbers alone.

A candidate is an int64: the bits of its distance from the greatest (float32, not negative, hence ascending), then its
index. So the order is that of falling logits, ties by the lower index, wherever a candidate was written.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITE: tl.constexpr = tl.constexpr(0x7F800000)
"""The bits of an infinite distance."""


@triton.jit
def distances(row, cols, peak, temperature, V):
    """How far entries of a row are below its greatest, over the temperature; infinite beyond the row."""
    value = tl.load(row + cols, mask=cols < V, other=float("-inf"))
    return tl.abs(tl.div_rn(peak - value, temperature))  # no -0, whose bits are another number's


@triton.jit
def at(values, places, place):
    """The value at one place, 0 beyond them."""
    return tl.sum(tl.where(places == place, values, tl.zeros_like(values)))


@triton.jit
def chunks(
    peaks,  # f32 [rows, CHUNKS]: the least distances
    sums,  # f64 [rows, CHUNKS / LANES]: of exp(-distance)
    counts,  # int32 [rows]: set to 0
    logits,
    places,
    temperatures,
    V,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """What is nearest in each chunk, and the weight of LANES chunks together. Grid [rows, CHUNKS / LANES]."""
    row, part = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        here = logits + row.to(tl.int64) * V
        peak = tl.load(here + tl.load(places + row))
        lanes = part * LANES + tl.arange(0, LANES)
        deep = tl.arange(0, DEPTH)
        least = tl.full([LANES], float("inf"), tl.float32)
        total = tl.zeros([LANES], tl.float64)
        for first in range(0, V, CHUNKS * DEPTH):
            distance = distances(here, first + deep[:, None] * CHUNKS + lanes[None, :], peak, temperature, V)
            least = tl.minimum(least, tl.min(distance, axis=0))
            total += tl.sum(tl.exp(-distance).to(tl.float64), axis=0)
        tl.store(peaks + row * CHUNKS + lanes, least)
        tl.store(sums + row * (CHUNKS // LANES) + part, tl.sum(total))
        if part == 0:
            tl.store(counts + row, 0)


@triton.jit
def candidates(
    found,  # int64 [rows, CAPACITY]
    counts,  # int32 [rows]
    floors,  # int32 [rows]: bits of the greatest distance among the candidates, INFINITE or more if they are all
    peaks,
    logits,
    places,
    temperatures,
    V,
    CHUNKS: tl.constexpr,
    ALL: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    LOOK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """All entries that are no farther than the LOOK-th nearest chunk, in any order. Grid [rows, CHUNKS / LANES]."""
    row, part = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        every = tl.arange(0, ALL)
        nearest = tl.load(peaks + row * CHUNKS + every, mask=every < CHUNKS, other=float("inf"))
        bits = nearest.to(tl.int32, bitcast=True)
        floor = tl.zeros([], tl.int32)
        for step in range(31):  # bit by bit, the least number that LOOK chunks do not exceed
            bit = tl.full([], 1, tl.int32) << (30 - step)
            within = tl.sum((bits < floor + bit).to(tl.int32))
            floor = tl.where(within >= LOOK, floor, floor + bit)
        if part == 0:
            tl.store(floors + row, floor)
        floor = tl.minimum(floor, INFINITE - 1)
        here = logits + row.to(tl.int64) * V
        peak = tl.load(here + tl.load(places + row))
        tile = tl.arange(0, DEPTH * LANES)
        cols = tile // LANES * CHUNKS + part * LANES + tile % LANES
        for first in range(0, V, CHUNKS * DEPTH):
            distance = distances(here, first + cols, peak, temperature, V)
            near = distance.to(tl.int32, bitcast=True) <= floor
            count = tl.sum(near.to(tl.int32))
            if count > 0:
                start = tl.atomic_add(counts + row, count)
                place = start + tl.cumsum(near.to(tl.int32)) - 1
                key = (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) + (first + cols)
                tl.store(found + row * CAPACITY + place, key, mask=near & (place < CAPACITY))


@triton.jit
def order(ordered, found, counts, temperatures, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """Candidates in ascending order: each goes where as many are before it. Grid [rows, CAPACITY / BLOCK]."""
    row, block = tl.program_id(0), tl.program_id(1)
    if tl.load(temperatures + row) > 0:
        count = tl.load(counts + row)
        if (count <= CAPACITY) & (block * BLOCK < count):
            here, every = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, CAPACITY)
            key = tl.load(found + row * CAPACITY + here, mask=here < count, other=0)
            other = tl.load(found + row * CAPACITY + every, mask=every < count, other=0x7FFFFFFFFFFFFFFF)
            before = tl.sum((other[None, :] < key[:, None]).to(tl.int32), axis=1)
            tl.store(ordered + row * CAPACITY + before, key, mask=here < count)


@triton.jit
def tokens(
    out,  # int32 [rows]: -1 where nothing is drawn
    ordered,  # int64 [rows, CAPACITY]
    counts,
    floors,
    sums,
    uniforms,
    top_ps,
    temperatures,
    min_ps,
    top_ks,
    V,
    PARTS: tl.constexpr,
    PARTS_ALL: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The walk down the candidates, step by step as `twins.draw` has it. Grid [rows]."""
    row = tl.program_id(0)
    drawn = tl.full([], -1, tl.int32)
    if tl.load(temperatures + row) > 0:
        part = tl.arange(0, PARTS_ALL)
        whole = tl.sum(tl.load(sums + row * PARTS + part, mask=part < PARTS, other=0.0))
        count = tl.load(counts + row)
        if (whole < float("inf")) & (count <= CAPACITY):  # a NaN is not below
            place = tl.arange(0, CAPACITY)
            key = tl.load(ordered + row * CAPACITY + place, mask=place < count, other=0x7FFFFFFFFFFFFFFF)
            bits = (key >> 32).to(tl.int32)
            weight = tl.exp(-bits.to(tl.float32, bitcast=True))
            complete = tl.load(floors + row) >= INFINITE
            k = tl.load(top_ks + row)
            k = tl.where(k < V, k, 0)
            cut = (k > 0) & (k <= count)
            few = tl.sum(((bits <= at(bits, place, k - 1)) & (place < count)).to(tl.int32))
            open_ = (k > count) & (complete == 0)
            count = tl.where(cut, few, count)
            complete = complete | cut
            weight = tl.where(place < count, weight, 0.0)
            mass = tl.cumsum(weight.to(tl.float64))
            whole = tl.where(complete, at(mass, place, count - 1), whole)
            top_p, min_p = tl.load(top_ps + row), tl.load(min_ps + row)
            # top-p: the first whose mass reaches it is the last that is kept
            last = tl.sum(((mass < top_p * whole) & (place < count)).to(tl.int32))
            reached = (top_p < 1.0) & (last < count)
            kept = tl.where(reached, last + 1, count)
            kept_mass = tl.where(reached, at(mass, place, last), whole)
            # min-p: as many as are likely enough
            likely = tl.maximum(tl.sum(((weight >= min_p) & (place < count)).to(tl.int32)), 1)
            all_likely = (min_p <= 0.0) | (likely >= count)
            fewer = (all_likely == 0) & (likely < kept)
            kept = tl.where(fewer, likely, kept)
            kept_mass = tl.where(fewer, at(mass, place, likely - 1), kept_mass)
            decided = complete | reached | (all_likely == 0) | ((top_p >= 1.0) & (min_p <= 0.0))
            goal = tl.load(uniforms + row) * kept_mass
            index = tl.sum(((mass <= goal) & (place < kept)).to(tl.int32))
            beyond = index >= kept  # rounding alone carried the goal there, unless there are others
            index = tl.where(beyond, tl.max(tl.where((place < kept) & (weight > 0.0), place, 0)), index)
            token = at((key & 0x7FFFFFFF).to(tl.int32), place, index)
            decided = decided & (open_ == 0) & ((beyond == 0) | complete | (kept < count))
            drawn = tl.where(decided, token, -1)
    tl.store(out + row, drawn)
