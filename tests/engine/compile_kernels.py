"""Compiles every kernel as `launch` launches it, for a GPU that need not be here.

    TRITON_INTERPRET=0 python -m tests.engine.compile_kernels

The kernels are replaced by recorders, so that the launches' own arguments decide what is compiled.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from haomiao.engine.executors.torch import attending, drawing, launch
from haomiao.engine.executors.torch.matrices import DeviceMatrix
from haomiao.engine.executors.torch.memory import make_memory
from haomiao.engine.executors.torch.twins import Draws
from haomiao.types import POINTS

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
CAPABILITIES = (90,)
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
CPU = torch.device("cpu")
done: set[Any] = set()


class Recorder:
    """Stands for a kernel; compiles instead of running."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        constants = {(self.kernel.arg_names.index(name),): value for name, value in named.items()}
        signature = {name: "constexpr" if name in named else kind_of(values[name]) for name in self.kernel.arg_names}
        key = (self.kernel.__name__, *signature.values(), *named.values())
        if key in done:
            return
        done.add(key)
        sixteen = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(self.kernel.arg_names)
            if signature[name].startswith("*") or (signature[name] == "i32" and values[name] % 16 == 0)
        }
        print(len(done), self.kernel.__name__, *signature.values(), *named.values(), flush=True)
        for capability in CAPABILITIES:
            source = ASTSource(self.kernel, signature, constants, sixteen)
            triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def kind_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def matrix(encoding: Any, rows: int = 96, cols: int = 256) -> DeviceMatrix:
    if encoding in ("f32", "bf16"):
        values = torch.zeros(rows, cols, dtype=torch.float32 if encoding == "f32" else torch.bfloat16)
        return DeviceMatrix(encoding, rows, cols, cols, 0, 0, values)
    scales = torch.zeros(rows, cols // 32, dtype=torch.float16)
    if encoding == "int8":
        return DeviceMatrix("int8", rows, cols, cols, 32, 0, torch.zeros(rows, cols, dtype=torch.int8), None, scales)
    plane = torch.zeros(rows, cols // 2, dtype=torch.uint8)
    return DeviceMatrix("planes", rows, cols, cols, 32, 4, plane, plane, scales)


def main() -> None:
    for module, name in (
        *((launch.linear, name) for name in ("gemm", "dequantize")),
        (launch.vector, "gemv"),
        *((launch.several, name) for name in ("prepare", "gemm_codes")),
        *((launch.rowwise, name) for name in ("embed", "norm", "gate", "add", "greatest_parts", "greatest")),
        *((attending.attention, name) for name in ("store", "attend", "merge")),
        *((drawing.kernels, name) for name in ("chunks", "candidates", "order", "tokens", "tail")),
    ):
        setattr(module, name, Recorder(getattr(module, name)))
    launch.BLOCKS.codes_to = 64  # small matrices too
    launch.dependence = lambda device: {"DEPENDENT": True, "launch_pdl": True}
    x, out, many = torch.zeros(1, 512), torch.zeros(1, 96), torch.zeros(20, 256)
    weight, ids = torch.zeros(256), torch.zeros(20, dtype=torch.int32)
    for encoding, point in (
        ("f32", "full"), ("bf16", "bf16"), ("int8", "int8"),
        ("planes", "int8"), ("planes", "int4"), ("planes", "int4-w"),
    ):  # fmt: skip
        planes = POINTS[point].planes
        for before in (launch.PLAIN, launch.Before(norm=weight, eps=1e-5), launch.Before(glu="silu")):
            launch.gemv(out, x, matrix(encoding), POINTS[point], planes, before, launch.After(add=True))
        if encoding in ("int8", "planes"):
            after = launch.After(weight[:96], False, 2.0, 3.0)
            launch.matmul(torch.zeros(20, 96), many, matrix(encoding), POINTS[point], planes, after)
            launch.dequantized(matrix(encoding), planes)
        launch.embed(many, ids, matrix(encoding), 1.5)
    launch.norm(many, many, weight, None, 1e-5, layer=False)
    launch.norm(many, many, weight, weight, 1e-5, layer=True)
    for activation, pairs in itertools.product(launch.ACTIVATIONS, (True, False)):
        launch.gate(torch.zeros(20, 128), many, activation, pairs=pairs)
    launch.add(many, many)
    launch.greatest(ids[:1], torch.zeros(1, 10000))
    table = torch.zeros(128, 32)
    for kv_type, dim, window, splits in (
        ("f32", 64, 0, 1),
        ("bf16", 64, 0, 4),
        ("bf16", 128, 99, 1),
        ("int8", 96, 0, 4),
    ):
        heads = attending.Heads(
            8, 2, dim, 8 * dim, 10 * dim, 0.1, window, 5.0 if window else 0.0,
            eps=1e-5, q_norm=weight, k_norm=weight, q_rope=(table, table), k_rope=(table, table),
        )  # fmt: skip
        memory = make_memory(kv_type, 4, 2, dim, CPU)  # type: ignore[arg-type]
        q, qkv = torch.zeros(20, 8 * dim), torch.zeros(20, 12 * dim)
        attending.store(q, qkv, memory, ids, ids, heads)
        queries = attending.Queries(ids, ids.view(5, 4), ids, ids, ids, 1 if splits > 1 else 16, 256, splits)
        attending.attend(q, q, memory, queries, heads)
    wide, narrow = torch.zeros(20, dtype=torch.float64), torch.zeros(20)
    for vocab in (300, 151936):
        drawing.draw(ids, torch.zeros(20, vocab), ids, Draws(wide, wide, narrow, narrow, ids))
    print(f"compiled {len(done)} kernels for sm_{', sm_'.join(map(str, CAPABILITIES))}")


if __name__ == "__main__":
    main()
