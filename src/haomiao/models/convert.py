"""A checkpoint becomes an artifact: every weight of the plan is read, checked, encoded and written, one at a time.

Knows plans and sources, not families or files' formats. Memory is bounded by one matrix. What can be kept exactly
(GGUF Q4_0 and Q8_0, symmetric int4 and int8 checkpoints) keeps its codes; the rest is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from haomiao import __version__
from haomiao.errors import InputError, ModelError
from haomiao.kernels.pack import pack_bf16, pack_f32, pack_int8, pack_planes, split_codes
from haomiao.kernels.packed import GROUPS, TILE_ROWS, PackedTensor
from haomiao.kernels.rtn import quantize_int8, quantize_planes
from haomiao.load.artifact import ArtifactWriter
from haomiao.load.source import QuantizedTensor, TensorSource
from haomiao.models.plan import Plan, WeightSpec
from haomiao.models.registry import plan_for
from haomiao.types import F32

Scheme = Literal["nested", "full", "bf16"]
Progress = Callable[[str, int, int], None]
"""progress(what, done, total), in bytes of float32 weights."""

PREFIXES = ("", "model.", "transformer.", "language_model.", "model.language_model.")
MAX_LISTED = 6


def convert(
    source: TensorSource,
    out: Path,
    *,
    scheme: Scheme = "nested",
    group: int = 32,
    lo_shift: int = 4,
    with_lo: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write `source` as an artifact into the directory `out` and return it.

    `nested`: int8/int4 planes of `group` columns per scale (`with_lo=False`: an ordinary int4 model). `full`: the
    weights as loaded (bf16 stays bf16, everything else float32). `bf16`: rounded to bf16. Raises `ModelError` for a
    checkpoint that lacks weights or contradicts its config, naming all of them at once.
    """
    if scheme not in ("nested", "full", "bf16"):
        raise InputError(f"scheme must be nested, full or bf16, not {scheme!r}", param="scheme")
    if group not in GROUPS:
        raise InputError(f"group must be 32, 64 or 128, not {group}", param="group")
    plan = plan_for(source.config)
    names = resolve(plan, source)
    encoder = Encoder(source, scheme, group, lo_shift, with_lo)
    total = sum(spec.rows * spec.cols for spec in plan.weights.values()) * 4
    done = 0
    with ArtifactWriter(out, overwrite=overwrite) as writer:
        for spec in plan.weights.values():
            if spec.kind == "vector":
                writer.add_vector(spec.name, read_vector(spec, names, source))
            else:
                writer.add_tensor(spec.name, encoder.encode(spec, names))
            done += spec.rows * spec.cols * 4
            if progress is not None:
                progress(f"converting {source.name}", done, total)
        carry_files(source, writer)
        points = encoder.points()
        meta: dict[str, Any] = {
            "config": dict(source.config),
            "family": plan.family,
            "points": list(points),
            "default_point": points[0],
            "provenance": {
                "source": source.name,
                "identity": source.identity,
                "haomiao": __version__,
                "exact": encoder.exact,
                "rounded": encoder.rounded,
            },
            "recipe": {"scheme": scheme, "group": group, "lo_shift": lo_shift, "method": "rtn"},
        }
        return writer.finish(meta)


# ---- names and shapes -----------------------------------------------------------------------------------------------


def resolve(plan: Plan, source: TensorSource) -> dict[str, str]:
    """The checkpoint's own name of every source of the plan; shapes checked. Lists everything wrong at once."""
    available = set(source.names())
    names: dict[str, str] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for spec in plan.weights.values():
        for wanted, shape in zip(spec.sources, spec.shapes, strict=True):
            found = next((name for name in spellings(wanted) if name in available), None)
            if found is None:
                missing.append(wanted)
                continue
            names[wanted] = found
            actual = tuple(source.shape(found))
            if actual != tuple(shape):
                wrong.append(f"{found} is {list(actual)}, the config says {list(shape)}")
    if missing:
        raise ModelError(
            f"{source.name}: {len(missing)} weights are missing: {listed(missing)}", code="missing_weights"
        )
    if wrong:
        raise ModelError(f"{source.name}: weights contradict the config: {listed(wrong)}", code="shape_mismatch")
    return names


def spellings(name: str) -> list[str]:
    """A weight's name with and without the prefixes that checkpoints of the same family put before it."""
    bare = name.removeprefix("transformer.").removeprefix("model.")
    return [name, *(prefix + bare for prefix in PREFIXES), f"language_model.{name}"]


def listed(items: Sequence[str]) -> str:
    """The first few of a list, and how many more."""
    rest = len(items) - MAX_LISTED
    return "; ".join(items[:MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")


# ---- reading --------------------------------------------------------------------------------------------------------


def transformed(values: npt.NDArray[Any], spec: WeightSpec, index: int) -> npt.NDArray[Any]:
    """A source as the plan wants it: transposed, offset, sliced."""
    if spec.transform == "transpose":
        values = values.T
    elif spec.transform == "plus_one":
        values = values + np.float32(1)
    if spec.slices:
        first, last = spec.slices[index]
        values = values[first:last]
    return values


def arranged(parts: Sequence[npt.NDArray[Any]], layout: str, rows: int, cols: int) -> npt.NDArray[Any]:
    """Parts [n_i, <= cols] as one matrix [rows, cols]: one below the other, or interleaved by tiles of 32 rows, new
    rows and columns zero."""
    if layout == "concat" and sum(len(part) for part in parts) == rows and all(p.shape[1] == cols for p in parts):
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    out = np.zeros((rows, cols), parts[0].dtype)
    if layout == "concat":
        at = 0
        for part in parts:
            out[at : at + len(part), : part.shape[1]] = part
            at += len(part)
        return out
    tiles = out.reshape(-1, len(parts), TILE_ROWS, cols)
    for index, part in enumerate(parts):
        padded = np.zeros((len(tiles) * TILE_ROWS, cols), part.dtype)
        padded[: len(part), : part.shape[1]] = part
        tiles[:, index] = padded.reshape(-1, TILE_ROWS, cols)
    return out


def read_vector(spec: WeightSpec, names: Mapping[str, str], source: TensorSource) -> F32:
    """A norm or bias, float32 [rows]."""
    parts = [
        transformed(source.read(names[name]), spec, i).reshape(-1, 1).astype(np.float32)
        for i, name in enumerate(spec.sources)
    ]
    values: F32 = arranged(parts, spec.layout, spec.rows, 1).reshape(-1)
    if not np.isfinite(values).all():
        raise ModelError(f"{source.name}: {spec.sources[0]} holds a NaN or an infinity")
    return values


@dataclass
class Encoder:
    """Turns sources into packed matrices by one scheme and remembers what it did."""

    source: TensorSource
    scheme: Scheme
    group: int
    lo_shift: int
    with_lo: bool
    exact: int = 0
    rounded: int = 0
    nested: int = 0
    """Body matrices with both planes."""
    bytes8: int = 0
    """Body matrices of plain int8 codes."""
    floats: int = 0
    """Float matrices that are not bf16 as stored."""

    def encode(self, spec: WeightSpec, names: Mapping[str, str]) -> PackedTensor:
        """One matrix or table in kernel layout."""
        sources = [names[name] for name in spec.sources]
        if self.scheme == "nested":
            packed = self._exact_image(spec, sources) or self._rounded(spec, sources)
            if spec.role == "body":
                self.nested += packed.lo is not None
                self.bytes8 += packed.encoding == "int8"
            return packed
        stays_bf16 = self.scheme == "bf16" or all(self.source.dtype(name) == "bf16" for name in sources)
        weights = self._matrix(spec, sources)
        if stays_bf16:
            return pack_bf16(weights)
        self.floats += 1
        return pack_f32(weights)

    def points(self) -> tuple[str, ...]:
        """The operating points that the artifact offers, the default first."""
        if self.scheme == "bf16":
            return ("bf16",)
        if self.scheme == "full":
            return ("full",) if self.floats else ("full", "bf16")
        if self.nested:
            return ("int8", "int4")
        return ("int8",) if self.bytes8 else ("int4",)

    def _matrix(self, spec: WeightSpec, sources: Sequence[str]) -> F32:
        parts = []
        read: dict[str, F32] = {}
        for index, name in enumerate(sources):
            if name not in read:
                read = {name: self.source.read(name)}
            parts.append(transformed(read[name], spec, index))
        weights: F32 = arranged(parts, spec.layout, spec.rows, spec.cols)
        return weights

    def _rounded(self, spec: WeightSpec, sources: Sequence[str]) -> PackedTensor:
        self.rounded += 1
        weights = self._matrix(spec, sources)
        if spec.role == "body":
            return quantize_planes(weights, self.group, self.lo_shift, self.with_lo)
        # the embedding and the head keep eight bits at every point
        if spec.role == "head":
            return quantize_planes(weights, self.group, self.lo_shift)
        return quantize_int8(weights, self.group)

    def _exact_image(self, spec: WeightSpec, sources: Sequence[str]) -> PackedTensor | None:
        """The checkpoint's own codes, if all sources have them in one kind that a layout can hold."""
        if spec.transform != "none":
            return None
        found: list[QuantizedTensor] = []
        for name in sources:
            quantized = self.source.quantized(name)
            if quantized is None or quantized.group not in GROUPS:
                return None
            found.append(quantized)
        if len({q.group for q in found}) != 1:
            return None
        group, bits = found[0].group, max(q.bits for q in found)
        groups = -(-spec.cols // group)
        codes = arranged(
            [transformed(q.codes, spec, i) for i, q in enumerate(found)], spec.layout, spec.rows, spec.cols
        )
        scales = arranged([transformed(q.scales, spec, i) for i, q in enumerate(found)], spec.layout, spec.rows, groups)
        self.exact += 1
        if bits == 4:
            return pack_planes(codes, None, scales, group, 0)
        if bits == 5:
            hi, lo = split_codes(codes, 1)
            doubled = (scales * np.float32(2)).astype(np.float32)
            if not np.isfinite(doubled.astype(np.float16)).all():
                self.exact -= 1
                return None
            return pack_planes(hi, lo, doubled, group, 1)
        return pack_int8(codes, scales, group)


# ---- what travels along ---------------------------------------------------------------------------------------------

CARRIED = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json")


def carry_files(source: TensorSource, writer: ArtifactWriter) -> None:
    """Copy the text files. An artifact's tokenizer is always a tokenizer.json: rebuilt where the checkpoint has none."""
    for name in CARRIED:
        if name in source.files:
            writer.add_file(name, source.files[name])
    if "tokenizer.json" in source.files:
        writer.add_file("tokenizer.json", source.files["tokenizer.json"])
        return
    for name in ("tokenizer.gguf", "tokenizer.model", "vocab.json"):
        path = source.files.get(name)
        if isinstance(path, Path):
            from haomiao.text.tokenizer import Tokenizer

            tokenizer = Tokenizer(path.parent if name == "vocab.json" else path)
            for carried, content in tokenizer.to_files().items():
                if carried not in source.files:
                    writer.add_file(carried, content)
            return
