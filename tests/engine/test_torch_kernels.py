"""The Triton kernels beside their twins, in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: it reads it once
torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("TRITON_INTERPRET=0: kernels are compiled, benchmarks.gpu checks them", allow_module_level=True)

from haomiao.engine.executors.torch import attending, launch, twins  # noqa: E402
from haomiao.engine.executors.torch.attending import Queries  # noqa: E402
from haomiao.engine.executors.torch.matrices import place  # noqa: E402
from haomiao.engine.executors.torch.memory import make_memory  # noqa: E402
from haomiao.engine.executors.torch.model import rope_table  # noqa: E402
from haomiao.kernels import pack, rtn  # noqa: E402
from haomiao.models import plan as ops  # noqa: E402
from haomiao.types import POINTS  # noqa: E402

CPU = torch.device("cpu")
READINGS = (
    ("f32", "full", "full"),
    ("bf16", "full", "full"),
    ("bf16", "bf16", "bf16"),
    ("int8", "int8", "hi+lo"),
    ("int8", "int4-w", "hi"),
    ("planes", "int8", "hi+lo"),
    ("planes", "int4", "hi"),
    ("planes", "int4-w", "hi"),
    ("planes", "int4-w", "hi+lo"),
)


def matrix_of(encoding: str, rows: int, cols: int, group: int = 32) -> Any:
    values = (np.random.default_rng(rows * cols).normal(size=(rows, cols)) / cols**0.5).astype(np.float32)
    packed = {
        "f32": lambda: pack.pack_f32(values),
        "bf16": lambda: pack.pack_bf16(values),
        "int8": lambda: rtn.quantize_int8(values, group),
        "planes": lambda: rtn.quantize_planes(values, group),
    }[encoding]()
    return place(packed, CPU)


def random(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def error(ours: Any, theirs: Any) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("tokens", [1, 3, 18, 130])
@pytest.mark.parametrize(("encoding", "point", "planes"), READINGS)
def test_linear(encoding: str, point: str, planes: Any, tokens: int) -> None:
    for rows, cols, group in ((37, 70, 32), (64, 256, 128)):
        matrix, x, bias = matrix_of(encoding, rows, cols, group), random(tokens, cols), random(rows, seed=1)
        ours, wanted = random(tokens, rows, seed=2), random(tokens, rows, seed=2)
        after = launch.After(bias, True, 0.5, 0.0)
        if tokens == 1:
            launch.gemv(ours, x, matrix, POINTS[point], planes, launch.PLAIN, after)
        else:
            launch.matmul(ours, x, matrix, POINTS[point], planes, after)
        wanted = wanted + 0.5 * twins.linear(matrix, x, POINTS[point], planes, bias)
        read, rounding = launch.encoding_of(matrix, planes), launch.rounding_of(matrix, POINTS[point])
        wide = tokens > 1 and launch.is_dense(matrix, read, rounding, tokens)  # weights are rounded to bf16 there
        assert error(ours, wanted) <= (1e-2 if wide else 1e-5)


@pytest.mark.parametrize("tiles", [1, 2, 4])
@pytest.mark.parametrize(("encoding", "point", "planes"), READINGS)
def test_a_program_goes_through_several_blocks(
    encoding: str, point: str, planes: Any, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program for all rows, the last block of which is not full; a row of more columns than one warp has."""
    monkeypatch.setattr(
        launch, "BLOCKS", launch.Blocks(gemv_bytes=64, gemv_columns=512, gemv_resident=2, gemv_tiles=tiles)
    )
    matrix, x = matrix_of(encoding, 125, 1030), random(1, 1030)
    read, rounding = launch.encoding_of(matrix, planes), launch.rounding_of(matrix, POINTS[point])
    block = launch.gemv_block(matrix, read, rounding, 1)
    assert block.programs == 1 and block.tiles == tiles and matrix.rows > block.rows * tiles
    out = random(1, 125, seed=2)
    wanted = out + twins.linear(matrix, x, POINTS[point], planes)
    launch.gemv(out, x, matrix, POINTS[point], planes, launch.PLAIN, launch.After(add=True))
    assert error(out, wanted) <= 1e-5


@pytest.mark.parametrize("point", ["int4", "int4-w", "full"])
def test_what_stands_before_a_vector(point: str) -> None:
    matrix = matrix_of("f32" if point == "full" else "planes", 40, 96)
    planes = POINTS[point].planes
    x, weight = random(1, 96), random(96, seed=3)
    out = torch.zeros(1, 40)
    launch.gemv(out, x, matrix, POINTS[point], planes, launch.Before(norm=weight, eps=1e-5), launch.After())
    wanted = twins.linear(matrix, twins.rms_norm(x, weight, 1e-5), POINTS[point], planes)
    assert error(out, wanted) <= 1e-2 if point == "int4" else 2e-3  # a code may fall the other way
    pairs = random(1, 192)
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        launch.gemv(out, pairs, matrix, POINTS[point], planes, launch.Before(glu=activation), launch.After(softcap=2.0))
        wanted = twins.softcapped(twins.linear(matrix, twins.glu(pairs, activation), POINTS[point], planes), 2.0)
        assert error(out, wanted) <= 1e-2


@pytest.mark.parametrize("point", ["int4", "int4-w", "int8"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_codes_in_tensor_cores(point: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several turns, the last of which is not full, after a norm and after a gate, for one token too."""
    monkeypatch.setattr(launch, "BLOCKS", launch.Blocks(gemv_codes=True, gemm_groups=4, gemm_rows=16, codes_to=3))
    matrix, weight = matrix_of("planes", 37, 288), random(288, seed=3)
    planes, before = POINTS[point].planes, (launch.Before(norm=weight, eps=1e-5), launch.Before(glu="silu"))
    for each in before:
        x = random(tokens, 288 if each.glu is None else 576)
        made = twins.rms_norm(x, weight, 1e-5) if each.glu is None else twins.glu(x, "silu")
        out = random(tokens, 37, seed=2)
        wanted = out + twins.linear(matrix, made, POINTS[point], planes)
        if tokens == 1:
            launch.gemv(out, x, matrix, POINTS[point], planes, each, launch.After(add=True))
        else:
            launch.matmul(out, x, matrix, POINTS[point], planes, launch.After(add=True), each)
        assert error(out, wanted) <= 1e-2  # a code of an activation may fall the other way


def test_several_tokens_without_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the batch of groups is switched off, weights become bf16, and codes of activations meet groups in turn; up
    to `codes_to` tokens they stay codes."""
    x, matrix = random(3, 256), matrix_of("planes", 64, 256)
    for point, bound in (("int4-w", 1e-2), ("int8", 1e-5)):
        monkeypatch.setattr(launch, "BLOCKS", launch.Blocks(gemm_batched=False))
        out, planes = torch.zeros(3, 64), POINTS[point].planes
        launch.matmul(out, x, matrix, POINTS[point], planes, launch.After())
        assert error(out, twins.linear(matrix, x, POINTS[point], planes)) <= bound
    monkeypatch.setattr(launch, "BLOCKS", launch.Blocks(codes_to=64))
    many, out = random(34, 256), torch.zeros(34, 64)
    launch.matmul(out, many, matrix, POINTS["int4-w"], "hi", launch.After())
    assert error(out, twins.linear(matrix, many, POINTS["int4-w"], "hi")) <= 1e-5


def test_codes_of_odd_groups() -> None:
    """Zero, infinite and NaN groups of activations, as the rule has them."""
    matrix, x = matrix_of("planes", 33, 128), random(3, 128)
    x[0, :32] = 0
    x[1, 40] = float("nan")
    x[2, 70] = float("inf")
    many = torch.zeros(3, 33)
    launch.matmul(many, x, matrix, POINTS["int8"], "hi+lo", launch.After())
    assert error(many[0], twins.linear(matrix, x, POINTS["int8"], "hi+lo")[0]) <= 1e-6
    assert many[1:].isnan().all()
    for row in range(3):
        one = torch.zeros(1, 33)
        launch.gemv(one, x[row : row + 1], matrix, POINTS["int8"], "hi+lo", launch.PLAIN, launch.After())
        assert bool(one.isnan().all()) == (row > 0)
        if row == 0:
            assert error(one, many[:1]) <= 1e-5


def test_rows_do_not_depend_on_company() -> None:
    matrix, x = matrix_of("planes", 70, 128), random(16, 128)
    together, apart = torch.zeros(16, 70), torch.zeros(5, 70)
    launch.matmul(together, x, matrix, POINTS["int8"], "hi+lo", launch.After())
    launch.matmul(apart, x[7:12], matrix, POINTS["int8"], "hi+lo", launch.After())
    np.testing.assert_array_equal(together[7:12].numpy(), apart.numpy())


def test_rowwise() -> None:
    x, weight, bias = random(3, 70), random(70, seed=1), random(70, seed=2)
    out = torch.zeros(3, 70)
    launch.norm(out, x, weight, None, 1e-6, layer=False)
    assert error(out, twins.rms_norm(x, weight, 1e-6)) <= 1e-6
    launch.norm(out, x, weight, bias, 1e-6, layer=True)
    assert error(out, twins.layer_norm(x, weight, bias, 1e-6)) <= 1e-6
    launch.add(out, x)
    assert error(out, twins.layer_norm(x, weight, bias, 1e-6) + x) <= 1e-6
    wide, narrow = random(2, 128), torch.zeros(2, 64)
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        launch.gate(narrow, wide, activation, pairs=True)
        assert error(narrow, twins.glu(wide, activation)) <= 1e-5
        launch.gate(narrow, wide[:, :64].contiguous(), activation, pairs=False)
        assert error(narrow, twins.activate(wide[:, :64], activation).float()) <= 1e-5


@pytest.mark.parametrize("encoding", ["f32", "bf16", "int8", "planes"])
def test_embedding(encoding: str) -> None:
    table = matrix_of(encoding, 50, 70)
    ids = torch.tensor([3, 49, 3], dtype=torch.int32)
    out = torch.ones(3, 70)
    launch.embed(out, ids, table, 1.5)
    launch.embed(out, ids, table, 1.0, add=True)
    assert error(out, 2.5 * table.values("hi+lo", ids.long())) <= 1e-6


def test_the_greatest() -> None:
    logits = random(4, 9000)
    logits[0, [17, 8999]] = 9.0
    logits[1, 5000] = float("nan")
    logits[2] = float("-inf")
    logits[3, 4095:4097] = 8.0
    out = torch.zeros(4, dtype=torch.int32)
    launch.greatest(out, logits)
    assert out.tolist() == twins.greatest(logits).tolist()
    assert (out[0], out[2], out[3]) == (17, 0, 4095)


# ---- attention ------------------------------------------------------------------------------------------------------

SHAPES = (
    (4, 2, 24, 0, 0.0),  # heads, heads of K and V, head_dim, window, softcap
    (2, 1, 16, 40, 2.0),
)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kv_type", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape: Any, kv_type: Any, split: bool) -> None:
    """Norm, rotation, paged K and V, then three tokens of one sequence and one of another, in company."""
    heads, kv_heads, dim, window, softcap = shape
    width = (heads + 2 * kv_heads) * dim
    ours, theirs = (make_memory(kv_type, 12, kv_heads, dim, CPU) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for memory in (ours, theirs):
        generator.manual_seed(1)
        past = torch.randn(2, 100, kv_heads, dim, generator=generator)
        memory.write(torch.arange(100) + 32 * 3, past[0], past[1])  # blocks 3, 4, 5, 6
    qkv = random(4, width)
    positions, slots = torch.tensor([97, 98, 99, 4]), torch.tensor([193, 194, 195, 4]) + torch.tensor([0, 0, 0, 32 * 9])
    q_norm, k_norm = random(dim, seed=4), random(dim, seed=5)
    rope = rope_table(ops.RopeSpec(8, (1.0, 0.3, 0.1, 0.01)), 128, CPU)
    heads_ = attending.Heads(
        heads, kv_heads, dim, heads * dim, (heads + kv_heads) * dim, dim**-0.5, window, softcap,
        eps=1e-6, q_norm=q_norm, k_norm=k_norm, q_rope=rope, k_rope=rope,
    )  # fmt: skip
    q = torch.zeros(4, heads * dim)
    attending.store(q, qkv, ours, positions.int(), slots.int(), heads_)
    tables = torch.tensor([[3, 4, 5, 6], [9, 0, 0, 0]])
    cut = ([0, 1, 2, 3], [1, 1, 1, 1], 1) if split else ([0, 3], [3, 1], 4)
    queries = Queries(
        positions.int(), tables.int(), torch.tensor([0, 0, 0, 1]).int(), torch.tensor(cut[0]).int(),
        torch.tensor(cut[1]).int(), cut[2], 64, 2 if split else 1,
    )  # fmt: skip
    out = torch.zeros(4, heads * dim)
    attending.attend(out, q, ours, queries, heads_)

    cos, sin = (table[positions] for table in rope)
    wanted_q = twins.rotate(twins.rms_norm(qkv[:, : heads * dim].unflatten(1, (heads, dim)), q_norm, 1e-6), cos, sin)
    k = qkv[:, heads * dim : (heads + kv_heads) * dim].unflatten(1, (kv_heads, dim))
    v = qkv[:, (heads + kv_heads) * dim :].unflatten(1, (kv_heads, dim))
    theirs.write(slots, twins.rotate(twins.rms_norm(k, k_norm, 1e-6), cos, sin), v)
    assert error(q.view(4, heads, dim), wanted_q) <= 1e-6
    for mine, twin in zip(ours.parts, theirs.parts, strict=True):
        assert error(mine.float(), twin.float()) <= 1e-2  # a code may fall the other way
    for t, (row, position) in enumerate(((0, 97), (0, 98), (0, 99), (1, 4))):
        keys, values = theirs.read(tables[row], position + 1)
        wanted = twins.attend(
            wanted_q[t], keys, values, scale=heads_.scale, window=window, softcap=softcap, int8=kv_type == "int8"
        )
        assert error(out[t].view(heads, dim), wanted.float()) <= (1e-5 if kv_type == "f32" else 5e-3)


# ---- whole steps ----------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_kernels_compile_for_a_gpu() -> None:
    """Triton compiles for a GPU that is not there: every launch of this file's kind, for Hopper."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.compile_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "compiled" in run.stdout


def test_a_library_that_cannot_write_in_place_is_not_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this PyTorch does on this device, the answer is that of its own trial."""
    launch.written_at_once.cache_clear()
    found = launch.written_at_once(CPU)
    one, out = torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(4, 4)
    if found:
        torch.ops.aten.addmm.dtype_out(out, one, one.T, torch.float32, out=out)
        assert (out == 5).all()
    launch.written_at_once.cache_clear()
    monkeypatch.setattr(torch.ops.aten.mm, "dtype_out", lambda *a, **k: None)
    assert not launch.written_at_once(CPU)
    launch.written_at_once.cache_clear()


def test_blocks_that_were_measured_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the matrix, the company and the rounding that they were measured for alone."""
    matrix, best = matrix_of("planes", 37, 70), launch.Blocks(gemv_bytes=16, gemv_tiles=1)
    encoding = launch.encoding_of(matrix, "hi")
    monkeypatch.setattr(launch, "BEST", {(encoding, 1, 37, 70, 0): best})
    assert launch.blocks_for(matrix, encoding, 1, 1) is best
    assert launch.blocks_for(matrix, encoding, 1, 8) is launch.BLOCKS
    assert launch.blocks_for(matrix, encoding, 2, 1) is launch.BLOCKS
    assert launch.gemv_block(matrix, encoding, 1, 1).tiles == 1


def test_a_few_tokens_meet_codes_where_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = matrix_of("planes", 37, 70), matrix_of("planes", launch.BLOCKS.codes_from_rows, 32)
    for matrix, tokens, rounding, dense in (
        (small, 8, 1, True), (large, 8, 1, False), (large, 40, 1, True), (small, 8, 2, False), (small, 64, 2, False),
    ):  # fmt: skip
        assert launch.is_dense(matrix, 3, rounding, tokens) == dense
    assert not launch.is_dense(matrix_of("bf16", 8, 32), 1, 1, 8)
    monkeypatch.setattr(launch, "BEST", {(3, 1, 37, 70, 1): launch.Blocks(codes_from_rows=0)})
    assert not launch.is_dense(small, 3, 1, 8)  # what was measured for a matrix is what it gets
