"""What a server is told when it starts. Knows nothing about how it is used; checks what can be checked early."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from haomiao.errors import InputError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests may cost before the engine sees them. Seconds, bytes and counts."""

    body_bytes: int = 4 * MIB
    header_bytes: int = 64 << 10
    receive_seconds: float = 10.0
    """For the headers, and again for the body; then 408."""
    stall_seconds: float = 30.0
    """How long a client may leave its stream unread."""
    idle_seconds: float = 300.0
    """How long a realtime connection may stay silent."""
    queue: int = 256
    """Requests in flight; one more gets 429."""
    rate: float | None = None
    """Requests a minute per key, or per address without keys."""
    drain_seconds: float = 30.0
    watchdog_seconds: float = 5.0
    """An engine that is busy and takes no step for so long is killed."""
    crashes: int = 3
    """So many crashes within `crash_seconds`, and the engine is left alone for as long."""
    crash_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything about one server."""

    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `LLM`."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    insecure: bool = False
    """Listen beyond loopback without a key."""
    served_names: tuple[str, ...] = ()
    chat_template: str | None = None
    """Jinja source in place of the model's own."""
    request_templates: bool = False
    """Let requests bring a chat template of their own."""
    points: tuple[str, ...] = ()
    """Operating points that requests may use; empty: all that the model has."""
    max_kl: float | None = None
    """Greatest mean KL to `full` of the points that are used; a request may only ask for less."""
    tls_cert: str | None = None
    tls_key: str | None = None
    origins: tuple[str, ...] = ()
    """Origins that may use the WebSocket from a browser, besides the server's own."""
    log_level: str = "info"
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Raise `InputError` for what would be unsafe or cannot be."""
        if not is_loopback(self.host) and not self.api_keys and not self.insecure:
            raise InputError(
                f"--host {self.host} lets other machines in: give --api-key, or --insecure to serve without one",
                param="host",
            )
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise InputError("an API key must be printable ASCII without spaces", param="api_key")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key belong together", param="tls_cert")
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port must be from 0 to 65535, not {self.port}", param="port")


def is_loopback(host: str) -> bool:
    """True if only this machine can reach an address; a name is trusted only if it is localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
