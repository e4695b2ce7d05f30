"""Steps with Triton kernels: a decode step is one captured CUDA graph, from the copy of its inputs to that of its
tokens.

Steps of up to 64 tokens are padded to a bucket, for which a graph is captured on its second use (the first one compiles
kernels) or ahead by `prepare`; longer ones are launched kernel by kernel. Without CUDA (Triton's interpreter)
everything is launched. Knows stages and buffers; kernels behind `launch`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from haomiao.engine.executors.torch import attending, drawing, launch
from haomiao.engine.executors.torch import inputs as step_inputs
from haomiao.engine.executors.torch.copies import copied_slots
from haomiao.engine.executors.torch.inputs import StepInputs, StepSize
from haomiao.engine.executors.torch.lowering import AttentionStage, MatrixStage, lower
from haomiao.engine.executors.torch.matrices import Tensor
from haomiao.engine.executors.torch.model import DeviceModel
from haomiao.errors import EngineError
from haomiao.models import plan as ops
from haomiao.types import F32, I32, KV_BLOCK_TOKENS, POINTS, Point, StepBatch

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens for which graphs are captured."""
CONTEXT_STEP = 4
FIRST_CONTEXT = 1024
"""Graphs are made for contexts of up to 1024 positions, 4096, and so on: programs of splits beyond a sequence's end
cost time."""


@dataclass
class _Launch:
    """A kind of step: its size, where its inputs and results lie, its graph once it is captured."""

    size: StepSize
    words: Tensor  # int32, on the device
    host_words: Tensor  # int32, pinned
    logits: Tensor  # f32 [rows, vocab]
    chosen: Tensor  # int32 [1 or 2, rows]: the places of the greatest, and what was drawn
    host_chosen: Tensor  # int32, pinned
    graph: Any = None
    used: bool = False
    copies: Tensor | None = None
    """Slots int64 [2, copies]: a step that copies K and V (`StepBatch.copies`) is launched, not replayed."""


class FastRunner:
    """Runs the steps of one model. `points` are those of the executor."""

    def __init__(self, model: DeviceModel, points: tuple[str, ...], max_step_tokens: int) -> None:
        self.model, self.points = model, points
        self.stages = lower(model.plan)
        self._cuda = model.device.type == "cuda"
        self._most = most = max(max_step_tokens, BUCKETS[-1])
        with torch.inference_mode():
            self._buffers = {
                name: torch.zeros(most, width, device=model.device) for name, width in model.plan.buffers.items()
            }
            widest = max((op.heads * op.head_dim for op in model.ops if isinstance(op, ops.Attention)), default=1)
            self._q = torch.zeros(most * widest, device=model.device)
            self._logits = torch.zeros(BUCKETS[-1], model.plan.vocab_size, device=model.device)
            self._host_logits = self._pinned((BUCKETS[-1], model.plan.vocab_size), torch.float32)
        self._shapes = {s.op.layer: self._heads(s) for s in self.stages if isinstance(s, AttentionStage)}
        self._launches: dict[tuple[str, int, int, bool], _Launch] = {}
        self._pool: Any = None
        self.launches = 0
        """Launches of the last step that the host made: 1 for a graph."""

    # ---- steps ------------------------------------------------------------------------------------------------------

    def step(self, batch: StepBatch) -> tuple[F32, I32, I32 | None, F32 | None]:
        """Logits [rows, vocab] (unspecified where they are not wanted), the places of their greatest, the tokens that
        were drawn, and the hidden states that were asked for."""
        rows = int(batch.logit_rows.size)
        with torch.inference_mode():
            copied = copied_slots(batch)
            if batch.tokens <= BUCKETS[-1] and copied is None:
                made = self._launch_for(batch)
                step_inputs.fill(made.host_words.numpy(), made.size, batch, self.model.kv_blocks)
                self._run(batch.point, made)
            else:
                made = self._made(step_inputs.prefill_size(batch))
                made.copies = None if copied is None else torch.from_numpy(copied).to(self.model.device)
                step_inputs.fill(made.host_words.numpy(), made.size, batch, self.model.kv_blocks)
                self._eager(POINTS[batch.point], made)
            whole = _wanted(batch)
            logits = self._fetched(made.logits[:rows], whole)
            hidden = None if batch.hidden_rows is None else self._hidden(batch.hidden_rows)
            self._wait()
            chosen = made.host_chosen.numpy()[:, :rows].copy()
            if batch.draws is None:
                return logits, chosen[0], None, hidden
            if not whole:
                self._bring(np.flatnonzero((batch.draws.temperature > 0) & (chosen[1] < 0)), made.logits, logits)
            return logits, chosen[0], chosen[1], hidden

    def _bring(self, rows: npt.NDArray[np.int64], logits: Tensor, found: F32) -> None:
        """Copy rows that were not decided to the host; they stay on the device until the next step."""
        for row in rows.tolist():
            torch.from_numpy(found[row]).copy_(logits[row], non_blocking=True)
        if rows.size:
            self._wait()

    def _hidden(self, rows: I32) -> F32:
        """Hidden states [hidden rows, hidden] after the step, whose buffers still hold what stands before the head."""
        stage = self.stages[-1]
        if not (isinstance(stage, MatrixStage) and isinstance(stage.op, ops.Head)) or isinstance(stage.before, ops.Glu):
            raise EngineError("no hidden states stand before the plan's head")
        before = stage.before
        source = self._buffers[stage.op.source if before is None else before.source]
        x = source.index_select(0, torch.from_numpy(rows.astype(np.int64)).to(source.device))
        if before is not None:
            normed = torch.empty_like(x)
            self._norm(before, normed, x)
            x = normed
        found: F32 = x.cpu().numpy()
        return found

    def prepare(self, tokens: tuple[int, ...] = BUCKETS, contexts: tuple[int, ...] | None = None) -> None:
        """Compile kernels and capture graphs for these numbers of tokens (and contexts; default: all) ahead, so that no
        answer waits for it."""
        reaches = self.contexts if contexts is None else tuple(self._context_bucket(each) for each in contexts)
        with torch.inference_mode():
            for point, bucket, drawn in itertools.product(self.points, tokens, (False, True)):
                for context in reaches:
                    made = self._kept(point, bucket, context, drawn)
                    self._empty(made)
                    for _ in range(2):
                        self._run(point, made)
            for point, size in itertools.product(self.points, self._long_sizes()):
                made = self._made(size)
                self._empty(made)
                self._eager(POINTS[point], made)
            self._wait()

    def _empty(self, made: _Launch) -> None:
        """Inputs of a step in which no token attends, and all write where nobody reads."""
        t = made.size.tokens
        made.host_words.zero_()
        made.host_words[2 * t : 3 * t].fill_(self.model.kv_blocks * KV_BLOCK_TOKENS)

    def _long_sizes(self) -> list[StepSize]:
        """Steps that no graph is made for, one for each way of computing them: their kernels are compiled ahead too."""
        lengths = {BUCKETS[-1] + 1, max(launch.DEQUANTIZED_FROM, BUCKETS[-1] + 1)}
        return [step_inputs.long_size(n) for n in sorted(lengths) if n <= self._most]

    def replay_of(self, batch: StepBatch) -> Callable[[], None] | None:
        """What replays the graph of such a step once more, with the inputs of its last; None before it is captured."""
        made = self._launch_for(batch)
        return None if made.graph is None else made.graph.replay

    @property
    def contexts(self) -> tuple[int, ...]:
        """The contexts that graphs are made for."""
        found = [self._context_bucket(1)]
        while found[-1] < self.model.plan.max_context:
            found.append(self._context_bucket(found[-1] + 1))
        return tuple(found)

    @property
    def graphs(self) -> int:
        """Graphs that were captured."""
        return sum(made.graph is not None for made in self._launches.values())

    def _run(self, point: str, made: _Launch) -> None:
        """Replay, or launch; capture on the second use."""
        if made.graph is None and made.used and self._cuda:
            self._capture(point, made)
        if made.graph is not None:
            made.graph.replay()
            self.launches = 1
            return
        made.used = True
        self._eager(POINTS[point], made)

    def _capture(self, point: str, made: _Launch) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._eager(POINTS[point], made)
        self._pool = self._pool or graph.pool()
        made.graph = graph

    def _eager(self, point: Point, made: _Launch) -> None:
        """Everything between the host's inputs and the host's tokens."""
        self.launches = 0
        made.words.copy_(made.host_words, non_blocking=True)
        given = step_inputs.views(made.words, made.size)
        self._stages(point, given, made)
        if made.size.rows:
            launch.greatest(made.chosen[0], made.logits)
            if given.draws is not None:
                drawing.draw(made.chosen[1], made.logits, made.chosen[0], given.draws)
            made.host_chosen.copy_(made.chosen, non_blocking=True)

    def _fetched(self, logits: Tensor, wanted: bool) -> F32:
        """Logits on the host, once `_wait` returned."""
        found: F32
        if not wanted:
            found = self._host_logits.numpy()[: logits.shape[0]]
            if found.shape[0] < logits.shape[0]:
                found = np.empty(logits.shape, np.float32)
            return found
        if logits.shape[0] <= self._host_logits.shape[0]:
            self._host_logits[: logits.shape[0]].copy_(logits, non_blocking=True)
            found = self._host_logits.numpy()[: logits.shape[0]]
        else:
            found = logits.cpu().numpy()
        return found

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.current_stream().synchronize()

    # ---- what a step is made for ------------------------------------------------------------------------------------

    def _launch_for(self, batch: StepBatch) -> _Launch:
        """The launch of the least bucket that the step fits into."""
        bucket = next(each for each in BUCKETS if each >= batch.tokens)
        one_each = batch.tokens == batch.past.size
        reach = int(batch.past.max()) + 1 if one_each else int((batch.past + np.diff(batch.span_starts)).max())
        return self._kept(batch.point, bucket, self._context_bucket(reach), batch.draws is not None)

    def _context_bucket(self, reach: int) -> int:
        context = FIRST_CONTEXT
        while context < reach:
            context *= CONTEXT_STEP
        return min(context, -(-self.model.plan.max_context // 32) * 32)

    def _kept(self, point: str, tokens: int, context: int, drawn: bool) -> _Launch:
        key = (point, tokens, context, drawn)
        if key not in self._launches:
            self._launches[key] = self._made(step_inputs.decode_size(tokens, context, drawn))
        return self._launches[key]

    def _made(self, size: StepSize) -> _Launch:
        device, vocab = self.model.device, self.model.plan.vocab_size
        few = size.rows <= self._logits.shape[0]
        return _Launch(
            size,
            torch.zeros(size.words, dtype=torch.int32, device=device),
            self._pinned((size.words,), torch.int32),
            self._logits[: size.rows] if few else torch.empty(size.rows, vocab, device=device),
            torch.zeros(1 + size.drawn, size.rows, dtype=torch.int32, device=device),
            self._pinned((1 + size.drawn, max(size.rows, 1)), torch.int32)[:, : size.rows],
        )

    def _pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=self._cuda)

    def _heads(self, stage: AttentionStage) -> attending.Heads:
        op, vectors, ropes = stage.op, self.model.vectors, self.model.ropes
        return attending.Heads(
            *(op.heads, op.kv_heads, op.head_dim, op.k_offset, op.v_offset, op.scale, op.window, op.softcap),
            eps=next((each.eps for each in (stage.q_norm, stage.k_norm) if each is not None), 0.0),
            q_norm=None if stage.q_norm is None else vectors[stage.q_norm.weight],
            k_norm=None if stage.k_norm is None else vectors[stage.k_norm.weight],
            q_rope=None if stage.q_rope is None else ropes[stage.q_rope.rope],
            k_rope=None if stage.k_rope is None else ropes[stage.k_rope.rope],
        )

    # ---- stages -----------------------------------------------------------------------------------------------------

    def _stages(self, point: Point, given: StepInputs, made: _Launch) -> None:
        tokens = made.size.tokens
        buffers = {name: buffer[:tokens] for name, buffer in self._buffers.items()}
        matrices = self.model.matrices
        for stage in self.stages:
            self.launches += 1
            match stage:
                case MatrixStage():
                    self._matrix(stage, point, buffers, given, made)
                case AttentionStage():
                    shape, memory = self._shapes[stage.op.layer], self.model.memory[stage.op.layer]
                    width = shape.heads * shape.head_dim
                    q = self._q[: tokens * width].view(tokens, width)
                    attending.store(q, buffers[stage.op.qkv], memory, given.positions, given.slots, shape)
                    if made.copies is not None:
                        memory.copy_slots(*made.copies)
                    attending.attend(buffers[stage.op.out], q, memory, given.queries, shape)
                    self.launches += 1 + (given.queries.splits > 1)
                case ops.Embed():
                    launch.embed(buffers[stage.out], given.tokens, matrices[stage.table], stage.scale)
                    if stage.positions is not None:
                        launch.embed(buffers[stage.out], given.positions, matrices[stage.positions], 1.0, add=True)
                case ops.Norm():
                    self._norm(stage, buffers[stage.out], buffers[stage.source])
                case ops.Add():
                    launch.add(buffers[stage.target], buffers[stage.source])
                case ops.Glu():
                    launch.gate(buffers[stage.out], buffers[stage.source], stage.activation, pairs=True)
                case ops.Activate():
                    launch.gate(buffers[stage.out], buffers[stage.source], stage.activation, pairs=False)

    def _norm(self, op: ops.Norm, out: Tensor, x: Tensor) -> None:
        bias = None if op.bias is None else self.model.vectors[op.bias]
        launch.norm(out, x, self.model.vectors[op.weight], bias, op.eps, layer=op.kind == "layer")

    def _matrix(
        self, stage: MatrixStage, point: Point, buffers: dict[str, Tensor], given: StepInputs, made: _Launch
    ) -> None:
        """A linear layer or the head: one launch for one token, else what stands before it first."""
        op, before = stage.op, stage.before
        matrix, bias = self.model.matrices[op.weight], None if op.bias is None else self.model.vectors[op.bias]
        x = buffers[op.source if before is None else before.source]
        if isinstance(op, ops.Head):
            if not made.size.rows:
                return
            if made.size.tokens > 1:
                x = torch.index_select(x, 0, given.rows)
            out, planes, after = made.logits, point.head, launch.After(bias, False, op.scale, op.softcap)
        else:
            out, planes = buffers[stage.into or op.out], point.planes
            after = launch.After(bias, stage.into is not None)
        if x.shape[0] == 1:
            launch.gemv(out, x, matrix, point, planes, self._before(before), after)
            return
        launch.matmul(out, x, matrix, point, planes, after, self._before(before))

    def _before(self, op: ops.Norm | ops.Glu | None) -> launch.Before:
        if op is None:
            return launch.PLAIN
        if isinstance(op, ops.Norm):
            return launch.Before(norm=self.model.vectors[op.weight], eps=op.eps)
        return launch.Before(glu=op.activation)


def _wanted(batch: StepBatch) -> bool:
    """True if a row is neither greedy nor drawn, so that logits are wanted on the host."""
    chosen = batch.greedy
    if batch.draws is not None:
        drawn = batch.draws.temperature > 0
        chosen = drawn if chosen is None else drawn | chosen
    return bool(batch.logit_rows.size) if chosen is None else not bool(chosen.all())
