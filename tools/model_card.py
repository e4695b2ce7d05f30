"""Write the card of the embedded model from what was measured, so that no figure in it is copied by hand.

    python tools/model_card.py src/haomiao/assets/haomiao-tiny --data DATA --config CONFIG.yaml --log RUN/log.jsonl \\
        --counted benchmarks/results/ngram-haomiao-tiny.json --machine "two cores of ..."

DATA is the folder that `haomiao.train.prepare` wrote (its manifest names texts and licences), CONFIG and log are of the
training, `--counted` is what benchmarks/ngram.py wrote. Errors of the planes are those that tools/embed_model.py stored
in the artifact. Samples are `int8`, seeds 1 to 5, none left out. The card is written into the artifact's folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from haomiao.api import LLM
from haomiao.load.artifact import Artifact
from haomiao.models.plan import Plan
from haomiao.models.registry import plan_for
from haomiao.train.curve import loss_against_tokens
from haomiao.train.settings import Training, read_training

PROMPTS = ("Once upon a time", "今天天气很好，阳光明媚，适合出门散步。")
SAMPLING: dict[str, Any] = {"max_tokens": 60, "temperature": 0.7, "top_p": 0.9}
SEEDS = range(1, 6)
CALLED = {"adamw": "AdamW", "muon": "Muon", "gptq": "GPTQ", "rtn": "rounded to nearest"}
COLUMNS = 9
"""Of the table of loss against tokens."""

LIMITS = """\
It continues text in the manner of old books and manuals and knows nothing. It is not a chat model, follows no
instructions, and repeats what the internet's prose contains without judgement. It is here to show the engine, to be
fine-tuned to small decisions, and to measure quantization and speculation on really trained weights."""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float], digits: int) -> str:
    """An estimate with its ends."""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def architecture(config: dict[str, Any], plan: Plan) -> list[list[str]]:
    """What the model is."""
    size = sum(spec.rows * spec.cols for spec in plan.weights.values())
    heads = f"{config['num_attention_heads']} query and {config['num_key_value_heads']} key/value heads"
    width = config["hidden_size"] // config["num_attention_heads"]
    shape = f"hidden {config['hidden_size']}, FFN {config['intermediate_size']}, {config['num_hidden_layers']} layers"
    theta = config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]
    tied = "tied head" if config.get("tie_word_embeddings") else "a head of its own"
    return [
        ["architecture", f"Llama: {shape}, {heads} of {width}, {tied}, RoPE base {theta:,.0f}"],
        ["parameters", f"{size:,}"],
        ["vocabulary", f"{config['vocab_size']:,}, byte-level BPE trained on the same text; `<\\|endoftext\\|>` = 0"],
    ]


def training(settings: Training, tokens: int, args: argparse.Namespace) -> list[list[str]]:
    """How it was trained."""
    start = f"begun as {args.start}, grown so that the function is the same at first; then " if args.start else ""
    rate = f"{CALLED[settings.optimizer]}, weight decay {settings.weight_decay}, peak rate {settings.learning_rate:g}"
    falls = f", constant, then linear to {100 * settings.floor:.0f} % over the last {100 * settings.decay:.0f} %"
    shape = falls if settings.schedule == "trapezoid" else f", half a cosine to {100 * settings.floor:.0f} %"
    read = f"{tokens / 1e6:.1f} M tokens, {settings.precision}, {rate}, {settings.warmup} warm-up steps{shape}"
    batches = f"{settings.steps} batches of {settings.batch * settings.accumulate} × {settings.length}"
    return [
        ["context", f"trained at {settings.length} tokens, positions up to 2,048"],
        ["training", f"{args.machine}; {start}{read}; {batches}, clipping at {settings.clip:g}"],
        ["licence", "Apache-2.0, as the project"],
    ]


def texts(manifest: dict[str, Any]) -> str:
    """What was read, with its licence; what is held out is named so."""
    rows: dict[tuple[str, str, str], int] = {}
    for file in manifest["files"]:
        what = Path(file["path"]).parent.name + (", held out and not learnt" if file["use"] == "valid" else "")
        key = (what, file["origin"], file["licence"])
        rows[key] = rows.get(key, 0) + file["bytes_kept"]
    return table(
        ["text", "from", "MB", "licence"], [[*key[:2], f"{size / 1e6:.1f}", key[2]] for key, size in rows.items()]
    )


def beside_counting(counted: dict[str, Any], name: str) -> str:
    """Held-out loss of the model and of the n-gram models, and their difference."""
    kinds = [kind for kind in counted["en"] if kind.startswith("order")] + ["model"]
    rows = []
    for kind in kinds:
        called = name if kind == "model" else f"{kind.removeprefix('order ')}-gram"
        figures = [
            f"{spread(counted[language][kind]['nats_token'], 3)} | {counted[language][kind]['perplexity'][0]} | "
            f"{spread(counted[language][kind]['nats_byte'], 3)}"
            for language in ("en", "zh")
        ]
        rows.append([called, *figures])
    head = ["", "English, nats/token", "perplexity", "nats/byte", "中文, nats/token", "perplexity", "nats/byte"]
    lines = []
    for language, gain in (("English", counted["en"]["gain"]), ("中文", counted["zh"]["gain"])):
        gained = f"{spread(gain['nats_token'], 3)} nats a token gained, better in {gain['windows']} windows."
        lines.append(f"Against the {gain['over'].removeprefix('order ')}-gram, {language}: {gained}")
    return table(head, [row[0:1] + " | ".join(row[1:]).split(" | ") for row in rows]) + "\n\n" + "\n".join(lines)


def curve(logs: list[Path]) -> str:
    """Training loss against tokens, both languages."""
    points = loss_against_tokens(logs, COLUMNS)
    head = ["M tokens seen", *(f"{tokens / 1e6:.1f}" for tokens, _ in points)]
    return table(head, [["nats/token", *(f"{loss:.2f}" for _, loss in points)]])


def planes(errors: dict[str, Any]) -> str:
    """What each operating point costs."""
    rows = []
    for point, found in errors.items():
        top = [100 * found["top1"][key] for key in ("estimate", "low", "high")]
        mean = [found["kl"][key] for key in ("estimate", "low", "high")]
        perplexity = found["candidate"]["perplexity"]["estimate"]
        rows.append([point, spread(mean, 5), spread(top, 1) + " %", f"{perplexity:.1f}"])
    return table(["point", "mean KL, nats/token", "top-1 agreement", "perplexity"], rows)


def samples(artifact: Path) -> str:
    """Every sample."""
    lines = []
    with LLM(artifact, point="int8", threads=1) as llm:
        for prompt in PROMPTS:
            for seed in SEEDS:
                text = llm.generate(prompt, seed=seed, **SAMPLING).text.replace("`", "'").replace("\n", "⏎").strip()
                lines.append(f"- `{prompt}`, seed {seed}: " + (f"`{text}`" if text else "*(ends at once)*"))
    return "\n".join(lines)


def card(args: argparse.Namespace) -> str:
    """The whole card."""
    with Artifact.open(args.artifact) as artifact:
        meta = artifact.meta
    name, megabytes = args.artifact.name, (args.artifact / "model.haomiao").stat().st_size / 1e6
    manifest = json.loads((args.data / "manifest.json").read_text(encoding="utf-8"))
    counted = json.loads(args.counted.read_text(encoding="utf-8"))
    tokens = loss_against_tokens(args.log[-1:], 1)[-1][0]
    facts = architecture(meta["config"], plan_for(meta["config"], 512))
    facts += training(read_training(args.config, steps=args.steps), tokens, args)
    method = meta["recipe"]["method"]
    how = CALLED.get(method, method) + (", rotated" if meta["recipe"].get("rotate") else "")
    full = next(iter(meta["errors"].values()))
    perplexity = full["reference"]["perplexity"]["estimate"]
    group = meta["recipe"]["group"]
    millions, judged = counted["train_tokens"] / 1e6, counted["en"]["tokens"]
    sampled = "temperature {temperature}, top-p {top_p}, {max_tokens} tokens".format(**SAMPLING)
    return f"""# {name}

The embedded model: a small bilingual (English, 中文) language model that this project trained itself, so that the first
command answers without a network. {megabytes:.1f} MB of nested int8/int4 planes ({how}, group {group}).

{table(["what", ""], facts)}

## Text

{texts(manifest)}

## Held out, beside counting

n-gram models (interpolated Kneser-Ney, nothing pruned) of all {millions:.1f} M tokens of the same text, and the model
in float32 on its trained weights, judged on the same {judged:,} held-out tokens of each language (English classics,
Chinese prose from other books); 95 % intervals over windows of 512 (`benchmarks/ngram.py`). The model sees its window
alone, an n-gram model all that came before.

{beside_counting(counted, name)}

## Loss against tokens

Training loss, both languages; each figure the mean since the column before.

{curve(args.log)}

## What the planes add

Against `full` (perplexity {perplexity:.1f}) on {full["tokens"]:,} held-out tokens, half of each text, windows of
512, bf16 KV; 95 % intervals. `tools/embed_model.py` measures and stores it in the artifact.

{planes(meta["errors"])}

## Samples

`int8`, {sampled}, seeds 1 to 5, none left out (⏎ is a new line):

{samples(args.artifact)}

## Make it again

docs/training.md, "The embedded model, made anew", has the commands.

## Limits

{LIMITS}
"""


def main() -> None:
    """Gather and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--log", type=Path, action="append", required=True, help="repeatable, in order")
    parser.add_argument("--counted", type=Path, required=True)
    parser.add_argument("--machine", required=True, help="where and how long it was trained")
    parser.add_argument("--start", help="name of the smaller model that it began as")
    args = parser.parse_args()
    (args.artifact / "README.md").write_text(card(args), encoding="utf-8")


if __name__ == "__main__":
    main()
