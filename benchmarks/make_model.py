"""Write random checkpoints with the shapes of real models: for speed only, their text is noise.

    python benchmarks/make_model.py qwen2.5-0.5b --out qwen              # Hugging Face directory, bf16
    python benchmarks/make_model.py qwen2.5-0.5b --out qwen --gguf Q4_0  # and model-Q4_0.gguf beside it
    python benchmarks/make_model.py --layers 2 llama-3.2-1b --out small  # fewer layers
    python benchmarks/make_model.py qwen2.5-0.5b --out qwen --tokenizer DIR  # with a real model's tokenizer

Weights are normal with standard deviation 0.02, norms are 1, from a fixed seed: the same command writes the same bytes.
Tensors are made and written one after the other, so that memory holds one tensor at a time. GGUF quantizing uses the
`gguf` package; token embeddings and head take the same type, as llama.cpp's --pure does.

`--random-codes` draws a GGUF's codes themselves instead of rounding weights, which takes seconds instead of minutes for
7 billion of them: uniform codes, one scale, the same standard deviation.

`--tokenizer` takes a directory with a byte-level BPE tokenizer.json of at most the shape's vocabulary: its files are
copied beside the checkpoint, its vocabulary and merges go into the GGUF. What it costs to load one is part of a cold
start, so a placeholder would flatter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from haomiao.measure.shapes import SHAPES, ModelShape

STANDARD_DEVIATION = 0.02
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
PRE_TOKENIZERS = {"qwen2": "qwen2", "llama": "llama-bpe"}
"""Model type -> how GGUF names the pre-tokenizer of its real vocabulary."""
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of every tensor, in Hugging Face's names."""
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (shape.hidden,)
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            yield prefix + f"self_attn.{name}_proj.weight", (heads * shape.head_dim, shape.hidden)
            if shape.qkv_bias:
                yield prefix + f"self_attn.{name}_proj.bias", (heads * shape.head_dim,)
        yield prefix + "self_attn.o_proj.weight", (shape.hidden, shape.heads * shape.head_dim)
        yield prefix + "post_attention_layernorm.weight", (shape.hidden,)
        yield prefix + "mlp.gate_proj.weight", (shape.ffn, shape.hidden)
        yield prefix + "mlp.up_proj.weight", (shape.ffn, shape.hidden)
        yield prefix + "mlp.down_proj.weight", (shape.hidden, shape.ffn)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def values(name: str, size: tuple[int, ...], index: int, seed: int) -> np.ndarray:
    """The tensor as float32. Each has a stream of its own, so that any one can be made alone."""
    if name.endswith("norm.weight"):
        return np.ones(size, np.float32)
    rng = np.random.Generator(np.random.SFC64([seed, index]))
    made = rng.standard_normal(size, dtype=np.float32)
    made *= STANDARD_DEVIATION
    return made


def config(shape: ModelShape) -> dict[str, object]:
    """config.json in Hugging Face's terms."""
    return {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[shape.model_type]],
        "model_type": shape.model_type,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_context,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
    }


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the upper 16 bits, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(shape: ModelShape, out: Path, seed: int) -> None:
    """One safetensors file, written tensor by tensor (github.com/huggingface/safetensors, "Format")."""
    header: dict[str, object] = {}
    offset = 0
    for name, size in tensors(shape):
        end = offset + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n")
    partial = out / "model.safetensors.part"
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        for index, (name, size) in enumerate(tensors(shape)):
            file.write(to_bf16(values(name, size, index, seed)).tobytes())
            progress(name)
    partial.rename(out / "model.safetensors")


def gguf_name(name: str) -> str:
    """Hugging Face's name -> GGUF's."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def permuted(name: str, x: np.ndarray, shape: ModelShape) -> np.ndarray:
    """GGUF stores Llama's q and k with rotary pairs next to each other; Qwen2's stay in halves."""
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
    if shape.model_type != "llama" or heads is None:
        return x
    return x.reshape(heads, 2, shape.head_dim // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about tokens: texts, types (1 normal, 3 control, 5 unused), merges, BOS and EOS."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    end: int
    pre: str


def placeholder(size: int) -> Vocabulary:
    """Tokens that a byte-level tokenizer can be built from: one merge, the bytes as GPT-2 spells them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (chr(256 + index) for index in range(256 - len(printable)))
    tokens = ["ab", *(chr(code) for code in printable), *others][:size]
    tokens += [f"<{token}>" for token in range(len(tokens), size)]
    return Vocabulary(tokens, [1] * size, ["a b"], 0, "default")


def real_vocabulary(directory: Path, shape: ModelShape) -> Vocabulary:
    """The vocabulary of a tokenizer.json; rows of the model beyond it are unused tokens, as in real GGUF files."""
    file = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    ids: dict[str, int] = dict(file["model"]["vocab"])
    added = {token["content"]: token["id"] for token in file["added_tokens"]}
    ids |= added
    if max(ids.values()) >= shape.vocab:
        raise SystemExit(f"{directory}: {max(ids.values()) + 1} tokens are more than the shape's {shape.vocab}")
    tokens = [f"[PAD{index}]" for index in range(shape.vocab)]
    types = [5] * shape.vocab
    for token, index in ids.items():
        tokens[index], types[index] = token, 3 if token in added else 1
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in file["model"]["merges"]]
    end = next((index for token, index in added.items() if token == "<|endoftext|>"), 0)
    return Vocabulary(tokens, types, merges, end, PRE_TOKENIZERS[shape.model_type])


def random_codes(size: tuple[int, ...], kind: str, index: int, seed: int) -> np.ndarray:
    """uint8 [rows, bytes]: blocks of 32 columns, a float16 scale and uniform codes (ggml: block_q4_0, block_q8_0)."""
    rows, cols = size
    width, deviation = {"Q4_0": (18, 4.61), "Q8_0": (34, 73.5)}[kind]  # of uniform codes, in steps
    rng = np.random.Generator(np.random.SFC64([seed, index]))
    blocks = np.frombuffer(rng.bytes(rows * cols // 32 * width), np.uint8).reshape(-1, width).copy()
    if kind == "Q8_0":
        codes = blocks[:, 2:].view(np.int8)
        np.maximum(codes, -127, out=codes)
    blocks[:, :2] = np.array([STANDARD_DEVIATION / deviation], "<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(shape: ModelShape, path: Path, kind: str, seed: int, words: Vocabulary, drawn: bool = False) -> None:
    """The same weights as GGUF, in one quantized type; or `drawn` codes."""
    import gguf

    quantized = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, {"qwen2": "qwen2", "llama": "llama"}[shape.model_type], use_temp_file=True)
    writer.add_context_length(shape.max_context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType[{"Q4_0": "MOSTLY_Q4_0", "Q8_0": "MOSTLY_Q8_0"}[kind]])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    writer.add_bos_token_id(words.end)
    writer.add_eos_token_id(words.end)
    writer.add_add_bos_token(False)
    for index, (name, size) in enumerate(tensors(shape)):
        if drawn and len(size) == 2:
            writer.add_tensor(gguf_name(name), random_codes(size, kind, index, seed), raw_dtype=quantized)
            continue
        x = permuted(name, values(name, size, index, seed), shape)
        if len(size) == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(x, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(gguf_name(name), x)
        progress(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def progress(name: str) -> None:
    """One line that is written over, where someone is watching."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--gguf", action="append", choices=("Q4_0", "Q8_0"), default=[], help="also as GGUF; repeatable"
    )
    parser.add_argument("--no-safetensors", action="store_true", help="GGUF only")
    parser.add_argument("--random-codes", action="store_true", help="draw the codes of GGUF files, not their weights")
    parser.add_argument("--tokenizer", type=Path, help="directory with a real tokenizer.json")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--vocab", type=int, help="a smaller vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = replace(shape, layers=args.layers or shape.layers, vocab=args.vocab or shape.vocab)
    if not args.no_safetensors:
        write_safetensors(shape, args.out, args.seed)
        for name in TOKENIZER_FILES if args.tokenizer is not None else ():
            if (args.tokenizer / name).is_file():
                shutil.copyfile(args.tokenizer / name, args.out / name)
    if args.gguf:
        args.out.mkdir(parents=True, exist_ok=True)
        words = real_vocabulary(args.tokenizer, shape) if args.tokenizer is not None else placeholder(shape.vocab)
        for kind in args.gguf:
            write_gguf(shape, args.out / f"model-{kind}.gguf", kind, args.seed, words, args.random_codes)
    print(json.dumps({"shape": args.shape, "parameters": shape.parameters, "out": str(args.out)}))


if __name__ == "__main__":
    main()
