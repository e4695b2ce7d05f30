"""One answer and its receipt.

python examples/generate.py [MODEL] [PROMPT]
"""

import sys

import haomiao

model = sys.argv[1] if len(sys.argv) > 1 else None
prompt = sys.argv[2] if len(sys.argv) > 2 else "Once upon a time"

llm = haomiao.LLM(model)
answer = llm.generate(prompt, max_tokens=48, temperature=0.7, top_p=0.9, seed=1)
print(prompt + answer.text)
print()
receipt = answer.receipt
print(f"{receipt.completion_tokens} tokens, first after {receipt.ttft_ms:.1f} ms, {receipt.total_ms:.1f} ms in all")
print(f"the same again: seed {receipt.seed}, point {receipt.schedule[0].point}, kernels {receipt.isa}")
llm.close()
