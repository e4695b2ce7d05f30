"""Make the embedded model: compress a checkpoint, measure each point's error on held-out text, write one artifact.

    python tools/embed_model.py CHECKPOINT src/haomiao/assets/haomiao-tiny --text english.txt --text chinese.txt
    python tools/embed_model.py CHECKPOINT OUT --text english.txt --text chinese.txt --compress "--method gptq --rotate"

`--compress` holds flags of `haomiao compress`; without it the checkpoint is rounded to nearest. Errors are KL(full ||
point) and top-1 agreement with 95 % intervals over windows of 512 tokens, at the KV type that the point runs with by
default. Companions of the artifact that are there already (its card) are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import Any

from haomiao.api import LLM
from haomiao.load.artifact import Artifact, ArtifactWriter
from haomiao.load.source import open_source
from haomiao.measure.accuracy import measure_agreement
from haomiao.models.convert import convert

WINDOW = 512


def held_out_tokens(llm: LLM, texts: list[Path], count: int) -> tuple[list[int], list[dict[str, Any]]]:
    """`count` tokens from the middle of each text, and what they are (name, digest, tokens)."""
    ids: list[int] = []
    described = []
    for path in texts:
        text = path.read_text(encoding="utf-8")
        taken = llm.tokenize(text[len(text) // 3 :][: count * 8])[:count]
        ids += taken
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        described.append({"name": path.name, "sha256": digest, "tokens": len(taken)})
    return ids, described


def measure_errors(checkpoint: str, artifact: Path, texts: list[Path], count: int) -> dict[str, Any]:
    """The `errors` of the artifact's meta section, by point."""
    errors: dict[str, Any] = {}
    with LLM(checkpoint, point="full", max_context=WINDOW + 1) as full:
        ids, described = held_out_tokens(full, texts, count)
        for point in Artifact.open(artifact).meta["points"]:
            with LLM(artifact, point=point, max_context=WINDOW + 1) as candidate:
                agreement = measure_agreement(full.logits, candidate.logits, ids, window=WINDOW)
            errors[point] = {**agreement.as_dict(), "against": "full", "text": described}
            print(f"{point}: {errors[point]}")
    return errors


def made_from(checkpoint: str, out: Path, flags: list[str]) -> Path:
    """The artifact of a checkpoint, by `haomiao compress` with these flags, none of them: rounded to nearest."""
    if not flags:
        return convert(open_source(checkpoint), out)
    from haomiao.cli.main import main as haomiao

    if haomiao(["compress", checkpoint, "-o", str(out), *flags]):
        raise SystemExit("compression did not end")
    return out


def main() -> None:
    """Compress, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True, help="held-out text; repeatable")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--compress", default="", metavar="FLAGS", help="of haomiao compress, in one word")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        converted = made_from(args.checkpoint, Path(folder) / "artifact", args.compress.split())
        errors = measure_errors(args.checkpoint, converted, args.text, args.tokens)
        kept = Artifact.open(args.out).files if (args.out / "model.haomiao").exists() else {}
        contents = {name: path.read_bytes() for name, path in kept.items()}
        with Artifact.open(converted) as made, ArtifactWriter(args.out, overwrite=True) as writer:
            for name, tensor in made.tensors.items():
                writer.add_tensor(name, tensor)
            for name, vector in made.vectors.items():
                writer.add_vector(name, vector)
            for name, content in {**contents, **{n: p.read_bytes() for n, p in made.files.items()}}.items():
                writer.add_file(name, content)
            writer.finish({**made.meta, "errors": errors})


if __name__ == "__main__":
    main()
