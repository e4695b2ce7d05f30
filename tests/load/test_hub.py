"""Downloads against a small server that speaks the hub's endpoints, on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haomiao.errors import DownloadError, InputError, ModelError, ModelNotFoundError
from haomiao.load import hub
from haomiao.load.source import open_source
from tests.load.checkpoints import safetensors_bytes
from tests.load.gguf_files import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = safetensors_bytes({"model.embed_tokens.weight": np.arange(4000, dtype=np.float32)})


class Hub:
    """Repositories as dictionaries of files; what happened to each request."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {
            "org/model": {
                "config.json": b'{"model_type": "llama"}',
                "model.safetensors": WEIGHTS,
                "tokenizer.json": b"{}",
                "pytorch_model.bin": b"\x80pickle",
                "modeling_evil.py": b"raise SystemExit",
            },
            "org/quants": {f"m.{q}.gguf": tiny("llama").bytes() for q in ("Q4_0", "Q8_0")},
            "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"\x80"},
        }
        self.fetched: list[str] = []
        self.tampered: bytes | None = None
        self.cut_after: int | None = None
        self.resumed_at: list[int] = []

    def respond(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            parts = path.removeprefix("api/models/").split("/")
            files = self.repos.get("/".join(parts[:2]))
            if files is None:
                return self.fail(handler, 404, "RepoNotFound")
            if "tree" in parts:
                return self.send(handler, json.dumps([self.entry(n, d) for n, d in files.items()]).encode())
            if parts[2:3] == ["revision"] and parts[3] not in ("main", COMMIT):
                return self.fail(handler, 404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in files]
            body = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0}
            return self.send(handler, json.dumps(body).encode())
        repo, _, rest = path.partition("/resolve/")
        name = rest.partition("/")[2]
        data = self.repos.get(repo, {}).get(name)
        if data is None:
            return self.fail(handler, 404, "EntryNotFound")
        if handler.command == "GET":
            self.fetched.append(name)
        return self.send_file(handler, data)

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith((".safetensors", ".gguf")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def send_file(self, handler: http.server.BaseHTTPRequestHandler, data: bytes) -> None:
        etag = hashlib.sha256(data).hexdigest()
        if self.tampered is not None and len(data) == len(self.tampered):
            data = self.tampered
        begin, status = 0, 200
        if (asked := handler.headers.get("Range")) is not None:
            self.resumed_at.append(int(asked.removeprefix("bytes=").split("-")[0]))
            begin, status = self.resumed_at[-1], 206
        handler.send_response(status)
        handler.send_header("ETag", f'"{etag}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(len(data) - begin))
        if status == 206:
            handler.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        handler.end_headers()
        if handler.command == "GET":
            end = len(data) if self.cut_after is None or begin else min(len(data), self.cut_after)
            handler.wfile.write(data[begin:end])

    def send(self, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def fail(self, handler: http.server.BaseHTTPRequestHandler, status: int, code: str) -> None:
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    site = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.respond(self)

        def do_HEAD(self) -> None:
            site.respond(self)

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    constants = pytest.importorskip("huggingface_hub.constants")
    url = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_HUB_OFFLINE", "HAOMIAO_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield site
    running.shutdown()
    running.server_close()


def test_a_model_directory_without_pickles_and_code(server: Hub) -> None:
    seen: list[tuple[str, int, int]] = []
    source = open_source("org/model", progress=lambda *report: seen.append(report))
    assert source.read("model.embed_tokens.weight").shape == (4000,)
    assert sorted(server.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "tokenizer.json" in source.files
    assert any(what.startswith("downloading") and done == total > 16000 for what, done, total in seen)
    server.fetched.clear()
    assert open_source("org/model").identity == source.identity
    assert server.fetched == [], "what is there is not fetched again"


def test_offline(server: Hub) -> None:
    with pytest.raises(DownloadError, match="offline") as caught:
        open_source("org/model", offline=True)
    assert caught.value.exit_code == 3
    online = open_source("org/model")
    server.repos.clear()
    assert open_source("org/model", offline=True).identity == online.identity
    assert open_source("org/model", offline=True, revision=COMMIT).identity == online.identity
    with pytest.raises(DownloadError, match="offline"):
        open_source("org/model", offline=True, revision="v2")


def test_offline_by_environment(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAOMIAO_OFFLINE", "1")
    with pytest.raises(DownloadError, match="offline"):
        open_source("org/model")
    assert server.fetched == []


@pytest.mark.parametrize("choice", [":Q8_0", ":q8_0", ":m.Q8_0", "/m.Q8_0.gguf"])
def test_one_gguf_of_several(server: Hub, choice: str) -> None:
    source = open_source("org/quants" + choice)
    assert source.name == "m.Q8_0" and server.fetched == ["m.Q8_0.gguf"]
    server.repos.clear()
    assert open_source("org/quants" + choice, offline=True).identity == source.identity


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("org/quants", InputError, "org/quants:Q4_0"),
        ("org/quants:Q2_K", ModelNotFoundError, "Q4_0, Q8_0"),
        ("org/quants/other.gguf", ModelNotFoundError, r"other\.gguf"),
        ("org/pickled", ModelError, "never loaded"),
        ("org/absent", ModelNotFoundError, "org/absent"),
        ("absent", ModelNotFoundError, "absent"),
    ],
)
def test_what_cannot_be_had(server: Hub, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_source(name)
    assert server.fetched == []


def test_revisions(server: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match="revision"):
        open_source("org/model", revision="v9")
    assert open_source("org/model", revision=COMMIT).name
    for wrong in ("../main", "", "a b", "/main"):
        with pytest.raises(InputError, match="revision"):
            open_source("org/model", revision=wrong)


def test_a_download_that_does_not_match_its_hash(server: Hub) -> None:
    server.tampered = WEIGHTS[:-1] + b"!"
    with pytest.raises(DownloadError, match="hash"):
        open_source("org/model")
    server.tampered = None
    assert open_source("org/model").read("model.embed_tokens.weight")[-1] == 3999


def test_an_interrupted_download_goes_on(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 250)  # what is lost at most
    server.cut_after = 1000
    source = open_source("org/model")  # the first answer breaks off; the rest is asked for from where it stopped
    assert source.read("model.embed_tokens.weight")[-1] == 3999
    assert server.fetched.count("model.safetensors") == 2 and server.resumed_at == [1000]


def test_nobody_listens(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="could not be fetched") as caught:
        open_source("org/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../model", "org/../model", "a/b/c", "/nowhere/passwd", "org/model/../../x.gguf", "org//model", "org/mo del",
     "http://host/model", "org/model:", "org/model:a/b", "models--org--x", "x.gguf", "w.bin", "-rf", "org/.hidden",
     "毫秒"],
)  # fmt: skip
def test_what_is_not_an_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no `../model` happens to be
    assert not hub.is_id(name)
    with pytest.raises(ModelNotFoundError):
        open_source(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", hub.HubId("gpt2")),
        ("Qwen/Qwen2.5-0.5B", hub.HubId("Qwen/Qwen2.5-0.5B")),
        ("a/b:IQ4_XS", hub.HubId("a/b", choice="IQ4_XS")),
        ("a/b/sub/c-Q4_K_M.gguf", hub.HubId("a/b", file="sub/c-Q4_K_M.gguf")),
    ],
)
def test_ids(name: str, expected: hub.HubId) -> None:
    assert hub.parse_id(name) == expected


def test_selection() -> None:
    def select(*names: str, **wish: Any) -> list[str]:
        return hub.select(names, hub.HubId("r", **wish))

    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    found = select(*shards, "model.safetensors.index.json", "consolidated.safetensors", "config.json", "x.py")
    assert set(found) == {*shards, "model.safetensors.index.json", "config.json"}
    split = [f"m-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]
    with pytest.raises(ModelError, match="split"):
        select(*split, choice="q4_k_m")
    assert select("m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf", choice="Q4_K_M") == ["m-Q4_K_M.gguf"]
    assert select("a.gguf", "mmproj-a.gguf") == ["a.gguf"]
    with pytest.raises(ModelError, match="no safetensors or GGUF"):
        select("README.md")


def test_nothing_heavy_is_imported_early() -> None:
    code = "import sys, haomiao.load.source, haomiao.load.hub; assert 'huggingface_hub' not in sys.modules"
    run: Callable[..., Any] = subprocess.run
    assert run([sys.executable, "-c", code], check=False).returncode == 0
