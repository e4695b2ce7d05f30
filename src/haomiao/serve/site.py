"""The page at `/`: a playground, served from this package; nothing is fetched from elsewhere.

Knows the names of its files and nothing of what is in them.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from haomiao.serve.failures import HttpError, error_response

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-cache",
}


@cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """Name -> bytes, type, entity tag; read once. What is not listed here is not served."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES and path.is_file():
            data = path.read_bytes()
            found[path.name] = (data, TYPES[path.suffix], f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"')
    return found


async def page(request: Request) -> Response:
    """The page itself, or one of its files."""
    known = files().get(request.path_params.get("file", "index.html"))
    if known is None:
        return error_response(HttpError(404, "there is no such file"))
    data, kind, tag = known
    headers = {**HEADERS, "etag": tag}
    if tag in [each.strip() for each in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(data, 200, headers, kind)


def page_routes() -> list[BaseRoute]:
    """What the page needs."""
    return [Route("/", page, methods=["GET"]), Route("/page/{file}", page, methods=["GET"])]
