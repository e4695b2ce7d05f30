"""The process that renders chat templates: a program, run as a file, that imports nothing of this project.

A chat template comes with a checkpoint and is not trusted. It runs in Jinja2's immutable sandbox, inside a process that
may not open, write or start anything and whose memory is limited; the parent kills it when it takes too long.

Protocol on standard input and output: u32 length, little-endian, then JSON. Requests are {"source": text} to compile
(the answer is {"id": n}) and {"id": n, "context": {...}, "limit": characters} to render; the answer to that is
{"text": ...}. What went wrong is {"error": one line}.
"""

from __future__ import annotations

import datetime
import json
import resource
import struct
import sys
import textwrap
import time
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

IMPORTED_EARLY = (textwrap, jinja2.constants, jinja2.debug)
"""Jinja imports these when a filter or an error first needs them, which is too late here."""
MEMORY_BYTES = 512 << 20
MAX_TEMPLATES = 64
WARM_UP = r"""
{%- set ns = namespace(n=0) %}{% macro m(x) %}{{ x }}{% endmacro %}
{%- for x in messages | selectattr('role', 'equalto', 'user') | list %}{% set ns.n = ns.n + 1 %}
{{- m(x['content'] | trim | upper) + '\n\u00e9' + (x | tojson(indent=2)) ~ ('%s' % x.role) ~ '{}'.format(1) }}
{%- if loop.first and x is mapping and x.content is string %}{% continue %}{% endif %}{% endfor %}
{{- messages | map(attribute='role') | join(', ') }}{{ none | default('x') | replace('x', 'y') }}
"""
"""Rendered before opening files is given up, so that whatever Jinja imports late has been imported."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks text for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body, as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What templates on the hub expect to find (transformers, `chat_template_utils`)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, GenerationTag],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as templates on the hub expect."""
    if isinstance(indent, int) and indent > 16:
        raise jinja2.TemplateError("tojson: indent is limited to 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """Templates refuse conversations with this."""
    raise jinja2.TemplateError(str(message)[:500])


def strftime_now(pattern: str) -> str:
    """The local date and time."""
    return datetime.datetime.now().strftime(str(pattern)[:200])


def restrict() -> None:
    """Give up what rendering does not need. Everything that will be imported has been."""
    time.tzset()
    strftime_now("%d %b %Y")
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 3,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        try:
            hard = resource.getrlimit(kind)[1]
            value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # a system that does not know this limit
            continue


def render(template: jinja2.Template, context: dict[str, Any], limit: int) -> str:
    """The text. Raises `jinja2.TemplateError` beyond `limit` characters."""
    parts: list[str] = []
    size = 0
    for part in template.generate(**context):
        size += len(part)
        if size > limit:
            raise jinja2.TemplateError(f"the rendered text is longer than {limit} characters")
        parts.append(part)
    return "".join(parts)


def answer(
    environment: jinja2.Environment, templates: list[jinja2.Template], request: dict[str, Any]
) -> dict[str, Any]:
    """Compile or render. Every failure becomes one line."""
    try:
        if "source" in request:
            if len(templates) >= MAX_TEMPLATES:
                raise jinja2.TemplateError(f"more than {MAX_TEMPLATES} templates")
            templates.append(environment.from_string(request["source"]))
            return {"id": len(templates) - 1}
        text = render(templates[request["id"]], request["context"], request["limit"])
        text.encode("utf-8")
        return {"text": text}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": "the template uses too much memory"}
    except RecursionError:
        return {"error": "the template recurses too deeply"}
    except Exception as error:  # whatever a template can provoke
        kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
        return {"error": f"{kind}{str(error)[:500]}"}


def serve() -> None:
    """Answer until the parent goes away."""
    environment = make_environment()
    environment.from_string(WARM_UP).render(messages=[{"role": "user", "content": "\u00e9"}])
    templates: list[jinja2.Template] = []
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    restrict()
    sink.write(struct.pack("<I", 2) + b"{}")  # ready
    sink.flush()
    while True:
        header = source.read(4)
        if len(header) < 4:
            return
        (size,) = struct.unpack("<I", header)
        reply = json.dumps(answer(environment, templates, json.loads(source.read(size)))).encode("ascii")
        sink.write(struct.pack("<I", len(reply)) + reply)
        sink.flush()


if __name__ == "__main__":
    serve()
