"""Models from the Hugging Face hub, through `huggingface_hub` and its standard cache (HF_HOME, HF_TOKEN, resume).

Only what a model needs is fetched: its weights as safetensors or one GGUF file, its config and its tokenizer; never
pickles or code. Large files are checked against the hash that names them. Knows nothing about what is in the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haomiao import config
from haomiao.errors import DownloadError, HaomiaoError, InputError, ModelError, ModelNotFoundError, UnavailableError
from haomiao.load.checkpoint import INDEX, PICKLES, SINGLE, TEXT_FILES
from haomiao.load.disk import FULL
from haomiao.load.source import Progress

PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
ID = re.compile(rf"(?P<repo>(?:{PART}/)?{PART})(?::(?P<choice>[A-Za-z0-9._-]{{1,64}}))?")
FILE = re.compile(rf"(?P<repo>{PART}/{PART})/(?P<file>(?:{PART}/){{0,4}}{PART}\.gguf)")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}")
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
MAX_LISTED = 12
HASH_CHUNK = 16 << 20


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository, and the GGUF file of it that was asked for: by its path, or by a part of its name (`Q4_K_M`)."""

    repo: str
    file: str | None = None
    choice: str | None = None


def parse_id(name: str) -> HubId | None:
    """`org/repo`, `repo`, `org/repo:Q4_K_M` or `org/repo/file.gguf`; None for what cannot be a Hugging Face id."""
    if match := FILE.fullmatch(name):
        found = HubId(match["repo"], file=match["file"])
    elif match := ID.fullmatch(name):
        found = HubId(match["repo"], choice=match["choice"])
    else:
        return None
    plain = "/" not in name and name.endswith((".gguf", ".safetensors", ".json", *PICKLES))  # a file that is not here
    return None if plain or ".." in name or "--" in found.repo else found


def is_id(name: str) -> bool:
    """True if `name` can be a Hugging Face id."""
    return parse_id(name) is not None


def download(
    name: str,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The snapshot directory or GGUF file of an id, fetched as far as it is not there. An interrupted download goes on.

    Raises `ModelNotFoundError` (no such repository, revision or file), `DownloadError` (offline, refused, interrupted,
    a hash that does not match), `UnavailableError` (no room on the disk), `ModelError` (nothing but pickles).
    """
    hub_id = parse_id(name)
    if hub_id is None:
        raise InputError(f"{name[:128]!r} is not a Hugging Face id", param="model")
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise InputError(f"{revision[:128]!r} is not a revision", param="revision")
    if config.offline() if offline is None else offline:
        return _cached(hub_id, revision)
    with _hub_errors(hub_id.repo):
        return _fetch(hub_id, revision, token, progress)


def select(names: Sequence[str], hub_id: HubId) -> list[str]:
    """The files of a repository that the model needs; one GGUF file, or config, weights and tokenizer."""
    ggufs = sorted(name for name in names if name.endswith(".gguf") and "mmproj" not in name)
    if hub_id.file is not None or hub_id.choice is not None:
        return [_choose(ggufs, hub_id)]
    text = [name for name in (*TEXT_FILES, "config.json") if name in names]
    if SINGLE in names:
        return [SINGLE, *text]
    if INDEX in names:
        return [*(name for name in names if SHARD.fullmatch(name)), INDEX, *text]
    tensors = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(tensors) == 1:
        return [*tensors, *text]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise InputError(f"{hub_id.repo} has {len(ggufs)} GGUF files; choose one, as {hub_id.repo}:{_quant(ggufs[0])}")
    pickled = next((name for name in names if name.endswith(PICKLES)), None)
    if pickled is not None:
        raise ModelError(f"{hub_id.repo}: only pickled weights ({pickled}), which are never loaded")
    raise ModelError(f"{hub_id.repo}: no safetensors or GGUF weights")


def _choose(ggufs: Sequence[str], hub_id: HubId) -> str:
    if hub_id.file is not None:
        found = [name for name in ggufs if name == hub_id.file]
    else:
        wanted = str(hub_id.choice).lower().removesuffix(".gguf")
        found = [name for name in ggufs if _quant(name).lower() == wanted or Path(name).stem.lower() == wanted]
    if len(found) == 1:
        return found[0]
    wish = hub_id.file or hub_id.choice
    if any(SPLIT.search(name) for name in found):
        raise ModelError(f"{hub_id.repo}: {wish} is split into {len(found)} files, which is not supported")
    there = ", ".join(_quant(name) for name in ggufs[:MAX_LISTED]) or "none"
    raise ModelNotFoundError(f"{hub_id.repo} has no GGUF file {wish} (there are: {there})")


def _quant(name: str) -> str:
    """`Q4_K_M` of `model-name.Q4_K_M.gguf`."""
    stem = SPLIT.sub("", Path(name).name).removesuffix(".gguf")
    match = re.search(r"[-.]((?:UD-)?(?:I?Q\d\w*|BF16|F16|F32|MXFP4\w*|TQ\d\w*))$", stem, re.IGNORECASE)
    return match[1] if match else stem


# ---- fetching -----------------------------------------------------------------------------------------------------


def _fetch(hub_id: HubId, revision: str | None, token: str | None, progress: Progress | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi(token=token, library_name="haomiao")
    info = api.model_info(hub_id.repo, revision=revision)  # one commit for the listing and for every file
    names = [item.rfilename for item in info.siblings or []]
    chosen = select(names, hub_id)
    started = time.time()
    directory = Path(
        snapshot_download(
            hub_id.repo,
            revision=info.sha,
            token=token,
            allow_patterns=[_literal(name) for name in chosen],
            tqdm_class=_bar(hub_id.repo, progress),
            library_name="haomiao",
        )
    )
    if revision is None or revision != info.sha:
        _remember(directory, revision or "main", str(info.sha))
    for name in chosen:
        _check_hash(directory / name, started, progress)
    return _opened(directory, chosen)


def _remember(directory: Path, revision: str, commit: str) -> None:
    """Note which commit a branch or tag means, as huggingface_hub itself does when it is asked by name."""
    reference = directory.parent.parent / "refs" / revision
    with contextlib.suppress(OSError):
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


def _opened(directory: Path, chosen: Sequence[str]) -> Path:
    return directory / chosen[0] if chosen[0].endswith(".gguf") else directory


def _cached(hub_id: HubId, revision: str | None) -> Path:
    """What the standard cache holds already: models--org--name/{refs/<branch>, snapshots/<commit>/...}."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ("models--" + hub_id.repo.replace("/", "--"))
    offline = DownloadError(f"{hub_id.repo} is not in the cache, and nothing may be fetched (offline)", code="offline")
    wanted = revision or "main"
    try:
        reference = folder / "refs" / wanted
        commit = reference.read_text().strip() if reference.is_file() else wanted
        directory = folder / "snapshots" / commit
        if not re.fullmatch(r"[0-9a-f]{7,64}", commit) or not directory.is_dir():
            raise offline
        names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    except OSError:
        raise offline from None
    if not names:
        raise offline
    return _opened(directory, select(names, hub_id))


def _literal(name: str) -> str:
    """A glob that matches just this name."""
    return re.sub(r"([\[\]*?])", r"[\1]", name)


def _check_hash(path: Path, started: float, progress: Progress | None) -> None:
    """Blobs of large files are named by their SHA-256: check those that this download brought."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name) or blob.stat().st_mtime < started - 1:
        return
    digest, size, done = hashlib.sha256(), blob.stat().st_size, 0
    with blob.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(f"checking {path.name}", done, size)
    if digest.hexdigest() != blob.name:
        blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise DownloadError(f"{path.name}: the download does not match its hash and was removed; try again")


def _bar(what: str, progress: Progress | None) -> type[Any]:
    """A tqdm class that draws nothing and reports bytes to `progress`."""
    tqdm: Any = importlib.import_module("tqdm").tqdm  # a dependency of huggingface_hub, without types

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **options)

        def display(self, *_: Any, **__: Any) -> None:
            if progress is not None and getattr(self, "unit", "") == "B" and self.total:
                progress(f"downloading {what}", int(self.n), int(self.total))

        def close(self) -> None:
            self.display()
            self.disable = True

    return Bar


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Whatever huggingface_hub and its HTTP client raise, as one line of ours."""
    from huggingface_hub import errors

    kinds: list[tuple[type[BaseException], Callable[[str], HaomiaoError]]] = [
        (errors.GatedRepoError, lambda _: DownloadError(f"{repo} is gated: accept its terms and set HF_TOKEN")),
        (
            errors.RepositoryNotFoundError,
            lambda _: ModelNotFoundError(
                f"{repo}: no such path here, and no such model on the hub (private? HF_TOKEN)"
            ),
        ),
        (errors.RevisionNotFoundError, lambda _: ModelNotFoundError(f"{repo} has no such revision")),
        (errors.EntryNotFoundError, lambda text: ModelNotFoundError(f"{repo}: {text}")),
        (errors.OfflineModeIsEnabled, lambda _: DownloadError(f"{repo}: the hub is switched off (HF_HUB_OFFLINE)")),
    ]
    try:
        yield
    except HaomiaoError:
        raise
    except Exception as wrong:
        text = (str(wrong).strip() or type(wrong).__name__).splitlines()[0][:200]
        if isinstance(wrong, OSError) and wrong.errno in FULL:
            raise UnavailableError(f"no room on the disk for {repo}") from None
        for kind, make in kinds:
            if isinstance(wrong, kind):
                raise make(text) from None
        raise DownloadError(f"{repo} could not be fetched ({type(wrong).__name__}: {text})") from None
