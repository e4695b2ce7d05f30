"""Several requests at once share every step; each gets exactly the answer it would get alone.

python examples/batch.py [MODEL]
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import haomiao

PROMPTS = ["Once upon a time", "The function returns", "今天", "She opened the door and"]

llm = haomiao.LLM(sys.argv[1] if len(sys.argv) > 1 else None)


def ask(prompt: str) -> str:
    """One request; threads may call at the same time."""
    text: str = llm.generate(prompt, max_tokens=24, temperature=0.8, seed=3).text
    return text


with ThreadPoolExecutor(len(PROMPTS)) as pool:
    together = list(pool.map(ask, PROMPTS))
alone = [ask(prompt) for prompt in PROMPTS]
for prompt, text in zip(PROMPTS, together, strict=True):
    print(repr(prompt + text))
print("together and alone agree:", together == alone)
llm.close()
