r"""How each named BPE pre-tokenizer cuts text into words, as data.

GGUF does not store a pre-tokenizer; it stores its name (`tokenizer.ggml.pre`). The names and what they stand for are
facts of the format, from llama.cpp (src/llama-vocab.cpp, `llm_tokenizer_bpe` and `llama_vocab::impl::load`). Where
llama.cpp adapts a pattern of the model's own tokenizer.json to its regex engine and quotes the original, the original
stands here: the model was trained with it. Patterns are applied one after the other, each to the pieces that the one
before left; what matches is a piece of its own, and so is what lies between matches.

Four patterns are written differently because the original is quadratic in the length of a run: `\s+$`, and the three
that group digits from the right (`\d{1,3}(?=(?:\d{3})*\b)` and its like).

Knows nothing about files or the tokenizers library.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
_CASCADE = "|".join([rf"\s{{{1 << k}}}(?!\S)" for k in range(9, 1, -1)] + [r"\s{1,2}(?!\S)", r"\s{1}"])
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ASCII_SIGN = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def _cased(end: str, numbers: str, upper: str = _UPPER, lower: str = _LOWER, punctuation: str = r"[\r\n/]*") -> str:
    """Words split where a capital follows a small letter (o200k and its family)."""
    word = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{word}{upper}*{lower}+{end}|{word}{upper}+{lower}*{end}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+{punctuation}|{_SPACES}"


_O200K = _cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}")
PART_AT_WORDS = frozenset([_GPT2, _QWEN2, _LLAMA3, _O200K])
"""Patterns that begin a new word at a space between two letters, whatever stands around."""
_HAN_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_HAN_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = r"[\p{Han}]+|" + _cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}", _HAN_UPPER, _HAN_LOWER, r"[\r\n]*")

# Digits grouped in threes from the right: once the run stands alone, a first group of one or two, then threes.
_THREES = r"\A\p{N}{1,2}(?=(?:\p{N}{3})+\z)|\p{N}{1,3}"
_CLOSED_RUN = r"(?<!\d)\d++(?!\w)"
"""A run of digits that ends at a word boundary; tried once per run."""
_SIGN_OR_LETTERS = rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3_WORDS = rf"{_SIGN_OR_LETTERS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_CJK_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_WIDE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_LINES = r"[^\n]+|[\n]+"
_FALCON_SIGNS = r"[\p{P}\$\+<=>\^~\|`]+"
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CHAMELEON = (
    r"<sentinel:[0-9]+>",
    r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to cut text before BPE, and what goes with its name."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges say."""
    add_bos: bool = False
    """Whether BOS is added where the file does not say."""
    add_sep: bool = False
    byte_level: bool = True
    """Bytes as GPT-2's printable characters; otherwise characters with byte fallback and U+2581 for spaces."""
    drop_spaces: bool = False


_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_GPT2_KIND = PreTokenizer((_GPT2,))
_LLAMA3_KIND = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_KIND = PreTokenizer((_QWEN2,))
_DEEPSEEK3_KIND = PreTokenizer((r"\p{N}{1,3}", _CJK_KANA, _DEEPSEEK3_WORDS))
_O200K_KIND = PreTokenizer((_O200K,))
_BLOOM_KIND = PreTokenizer((_BLOOM,))
_GEMMA4_KIND = PreTokenizer((_LINES,), byte_level=False, add_bos=True)
_BAILING_KIND = PreTokenizer(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
)
_TINY_AYA_KIND = PreTokenizer((_CLOSED_RUN, r"\A\d{1,2}(?=(?:\d{3})+\z)", _O200K))

_KINDS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"(?<!\s)\s+\z",
            _CJK_WIDE,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_WIDE, r"\p{N}")),
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            _CJK_KANA,
            rf"{_SIGN_OR_LETTERS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "youtu": PreTokenizer((_YOUTU_SCRIPTS, _cased(rf"{_CONTRACTIONS}?", r"\p{N}")), ignore_merges=True),
    "falcon": PreTokenizer((_FALCON_SIGNS, _GPT2, r"[0-9][0-9][0-9]")),
    "jais-2": PreTokenizer(
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}|\s*[\r\n]+|{_CASCADE}",)
    ),
    "minicpm5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+|{_PUNCTUATION}|{_SPACES}",
        ),
        ignore_merges=True,
    ),
    "qwen35": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    "chameleon": PreTokenizer(_CHAMELEON, add_bos=True),
    "granite-embed-multi-97m": PreTokenizer((_O200K,), ignore_merges=True),
    "kimi-k2": PreTokenizer((_KIMI,)),
    "superbpe": PreTokenizer((r"\p{N}+", _THREES)),
    "seed-coder": PreTokenizer(
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
    ),
    "ufakzeka": PreTokenizer((rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}|{_SPACES}",)),
    "afmoe": PreTokenizer((r"\p{N}+", _THREES, _AFMOE_SCRIPTS, _DEEPSEEK3_WORDS)),
    "laguna": PreTokenizer((_LINES, _QWEN2)),
    "exaone-moe": PreTokenizer(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "sarvam-moe": PreTokenizer((_LINES,), byte_level=False),
    "whitespace": PreTokenizer((r"\S+",), byte_level=False, drop_spaces=True),
}

_SAME: dict[PreTokenizer, str] = {
    _LLAMA3_KIND: "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe glm4 chatglm-bpe",
    _DEEPSEEK3_KIND: "deepseek-v3 hunyuan-dense hy_v4 joyai-llm",
    _SINGLE_DIGITS: "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    _GPT2_KIND: "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais"
    " trillion granite-docling exaone4",
    PreTokenizer((_GPT2,), add_sep=True): "jina-v1-en jina-v2-code roberta-bpe",
    _QWEN2_KIND: "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    _O200K_KIND: "gpt-4o llama4 kanana2 talkie minimax-m2",
    _TINY_AYA_KIND: "tiny_aya cohere2moe",
    _BLOOM_KIND: "poro-chat bloom gpt3-finnish",
    _BAILING_KIND: "bailingmoe bailingmoe2 llada-moe",
    _GEMMA4_KIND: "gemma4 granite-embed-multi-311m",
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = _KINDS | {
    name: kind for kind, names in _SAME.items() for name in names.split()
}
"""`tokenizer.ggml.pre` -> what it means."""

CLASS_NAMES: dict[str, str] = {
    "GPT2Tokenizer": "gpt-2",
    "GPT2TokenizerFast": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    "Qwen2TokenizerFast": "qwen2",
}
"""`tokenizer_class` of tokenizer_config.json -> pre-tokenizer, for directories that hold vocab.json and merges.txt."""
