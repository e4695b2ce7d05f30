"""What a teacher says of a text, computed once and kept on disk: its likeliest tokens and their log-probabilities.

`ids` [samples, tokens, k] and `logprobs` float16 of the same shape are plain arrays, mapped; the mass of all other
tokens is one minus theirs. `divergence` compares a student's logits with them: KL over the k tokens and the rest as
one, which is never more than the whole KL. Knows nothing about files' origin or training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from haomiao.load.disk import disk_errors

LEAST_REST = 1e-6
"""Mass that the rest is never below: float16 log-probabilities may sum to more than one."""
Logits = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]


class Teacher:
    """The cache of one teacher on one text at one temperature, in `folder`; made on first use, and whole or absent."""

    def __init__(self, folder: Path, identity: str, samples: npt.NDArray[np.int32], k: int, temperature: float) -> None:
        self.k, self.temperature = k, temperature
        self._samples = samples
        self._paths = folder / f"teacher-{identity}.ids.npy", folder / f"teacher-{identity}.logprobs.npy"

    def fill(self, logits: Logits, device: torch.device, batch: int, progress: Progress | None = None) -> None:
        """Ask the teacher, unless it was asked already. Raises `UnavailableError` if the disk is full."""
        if all(path.is_file() for path in self._paths):
            return
        shape = (*self._samples.shape, self.k)
        parts = [path.with_suffix(".part") for path in self._paths]
        with disk_errors(parts[0], kept=True):
            parts[0].parent.mkdir(parents=True, exist_ok=True)
            ids = np.lib.format.open_memmap(parts[0], mode="w+", dtype=np.int32, shape=shape)
            logprobs = np.lib.format.open_memmap(parts[1], mode="w+", dtype=np.float16, shape=shape)
            for begin in range(0, len(self._samples), batch):
                rows = torch.from_numpy(self._samples[begin : begin + batch].astype(np.int64)).to(device)
                with torch.no_grad():
                    found, said = likeliest(logits(rows), self.k, self.temperature)
                ids[begin : begin + batch] = found.cpu().numpy()
                logprobs[begin : begin + batch] = said.cpu().numpy().clip(-6e4)
                if progress is not None:
                    progress(min(begin + batch, len(self._samples)), len(self._samples))
            ids.flush()
            logprobs.flush()
            for part, path in zip(parts, self._paths, strict=True):
                part.replace(path)

    def answers(self, places: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids int64 and log-probabilities float32 of some samples, [samples, tokens, k]."""
        ids, logprobs = (np.load(path, mmap_mode="r", allow_pickle=False)[places] for path in self._paths)
        return torch.from_numpy(ids.astype(np.int64)).to(device), torch.from_numpy(logprobs.astype(np.float32)).to(
            device
        )


def divergence(logits: Tensor, ids: Tensor, logprobs: Tensor, *, temperature: float, reverse: bool) -> Tensor:
    """Mean KL(teacher || student), or with `reverse` KL(student || teacher), in nats per token: of the tokens `ids` and
    of all others as one. Times temperature squared, so that gradients keep their size (Hinton et al., 1503.02531)."""
    said = torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, ids)
    p, q = _with_rest(logprobs), _with_rest(said)
    kl = (q.exp() * (q - p) if reverse else p.exp() * (p - q)).sum(dim=-1)
    return kl.mean() * temperature**2


def likeliest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the k likeliest tokens, [samples, tokens, k]."""
    top = torch.log_softmax(logits.float() / temperature, dim=-1).topk(k, dim=-1)
    return top.indices, top.values


def distance(sums: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """How far a student's residual stream is from its teacher's: squared distance over the teacher's squared length,
    mean over the places where it is looked at (SquareHead: Kurtic et al., arXiv:2310.06927, section 3)."""
    each = [((ours - theirs) ** 2).sum() / (theirs**2).sum() for ours, theirs in zip(sums, teachers, strict=True)]
    return torch.stack(each).mean()


def _with_rest(logprobs: Tensor) -> Tensor:
    rest = (1 - logprobs.exp().sum(dim=-1, keepdim=True)).clamp(min=LEAST_REST)
    return torch.cat([logprobs, rest.log()], dim=-1)
