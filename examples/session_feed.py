"""Reading while the user still speaks: text is computed as it arrives, so that after the last word the first token
costs one step instead of the whole prompt.

python examples/session_feed.py [MODEL]
"""

import sys

import haomiao

HEARD = [f"Sensor {number} in the house reports {18 + number % 7} degrees. " for number in range(40)]
HEARD.append("The warmest room is")

llm = haomiao.LLM(sys.argv[1] if len(sys.argv) > 1 else None, prefix_cache=False)  # so that both start from nothing
with llm.session() as session:
    for piece in HEARD:  # each piece is computed now, while the next is still being spoken
        session.feed(piece)
    answer = session.generate(max_tokens=16)
whole = llm.generate("".join(HEARD), max_tokens=16)

print(answer.text)
print(f"fed as it was heard: first token {answer.receipt.ttft_ms:.1f} ms after the last word")
print(f"all at the end:      first token {whole.receipt.ttft_ms:.1f} ms after the last word")
print("the same answer:", answer.text == whole.text)
llm.close()
