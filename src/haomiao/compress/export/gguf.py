"""Export to GGUF: one file that llama.cpp and everything built on it loads.

Codes and scales are the artifact's own: int4 becomes Q4_0, int8 Q8_0 (both with the scale of a group repeated for its
blocks of 32), codes with integer zero-points Q4_1 where that holds them, else Q8_0. Nothing is rounded again: a matrix
that no type holds to the bit is refused; the token table and the head, whose nested planes may reach beyond int8, are
then written as float32, or rounded to Q8_0 where that is asked for. Norms and biases are float32.

What llama.cpp's converter does to a checkpoint is done here too: rotary pairs of Llama's q and k become neighbours, and
Gemma's norms get their one. The file is read back before it gets its name: model and tokenizer must be the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.compress.export.gguf_blocks import BLOCK, pack_blocks
from haomiao.compress.export.gguf_config import QUANTIZATION_VERSION, agrees, architecture_of, describe
from haomiao.compress.export.gguf_file import Value, write_file
from haomiao.compress.export.gguf_vocabulary import check, vocabulary
from haomiao.compress.export.parts import Part, config_of, parts
from haomiao.errors import InputError, UnsupportedModelError
from haomiao.kernels.pack import unpack_codes
from haomiao.kernels.rtn import quantize_int8
from haomiao.load.artifact import Artifact
from haomiao.load.disk import disk_errors
from haomiao.load.gguf.names import untranslate
from haomiao.models.plan import Attention, Plan
from haomiao.models.registry import plan_for
from haomiao.types import F32

FILE_TYPES = {"int4": 2, "int8": 7}
"""`general.file_type`: mostly Q4_0, mostly Q8_0."""

Body = tuple[str, str, npt.NDArray[Any]]


def export(artifact: Artifact, out: Path, point: str, *, round_tables: bool = False) -> dict[str, str]:
    """Write the artifact's `point` into the file `out`, which must not exist. Returns each tensor's type.

    `round_tables`: the token table and the head are rounded to Q8_0 where it does not hold them, instead of becoming
    float32. Raises `InputError` for other points and for codes that no type holds, `UnsupportedModelError` for models
    and tokenizers that the format has no words for.
    """
    if point not in FILE_TYPES:
        raise InputError(f"GGUF export takes int4 or int8, not {point}", param="point")
    if out.suffix != ".gguf":
        raise InputError(f"{out}: the name of a GGUF file must end in .gguf", param="output")
    if out.exists():
        raise InputError(f"{out} exists already; nothing was written", param="output")
    config = config_of(artifact)
    plan = plan_for(config)
    architecture = architecture_of(config)
    described, tables = describe(config, plan)
    metadata: dict[str, Value] = {
        **described,
        "general.name": str(artifact.meta.get("provenance", {}).get("source") or artifact.directory.name),
        "general.file_type": FILE_TYPES[point],
        "general.quantization_version": QUANTIZATION_VERSION,
        **vocabulary(artifact.directory, plan.vocab_size),
    }
    shapes = {name: table.shape for name, table in tables.items()} | _shapes(plan, architecture)
    bodies = _bodies(artifact, plan, point, architecture, tables, round_tables)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.gguf")
    try:
        with disk_errors(out):
            types = write_file(temporary, metadata, shapes, bodies)
            _verify(temporary, artifact, plan)
            temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    return types


def _shapes(plan: Plan, architecture: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for spec in plan.weights.values():
        for source, shape in zip(spec.sources, spec.shapes, strict=True):
            found[_named(architecture, source)] = tuple(shape)
    return found


def _named(architecture: str, name: str) -> str:
    found = untranslate(architecture, name)
    if found is None:
        raise UnsupportedModelError(f"GGUF has no name for {name} in a model of architecture {architecture}")
    return found


def _bodies(
    artifact: Artifact, plan: Plan, point: str, architecture: str, tables: dict[str, F32], round_tables: bool
) -> Iterator[Body]:
    for name, table in tables.items():
        yield name, "f32", table
    head_dim = next(op.head_dim for op in plan.ops if isinstance(op, Attention))
    for part in parts(artifact, plan, point, tables_in_codes=True, norms_as_run=True):
        name = _named(architecture, part.name)
        rotated = architecture == "llama" and (".q_proj." in part.name or ".k_proj." in part.name)
        yield (name, *_body(part, paired(part.rows, head_dim) if rotated else None, round_tables))


def paired(rows: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Row of the file -> row of the checkpoint: members p of rotary pair c, there p * dim/2 + c, are neighbours."""
    return np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(rows)


def _body(part: Part, order: npt.NDArray[np.int64] | None, round_tables: bool) -> tuple[str, npt.NDArray[Any]]:
    if part.codes is None or part.scales is None:
        values = part.values
        assert values is not None  # a part is one or the other
        return "f32", np.ascontiguousarray(values if order is None else values[order], dtype="<f4")
    codes, scales, group = part.codes, part.scales, part.group
    packed = pack_blocks(*((codes, scales) if order is None else (codes[order], scales[order])), group)
    if packed is not None:
        return packed
    if not part.table and codes.shape[1] % BLOCK:
        raise InputError(f"{part.name}: {codes.shape[1]} columns are not whole blocks of {BLOCK}, which GGUF needs")
    if not part.table:
        raise InputError(
            f"{part.name}: codes or scales that no GGUF type holds exactly (two planes with lo_shift 4 reach beyond "
            "int8); compress with --bits 8, or with --lo-shift 3"
        )
    values = codes * np.repeat(scales, group, axis=1)[:, : codes.shape[1]]
    if round_tables:
        rounded = quantize_int8(values, BLOCK)
        if (packed := pack_blocks(*unpack_codes(rounded), BLOCK)) is not None:
            return packed
    return "f32", values.astype("<f4")


def _verify(path: Path, artifact: Artifact, plan: Plan) -> None:
    """The file describes the artifact's model and tokenizer, or it is refused."""
    from haomiao.load.gguf.source import GgufSource

    source = GgufSource(path)
    try:
        differs = agrees(plan, plan_for(source.config, plan.max_context))
    finally:
        source.close()
    if differs is not None:
        raise UnsupportedModelError(f"GGUF has no words for this model: {differs} would differ")
    if (artifact.directory / "tokenizer.json").is_file():
        check(path, artifact.directory)
