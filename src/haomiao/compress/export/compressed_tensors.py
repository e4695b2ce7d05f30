"""Export to compressed-tensors: a Hugging Face directory that transformers and vLLM load.

int4: `pack-quantized`, group strategy, symmetric; codes + 8 packed into int32, low bits first. int8: `int-quantized`
with the same group strategy, weights int8. Scales are our float16 scales, widened: nothing is rounded again. A negative
scale is allowed by the arithmetic (w = scale * code) and kept. Embedding and head stay floats (`ignore: ["lm_head"]`).
The format: github.com/vllm-project/compressed-tensors, config_groups and the pack-quantized compressor.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.compress.export.parts import Part, config_of, parts
from haomiao.errors import InputError
from haomiao.load.artifact import Artifact
from haomiao.load.disk import disk_errors
from haomiao.models.registry import plan_for

FORMATS = {"int4": "pack-quantized", "int8": "int-quantized"}


def export(artifact: Artifact, out: Path, point: str) -> Path:
    """Write the artifact's `point` into the directory `out`, which must not exist or be empty. Returns it.

    Raises `InputError` for points that the format has no words for, and for columns that are not whole groups.
    """
    from safetensors.numpy import save_file

    if point not in FORMATS:
        raise InputError(f"compressed-tensors holds int4 and int8, not {point}", param="point")
    check_target(out)
    plan = plan_for(artifact.meta["config"])
    tensors: dict[str, npt.NDArray[Any]] = {}
    group = 0
    for part in parts(artifact, plan, point):
        tensors |= _tensors(part, point)
        group = group or part.group
    config = config_of(artifact) | {"quantization_config": _config(point, group)}
    with disk_errors(out), tempfile.TemporaryDirectory(dir=_parent(out), prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "checkpoint"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, path in artifact.files.items():
            shutil.copyfile(path, folder / name)
        folder.rename(out)  # replaces an empty directory, fails on any other
    return out


def check_target(out: Path) -> None:
    """Refuse a directory that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; nothing was written", param="output")


def _parent(out: Path) -> Path:
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return out.absolute().parent


def _tensors(part: Part, point: str) -> dict[str, npt.NDArray[Any]]:
    if part.codes is None or part.scales is None:
        assert part.values is not None  # a part is one or the other
        return {part.name: np.ascontiguousarray(part.values)}
    rows, cols = part.codes.shape
    if cols % part.group:
        raise InputError(f"{part.name}: {cols} columns are not whole groups of {part.group}, which the format needs")
    prefix = part.name.removesuffix(".weight")
    found: dict[str, npt.NDArray[Any]] = {f"{prefix}.weight_scale": np.ascontiguousarray(part.scales)}
    if point == "int4":
        found[f"{prefix}.weight_packed"] = pack_words(part.codes)
        found[f"{prefix}.weight_shape"] = np.array([rows, cols], np.int64)
    else:
        if part.codes.min() < -128 or part.codes.max() > 127:
            raise InputError(
                f"{part.name}: the two planes hold codes beyond int8 (lo_shift 4 with clipping); compress with --bits 8"
            )
        found[f"{prefix}.weight"] = part.codes.astype(np.int8)
    return found


def pack_words(codes: npt.NDArray[np.int16]) -> npt.NDArray[np.int32]:
    """Codes in [-8, 7], [rows, cols], as int32 [rows, ceil(cols / 8)]: code + 8, low bits first."""
    rows, cols = codes.shape
    padded = np.zeros((rows, -(-cols // 8) * 8), np.uint32)
    padded[:, :cols] = (codes + 8).astype(np.uint32)
    shifts = np.arange(8, dtype=np.uint32) * np.uint32(4)
    words: npt.NDArray[np.uint32] = np.bitwise_or.reduce(padded.reshape(rows, -1, 8) << shifts, axis=2)
    return np.ascontiguousarray(words).view(np.int32)


def _config(point: str, group: int) -> dict[str, Any]:
    weights = {
        "num_bits": 4 if point == "int4" else 8,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[point],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {"group_0": scheme | {"format": FORMATS[point]}},
    }
