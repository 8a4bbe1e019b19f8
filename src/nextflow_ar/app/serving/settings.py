"""What an operator may set."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of a server. Sizes in bytes, times in seconds.

    ``name``: what clients call the model. ``keys``: accepted API keys; none: everybody may ask. ``max_open``: pictures and
    texts in work or waiting at once. ``max_n``: pictures or answers of one request. ``max_inputs``: pictures given in one
    request, each of at most ``max_pixels``. ``max_body``: of one request; ``max_buffered``: of all bodies in memory.
    ``max_connections``: open at once. ``header_timeout``, ``body_timeout``: how long a client may take to send them.
    ``timeout``: of a whole request. ``grace``: what running work gets at the end. ``fetch``: whether http and https
    picture addresses are fetched. ``origins``: web pages that may call from a browser ("*": any).
    """

    name: str = "nano"
    keys: tuple[str, ...] = ()
    max_open: int = 128
    max_n: int = 10
    max_inputs: int = 16
    max_pixels: int = 16_000_000
    max_body: int = 20 * MIB
    max_buffered: int = 256 * MIB
    max_text: int = 32_000
    max_tokens: int = 1024
    max_pictures: int = 8
    max_connections: int = 1024
    header_timeout: float = 15.0
    body_timeout: float = 30.0
    timeout: float = 300.0
    grace: float = 30.0
    fetch: bool = False
    fetch_timeout: float = 10.0
    origins: tuple[str, ...] = ()
