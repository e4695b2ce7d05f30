"""The one table of errors: exception -> HTTP status -> exit code.

Everything that a user can cause is a `HaomiaoError` with one clear line. `code` is stable: programs match on it.
Knows nothing about HTTP beyond the numbers in the table.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as a shell counts: stopped by Ctrl-C."""


class HaomiaoError(Exception):
    """Base of every error that a user may see. `str(error)` is one line."""

    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    type: ClassVar[str] = "internal_error"
    default_code: ClassVar[str] = "internal_error"
    predicted_ms: float | None = None
    """Of a refused budget: what the answer would have taken."""
    retry_after_ms: float | None = None
    """Of an overload: when trying again may help."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        predicted_ms: float | None = None,
        retry_after_ms: float | None = None,
    ) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code or self.default_code
        self.param = param
        self.predicted_ms = predicted_ms
        self.retry_after_ms = retry_after_ms


class InputError(HaomiaoError):
    """A request that contradicts the contract: a wrong type, range or combination."""

    status = 400
    exit_code = 2
    type = "invalid_request_error"
    default_code = "invalid_value"


class ContextLengthError(InputError):
    """Prompt plus requested tokens do not fit the context. Nothing is truncated silently."""

    default_code = "context_length_exceeded"


class ConstraintError(InputError):
    """A schema, regex or grammar that is malformed or beyond its limits."""

    default_code = "invalid_constraint"


class TemplateError(InputError):
    """A chat template that fails, or exceeds its time or size."""

    default_code = "template_error"


class ModelError(HaomiaoError):
    """A model that cannot be loaded: hostile, truncated, contradictory or unsupported."""

    status = 400
    exit_code = 2
    type = "model_error"
    default_code = "invalid_model"


class UnsupportedModelError(ModelError):
    """A well-formed model of a kind that is not supported."""

    default_code = "unsupported_model"


class ArtifactError(ModelError):
    """An artifact whose header, section table or body is wrong."""

    default_code = "invalid_artifact"


class ModelNotFoundError(HaomiaoError):
    """No model of that name, path or id."""

    status = 404
    exit_code = 2
    type = "invalid_request_error"
    default_code = "model_not_found"


class DownloadError(HaomiaoError):
    """The hub did not deliver: offline, refused, interrupted or a hash that does not match."""

    status = 502
    exit_code = 3
    type = "download_error"
    default_code = "download_failed"


class BudgetError(HaomiaoError):
    """A budget that even an idle machine could not keep."""

    status = 422
    exit_code = 4
    type = "budget_error"
    default_code = "budget_infeasible"


class OverloadError(HaomiaoError):
    """Only the present load forbids it: queue full, KV exhausted, or a budget that would hold on an idle machine."""

    status = 429
    exit_code = 5
    type = "overloaded_error"
    default_code = "overloaded"


class KvExhaustedError(OverloadError):
    """No KV block is left for this request; it alone is shed."""

    status = 503
    default_code = "kv_exhausted"


class NotReadyError(OverloadError):
    """The engine is loading, restarting, or was given up after too many crashes; or the server is draining."""

    status = 503
    default_code = "not_ready"


class DeadlineError(HaomiaoError):
    """The budget expired in the queue, before a token existed."""

    status = 504
    exit_code = 6
    type = "deadline_error"
    default_code = "budget_exhausted"


class CancelledError(HaomiaoError):
    """The client went away or cancelled."""

    status = 499
    exit_code = EXIT_INTERRUPTED
    type = "cancelled"
    default_code = "cancelled"


class UnavailableError(HaomiaoError):
    """The machine lacks something: an instruction set, a device, a library, room on the disk."""

    status = 501
    exit_code = 7
    type = "unavailable_error"
    default_code = "unavailable"


class EngineError(HaomiaoError):
    """The engine process failed; in-flight requests end with this."""

    default_code = "engine_error"
