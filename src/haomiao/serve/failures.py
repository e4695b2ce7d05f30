"""Errors as HTTP says them: OpenAI's error object, its status and headers. Adds the few errors that only HTTP has."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from starlette.responses import Response

from haomiao.errors import (
    BudgetError,
    DeadlineError,
    HaomiaoError,
    InputError,
    KvExhaustedError,
    OverloadError,
)
from haomiao.serve.jsonbody import dump


class HttpError(InputError):
    """What goes wrong before a request is one: routes, methods, keys, sizes, times."""

    _DEFAULTS: ClassVar[dict[int, tuple[str, str]]] = {
        401: ("authentication_error", "invalid_api_key"),
        403: ("permission_error", "forbidden"),
        404: ("invalid_request_error", "not_found"),
        405: ("invalid_request_error", "method_not_allowed"),
        408: ("timeout_error", "request_timeout"),
        413: ("invalid_request_error", "body_too_large"),
        415: ("invalid_request_error", "unsupported_media_type"),
        429: ("overloaded_error", "rate_limited"),
        431: ("invalid_request_error", "headers_too_large"),
    }

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        kind, default = self._DEFAULTS.get(status, (InputError.type, InputError.default_code))
        super().__init__(message, code=code or default, param=param)
        self.http_status = status
        self.kind = kind


def status_of(error: HaomiaoError) -> int:
    """The HTTP status of an error."""
    return error.http_status if isinstance(error, HttpError) else error.status


def error_body(error: HaomiaoError) -> dict[str, Any]:
    """OpenAI's error object; `predicted_ms` where a budget was refused."""
    about: dict[str, Any] = {
        "message": str(error),
        "type": error.kind if isinstance(error, HttpError) else error.type,
        "param": error.param,
        "code": error.code,
    }
    if error.predicted_ms is not None:
        about["predicted_ms"] = error.predicted_ms
    return {"error": about}


def error_headers(error: HaomiaoError, *, budget: bool = False) -> dict[str, str]:
    """When to come again, and whether at all: clients of OpenAI's API retry 429 and 5xx by themselves unless
    x-should-retry forbids it, which would multiply an overload. `budget`: the request had one, which waiting spends."""
    headers: dict[str, str] = {}
    status = status_of(error)
    if status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil((error.retry_after_ms or 1000.0) / 1e3)))
    if isinstance(error, (DeadlineError, BudgetError, KvExhaustedError)) or (
        budget and isinstance(error, OverloadError)
    ):
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: HaomiaoError, *, budget: bool = False) -> Response:
    """The whole answer."""
    return Response(
        dump(error_body(error)),
        status_of(error),
        error_headers(error, budget=budget),
        "application/json",
    )
