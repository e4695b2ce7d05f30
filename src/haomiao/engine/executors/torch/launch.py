"""Launches of the kernels on tensors: grids, sizes of blocks, flags. Knows no plan and no step.

The block sizes are reckoned and have not met a GPU; `python -m benchmarks.gpu tune` times others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from haomiao.engine.executors.torch.kernels import linear, rowwise, several, vector
from haomiao.engine.executors.torch.matrices import DeviceMatrix, Tensor
from haomiao.models.plan import Activation
from haomiao.types import Planes, Point

ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
PART = 4096
"""Logits of a row that one program looks at for the greatest."""


@dataclass
class Blocks:
    """Sizes of blocks, changed by `benchmarks.gpu tune` only."""

    gemv_bytes: int = 32
    """Bytes of weights that a thread of `gemv` asks for at a turn, about."""
    gemv_most: int = 16
    """Rows of a block of `gemv` at most."""
    gemv_columns: int = 1024
    """Columns of a warp of `gemv`."""
    gemv_codes: bool = False
    """One token as several are multiplied, in tensor cores."""
    gemv_tiles: int = 4
    """Tiles of rows that the warps of `gemv` add up at once, at most."""
    gemv_resident: int = 20
    """Warps of `gemv` on a multiprocessor, which has registers for as many."""
    gemm_rows: int = 32
    gemm_warps: int = 4
    gemm_stages: int = 3
    gemm_batched: bool = True
    """The groups of a turn as a batch of products; else weights become bf16, or for codes of activations the groups
    come one after the other."""
    codes_to: int = 0
    """Up to so many tokens weights stay codes, however many `DEQUANTIZED_FROM` says."""
    codes_from_rows: int = 16384
    """Rows from which fewer tokens meet codes; a matrix of fewer does not fill a GPU so, and becomes bf16 (H200)."""
    gemm_groups: int = 8
    """Groups of 32 columns that `gemm` reads at a turn, for up to 32 tokens."""
    keys: int = 64
    attend_warps: int = 4
    dependent: bool = True
    """Kernels of a step may begin before the one before them ends, to load weights (programmatic dependent launch)."""


BLOCKS = Blocks()
BEST: dict[tuple[int, int, int, int, int], Blocks] = {}
"""By encoding, rounding, rows, columns and `company`, what was measured to be best; else `BLOCKS`."""
PREPARED = 32
"""Groups of 32 activations that one program makes ready."""
DEQUANTIZED_FROM = 32
"""Tokens from which 16-bit activations meet weights that were made bf16 first."""


def power(n: int, least: int = 1) -> int:
    """The least power of two that is at least both."""
    return max(least, 1 << max(0, n - 1).bit_length())


def up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def blocks_for(matrix: DeviceMatrix, encoding: int, rounding: int, tokens: int) -> Blocks:
    """Sizes of blocks for a matrix."""
    return BEST.get((encoding, rounding, matrix.rows, matrix.cols, company(tokens)), BLOCKS)


def is_dense(matrix: DeviceMatrix, encoding: int, rounding: int, tokens: int) -> bool:
    """True if weights in codes are made bf16 for the library's product. Two tokens or more."""
    blocks = blocks_for(matrix, encoding, rounding, tokens)
    if encoding < 2 or rounding != 1 or tokens <= blocks.codes_to:
        return False
    return tokens >= DEQUANTIZED_FROM or not blocks.gemm_batched or matrix.rows < blocks.codes_from_rows


def company(tokens: int) -> int:
    """0 for a token alone, 1 for up to 16, 2 for more."""
    return 0 if tokens == 1 else 1 if tokens <= 16 else 2


def encoding_of(matrix: DeviceMatrix, planes: Planes) -> int:
    """The kernels' number for how a matrix is read at `planes`."""
    if matrix.encoding == "planes":
        return 4 if matrix.reads_lo(planes) else 3
    return ("f32", "bf16", "int8").index(matrix.encoding)


def rounding_of(matrix: DeviceMatrix, point: Point) -> int:
    """What becomes of activations: 0 nothing, 1 bf16, 2 codes."""
    if matrix.scales is not None and point.activations == "int8":
        return 2
    return 1 if point.activations == "bf16" and matrix.encoding != "f32" else 0


def _parts(matrix: DeviceMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """Pointers for the kernels; what an encoding lacks is never read."""
    lo = matrix.hi if matrix.lo is None else matrix.lo
    return matrix.hi, lo, matrix.hi if matrix.scales is None else matrix.scales


def _words(matrix: DeviceMatrix) -> list[Tensor]:
    """The same, planes as words."""
    return [part.view(torch.int32) if part.dtype == torch.uint8 else part for part in _parts(matrix)]


@dataclass(frozen=True, slots=True)
class Before:
    """What a matrix's source is made of."""

    norm: Tensor | None = None
    eps: float = 0.0
    glu: Activation | None = None


@dataclass(frozen=True, slots=True)
class After:
    """What becomes of a matrix's sums."""

    bias: Tensor | None = None
    add: bool = False
    scale: float = 1.0
    softcap: float = 0.0


PLAIN = Before()


def gemv(
    out: Tensor, x: Tensor, matrix: DeviceMatrix, point: Point, planes: Planes, before: Before, after: After
) -> None:
    """One token: out f32 [1, rows] from x f32 [1, cols] (or [1, 2 cols] for a gate)."""
    encoding, rounding = encoding_of(matrix, planes), rounding_of(matrix, point)
    if encoding >= 3 and rounding and blocks_for(matrix, encoding, rounding, 1).gemv_codes:
        codes_matmul(out, x, matrix, encoding, rounding, before, after)
        return
    source = 1 if before.norm is not None else 2 if before.glu is not None else 0
    block = gemv_block(matrix, encoding, rounding, multiprocessors(out.device))
    vector.gemv[(block.programs,)](
        out, x, x if before.norm is None else before.norm, *_words(matrix), out if after.bias is None else after.bias,
        matrix.cols, matrix.padded, matrix.rows, before.eps, after.scale, after.softcap,
        ENCODING=encoding, GROUP=matrix.group or 1, LO_SHIFT=matrix.lo_shift, SOURCE=source,
        ACT=ACTIVATIONS[before.glu or "silu"], ROUND=rounding, BIAS=after.bias is not None,
        ADD=after.add, CAP=after.softcap != 0, BN=block.rows, TILES=block.tiles, WIDTH=block.width,
        PIECES=block.pieces, EARLY=block.early, num_warps=block.warps, **dependence(out.device),
    )  # fmt: skip


BITS = (32, 16, 8, 4, 8)
"""Of a weight, by encoding."""


REDUCTION = 0.4
"""Of a tile's time, about: what it takes the warps to add up their sums."""
WIDTHS = (4, 8, 16, 4, 4)
"""Numbers, or words, of 16 bytes."""


@dataclass(frozen=True, slots=True)
class GemvBlock:
    """What one launch of `gemv` is made of."""

    rows: int
    """Of a tile."""
    tiles: int
    width: int
    pieces: int
    warps: int
    programs: int
    early: bool


def gemv_block(matrix: DeviceMatrix, encoding: int, rounding: int, processors: int) -> GemvBlock:
    """Tiles of whole rows, so many that the GPU is full and a thread has enough bytes on their way."""
    blocks = blocks_for(matrix, encoding, rounding, 1)
    columns = power(matrix.padded, 64)
    warps = min(max(columns // blocks.gemv_columns, 1), 16)
    a_row = columns * BITS[encoding] // 8 // (32 * warps)
    rows = min(max(blocks.gemv_bytes // max(a_row, 1), 1), blocks.gemv_most)
    slots = processors * max(1, blocks.gemv_resident // warps)
    # rounds of the last programs to finish, each of some tiles and a sum over the warps that costs a part of one
    tiles = min(
        (each for each in (1, 2, 4) if each <= blocks.gemv_tiles),
        key=lambda each: up(up(matrix.rows, each * rows), slots) * (each + REDUCTION),
    )
    count = up(matrix.rows, tiles * rows)
    pieces = columns // (32 if encoding >= 3 else WIDTHS[encoding])
    return GemvBlock(rows, tiles, WIDTHS[encoding], pieces, warps, min(count, slots), count <= slots)


@cache
def waits(device: torch.device) -> bool:
    """Whether kernels can be launched before the one before them ended: Hopper and later."""
    return device.type == "cuda" and bool(torch.cuda.get_device_capability(device) >= (9, 0))


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; of the interpreter few, so that programs go through several blocks."""
    return 1 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def dependence(device: torch.device) -> dict[str, bool]:
    """How a kernel is launched that waits by itself for the one before it."""
    return {"DEPENDENT": True, "launch_pdl": True} if BLOCKS.dependent and waits(device) else {"DEPENDENT": False}


def matmul(
    out: Tensor, x: Tensor, matrix: DeviceMatrix, point: Point, planes: Planes, after: After, before: Before = PLAIN
) -> None:
    """Several tokens: out f32 [tokens, rows] from x f32 [tokens, cols] (or [tokens, 2 cols] for a gate)."""
    encoding, rounding, tokens = encoding_of(matrix, planes), rounding_of(matrix, point), x.shape[0]
    dense = is_dense(matrix, encoding, rounding, tokens)
    batched = blocks_for(matrix, encoding, rounding, tokens).gemm_batched
    if encoding >= 2 and not dense and batched and tokens <= 64:
        codes_matmul(out, x, matrix, encoding, rounding, before, after)
        return
    x = _made(x, matrix, before)
    if encoding < 2:
        _product(out, x, matrix.hi, rounding, after)
    elif dense:
        _product(out, x, dequantized(matrix, planes), 1, after)
    else:
        _gemm(out, x, matrix, encoding, rounding, after)


def _made(x: Tensor, matrix: DeviceMatrix, before: Before) -> Tensor:
    """What stands before a matrix, f32."""
    if before.norm is None and before.glu is None:
        return x
    made = torch.empty(x.shape[0], matrix.cols, device=x.device)
    if before.norm is not None:
        norm(made, x, before.norm, None, before.eps, layer=False)
    elif before.glu is not None:
        gate(made, x, before.glu, pairs=True)
    return made


def codes_matmul(
    out: Tensor, x: Tensor, matrix: DeviceMatrix, encoding: int, rounding: int, before: Before, after: After
) -> None:
    """Up to some tokens, from one on, by codes in tensor cores."""
    tokens, groups = x.shape[0], matrix.padded // 32
    blocks = blocks_for(matrix, encoding, rounding, tokens)
    short = torch.empty(tokens, matrix.padded, dtype=torch.bfloat16, device=x.device)
    x_scales = torch.empty(tokens, groups, device=x.device) if rounding == 2 else out
    source = 1 if before.norm is not None else 2 if before.glu is not None else 0
    several.prepare[(tokens, up(groups, PREPARED))](
        short, x_scales, x, x if before.norm is None else before.norm, matrix.cols, matrix.padded, before.eps,
        SOURCE=source, ACT=ACTIVATIONS[before.glu or "silu"], ROUND=rounding, PLANES=encoding >= 3,
        GROUPS=PREPARED, BLOCK=power(matrix.cols, 32), num_warps=4, **dependence(out.device),
    )  # fmt: skip
    # codes times codes: 64 tokens took less than twice what 8 took in a block of 16, so a block of 32 is quicker
    rows = 16 if tokens <= 16 and rounding == 1 else 32
    several.gemm_codes[(up(matrix.rows, blocks.gemm_rows), up(tokens, rows))](
        out, short, x_scales, *_words(matrix), out if after.bias is None else after.bias,
        tokens, matrix.padded, matrix.rows, after.scale, after.softcap,
        ENCODING=encoding, GROUP=matrix.group, LO_SHIFT=matrix.lo_shift, ROUND=rounding,
        BIAS=after.bias is not None, ADD=after.add, CAP=after.softcap != 0,
        BM=rows, BN=blocks.gemm_rows, GROUPS=blocks.gemm_groups,
        num_warps=blocks.gemm_warps, num_stages=blocks.gemm_stages, **dependence(out.device),
    )  # fmt: skip


def _gemm(out: Tensor, x: Tensor, matrix: DeviceMatrix, encoding: int, rounding: int, after: After) -> None:
    tokens = x.shape[0]
    rows = 16 if tokens <= 16 else 32 if tokens <= 64 else 64  # twice 32 take less than once 64, which waits for wgmma
    linear.gemm[(up(matrix.rows, 32), up(tokens, rows))](
        out, x, *_parts(matrix), out if after.bias is None else after.bias,
        tokens, matrix.cols, matrix.padded, matrix.rows, after.scale, after.softcap,
        ENCODING=encoding, GROUP=matrix.group, LO_SHIFT=matrix.lo_shift, ROUND=rounding,
        BIAS=after.bias is not None, ADD=after.add, CAP=after.softcap != 0,
        BM=rows, BN=32, GROUPS=4 if rows < 64 else 1, num_warps=4, num_stages=3, **dependence(out.device),
    )  # fmt: skip


def dequantized(matrix: DeviceMatrix, planes: Planes) -> Tensor:
    """Weights bf16 [rows, cols], for one product."""
    out = torch.empty(matrix.rows, matrix.cols, dtype=torch.bfloat16, device=matrix.hi.device)
    linear.dequantize[(up(matrix.padded, 128), up(matrix.rows, 32))](
        out, *_words(matrix), matrix.cols, matrix.padded, matrix.rows,
        ENCODING=encoding_of(matrix, planes), GROUP=matrix.group, LO_SHIFT=matrix.lo_shift, BN=32, BK=128,
    )  # fmt: skip
    return out


def _product(out: Tensor, x: Tensor, weights: Tensor, rounding: int, after: After) -> None:
    """x Wᵀ by the vendor's library, float32 sums and a float32 result; written or added where it belongs if nothing
    else becomes of it."""
    if rounding == 1 and x.device.type == "cuda":
        short, plain = x.bfloat16(), after.bias is None and after.scale == 1.0 and not after.softcap
        if plain and written_at_once(x.device):
            if after.add:
                torch.ops.aten.addmm.dtype_out(out, short, weights.T, torch.float32, out=out)
            else:
                torch.ops.aten.mm.dtype_out(short, weights.T, torch.float32, out=out)
            return
        _finish(out, torch.mm(short, weights.T, out_dtype=torch.float32), after)
        return
    if rounding == 1:
        x = x.bfloat16().float()
    _finish(out, torch.mm(x, weights.float().T), after)


@cache
def written_at_once(device: torch.device) -> bool:
    """Whether this PyTorch writes the float32 product of bf16 matrices into a given tensor, and adds to it, as it
    should: found out once, with small ones, before anything is captured."""
    one, other = (torch.ones(16, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    found = torch.full((16, 16), 3.0, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(found, one, other.T, torch.float32, out=found)
        added = bool((found == 19.0).all())
        torch.ops.aten.mm.dtype_out(one, other.T, torch.float32, out=found)
        return added and bool((found == 16.0).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _finish(out: Tensor, y: Tensor, after: After) -> None:
    """What stands behind a product of the library."""
    if after.bias is not None:
        y += after.bias
    if after.scale != 1.0:
        y *= after.scale
    if after.softcap:
        y = after.softcap * torch.tanh(y / after.softcap)
    if after.add:
        out += y
    else:
        out.copy_(y)


def embed(out: Tensor, indices: Tensor, table: DeviceMatrix, factor: float, *, add: bool = False) -> None:
    """out f32 [tokens, cols] = table[indices] * factor, or added."""
    rowwise.embed[(out.shape[0], up(table.cols, 1024))](
        out, indices, *_parts(table), table.cols, table.padded, factor,
        ENCODING=encoding_of(table, "hi+lo"), GROUP=table.group or 1, LO_SHIFT=table.lo_shift, ADD=add, BLOCK=1024,
    )  # fmt: skip


def norm(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, layer: bool) -> None:
    """RMS or layer norm of the rows of x."""
    rowwise.norm[(x.shape[0],)](
        out, x, weight, weight if bias is None else bias, x.shape[1], eps,
        LAYER=layer, BIAS=bias is not None, BLOCK=power(x.shape[1]), num_warps=4 if x.shape[1] <= 4096 else 8,
        **dependence(out.device),
    )  # fmt: skip


def gate(out: Tensor, x: Tensor, activation: Activation, *, pairs: bool) -> None:
    """out = act(gate) * up, interleaved by 32, or out = act(x)."""
    rowwise.gate[(x.shape[0], up(out.shape[1], 1024))](
        out, x, out.shape[1], ACT=ACTIVATIONS[activation], PAIRS=pairs, BLOCK=1024, **dependence(out.device)
    )


def add(out: Tensor, x: Tensor) -> None:
    """out += x."""
    rowwise.add[(up(out.numel(), 1024),)](out, x, out.numel(), BLOCK=1024)


def greatest(out: Tensor, logits: Tensor) -> None:
    """out int32 [rows]: the lowest index among the greatest of each row."""
    rows, vocab = logits.shape
    parts = up(vocab, PART)
    peaks = torch.empty(rows, parts, device=logits.device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    rowwise.greatest_parts[(rows, parts)](peaks, places, logits, vocab, parts, BLOCK=PART, **dependence(out.device))
    rowwise.greatest[(rows,)](out, peaks, places, vocab, parts, BLOCK=power(parts), **dependence(out.device))
