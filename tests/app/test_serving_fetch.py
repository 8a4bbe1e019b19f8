"""Pictures from addresses: only public ones, the very one that was checked, every redirect anew."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator

import pytest

from nextflow_ar.app.serving.errors import ApiError
from nextflow_ar.app.serving.fetch import Fetcher, is_public

PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "255.255.255.255",
    "224.0.0.1",
    "240.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2001:0:0:0:0:0:80ff:fffe",
    "2001:db8::1",
    "nonsense",
]


def test_which_addresses_are_public() -> None:
    assert [address for address in PRIVATE if is_public(address)] == []
    assert all(
        is_public(address) for address in ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808")
    )


class Site(http.server.BaseHTTPRequestHandler):
    """A site: a body, redirects, and what is too large."""

    seen: list[str]

    def do_GET(self) -> None:
        type(self).seen.append(f"{self.headers['host']}{self.path}")
        status, headers, body = {
            "/a.png": (200, {}, b"picture"),
            "/on": (302, {"location": "/a.png"}, b""),
            "/home": (301, {"location": "http://home.test/a.png"}, b""),
            "/file": (301, {"location": "file:///etc/passwd"}, b""),
            "/loop": (301, {"location": "/loop"}, b""),
            "/large": (200, {}, b"x" * 5000),
        }.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Site.seen = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


NAMES = {"open.test": ["127.0.0.1"], "home.test": ["10.0.0.7"], "both.test": ["127.0.0.1", "10.0.0.7"]}


def get(url: str, looked: list[str] | None = None) -> bytes:
    """Through a fetcher for which 127.0.0.1 stands for the open internet."""

    async def look(host: str, _: int) -> list[str]:
        if looked is not None:
            looked.append(host)
        return NAMES.get(host, [])

    fetcher = Fetcher(1000, 5.0, look, lambda address: address == "127.0.0.1")
    return asyncio.run(fetcher.get(url, "url"))


def test_a_picture_is_got_and_redirects_are_followed(port: int) -> None:
    looked: list[str] = []
    assert get(f"http://open.test:{port}/a.png", looked) == b"picture" and looked == ["open.test"]
    assert get(f"http://open.test:{port}/on", looked) == b"picture"
    assert looked == ["open.test"] * 3 and Site.seen[-1] == f"open.test:{port}/a.png"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://home.test/a.png", "not a public address"),
        ("http://both.test:{port}/a.png", "not a public address"),
        ("http://nowhere.test/", "not a public address"),
        ("http://open.test:{port}/home", "not a public address"),
        ("http://open.test:{port}/file", "no http or https"),
        ("http://open.test:{port}/loop", "leads on too often"),
        ("http://open.test:{port}/large", "larger than 1000 bytes"),
        ("http://open.test:{port}/none", "answers 404"),
        ("http://me:you@open.test:{port}/a.png", "name or password"),
        ("ftp://open.test/a.png", "no http or https"),
        ("http://open.test:99999/", "could not be read"),
        ("https://open.test:{port}/a.png", "could not be read"),
        ("http://[::1", "could not be read"),
    ],
)
def test_what_is_not_got(port: int, url: str, why: str) -> None:
    with pytest.raises(ApiError, match=why) as caught:
        get(url.replace("{port}", str(port)))
    assert caught.value.status == 400 and caught.value.code == "invalid_image_url"


def test_the_system_is_asked_for_addresses_and_private_ones_are_refused(port: int) -> None:
    with pytest.raises(ApiError, match="not a public address"):
        asyncio.run(Fetcher(1000, 5.0).get(f"http://localhost:{port}/a.png", "url"))
    with pytest.raises(ApiError, match="not a public address"):
        asyncio.run(Fetcher(1000, 5.0).get(f"http://0x7f000001:{port}/a.png", "url"))
    assert Site.seen == []
