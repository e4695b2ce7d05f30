"""Text as it is produced; whoever stops reading early stops the engine within one step.

python examples/stream.py [MODEL] [PROMPT]
"""

import sys

import haomiao

model = sys.argv[1] if len(sys.argv) > 1 else None
prompt = sys.argv[2] if len(sys.argv) > 2 else "The function returns"

llm = haomiao.LLM(model)
print(prompt, end="", flush=True)
said = ""
stream = llm.stream(prompt, max_tokens=128, temperature=0.7, seed=2)
for chunk in stream:
    print(chunk.text, end="", flush=True)
    said += chunk.text
    if said.count(".") == 2:  # two sentences are enough
        stream.close()
        break
print()
llm.close()
