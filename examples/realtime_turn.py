"""A turn of a voice assistant over /v1/realtime: words are sent as they are recognized, one of them is corrected, and
the answer begins as soon as the speaker has finished, inside a budget.

python examples/realtime_turn.py [URL of a running `haomiao serve`]    without one, a server is started for the example
"""

import json
import re
import subprocess
import sys
import time

from websockets.sync.client import connect

SAID = "Once upon a time there was a little girl who lived with her grandfather in the"
BUDGET_MS = 300


def say(socket, kind, **fields):
    socket.send(json.dumps({"type": kind, **fields}))


def hear(socket, *kinds):
    """The next event of these kinds; an error ends the example."""
    while True:
        event = json.loads(socket.recv(timeout=60))
        if event["type"] == "error":
            sys.exit(event["error"]["message"])
        if event["type"] in kinds:
            return event


def converse(url):
    with connect(url.replace("http", "ws", 1) + "/v1/realtime", proxy=None) as socket:
        for word in SAID.split():  # each word is read while the next is being spoken
            say(socket, "input_text_buffer.append", text=" " + word)
            hear(socket, "input_text_buffer.computed")
        said = " " + SAID
        # the recognizer thinks again: only what follows the corrected word is read again
        say(socket, "input_text_buffer.replace", start=said.index("grandfather"), text="grandmother in the")
        hear(socket, "input_text_buffer.computed")

        say(socket, "input_text_buffer.commit")
        asked = time.monotonic()
        say(socket, "response.create", response={"max_output_tokens": 24, "budget_ms": BUDGET_MS})
        first = hear(socket, "response.output_text.delta", "response.done")
        if first["type"] == "response.done":  # refused: it could not be kept
            sys.exit(first["response"]["status_details"]["error"]["message"])
        print(f"first token {1e3 * (time.monotonic() - asked):.1f} ms after the last word: {first['delta']!r}")
        response = hear(socket, "response.done")["response"]

    if response["status"] == "failed":
        sys.exit(response["status_details"]["error"]["message"])
    receipt = response["haomiao"]["receipt"]
    print(said.replace("grandfather", "grandmother"), "|", response["output"][0]["content"][0]["text"])
    print(f"{receipt['cached_tokens']} of {receipt['prompt_tokens']} prompt tokens were read ahead")
    print(f"{receipt['total_ms']:.0f} of {BUDGET_MS} ms, outcome {receipt['outcome']}")


if len(sys.argv) > 1:
    converse(sys.argv[1])
else:
    command = [sys.executable, "-m", "haomiao", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            converse(next(found[1] for line in server.stderr if (found := re.search(r"(http://\S+) · ", line))))
        finally:
            server.terminate()
            server.stderr.read()
