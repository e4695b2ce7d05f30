"""`LLM`: a model that answers. Opens the model, sizes its KV, loads the tokenizer beside it, and drives the engine.

Threads may share an `LLM`: requests that are waited for at the same time share steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from haomiao.api.answers import AnswerStream, Choice, Completion, Embedding, completions_of, end_of, unit
from haomiao.api.opened import Beside, end_ids, load_tokenizer, measured_errors, points_of_throttle
from haomiao.api.requests import ChatPrompts, RequestMaker, token_ids
from haomiao.engine.driver import Driver
from haomiao.engine.idle import IdleWorker
from haomiao.engine.request import DoneEvent, EngineRequest, Event
from haomiao.errors import EngineError, HaomiaoError, InputError
from haomiao.types import F32, POINTS, Executor, KvType

if TYPE_CHECKING:
    from pathlib import Path

    from haomiao.api.session import Session
    from haomiao.engine.cost import CostModel
    from haomiao.engine.engine import Engine
    from haomiao.models.open import OpenedModel
    from haomiao.text.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]


class LLM:
    """A model, ready to answer. A context manager; `close` gives threads and memory back."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        point: str | None = None,
        points: Sequence[str] | None = None,
        threads: int | None = None,
        max_context: int | None = None,
        kv: KvType | None = None,
        device: Literal["cpu", "cuda", "auto"] | None = None,
        executor: Literal["native", "reference", "torch"] | None = None,
        isa: str | None = None,
        group: int = 32,
        revision: str | None = None,
        offline: bool | None = None,
        hugepages: bool = False,
        prefix_cache: bool = True,
        kv_memory: int | None = None,
        speculate: str | os.PathLike[str] = "auto",
        monitor_rate: float | None = None,
        max_kl: float | None = None,
        coverage: float = 0.99,
        progress: Progress | None = None,
    ) -> None:
        """Open a model: an artifact, a directory, a GGUF file, a Hugging Face id, or None for the embedded one.

        `point` is the default operating point, and decides what a checkpoint is converted to; `points` are those that a
        request with a budget may be lowered to (default: all that are switchable with it). `kv` is how K and V are
        kept, `kv_memory` the bytes they may take (default: a quarter of the available memory, at most 2 GiB),
        `max_context` the tokens of a prompt and its answer (default: the model's own, as far as it fits). `device` is
        "cpu" (default), "cuda" (PyTorch and Triton; K and V then take most of the GPU's free memory) or "auto" (a GPU
        if there is one); `executor` chooses a slow one for comparison. `speculate` says who drafts tokens: "suffix"
        ("auto": what occurred before in prompt and answer), "self" (the model's int4 plane), another model of the same
        vocabulary by its name, or "off"; answers are the same in any case. `coverage` is the share of the predicted
        bounds of budgets that is to hold: less admits more. `progress` is called with (what, done, total). Raises
        `ModelError`, `ModelNotFoundError`, `InputError`, `UnavailableError`.
        """
        from haomiao.api.calibration import Calibration
        from haomiao.api.devices import kv_memory_on, make_executor, on_device, opening_point, place
        from haomiao.api.speculation import check_way, kv_type_of, make_speculator
        from haomiao.engine.engine import Engine
        from haomiao.engine.monitor import DEFAULT_RATE, Monitor
        from haomiao.engine.sizing import size_pool
        from haomiao.models.open import open_model

        if kv is not None and kv not in ("f32", "bf16", "int8"):
            raise InputError(f"kv must be f32, bf16 or int8, not {kv!r:.40}", param="kv")
        placement = place(executor, device)
        way = check_way(speculate)
        if monitor_rate is None:
            monitor_rate = DEFAULT_RATE if max_kl is not None else 0.0
        self.monitor = Monitor(monitor_rate, limit=max_kl)
        opened = open_model(
            model if model is None else os.fspath(model),
            point=opening_point(placement, point),
            group=group,
            max_context=max_context,
            revision=revision,
            offline=offline,
            hugepages=hugepages,
            progress=progress,
        )
        opened = on_device(placement, opened, point)
        loading = Beside(lambda: load_tokenizer(opened.files_dir))
        try:
            self.kv: KvType = kv or POINTS[opened.default_point].default_kv
            memory = kv_memory_on(placement, opened, kv_memory)
            size = size_pool(opened.plan, self.kv, max_context=max_context, kv_memory=memory)
            planned = opened.with_context(size.max_context) if size.max_context < opened.plan.max_context else opened
            runner = make_executor(placement, planned, self.kv, size.blocks, threads, isa)
        finally:
            loading.join()
        try:
            self.tokenizer = loading.result()
        except BaseException:
            runner.close()
            raise
        opened = planned
        self.name = opened.name
        self.plan = opened.plan
        self.weights = opened.artifact.tensors
        self.points = tuple(opened.points)
        self.point = opened.default_point
        self.max_context = size.max_context
        self.vocab_size = runner.vocab_size
        self.threads = int(getattr(runner, "threads", 1))
        self.isa = str(getattr(runner, "isa", ""))
        self.eos_ids = end_ids(self.tokenizer, opened)
        self._opened = opened
        throttled = points_of_throttle(points, self.points, self.point)
        self._calibration = Calibration(
            opened, runner, throttled, kind=placement.name, max_context=self.max_context, coverage=coverage
        )
        self._progress = progress
        self._requests = RequestMaker(self.tokenizer, self.vocab_size, self.max_context, self.calibrate)
        self._chat_prompts = ChatPrompts(self._requests)

        def open_draft(name: str, context: int) -> tuple[OpenedModel, Executor, Tokenizer | None]:
            draft = open_model(name, group=group, revision=None, offline=offline, progress=progress)
            if context < draft.plan.max_context:
                draft = draft.with_context(context)
            size = size_pool(draft.plan, kv_type_of(draft), max_context=draft.plan.max_context, kv_memory=None)
            tokenizer = load_tokenizer(draft.files_dir) if self.tokenizer is not None else None
            return draft, make_executor(placement, draft, kv_type_of(draft), size.blocks, threads, isa), tokenizer

        try:
            speculator = make_speculator(way, runner, self.max_context, self.tokenizer, open_draft)
        except BaseException:
            runner.close()
            raise
        self._engine = engine = Engine(
            runner,
            eos_ids=self.eos_ids,
            final_ids=() if self.tokenizer is None else self.tokenizer.labels.values(),
            max_context=self.max_context,
            prefix_cache=prefix_cache,
            model_key=opened.name,
            name=opened.name,
            point=self.point,
            points=throttled,
            cost=self._calibration.cost,
            errors=measured_errors(opened),
            speculator=speculator,
            monitor=self.monitor,
        )
        self._driver = Driver(engine)
        self._idle = IdleWorker(self._driver)
        self.monitor.on_waiting = engine.on_waiting = self._idle.wake

    @property
    def labels(self) -> tuple[str, ...]:
        """What a model that `haomiao finetune` taught labels of text chooses among; empty for any other."""
        return () if self.tokenizer is None else tuple(self.tokenizer.labels)

    def decide(self, text: str, *, point: str | None = None, **budget: Any) -> Choice:
        """The label of `text`, among `labels`, asked as the model was taught: one prefill, one row of logits. Raises
        `InputError` if the model was taught none."""
        if not self.labels:
            raise InputError(
                "this model was taught no labels: name options, or see `haomiao finetune`", param="options"
            )
        prompt = self._requests.need_tokenizer().label_prompt.replace("{text}", text)
        return self.choose(prompt, self.labels, point=point, **budget)

    # ---- for programs that step themselves (serve) ------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine. Whoever steps it must be the only one: nothing else of this class may be called meanwhile. From
        now on its owner calls `Engine.idle` too, while nothing is asked."""
        self.monitor.on_waiting = self._engine.on_waiting = lambda: None
        self._idle.close()
        return self._engine

    @property
    def requests(self) -> RequestMaker:
        """What makes the engine's requests out of options."""
        return self._requests

    @property
    def cost(self) -> CostModel:
        """What steps take on this machine, as far as it was measured (`calibrate`)."""
        return self._calibration.cost

    @property
    def files_dir(self) -> Path:
        """Where the tokenizer's files lie."""
        return self._opened.files_dir

    @property
    def errors(self) -> dict[str, float]:
        """Mean KL to `full` by point, nats per token, where it was measured."""
        return measured_errors(self._opened)

    # ---- answers --------------------------------------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[int] | Sequence[str], **options: Any) -> Any:
        """Answer a prompt (text or token ids), or several at once.

        Options: the fields of `SamplingParams` one by one, or `sampling=SamplingParams(...)`; one of `json_schema`,
        `regex`, `grammar`, `choice`, `json_object`; `point`; `speculate` ("off", "auto", "suffix", "self", "draft");
        `prompt_logprobs`. Without `max_tokens`, 256 or what the context leaves.

        Time: `budget_ms` for the whole answer and `ttft_ms` for the first token, both from this call on; `on_budget`
        says what may be given up to keep them: `degrade` (default: a lower point, then fewer tokens, then generating at
        all: where a constraint allows few answers, the likeliest is chosen in one prefill), `truncate` (fewer tokens),
        `refuse` (nothing); `min_point` and `max_kl` (nats per token, as measured for the artifact) limit the points.
        What cannot be kept is refused at once: `BudgetError` if not even by an idle machine, `OverloadError` if not
        beside the other requests; both have `predicted_ms`. `DeadlineError` if time ran out before the first token.
        The first budget on a machine waits for `calibrate`, before its clock starts.

        Returns a `Completion`; a list of them for `n` > 1; for a list of texts, a list with one such result each.
        """
        if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], str):
            return self._generate_all([self._requests.prompt_ids(each) for each in prompt], options)
        (answer,) = self._generate_all([self._requests.prompt_ids(prompt)], options)  # type: ignore[arg-type]
        return answer

    def stream(self, prompt: str | Sequence[int], **options: Any) -> AnswerStream:
        """As `generate` for one prompt, yielding `Chunk`s as they are produced. Closing the stream ends the request."""
        return self._stream(self._requests.generation(self._requests.prompt_ids(prompt), options))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Answer a conversation: `messages` are {"role", "content"} in OpenAI's form. Options as in `generate`;
        `chat_template_kwargs` are variables of the checkpoint's template, such as enable_thinking.

        Returns a `Completion` (a list for `n` > 1), or an `AnswerStream` if `stream`.
        """
        prompt = self._chat_prompts.ids(messages, tools, chat_template_kwargs)
        return self.stream(prompt, **options) if stream else self.generate(prompt, **options)

    def choose(
        self,
        prompt: str | Sequence[int],
        options: Sequence[str],
        *,
        normalize: bool = False,
        point: str | None = None,
        **budget: Any,
    ) -> Choice:
        """The option that the model finds likeliest after `prompt`: by the summed log-probability of its tokens and of
        its end. `normalize` divides by their number. Labels that the model was fine-tuned to choose among are one token
        each and need no end: `LLM.labels` names them. The prompt is computed once, the options together. `budget_ms`,
        `on_budget`, `min_point` and `max_kl` as in `generate`."""
        fields = self._requests.budget_of_choice(budget)
        prompt_ids, option_ids = self._requests.options_of(prompt, options)
        return self._choose(prompt_ids, option_ids, options, normalize=normalize, point=point, **fields)

    def embed(
        self,
        text: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        normalize: bool = True,
        point: str | None = None,
        **budget: Any,
    ) -> Any:
        """A text (or token ids) as a vector, or several at once: the mean over the tokens of the hidden states that
        stand before the vocabulary head, at length 1 unless `normalize` is False. `budget_ms`, `on_budget`, `min_point`
        and `max_kl` as in `generate`. Vectors of one collection should be computed at one `point`.

        Returns an `Embedding`, a list of them for a list of texts. Raises `UnavailableError` if the executor returns no
        hidden states.
        """
        several = isinstance(text, (list, tuple)) and bool(text) and not isinstance(text[0], int)
        texts: Sequence[Any] = text if several else [text]
        requests = [self._requests.embedding(each, point, budget) for each in texts]
        found = []
        for done, request in zip(self._ends(requests), requests, strict=True):
            if done.embedding is None:
                raise EngineError("the engine returned no embedding")
            vector = unit(done.embedding) if normalize else done.embedding
            found.append(Embedding(vector, list(request.prompt_ids), done.receipt))
        return found if several else found[0]

    def logits(self, ids: Sequence[int], *, point: str | None = None) -> F32:
        """Logits float32 [tokens, vocab] of a sequence: row `i` predicts token `i + 1`. Needs no tokenizer."""
        done = self._done(EngineRequest(token_ids("token_ids", ids), work="logits", point=point))
        if done.logits is None:
            raise EngineError("the engine returned no logits")
        return done.logits

    # ---- text -----------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; with `special`, special tokens in it are recognised and the model's BOS is added."""
        return self._requests.need_tokenizer().encode(text, special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        return self._requests.need_tokenizer().decode(token_ids("ids", ids))

    def session(self) -> Session:
        """Text that is computed as it arrives."""
        from haomiao.api.session import Session

        return Session(self)

    # ---- time -----------------------------------------------------------------------------------------------------

    def calibrate(self, *, again: bool = False) -> None:
        """Measure how long steps take on this machine, a second or two for each point, unless that was done: before, or
        by another process (it is kept in the cache folder). Budgets stand on it; without one it is never needed."""
        if again or not self._calibration.ready:
            self._calibration.prepare(self._driver, self._progress, again=again)

    # ---- life -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give threads and memory back; idempotent."""
        driver: Driver | None = getattr(self, "_driver", None)
        if driver is not None:
            self._idle.close()
            driver.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- for Session ----------------------------------------------------------------------------------------------

    def _generate_all(self, prompts: Sequence[list[int]], options: Mapping[str, Any]) -> list[Any]:
        return self._run([self._requests.generation(prompt, options) for prompt in prompts])

    def _run(self, requests: Sequence[EngineRequest]) -> list[Any]:
        """Answer requests together: a `Completion` each, a list of them where n > 1. All end if one fails."""
        tickets = []
        try:
            for request in requests:
                tickets.append(self._driver.submit(request))
            answers: list[Any] = []
            for ticket, request in zip(tickets, requests, strict=True):
                samples = request.sampling.n
                found = completions_of(list(_events(ticket.wait)), samples)
                answers.append(found if samples > 1 else found[0])
            return answers
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _stream(self, request: EngineRequest) -> AnswerStream:
        return AnswerStream(self._driver.submit(request))

    def _done(self, request: EngineRequest) -> DoneEvent:
        """The end of a request that has one and no tokens. Raises its error."""
        (done,) = self._ends([request])
        return done

    def _ends(self, requests: Sequence[EngineRequest]) -> list[DoneEvent]:
        """The same for several that are served together. All end if one fails."""
        tickets = []
        try:
            for request in requests:
                tickets.append(self._driver.submit(request))
            return [end_of(_events(ticket.wait)) for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _choose(
        self,
        prompt_ids: list[int],
        option_ids: Sequence[tuple[int, ...]],
        options: Sequence[str],
        *,
        normalize: bool,
        point: str | None,
        **more: Any,
    ) -> Choice:
        done = self._done(
            EngineRequest(
                prompt_ids,
                work="choose",
                options=tuple(option_ids),
                normalize=normalize,
                point=point,
                **more,
            )
        )
        scores = done.scores or []
        best = max(range(len(scores)), key=scores.__getitem__)
        return Choice(best, options[best], scores, done.receipt)


def _events(wait: Callable[[], list[Event]]) -> Iterator[Event]:
    """All events of a ticket."""
    while events := wait():
        yield from events


__all__ = ["LLM", "Completion", "HaomiaoError"]
