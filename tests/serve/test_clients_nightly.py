"""Other people's clients, as their users call them; skipped where they are not installed (.ci/nightly installs them).

schemathesis asks everything that the OpenAPI document allows, and much that it does not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from haomiao.models.open import EMBEDDED, embedded_path
from tests.serve.conftest import Command

pytestmark = pytest.mark.nightly
CASES = int(os.environ.get("HAOMIAO_SCHEMATHESIS_CASES", "200"))
"""Examples an operation; .ci/release asks for more."""
SECONDS = int(os.environ.get("HAOMIAO_SCHEMATHESIS_SECONDS", "900"))
"""After so long it ends with what it has found."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # quiet: nobody reads its stderr meanwhile, and a pipe that is full holds the whole server up
    server = Command("--max-queue", "64", "--max-model-len", "256", "--log-level", "error")
    yield server.url()
    code, _ = server.end()
    assert code == 0


def test_langchain(url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model=EMBEDDED, base_url=url + "/v1", api_key="unused", max_tokens=8, max_retries=0)
    answer = model.invoke([("system", "Be brief."), ("human", "Hello")])
    assert isinstance(answer.content, str) and answer.usage_metadata["output_tokens"] <= 8
    assert "".join(str(chunk.content) for chunk in model.stream("Hello")) == model.invoke("Hello").content
    chosen = model.bind(extra_body={"structured_outputs": {"choice": ["yes", "no"]}, "budget_ms": 60_000})
    assert chosen.invoke("Is the sky blue?").content in ("yes", "no")


def test_litellm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its prices are not looked up
    litellm = pytest.importorskip("litellm")
    asked = {
        "model": f"openai/{EMBEDDED}",
        "api_base": url + "/v1",
        "api_key": "unused",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "num_retries": 0,
    }
    answer = litellm.completion(**asked)
    assert answer.usage.completion_tokens <= 8
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True))
    assert streamed == answer.choices[0].message.content


TASK = """
task: haomiao_smoke
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def test_lm_eval(url: str, tmp_path: Path) -> None:
    """lm-eval scores prompts by `echo` and `logprobs`; the task is made here, so that nothing is downloaded."""
    pytest.importorskip("lm_eval")
    data = tmp_path / "test.jsonl"
    questions = [("The sky is", [" blue", " seven"]), ("A dog can", [" run", " purple"]), ("1 + 1 =", [" 2", " sea"])]
    rows = [{"question": text, "choices": choices, "answer": 0} for text, choices in questions]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    server = f"model={EMBEDDED},base_url={url}/v1/completions"
    model = ["--model", "local-completions", "--model_args", f"{server},tokenizer={embedded_path()}"]
    task = ["--tasks", "haomiao_smoke", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    found = subprocess.run(
        [sys.executable, "-m", "lm_eval", *model, *task],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    scores = json.loads(results.read_text())["results"]["haomiao_smoke"]
    assert 0.0 <= scores["acc,none"] <= 1.0


@pytest.mark.timeout(2 * SECONDS + 300)
def test_schemathesis(url: str, tmp_path: Path) -> None:
    """No status that the document does not name, no 500, no 502."""
    program = shutil.which("schemathesis") or shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("schemathesis is not installed")
    checks = ("--checks", "status_code_conformance,content_type_conformance,response_schema_conformance")
    bounds = (
        "--max-examples",
        str(CASES),
        "--request-timeout",
        "120",
        "--max-time",
        str(SECONDS),
        "--phases",
        "examples,coverage,fuzzing",
    )
    found = subprocess.run(
        [program, "run", url + "/openapi.json", "--seed", "1", *checks, *bounds, "--generation-database", "none"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=2 * SECONDS + 200,
    )
    assert found.returncode == 0, found.stdout[-6000:]
    metrics = httpx.get(url + "/metrics", trust_env=False).text
    counted = [line for line in metrics.splitlines() if line.startswith("haomiao:http_requests_total")]
    assert sum(float(line.rpartition(" ")[2]) for line in counted) > CASES
    assert not [line for line in counted if 'status="500"' in line or 'status="502"' in line]
