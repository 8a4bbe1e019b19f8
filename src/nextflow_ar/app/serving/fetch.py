"""Pictures from http and https addresses, without becoming a way into the network that the server stands in.

Only where it is switched on. A host's addresses are looked up once, all of them must be public, and the connection goes
to the very address that was checked: a second answer of the name server changes nothing. Every redirect is checked anew.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import h11

from nextflow_ar.app.serving.errors import ApiError, bad

REDIRECTS = 3
Address = tuple[str, int]
Look = Callable[[str, int], Awaitable[list[str]]]
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Fetcher:
    """``most``: bytes of an answer; ``seconds``: for all of it, redirects included. ``look``: host and port to addresses,
    ``public``: which of them may be asked; both are there for tests.
    """

    most: int
    seconds: float
    look: Look | None = None
    public: Callable[[str], bool] | None = None

    async def get(self, url: str, param: str) -> bytes:
        """The body of an address. Raises ApiError, which tells no more than that it was not got."""
        try:
            async with asyncio.timeout(self.seconds):
                for _ in range(REDIRECTS + 1):
                    body, onward = await self._once(url, param)
                    if onward is None:
                        return body
                    url = urljoin(url, onward)
        except TimeoutError:
            raise _failed("took too long", param) from None
        except (OSError, h11.ProtocolError, ssl.SSLError, ValueError):
            raise _failed("could not be read", param) from None
        raise _failed("leads on too often", param)

    async def _once(self, url: str, param: str) -> tuple[bytes, str | None]:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise _failed("is no http or https address", param)
        if parts.username or parts.password:
            raise _failed("holds a name or password", param)
        port = parts.port or _PORTS[parts.scheme]
        address = await self._checked(parts.hostname, port, param)
        host = parts.hostname.encode("idna").decode()
        secure = ssl.create_default_context() if parts.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            address, port, ssl=secure, server_hostname=host if secure else None
        )
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            shown = f"[{host}]" if ":" in host else host
            shown = shown if port == _PORTS[parts.scheme] else f"{shown}:{port}"
            return await self._asked(reader, writer, shown, target, param)
        finally:
            writer.close()

    async def _checked(self, host: str, port: int, param: str) -> str:
        """An address of the host; all of them are public."""
        found = await (self.look or _look)(host, port)
        if not found or not all((self.public or is_public)(address) for address in found):
            raise _failed("is not a public address", param)
        return found[0]

    async def _asked(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: str,
        target: str,
        param: str,
    ) -> tuple[bytes, str | None]:
        http = h11.Connection(h11.CLIENT)
        headers = [
            ("Host", host),
            ("Accept", "image/*"),
            ("Connection", "close"),
            ("User-Agent", "nextflow-ar"),
        ]
        asked = http.send(h11.Request(method="GET", target=_quoted(target), headers=headers))
        writer.write((asked or b"") + (http.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        parts, size = [], 0
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                told = {name: value.decode("latin-1") for name, value in event.headers}
                if event.status_code in (301, 302, 303, 307, 308) and b"location" in told:
                    return b"", told[b"location"]
                if event.status_code != 200:
                    raise _failed(f"answers {event.status_code}", param)
            elif isinstance(event, h11.Data):
                parts.append(bytes(event.data))
                size += len(parts[-1])
                if size > self.most:
                    raise _failed(f"is larger than {self.most} bytes", param)
            elif isinstance(event, h11.EndOfMessage):
                return b"".join(parts), None
            elif isinstance(event, h11.ConnectionClosed):
                raise _failed("could not be read", param)


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet: not private, loopback, link-local, shared, reserved or multicast,
    and no such address in IPv6's clothes (mapped, 6to4, Teredo, NAT64).
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    inner = None
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None and ip in ipaddress.ip_network("64:ff9b:1::/48"):
            return False
    if inner is not None:
        return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def _look(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _quoted(target: str) -> str:
    """Only what may stand in a request line."""
    if any(not 33 <= ord(c) <= 126 for c in target):
        from urllib.parse import quote

        return quote(target, safe="/?&=%:@!$'()*+,;~")
    return target


def _failed(why: str, param: str) -> ApiError:
    return bad(f"the picture's address {why}", param, "invalid_image_url")
