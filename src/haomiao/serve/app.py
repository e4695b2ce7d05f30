"""The routes, and what every one of them does with errors. Knows no server: any that speaks ASGI will do."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from haomiao import __version__
from haomiao.errors import EngineError, HaomiaoError
from haomiao.serve.chat import chat_completions
from haomiao.serve.completions import completions
from haomiao.serve.embeddings import embeddings
from haomiao.serve.failures import HttpError, error_response
from haomiao.serve.guard import Guard
from haomiao.serve.jsonbody import dump
from haomiao.serve.realtime import realtime
from haomiao.serve.responses import responses
from haomiao.serve.service import Service
from haomiao.serve.site import page_routes
from haomiao.serve.texts import detokenize, tokenize


def make_app(service: Service) -> Guard:
    """The application, guarded."""
    app = Starlette(
        routes=routes(),
        exception_handlers={HTTPException: _http, HaomiaoError: _known, Exception: _unknown},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return Guard(app, service)


def routes() -> list[BaseRoute]:
    """Every route. The page and the WebSocket add theirs here."""
    return [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/version", version, methods=["GET"]),
        WebSocketRoute("/v1/realtime", realtime),
        *page_routes(),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]


# ---- errors -------------------------------------------------------------------------------------------------------


async def _http(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route or method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        response = error_response(HttpError(405, f"{request.method[:16]} is not allowed here"))
        response.headers.update(getattr(error, "headers", None) or {})
        return response
    return error_response(HttpError(404, "there is no such route"))


async def _known(request: Request, error: Exception) -> Response:
    known = error if isinstance(error, HaomiaoError) else EngineError("internal error")
    request.scope["state"].setdefault("facts", {})["code"] = known.code
    budgeted = any(name in request.headers for name in ("x-budget-ms", "grpc-timeout"))
    return error_response(known, budget=budgeted or request.scope["state"].get("budgeted", False))


async def _unknown(request: Request, error: Exception) -> Response:
    """A mistake of ours: the client learns that, the log where."""
    return error_response(EngineError("internal error"))


# ---- small routes -------------------------------------------------------------------------------------------------


def _json(value: Any, status: int = 200) -> Response:
    return Response(dump(value), status, media_type="application/json")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def health(request: Request) -> Response:
    """The process lives; says nothing about the model."""
    return _json({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 if requests are served now, else 503 and why not."""
    service = _service(request)
    if service.is_ready:
        return _json({"status": "ready"})
    supervisor = service.supervisor
    state = "draining" if service.draining else supervisor.state
    loading = supervisor.loading
    about = {"status": state, "loading": {"what": loading.what, "done": loading.done, "total": loading.total}}
    return _json(about, 503)


async def openapi(request: Request) -> Response:
    """The OpenAPI document."""
    from haomiao.serve.openapi import document

    return _json(document())


async def version(request: Request) -> Response:
    """Which haomiao this is."""
    return _json({"version": __version__})


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service = _service(request)
    supervisor = service.supervisor
    text = service.metrics.render(supervisor.stats, up=supervisor.state == "ready", restarts=supervisor.crashes)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(service: Service, name: str) -> dict[str, Any]:
    hello = service.hello
    offered = service.settings.points or tuple(hello.points)
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "haomiao",
        "max_model_len": hello.max_request_tokens,
        "haomiao": {
            "point": hello.point,
            "points": list(offered),
            "errors": hello.errors,
            "threads": hello.threads,
            "isa": hello.isa,
            "kv": hello.kv,
        },
    }


async def models(request: Request) -> Response:
    """The model, under every name it is served by."""
    service = _service(request)
    return _json({"object": "list", "data": [_model(service, name) for name in service.names]})


async def model(request: Request) -> Response:
    """One name."""
    service = _service(request)
    return _json(_model(service, service.check_model(request.path_params["name"])))
