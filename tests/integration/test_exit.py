"""A program that ends without closing its model, while something is done in idle time, ends as it should."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from haomiao import LLM
from haomiao.errors import BudgetError
llm = LLM(points=["int4"])
for _ in range(2):
    try:
        llm.choose("one two three", ["four", "five"], budget_ms=0.01)  # refused, and rehearsed at once
    except BudgetError:
        print("refused")
"""


def test_a_program_may_end_while_the_idle_thread_works() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\nrefused\n", "")
