"""A decision instead of a text: which of several options fits best, from a single prefill.

Every option is scored by the log-probability of the whole option, so that the answer is always one of them. The
prompt's examples are shared by all questions and computed only once (see `cached_tokens`). The embedded model is too
small to decide well; give a real one.

python examples/choose_intent.py [MODEL]
"""

import sys

import haomiao

OPTIONS = [" light", " music", " weather", " alarm"]
EXAMPLES = """Command: switch the bedroom lamp off
Topic: light
Command: play some jazz
Topic: music
Command: will it rain tomorrow
Topic: weather
Command: wake me at seven
Topic: alarm
"""

llm = haomiao.LLM(sys.argv[1] if len(sys.argv) > 1 else None)
for command in ("make the kitchen brighter", "next song please", "how hot is it outside"):
    choice = llm.choose(f"{EXAMPLES}Command: {command}\nTopic:", OPTIONS)
    scores = "  ".join(f"{option.strip()} {score:.2f}" for option, score in zip(OPTIONS, choice.scores, strict=True))
    receipt = choice.receipt
    print(f"{command!r} -> {choice.option.strip()}   [{scores}]")
    print(
        f"    {receipt.total_ms:.1f} ms, {receipt.cached_tokens} of {receipt.prompt_tokens} prompt tokens were cached"
    )
llm.close()
