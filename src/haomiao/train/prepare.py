"""Prepare pretraining data: `python -m haomiao.train.prepare CORPUS --root FOLDER --out DATA`.

CORPUS lists texts with their languages and licences (configs/corpus.yaml); they lie below --root. Text is cleaned of
repetitions and of what is held out, a vocabulary is learnt from it (or taken: --tokenizer), and token ids are written
as shards with a manifest that names every file, its licence, its digest and what was kept of it. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from haomiao.errors import InputError
from haomiao.train import vocabulary
from haomiao.train.command import run_command
from haomiao.train.corpus import Account, Seen, documents, read_file
from haomiao.train.settings import Corpus, read_corpus
from haomiao.train.shards import MANIFEST, TOKENIZER_FILES, write_manifest, write_shards

END = 0
Tell = Callable[[str], None]


def prepare(corpus: Corpus, root: Path, out: Path, *, tokenizer: Path | None = None, tell: Tell = print) -> Path:
    """Write the data folder `out` and return it. Raises `InputError` if it holds prepared data already."""
    if (out / MANIFEST).exists():
        raise InputError(f"{out} holds prepared data already", param="out")
    out.mkdir(parents=True, exist_ok=True)
    accounts = [Account() for _ in corpus.files]
    texts = read_all(corpus, root, accounts)
    if tokenizer is None:
        tell(f"learning a vocabulary of {corpus.vocabulary}")
        vocabulary.learn(sample(texts, corpus), corpus.vocabulary, out)
    else:
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, out / name)
    encode, size = _encoder(out / "tokenizer.json")
    streams: list[npt.NDArray[np.uint16]] = []
    valid: dict[str, Any] = {}
    for file, account, found in zip(corpus.files, accounts, texts, strict=True):
        ids = encode(found)
        account.tokens = sum(map(len, ids))
        tell(
            f"{file.path}: {account.tokens} tokens of {account.bytes_kept} bytes, {account.lines_dropped} lines dropped"
        )
        if file.use == "valid":
            written = write_shards(out, f"valid-{file.language}", ids)
            valid[file.language] = {"file": written[0], "bytes": account.bytes_kept, "path": file.path}
        else:
            streams += ids * file.repeat
    streams = limited(streams, corpus.limit_mib << 19, corpus.seed)
    train = write_shards(out, "train", streams)
    digest = hashlib.sha256()
    for name, _ in train:
        digest.update((out / name).read_bytes())
    listed = [
        dataclasses.asdict(file) | dataclasses.asdict(account)
        for file, account in zip(corpus.files, accounts, strict=True)
    ]
    tokens = sum(count for _, count in train)
    manifest = {"vocab_size": size, "tokens": tokens, "sha256": digest.hexdigest(), "train": train, "valid": valid}
    write_manifest(out, manifest | {"files": listed})
    return out


def read_all(corpus: Corpus, root: Path, accounts: list[Account]) -> list[list[str]]:
    """Documents of every file; held-out files are read first, so that nothing of them stays in the others."""
    seen = Seen()
    texts: list[list[str]] = [[] for _ in corpus.files]
    order = sorted(range(len(corpus.files)), key=lambda i: corpus.files[i].use == "train")
    for i in order:
        file = corpus.files[i]
        texts[i] = list(documents(file, read_file(root / file.path, accounts[i]), seen, accounts[i]))
        if not texts[i]:
            raise InputError(f"{file.path} holds no text that is not said elsewhere", param="files")
    if not any(file.use == "train" for file in corpus.files):
        raise InputError("no file of the corpus is for training", param="files")
    return texts


def sample(texts: list[list[str]], corpus: Corpus) -> Iterator[str]:
    """About `sample_mib` of training text, each file in its share, evenly over its documents' paragraphs."""
    train = [found for found, file in zip(texts, corpus.files, strict=True) if file.use == "train"]
    total = sum(len(d) for found in train for d in found)
    every = max(1, round(total / (corpus.sample_mib << 20)))
    at = 0
    for found in train:
        for document in found:
            for line in document.split("\n"):
                if at % every == 0:
                    yield line + "\n"
                at += 1


def limited(streams: list[npt.NDArray[np.uint16]], most: int, seed: int) -> list[npt.NDArray[np.uint16]]:
    """Documents in another order, as many as `most` tokens hold."""
    order = np.random.Generator(np.random.Philox([seed, 0])).permutation(len(streams))
    kept, tokens = [], 0
    for index in order:
        if tokens + len(streams[index]) <= most:
            kept.append(streams[index])
            tokens += len(streams[index])
    return kept


def _encoder(path: Path) -> tuple[Callable[[list[str]], list[npt.NDArray[np.uint16]]], int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    size = tokenizer.get_vocab_size()
    if size > 1 << 16:
        raise InputError(f"{path}: {size} tokens do not fit shards of 16 bits", param="tokenizer")

    def encode(texts: list[str]) -> list[npt.NDArray[np.uint16]]:
        found = []
        for begin in range(0, len(texts), 256):
            batch = tokenizer.encode_batch_fast(texts[begin : begin + 256], add_special_tokens=False)
            found += [np.array([*each.ids, END], "<u2") for each in batch]
        return found

    return encode, size


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="folder below which the texts lie")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", type=Path, help="take this folder's vocabulary instead of learning one")
    args = parser.parse_args(argv)
    prepare(read_corpus(args.corpus), args.root, args.out, tokenizer=args.tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
