"""The OpenAPI document, made of the schemas that requests are checked by, with every status that a route may answer.

Knows routes by name only; nothing about how they are served.
"""

from __future__ import annotations

from typing import Any

import msgspec

from haomiao import __version__
from haomiao.serve import schemas

ERROR_STATUSES: dict[int, str] = {
    400: "The request contradicts the contract; `param` names the field.",
    401: "No API key, or a wrong one.",
    403: "This server does not answer to that host or origin.",
    404: "No such model or route.",
    405: "The method is not allowed here.",
    408: "Headers or body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "`budget_infeasible`: not even an idle machine could keep the budget; `predicted_ms` says what it would take.",
    429: "Too many requests, or the present load forbids this budget; Retry-After says when to come again.",
    431: "The headers are too large.",
    500: "The engine failed while it answered.",
    501: "This server cannot do that.",
    503: "The model is being loaded or restarted, the server stops, or KV is exhausted.",
    504: "`budget_exhausted`: the budget was spent before the first token.",
}
COMMON = (400, 401, 403, 405, 408, 413, 415, 429, 431, 503)
GENERATING = (*COMMON, 404, 422, 500, 504)
_BODIES: dict[str, tuple[type, str, tuple[int, ...]]] = {
    "/v1/chat/completions": (schemas.ChatRequest, "Answer a conversation", GENERATING),
    "/v1/completions": (schemas.CompletionRequest, "Continue prompts", GENERATING),
    "/v1/responses": (schemas.ResponsesRequest, "Answer an input (OpenAI's Responses API)", GENERATING),
    "/v1/embeddings": (schemas.EmbeddingsRequest, "Texts as vectors", (*GENERATING, 501)),
    "/tokenize": (schemas.TokenizeRequest, "Token ids of a prompt or conversation", (*COMMON, 404)),
    "/detokenize": (schemas.DetokenizeRequest, "Text of token ids", (*COMMON, 404)),
}
_STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_BUDGETED = (*_STREAMS, "/v1/embeddings")
_READ: dict[str, tuple[str, tuple[int, ...]]] = {
    "/v1/models": ("The model that is served", (401, 403, 405, 431, 503)),
    "/v1/models/{name}": ("One name of it", (401, 403, 404, 405, 431, 503)),
    "/health": ("The process lives", (403, 405, 431)),
    "/ready": ("Requests are served", (403, 405, 431, 503)),
    "/metrics": ("Prometheus' text format", (401, 403, 405, 431)),
    "/version": ("Which haomiao this is", (401, 403, 405, 431)),
    "/openapi.json": ("This document", (401, 403, 405, 431)),
}
_BUDGET_HEADERS = [
    {
        "name": "X-Budget-Ms",
        "in": "header",
        "required": False,
        "description": "Milliseconds for the whole answer; the earliest of this, grpc-timeout and budget_ms counts.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86_400_000},
    },
    {
        "name": "grpc-timeout",
        "in": "header",
        "required": False,
        "description": "The same in gRPC's form: up to 8 digits and one of H M S m u n.",
        "schema": {"type": "string", "pattern": "^[1-9][0-9]{0,7}[HMSmun]$"},
    },
]


def document() -> dict[str, Any]:
    """The whole document."""
    kinds = [kind for kind, _, _ in _BODIES.values()]
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for path, (kind, summary, statuses) in _BODIES.items():
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if path in _STREAMS:
            content["text/event-stream"] = {}  # a sequence of events has no schema in OpenAPI 3.1
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": path.strip("/").replace("/", "_"),
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}},
            },
            "responses": _responses(statuses, {"description": "Done", "content": content}),
        }
        if path in _BUDGETED:
            operation["parameters"] = _BUDGET_HEADERS
        paths[path] = {"post": operation}
    for path, (summary, statuses) in _READ.items():
        kind_of = "text/plain" if path == "/metrics" else "application/json"
        schema = {"type": "string"} if path == "/metrics" else {"type": "object"}
        done = {"description": "Done", "content": {kind_of: {"schema": schema}}}
        operation = {
            "summary": summary,
            "operationId": "get_" + path.strip("/").replace("/", "_").replace("{name}", "name").replace(".json", ""),
            "responses": _responses(statuses, done),
        }
        if "{name}" in path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "haomiao", "version": __version__, "description": "A real-time LLM engine: OpenAI's API."},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "predicted_ms": {"type": "number"},
            },
        }
    },
}


def _responses(statuses: tuple[int, ...], done: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"200": done}
    for status in sorted(statuses):
        found[str(status)] = {
            "description": ERROR_STATUSES[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
    if "503" in found and done["content"].get("application/json") is not None:
        found["503"]["content"]["application/json"]["schema"] = {"type": "object"}
    return found
