"""Drawing tokens from rows of logits: temperature, top-k, top-p, min-p, and the inverse of the cumulative distribution.

The rule is that of `engine.draw`. Five kernels: the greatest of each chunk of a row and the sum of its weights; all
entries that are at least as good as the LOOK-th of those, which are few; these in order; the walk down them; and, where
the few do not decide, a search over the whole row. What is not finite is left open. Sums are float64 and their order is
fixed, so that a token depends on its row and its numbers alone.

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
        least = tl.full([DEPTH, LANES], float("inf"), tl.float32)
        total = tl.zeros([DEPTH, LANES], tl.float64)
        for first in range(0, V, CHUNKS * DEPTH):
            distance = distances(here, first + deep[:, None] * CHUNKS + lanes[None, :], peak, temperature, V)
            least = tl.minimum(least, distance)
            total += tl.exp(-distance).to(tl.float64)
        tl.store(peaks + row * CHUNKS + lanes, tl.min(least, axis=0))
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
    out,  # int32 [rows]: -1 where nothing is drawn, or the candidates do not decide
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


@triton.jit
def reach(here, peak, temperature, V, goal, WEIGH: tl.constexpr, STRICT: tl.constexpr, BLOCK: tl.constexpr):
    """(bits, before): the least distance up to which entries weigh `goal` together (STRICT: more), and what those that
    are nearer weigh. Without WEIGH each counts 1. Bits beyond all distances where they never do."""
    place = tl.arange(0, BLOCK)
    floor = tl.zeros([], tl.uint32)
    before = tl.zeros([], tl.float64)
    unit = tl.full([], 1 << 30, tl.uint32)
    for _ in range(16):  # two bits at a time
        first = tl.zeros([BLOCK], tl.float64)
        second = tl.zeros([BLOCK], tl.float64)
        third = tl.zeros([BLOCK], tl.float64)
        for start in range(0, V, BLOCK):
            distance = distances(here, start + place, peak, temperature, V)
            bits = distance.to(tl.uint32, bitcast=True)
            if WEIGH:
                weight = tl.exp(-distance).to(tl.float64)
            else:
                weight = tl.where(start + place < V, 1.0, 0.0).to(tl.float64)
            first += tl.where(bits < floor + unit, weight, 0.0)
            second += tl.where(bits < floor + 2 * unit, weight, 0.0)
            third += tl.where(bits < floor + 3 * unit, weight, 0.0)
        a, b, c = tl.sum(first), tl.sum(second), tl.sum(third)
        if STRICT:
            steps = (a <= goal).to(tl.uint32) + (b <= goal).to(tl.uint32) + (c <= goal).to(tl.uint32)
        else:
            steps = (a < goal).to(tl.uint32) + (b < goal).to(tl.uint32) + (c < goal).to(tl.uint32)
        before = tl.where(steps == 0, before, tl.where(steps == 1, a, tl.where(steps == 2, b, c)))
        floor += steps * unit
        unit = unit >> 2
    return floor, before


@triton.jit
def tail(
    out,  # int32 [rows]: written where it is -1
    logits,
    places,
    sums,
    uniforms,
    top_ps,
    temperatures,
    min_ps,
    top_ks,
    V,
    PARTS: tl.constexpr,
    PARTS_ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The walk down a whole row, for rows that the candidates left open: every filter, and the draw, is a search for a
    distance by what stands before it. Grid [rows]."""
    row = tl.program_id(0)
    temperature = tl.load(temperatures + row)
    if (temperature > 0) & (tl.load(out + row) < 0):
        part = tl.arange(0, PARTS_ALL)
        if tl.sum(tl.load(sums + row * PARTS + part, mask=part < PARTS, other=0.0)) < float("inf"):
            here = logits + row.to(tl.int64) * V
            peak = tl.load(here + tl.load(places + row))
            limit = tl.full([], 0x7F7FFFFF, tl.uint32)
            k = tl.load(top_ks + row)
            if (k > 0) & (k < V):
                farthest, _ = reach(here, peak, temperature, V, k.to(tl.float64), False, False, BLOCK)
                limit = tl.minimum(limit, farthest)
            place = tl.arange(0, BLOCK)
            min_p = tl.load(min_ps + row)
            masses = tl.zeros([BLOCK], tl.float64)
            likely = tl.zeros([BLOCK], tl.float64)
            for start in range(0, V, BLOCK):
                distance = distances(here, start + place, peak, temperature, V)
                weight = tl.exp(-distance)
                weight = tl.where(distance.to(tl.uint32, bitcast=True) <= limit, weight, 0.0)
                masses += weight.to(tl.float64)
                likely += tl.where(weight >= min_p, weight, 0.0).to(tl.float64)
            kept_mass = tl.sum(masses)
            top_p = tl.load(top_ps + row)
            if top_p < 1.0:
                goal = top_p * kept_mass
                bits, before = reach(here, peak, temperature, V, goal, True, False, BLOCK)
                equal = tl.exp(-bits.to(tl.float32, bitcast=True)).to(tl.float64)
                kept_mass = tl.minimum(kept_mass, before + equal * tl.maximum(tl.ceil((goal - before) / equal), 1.0))
            kept_mass = tl.minimum(kept_mass, tl.sum(likely))
            goal = tl.load(uniforms + row) * kept_mass
            bits, before = reach(here, peak, temperature, V, goal, True, True, BLOCK)
            equal = tl.exp(-bits.to(tl.float32, bitcast=True)).to(tl.float64)
            skipped = tl.floor((goal - before) / equal)  # of those that are as far, by their index
            token = tl.full([], -1, tl.int32)
            seen = tl.zeros([], tl.int32)
            for start in range(0, V, BLOCK):
                distance = distances(here, start + place, peak, temperature, V)
                same = ((distance.to(tl.uint32, bitcast=True) == bits) & (start + place < V)).to(tl.int32)
                number = seen + tl.cumsum(same)
                found = (same > 0) & (number.to(tl.float64) == skipped + 1.0)
                token = tl.maximum(token, tl.max(tl.where(found, start + place, -1)))
                seen += tl.sum(same)
            tl.store(out + row, token)
