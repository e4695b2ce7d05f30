"""One answer on /v1/realtime: from `response.create` to `response.done`.

Knows the socket that says its events and the feeder that has the prompt computed; nothing about frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from haomiao.errors import CancelledError, HaomiaoError, InputError
from haomiao.serve import asking
from haomiao.serve.answers import account, account_failure, account_of, usage_of
from haomiao.serve.budgets import Budget, budget_of
from haomiao.serve.client import Answer
from haomiao.serve.conversation import Item
from haomiao.serve.failures import error_body
from haomiao.serve.messages import Commit, Done, Submit
from haomiao.serve.realtime_events import SessionFields, message_item
from haomiao.serve.service import new_name

if TYPE_CHECKING:
    from haomiao.serve.realtime import Socket
    from haomiao.serve.realtime_feeder import Feeder

FIRST = {"output_index": 0, "content_index": 0}


class Response:
    """One answer while it is given."""

    def __init__(self, socket: Socket, feeder: Feeder, fields: SessionFields, arrival_ns: int) -> None:
        self.id = new_name("resp_")
        self._socket = socket
        self._feeder = feeder
        self._fields = fields
        self._budget: Budget = budget_of(arrival_ns, fields, {}, socket.service.max_kl)
        self._item = Item(new_name("item_"), "assistant", "", "in_progress")
        self._answer: Answer | None = None
        self._cancelled: str | None = None
        self._done: Done | None = None
        self._choices: list[str] | None = None
        self._choice_tokens: list[int] = []

    def cancel(self, reason: str) -> None:
        """End it: `turn_detected` if the user went on speaking, else `client_cancelled`."""
        self._cancelled = self._cancelled or reason
        if self._answer is not None:
            self._answer.cancel()

    # ---- the engine -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Say everything, and how it ended. What fails is said in `response.done`, as OpenAI does."""
        error: HaomiaoError | None = None
        kept = self._fields.conversation != "none"
        await self._socket.say("response.created", response=self._about("in_progress"))
        try:
            answer = self._answer = await self._ask()
            if self._cancelled is not None:
                answer.cancel()
            await self._begin(kept)
            await self._pass_on(answer)
        except HaomiaoError as failed:
            if not (isinstance(failed, CancelledError) and self._cancelled):
                error = failed
                account_failure(self._socket.service, failed, self._budget.given)
        finally:
            if self._answer is not None and self._done is None:
                self._answer.cancel()
        await self._end(error, kept)

    async def _ask(self) -> Answer:
        socket, fields = self._socket, self._fields
        async with self._feeder.turn:
            ids = await self._feeder.reader.prompt(fields, socket.conversation.messages(), socket.form)
            if not ids:
                raise InputError("there is nothing to answer: the conversation is empty", code="empty_conversation")
            submit = await self._submit(ids)
            connection, session, tail = self._feeder.commit(ids)
            submit.id, submit.token_ids = connection.new_id(), tail
            answer: Answer = connection.expect(submit, Commit(session=session, submit=submit))
            return answer

    async def _submit(self, ids: list[int]) -> Submit:
        """What the engine is asked; id and tokens are filled in at the end."""
        socket, fields, budget = self._socket, self._fields, self._budget
        service = socket.service
        constraint = asking.constraint_of(fields.response_format, fields.structured_outputs)
        choices = asking.choices_of(fields)
        common: dict[str, Any] = {"point": fields.point, "salt": socket.salt}
        if choices is not None:
            options = await service.prompts.choices(choices)
            self._choices, self._choice_tokens = choices, [len(option) for option in options]
            return asking.submit_of(0, [], budget, work="choose", options=options, **common)
        asked = fields.max_output_tokens if fields.max_output_tokens is not None else fields.max_tokens
        limit = None if asked == "inf" else asked
        sampling = asking.sampling_of(fields, service.hello, len(ids), max_tokens=limit)
        return asking.submit_of(0, [], budget, sampling=sampling, constraint=constraint, **common)

    async def _pass_on(self, answer: Answer) -> None:
        while batch := await answer.some():
            for event in batch:
                if isinstance(event, Done):
                    self._done = event
                    account(self._socket.service, {}, event)
                    if self._choices is not None:
                        scores = event.scores or [0.0]
                        best = max(range(len(scores)), key=scores.__getitem__)
                        await self._delta(self._choices[best], self._choice_tokens[best], event)
                elif event.text or event.token_ids:
                    await self._delta(event.text, len(event.token_ids), event)

    # ---- events ---------------------------------------------------------------------------------------------------

    async def _begin(self, kept: bool) -> None:
        say, shown = self._socket.say, message_item(self._item.id, "assistant", "", "in_progress")
        await say("response.output_item.added", response_id=self.id, output_index=0, item=shown)
        if kept:
            await self._socket.add(self._item)
        part = {"type": "output_text", "text": ""}
        await say("response.content_part.added", response_id=self.id, item_id=self._item.id, part=part, **FIRST)

    async def _delta(self, text: str, tokens: int, event: Any) -> None:
        self._item.text += text
        point = event.receipt.schedule[-1].point if isinstance(event, Done) and event.receipt.schedule else ""
        await self._socket.say(
            "response.output_text.delta",
            response_id=self.id,
            item_id=self._item.id,
            delta=text,
            haomiao={"point": getattr(event, "point", point), "tokens": tokens},
            **FIRST,
        )

    async def _end(self, error: HaomiaoError | None, kept: bool) -> None:
        status = self._status(error)
        item = self._item
        begun = self._answer is not None and (error is None or bool(item.text))
        item.status = "completed" if status == "completed" else "incomplete"
        shown = message_item(item.id, "assistant", item.text, item.status)
        if begun:
            say = self._socket.say
            ids = {"response_id": self.id, "item_id": item.id}
            await say("response.output_text.done", text=item.text, **ids, **FIRST)
            part = {"type": "output_text", "text": item.text}
            await say("response.content_part.done", part=part, **ids, **FIRST)
            await say("response.output_item.done", response_id=self.id, output_index=0, item=shown)
        if kept and item in self._socket.conversation.items:
            if item.text:
                await self._socket.say("conversation.item.done", item=shown, previous_item_id=self._before())
            else:  # nothing was said: the model shall not read an empty turn
                self._socket.conversation.items.remove(item)
                await self._socket.say("conversation.item.deleted", item_id=item.id)
        self._socket.release(self)
        await self._socket.say("response.done", response=self._about(status, error, [shown] if begun else []))

    def _before(self) -> str | None:
        items = self._socket.conversation.items
        place = items.index(self._item)
        return items[place - 1].id if place else None

    def _status(self, error: HaomiaoError | None) -> str:
        if error is not None:
            return "failed"
        if self._done is None:
            return "cancelled"
        return "incomplete" if self._done.finish_reason == "length" else "completed"

    def _about(
        self, status: str, error: HaomiaoError | None = None, output: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The response as the server shows it."""
        details: dict[str, Any] | None = None
        if error is not None:
            said = error_body(error)["error"]
            details = {"type": "failed", "error": said}
        elif status == "cancelled":
            details = {"type": "cancelled", "reason": self._cancelled or "client_cancelled"}
        elif status == "incomplete":
            details = {"type": "incomplete", "reason": "max_output_tokens"}
        about: dict[str, Any] = {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": output or [],
            "conversation_id": None if self._fields.conversation == "none" else self._socket.conversation_id,
            "output_modalities": ["text"],
            "max_output_tokens": self._fields.max_output_tokens or "inf",
            "metadata": self._fields.metadata,
        }
        if self._done is not None:
            tokens = sum(self._choice_tokens[:1]) if self._choices is not None else None
            usage = usage_of([self._done.receipt], tokens)
            about["usage"] = {
                "total_tokens": usage["total_tokens"],
                "input_tokens": usage["prompt_tokens"],
                "output_tokens": usage["completion_tokens"],
                "input_token_details": {**usage["prompt_tokens_details"], "text_tokens": usage["prompt_tokens"]},
                "output_token_details": {"text_tokens": usage["completion_tokens"]},
            }
            about["haomiao"] = account_of(self._done)
            if self._choices is not None:
                about["haomiao"]["scores"] = dict(zip(self._choices, self._done.scores or [], strict=False))
        return about
