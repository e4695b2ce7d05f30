"""An answer that is always valid JSON of a given schema, whatever the model would rather say.

python examples/constrained_json.py [MODEL]
"""

import json
import sys

import haomiao

SCHEMA = {
    "type": "object",
    "properties": {
        "room": {"enum": ["kitchen", "bedroom", "living room"]},
        "on": {"type": "boolean"},
        "brightness": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["room", "on", "brightness"],
    "additionalProperties": False,
}

llm = haomiao.LLM(sys.argv[1] if len(sys.argv) > 1 else None)
answer = llm.generate("Dim the kitchen lamp to thirty percent.\nAs JSON: ", json_schema=SCHEMA, max_tokens=200)
print(answer.text)
if answer.finish_reason == "length":  # valid so far, but `max_tokens` came before its end
    print("not complete: raise max_tokens")
else:
    command = json.loads(answer.text)
    print(f"{command['room']}: {'on' if command['on'] else 'off'}, {command['brightness']} %")
llm.close()
