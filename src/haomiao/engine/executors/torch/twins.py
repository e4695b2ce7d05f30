"""Every operation of a plan in plain torch: slow, in float64 where a rule leaves the order open, and obviously right.

The truth beside which the fast kernels are tested on the same device, and all that the torch executor needs on a CPU.
Each states the rule of docs/ARCHITECTURE.md, sections 3 and 6, again. Knows no sequences and no plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haomiao.engine.executors.torch.matrices import DeviceMatrix, Tensor
from haomiao.models.plan import Activation
from haomiao.types import KV_SPLIT_TOKENS, Planes, Point

ACTIVATION_GROUP = 32
FIRST_LOOK = 256
"""Of a row that is drawn, the first so many entries (and those that are as good as the last) are put in order."""
MOST_KEPT = 4096
"""Entries that top-k may leave for the others not to count."""


def over(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once. (torch's own `number / x` is `number * (1 / x)`.)"""
    return torch.full_like(x, number) / x


def under(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once. (By a Python number, torch multiplies on CUDA.)"""
    return x / torch.full_like(x, number)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations f32 [tokens, cols] as codes f32 [tokens, groups, 32] and scales f32 [tokens, groups]. A group with a
    NaN or an infinity has the scale NaN."""
    groups = -(-x.shape[1] // ACTIVATION_GROUP)
    padded = torch.nn.functional.pad(x, (0, groups * ACTIVATION_GROUP - x.shape[1]))
    blocks = padded.view(-1, groups, ACTIVATION_GROUP)
    greatest = blocks.abs().amax(dim=2)
    inverse = over(127.0, greatest)
    usable = torch.isfinite(greatest) & ~torch.isinf(inverse)
    scales = torch.where(torch.isinf(inverse), torch.zeros_like(greatest), under(greatest, 127.0))
    scales = torch.where(torch.isfinite(greatest), scales, torch.full_like(scales, torch.nan))
    codes = torch.where(usable[..., None], torch.round(blocks * inverse[..., None]), torch.zeros_like(blocks))
    return codes, scales


def linear(matrix: DeviceMatrix, x: Tensor, point: Point, planes: Planes, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ (+ bias), f32 [tokens, rows], by the encoding and the point's activations."""
    if matrix.scales is not None and point.activations == "int8":
        y = _linear_codes(matrix, x, planes)
    else:
        rounds = point.activations == "bf16" and matrix.encoding != "f32"
        y = _linear_values(matrix.values(planes), x.bfloat16().float() if rounds else x)
    return y if bias is None else y + bias


def _linear_values(weights: Tensor, x: Tensor) -> Tensor:
    """Row by row: what a token gets must not depend on how many others are in the step."""
    wide = weights.double()
    return torch.stack([wide @ row for row in x.double()]).float()


def _linear_codes(matrix: DeviceMatrix, x: Tensor, planes: Planes) -> Tensor:
    """Groups of 32 columns: exact integer sums, added in ascending order as if by fused multiply-add."""
    codes, scales = quantize(x)
    weights, weight_scales = matrix.codes(planes)
    y = torch.zeros(x.shape[0], matrix.rows, dtype=torch.float64, device=x.device)
    for g in range(scales.shape[1]):
        columns = slice(g * ACTIVATION_GROUP, (g + 1) * ACTIVATION_GROUP)
        # every partial sum is an integer below 2^24, hence exact in float32 in any order
        total = codes[:, g] @ weights[:, columns].float().T
        scale = weight_scales[None, :, g * ACTIVATION_GROUP // matrix.group] * scales[:, g, None]
        y = (scale.double() * total.double() + y).float().double()
    return y.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis."""
    wide = x.double()
    return (wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.double()).float()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight (+ bias) over the last axis."""
    wide = x.double()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight.double()
    return (y if bias is None else y + bias.double()).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim]; cos, sin [tokens, dim / 2] rotate its first `dim` channels in halves."""
    half = cos.shape[1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)


def activate(x: Tensor, name: Activation) -> Tensor:
    """The activation functions, f64."""
    wide = x.double()
    if name == "silu":
        return torch.nn.functional.silu(wide)
    if name == "relu":
        return wide.clamp(min=0)
    return torch.nn.functional.gelu(wide, approximate="tanh" if name == "gelu_tanh" else "none")


def glu(source: Tensor, name: Activation) -> Tensor:
    """act(gate) * up of neurons that are interleaved by 32."""
    pairs = source.view(source.shape[0], -1, 2, 32)
    return (activate(pairs[:, :, 0], name) * pairs[:, :, 1].double()).reshape(source.shape[0], -1).float()


def softcapped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap); cap 0 leaves x alone."""
    return x if cap == 0 else cap * torch.tanh(x / cap)


def greatest(logits: Tensor) -> Tensor:
    """The lowest index among the greatest of each row, int32; a NaN is never the greatest."""
    shown = torch.where(torch.isnan(logits), torch.full_like(logits, -torch.inf), logits)
    indices = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)
    beyond = torch.full_like(indices, logits.shape[1] - 1)
    return torch.where(shown == shown.amax(dim=1, keepdim=True), indices, beyond).amin(dim=1)


@dataclass(frozen=True, slots=True)
class Draws:
    """`types.RowDraws` on a device, [rows] each; uniform and top_p float64, top_k int32, the others float32."""

    uniform: Tensor
    top_p: Tensor
    temperature: Tensor
    min_p: Tensor
    top_k: Tensor


def draw(logits: Tensor, draws: Draws) -> Tensor:
    """Tokens int32 [rows], the rule of `engine.draw`; -1: not to be drawn, not finite, or not among the first."""
    tokens = [
        _drawn(row, temperature, *each)
        for row, temperature, *each in zip(
            logits,
            draws.temperature,
            draws.top_k.tolist(),
            draws.top_p.tolist(),
            draws.min_p.tolist(),
            draws.uniform.tolist(),
            strict=True,
        )
    ]
    return torch.tensor(tokens, dtype=torch.int32, device=logits.device)


def _drawn(row: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    peak = row.amax()  # a NaN counts as the greatest
    if temperature <= 0 or not torch.isfinite(peak):
        return -1
    scaled = (row - peak) / temperature
    complete = False
    if 0 < top_k < scaled.shape[0]:
        best = torch.topk(scaled, top_k).values[-1]
        scaled = torch.where(scaled >= best, scaled, torch.full_like(scaled, -torch.inf))
        complete = int((scaled > -torch.inf).sum()) <= MOST_KEPT
    if complete:
        ids = torch.nonzero(scaled > -torch.inf)[:, 0]
    else:
        least = torch.topk(scaled, min(FIRST_LOOK, scaled.shape[0])).values[-1]
        ids = torch.nonzero((scaled >= least) & (scaled > -torch.inf))[:, 0]
    order = ids[torch.argsort(-scaled[ids], stable=True)]
    weights = torch.exp(scaled)
    total = None if complete else float(weights.double().sum())
    index = _walk(weights[order], total, top_p, min_p, uniform)
    return -1 if index is None else int(order[index])


def _walk(weights: Tensor, total: float | None, top_p: float, min_p: float, uniform: float) -> int | None:
    """The place in descending order at which the uniform number is used up; None if it is not among the given ones.
    `total` None: they are all."""
    count = weights.shape[0]
    mass = torch.cumsum(weights.double(), 0)
    whole = float(mass[-1]) if total is None else total
    kept, kept_mass = count, whole
    decided = total is None or (top_p >= 1.0 and min_p <= 0.0)
    if top_p < 1.0:
        last = int((mass < top_p * whole).sum())
        if last < count:
            kept, kept_mass, decided = last + 1, float(mass[last]), True
    if min_p > 0.0:
        likely = max(1, int((weights >= min_p).sum()))
        if likely < count:
            decided = True
            if likely < kept:
                kept, kept_mass = likely, float(mass[likely - 1])
    index = int((mass[:kept] <= uniform * kept_mass).sum())
    if not decided or (index >= kept and total is not None and kept == count):
        return None
    return index if index < kept else int(torch.nonzero(weights[:kept])[-1])


def kv_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values [..., head_dim] as int8 codes and one scale f32 [...] per token and head."""
    greatest_ = x.abs().amax(dim=-1)
    inverse = over(127.0, greatest_)
    usable = ~torch.isinf(inverse)
    codes = torch.where(usable[..., None], torch.round(x * inverse[..., None]), torch.zeros_like(x))
    return codes.to(torch.int8), torch.where(usable, under(greatest_, 127.0), torch.zeros_like(greatest_))


def attend(q: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int, softcap: float, int8: bool) -> Tensor:
    """One query token: q f32 [heads, head_dim] over K, V f32 [kv_heads, positions, head_dim], all visible; f64 [heads,
    head_dim]. With int8 K and V the query and the probabilities become codes of 16 bits."""
    kv_heads, length, head_dim = keys.shape
    asked = q.view(kv_heads, -1, head_dim) * torch.tensor(scale, dtype=torch.float32, device=q.device)
    if int8:
        asked = asked - _rounding(asked)
    scores = softcapped(asked.double() @ keys.double().transpose(1, 2), softcap)
    if window and length > window:
        scores[:, :, : length - window] = -torch.inf
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    wide = values.double()
    result = weights @ wide
    if int8:
        result -= _lost(weights, values)
    return (result / weights.sum(dim=-1, keepdim=True)).reshape(-1, head_dim)


def _lost(weights: Tensor, values: Tensor) -> Tensor:
    """What the sums lose because probabilities times V's scales are rounded, split by split."""
    greatest_ = values.abs().amax(dim=-1)[:, None, :]  # 127 times a value's scale
    lost = torch.zeros(*weights.shape[:2], values.shape[2], dtype=torch.float64, device=values.device)
    for start in range(0, values.shape[1], KV_SPLIT_TOKENS):
        split = slice(start, start + KV_SPLIT_TOKENS)
        rest = _rounding((weights[:, :, split] * greatest_[:, :, split]).float()).double()
        shares = torch.where(greatest_[:, :, split] > 0, rest / greatest_[:, :, split], torch.zeros_like(rest))
        lost += shares @ values[:, split].double()
    return lost


def _rounding(x: Tensor) -> Tensor:
    """What is lost where rows [..., n] become codes of 16 bits, one scale max|x| / 16383 per row."""
    greatest_ = x.abs().amax(dim=-1, keepdim=True)
    factor = over(16383.0, greatest_)
    usable = torch.isfinite(factor)
    codes = torch.where(usable, torch.round(x * factor), torch.zeros_like(x))
    return torch.where(usable, x - codes * under(greatest_, 16383.0), x)
