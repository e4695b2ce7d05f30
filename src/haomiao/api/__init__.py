"""Text in, text out: `LLM`, `Session`, `Tokenizer`. Everything below speaks token ids.

llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct", point="int8")
print(llm.generate("The sea is", max_tokens=20).text)
"""

from __future__ import annotations

from haomiao.api.answers import AnswerStream, Choice, Chunk, Completion, Embedding
from haomiao.api.llm import LLM
from haomiao.api.session import Session
from haomiao.text.tokenizer import Tokenizer
from haomiao.types import Receipt, SamplingParams, TokenLogprob

__all__ = [
    "LLM",
    "AnswerStream",
    "Choice",
    "Chunk",
    "Completion",
    "Embedding",
    "Receipt",
    "SamplingParams",
    "Session",
    "TokenLogprob",
    "Tokenizer",
]
