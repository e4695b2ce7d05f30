"""A checkpoint becomes an artifact: every weight of the plan is found, checked, encoded and written, one at a time.

Knows plans, sources and artifacts; not families, nor files' formats. How a weight is encoded lives in `encode`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haomiao import __version__
from haomiao.errors import InputError, ModelError, ModelNotFoundError, UnsupportedModelError
from haomiao.kernels.packed import GROUPS
from haomiao.load.artifact import ArtifactWriter
from haomiao.load.source import Progress, TensorSource
from haomiao.models.config import eos_token_ids
from haomiao.models.encode import SCHEMES, Encoder, Scheme
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for

PREFIXES = ("", "model.", "transformer.", "language_model.model.", "model.language_model.")
"""What checkpoints of one family put before a weight's name, or leave out."""

MAX_LISTED = 6
CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""Files that an artifact takes over as they are; `chat_template.jinja` too."""


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

    `nested`: int8/int4 planes of `group` columns per scale (`with_lo=False`: an ordinary int4 model). `exact`: as
    nested, but the codes of 8-bit checkpoints are kept, and have no int4. `full`: the weights as loaded (bf16 stays
    bf16, everything else float32). `bf16`: rounded to bf16. `progress(what, done, total)` counts float32 bytes.

    Raises `ModelError` for a checkpoint that lacks weights or contradicts its config, naming all of them at once.
    """
    if scheme not in SCHEMES:
        raise InputError(f"scheme must be one of {', '.join(SCHEMES)}, not {scheme!r}", param="scheme")
    if group not in GROUPS:
        raise InputError(f"group must be 32, 64 or 128, not {group}", param="group")
    plan = plan_for(source.config)
    eos_token_ids(source.config)
    encoder = Encoder(source, resolve(plan, source), scheme, group, lo_shift, with_lo)
    total = sum(spec.rows * spec.cols for spec in plan.weights.values()) * 4
    done = 0
    with ArtifactWriter(out, overwrite=overwrite) as writer:
        for spec in plan.weights.values():
            if spec.kind == "vector":
                writer.add_vector(spec.name, encoder.vector(spec))
            else:
                writer.add_tensor(spec.name, encoder.matrix(spec))
            done += spec.rows * spec.cols * 4
            if progress is not None:
                progress(f"converting {source.name}", done, total)
        without_tokenizer = carry_files(source, writer)
        points = encoder.points()
        meta: dict[str, Any] = {
            "config": dict(source.config),
            "family": plan.family,
            "points": list(points),
            "default_point": points[0],
            "provenance": {
                "source": source.name,
                # a digest: the identity itself holds paths of the machine that converted
                "identity": hashlib.sha256(source.identity.encode()).hexdigest()[:32],
                "haomiao": __version__,
                "exact": encoder.exact,
                "rounded": encoder.rounded,
                **({"without_tokenizer": without_tokenizer} if without_tokenizer else {}),
            },
            "recipe": {"method": "rtn", "scheme": scheme, "group": group, "lo_shift": lo_shift, "lo": with_lo},
        }
        return writer.finish(meta)


def resolve(plan: Plan, source: TensorSource) -> dict[str, str]:
    """The checkpoint's own name of every source of the plan; shapes checked. Lists everything wrong at once."""
    available = set(source.names())
    names: dict[str, str] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for spec in plan.weights.values():
        for wanted, shape in zip(spec.sources, spec.shapes, strict=True):
            if wanted in names:
                continue
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
        raise ModelError(
            f"{source.name}: {len(wrong)} weights contradict the config: {listed(wrong)}", code="shape_mismatch"
        )
    return names


def spellings(name: str) -> list[str]:
    """A weight's name with and without the prefixes that checkpoints of the same family put before it."""
    bare = name.removeprefix("transformer.").removeprefix("model.")
    return [name, *(prefix + bare for prefix in PREFIXES), f"language_model.{name}"]


def listed(items: Sequence[str]) -> str:
    """The first few of a list, and how many more."""
    rest = len(items) - MAX_LISTED
    return "; ".join(items[:MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")


def carry_files(source: TensorSource, writer: ArtifactWriter) -> str | None:
    """Copy the text files. An artifact's tokenizer is always a tokenizer.json: rebuilt where the checkpoint has none
    (and then the files beside it are those that the rebuilt one needs). A checkpoint may have no tokenizer at all, or
    one of a kind that is not known: the model then takes token ids. Returns why there is none, None if there is one."""
    missing = None
    files: dict[str, Path | bytes] = {
        name: source.files[name] for name in (*CARRIED, "chat_template.jinja") if name in source.files
    }
    if "tokenizer.json" not in files:
        try:
            files.update(_rebuilt_tokenizer(source))
        except (UnsupportedModelError, ModelNotFoundError) as error:
            missing = str(error)
    table = _token_table(files.get("tokenizer.json"), files.get("tokenizer_config.json"))
    if table is not None:
        files["tokenizer.table"] = table
    for name, content in files.items():
        writer.add_file(name, content)
    return missing


def _token_table(tokenizer: Path | bytes | None, config: Path | bytes | None) -> bytes | None:
    """The vocabulary ready to be mapped, where its kind has one (`text.table`)."""
    if tokenizer is None:
        return None
    from haomiao.text.files import read_bytes
    from haomiao.text.table import make_table

    source, declared = (read_bytes(file) if isinstance(file, Path) else file or b"" for file in (tokenizer, config))
    return make_table(source, declared)


def _rebuilt_tokenizer(source: TensorSource) -> dict[str, bytes]:
    """tokenizer.json and its companions from a GGUF file, a tokenizer.model, or vocab.json and merges.txt."""
    for name in ("tokenizer.gguf", "tokenizer.model", "vocab.json"):
        path = source.files.get(name)
        if isinstance(path, Path):
            from haomiao.text.tokenizer import Tokenizer

            with tempfile.TemporaryDirectory(prefix="haomiao-") as directory:
                Tokenizer(path.parent if name == "vocab.json" else path).save(directory)
                return {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir())}
    return {}
