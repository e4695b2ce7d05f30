"""A compressed matrix that learns: codes and scales as they will be stored, gradients straight through the rounding.

The latent of a weight is its place on the grid of `hi` codes, w = scale * latent, so that both planes come from one
number: `hi` is the latent rounded, `lo` what is left of it in steps of 2^-lo_shift. Where a solver had chosen another
`hi` than the nearest to both planes, the nearest is taken: a choice that is held on to keeps `hi` from following its
latent, and each point learns what the other does not feel (docs/LOG.md, "Half of what pruning lost"). Rounding has the
gradient of the identity (Bengio et al., arXiv:1308.3432); scales move by a factor exp(t). What is pruned (code zero in
all planes) stays zero: a mask. Knows nothing about losses.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from haomiao.kernels.pack import pack_int8, pack_planes, unpack, unpack_codes, without_empty
from haomiao.kernels.packed import PackedTensor

UNIT = 30.0
"""Codes by which a latent moves when its parameter moves by one: a rate of 0.0005 moves it by 0.015 codes a step."""
SHARE = 5.0
"""Share of themselves by which scales and vectors move then: 0.25 % a step. Few numbers that every token tells about
may move faster than codes (docs/LOG.md)."""
LEAST_SIZE = 1e-3
"""Size of a vector of zeros, such as a bias that was never trained."""


class RoundedMatrix:
    """One matrix of an artifact. `parameters` are what is learnt; `weights(point)` what a plan computes with."""

    def __init__(self, packed: PackedTensor, device: torch.device) -> None:
        self.packed = packed
        self.nested = packed.encoding == "planes" and packed.lo is not None
        self._least, self._most = (-128, 127) if packed.encoding == "int8" else (-8, 7)
        hi, scales = (torch.from_numpy(np.array(a, np.float32)) for a in unpack_codes(packed, "hi"))
        latent = hi
        if self.nested:
            both, _ = unpack_codes(packed)
            latent = torch.from_numpy(both.astype(np.float32)) * 2.0**-packed.lo_shift
        # a fine plane reaches from -8 to 7 steps: half a step more brings its middle to the code
        self._shift = 0.5 * 2.0**-packed.lo_shift if self.nested else 0.0
        self._mask = ((hi != 0) | (latent != 0)).float().to(device)
        self._scales = scales.to(device)
        self._latent = latent.to(device)
        self.parameters = {
            "codes": torch.zeros_like(self._latent).requires_grad_(),
            "scales": torch.zeros_like(self._scales).requires_grad_(),
        }

    def weights(self, point: str) -> Tensor:
        """float32 [rows, cols] as `point` reads them, with gradients into the parameters."""
        latent = self._place()
        hi = self._hi(latent)
        codes = latent + (hi - latent).detach()
        if self.nested and point != "int4":
            step = 2.0**self.packed.lo_shift
            lo = self._lo(latent, hi)
            codes = latent + (hi + lo / step - latent).detach()
        return codes * self._mask * self._spread()

    def pack(self) -> PackedTensor:
        """The matrix as it will be stored."""
        with torch.no_grad():
            latent = self._place()
            hi = self._hi(latent) * self._mask
            lo = (self._lo(latent, hi) * self._mask).cpu().numpy().astype(np.int8) if self.nested else None
            scales = self._rounded_scales().cpu().numpy()
        codes = hi.cpu().numpy().astype(np.int16)
        if self.packed.encoding == "int8":
            made = pack_int8(codes, scales, self.packed.group)
        else:
            made = pack_planes(codes, lo, scales, self.packed.group, self.packed.lo_shift if self.nested else 0)
        # tiles that were not stored are still empty, and so are not stored again
        return made if self.packed.kept is None else without_empty(made, 0.0)

    def _place(self) -> Tensor:
        return self._latent + UNIT * self.parameters["codes"]

    def _hi(self, latent: Tensor) -> Tensor:
        return torch.round(latent.detach() + self._shift).clamp(self._least, self._most)

    def _lo(self, latent: Tensor, hi: Tensor) -> Tensor:
        return torch.round((latent.detach() - hi) * 2.0**self.packed.lo_shift).clamp(-8, 7)

    def _rounded_scales(self) -> Tensor:
        """Scales as float16 holds them, [rows, groups]."""
        scales = self._scales * torch.exp(SHARE * self.parameters["scales"])
        return scales + (scales.half().float() - scales).detach()

    def _spread(self) -> Tensor:
        spread = self._rounded_scales().repeat_interleave(self.packed.group, dim=1)
        return spread[:, : self.packed.cols]


class MovedVector:
    """A vector that learns, as it is stored: it moves by shares of its own size (root of the mean square)."""

    def __init__(self, stored: npt.NDArray[np.float32], device: torch.device) -> None:
        self._stored = torch.tensor(stored, device=device)
        self._unit = SHARE * max(float(self._stored.square().mean().sqrt()), LEAST_SIZE)
        self.parameter = torch.zeros_like(self._stored).requires_grad_()

    def value(self) -> Tensor:
        """float32 [rows], with a gradient into the parameter."""
        return self._stored + self._unit * self.parameter


def fixed(packed: PackedTensor) -> Tensor:
    """A matrix that is not learnt, with all planes that are stored."""
    return torch.from_numpy(np.array(unpack(packed), np.float32))
