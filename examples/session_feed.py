"""Reading while the user still speaks: text is computed as it arrives, so that after the last word the first token
costs one step instead of the whole prompt.

python examples/session_feed.py [MODEL]
"""

import sys

import haomiao

HEARD = ["Please tell me, ", "in a few words, ", "what the weather ", "is like in the mountains ", "in autumn."]

llm = haomiao.LLM(sys.argv[1] if len(sys.argv) > 1 else None)
session = llm.session()
for piece in HEARD:  # each piece is computed now, while the next is being spoken
    session.feed(piece)
answer = session.generate(max_tokens=24)
print(answer.text)
print(f"after the last word: {answer.receipt.ttft_ms:.1f} ms to the first token")

whole = llm.generate("".join(HEARD), max_tokens=24)
print(f"all at once:         {whole.receipt.ttft_ms:.1f} ms to the first token")
llm.close()
