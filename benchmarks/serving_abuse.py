"""Thousands of malformed and hostile requests against a running server: no 5xx but honest ones, memory flat, healthy after.

    python benchmarks/serving_abuse.py --requests 10000 --engines 2

starts ``nextflow-ar serve`` with the bundled model, sends all of them from some threads, and prints what was answered by
kind of attack, and the server's memory on the way. Exit status 1 where anything is not as it should be.
"""

import argparse
import base64
import collections
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

ANSWERS = {"400", "401", "404", "405", "408", "413", "429", "431", "503", "504"}
"""Besides 200 and a closed connection, what a hostile request may meet."""
PATHS = ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions")
WORDS = (
    "a red circle",
    "",
    "\x00",
    "<boi><eoi>",
    "<|im_start|>system",
    "\u202e\ufeff\U0001f9ff",
    "' OR 1=1 --",
    "{{7*7}}",
    "../../etc/passwd",
)


def post(path, body, kind="application/json", length=None, extra=b""):
    """A whole request as bytes; ``length``: told in place of the true one."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {size}\r\n"
    return head.encode() + b"connection: close\r\n" + extra + b"\r\n" + body


def png(width, height, rows=None, kind=2):
    """A PNG that claims a size; ``rows``: how many it really has (None: none at all, the data is broken)."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = 0 if rows is None else 1 + width * {0: 1, 2: 3}[kind]
    data = b"broken" if rows is None else zlib.compress(bytes(row * rows))
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def form(fields, boundary="b"):
    """A multipart body of (name, file name or None, data) parts."""
    out = b""
    for name, file, data in fields:
        told = f'; filename="{file}"' if file is not None else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{told}\r\n\r\n'
        out += head.encode("utf-8", "surrogateescape") + data + b"\r\n"
    return out + f"--{boundary}--\r\n".encode()


def value(rng, depth=0):
    """Any JSON value."""
    plain = [
        None, True, -1, 0, 1, 2**63, -(10**400), 1e308, 0.5, rng.random(), rng.choice(WORDS), "x" * rng.choice((3, 3000)),
    ]  # fmt: skip
    kind = rng.random()
    if depth < 3 and kind < 0.15:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and kind < 0.3:
        return {rng.choice(("type", "text", "url", "a", "role")): value(rng, depth + 1) for _ in range(3)}
    return rng.choice(plain)


FIELDS = [
    "prompt",
    "model",
    "n",
    "size",
    "response_format",
    "stream",
    "partial_images",
    "output_format",
    "output_compression",
    "background",
    "seed",
    "top_k",
    "top_p",
    "temperature",
    "guidance_scale",
    "negative_prompt",
    "think",
    "messages",
    "max_tokens",
    "max_pictures",
    "modalities",
    "stop",
    "stream_options",
    "tools",
    "user",
    "__proto__",
]


def wrong_types(rng):
    """Fields of any type."""
    body = {name: value(rng) for name in rng.sample(FIELDS, rng.randrange(1, 6))}
    if rng.random() < 0.7:
        body["prompt"] = rng.choice(WORDS)
        body["messages"] = rng.choice(
            [
                value(rng),
                [{"role": "user", "content": value(rng)}],
                [{"role": "user", "content": [value(rng)]}],
            ]
        )
    return post(rng.choice(PATHS), json.dumps(body).encode())


def broken_json(rng):
    """Bytes that are no JSON, or nearly."""
    body = rng.choice(
        [
            b"", b"{", b'{"prompt": "a"', b'{"prompt": "\\ud800"}', b'{"prompt": "\xff\xfe"}', b'{"prompt": NaN}', b"null",
            b"[" * rng.choice((10, 100_000)), b'{"a":' * 50_000, b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}",
            b'{"prompt": "a", "prompt": 1}', rng.randbytes(rng.randrange(2000)), b"\x00" * 1000,
        ]
    )  # fmt: skip
    return post(
        rng.choice(PATHS), body, rng.choice(("application/json", "text/plain", "", "multipart/form-data"))
    )


def huge(rng):
    """Numbers and sizes beyond all measure."""
    most = rng.choice((11, 10**6, 2**31, 10**30))
    body = rng.choice(
        [
            {"prompt": "a", "n": most}, {"prompt": "a", "size": f"{most}x{most}"}, {"prompt": "a", "partial_images": most},
            {"prompt": "a" * 40_000}, {"prompt": "a b " * 7_000}, {"prompt": "a", "top_k": [1] * 10_000},
            {"messages": [{"role": "user", "content": "a"}] * 2_000},
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": most, "max_pictures": 8},
        ]
    )  # fmt: skip
    path = PATHS[2] if "messages" in body else PATHS[0]
    return post(path, json.dumps(body).encode())


def cut_off(rng):
    """Bodies that end too early, or that are longer than was told."""
    body = json.dumps({"prompt": "a red circle"}).encode()
    length = rng.choice((len(body) + 1, len(body) + 10**6, 10**12, len(body) - 5))
    return post(rng.choice(PATHS), body, length=length)


def bad_heads(rng):
    """Heads that are no HTTP, or nearly."""
    return rng.choice(
        [
            rng.randbytes(300), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200), b"GET /\r\n\r\n",
            b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n{}",
            b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 9\r\n\r\n{}",
            b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
            b"POST /v1/models HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * 70_000 + b"\r\n\r\n",
            b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 9_000 + b"\r\n",
            b"\r\n" * 2_000, b"HELO x\r\n", b"GET /health HTTP/9.9\r\nhost: x\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
            b"BREW /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-request-id: a\x01b\r\nconnection: close\r\n\r\n",
        ]
    )  # fmt: skip


def path_tricks(rng):
    """Addresses that try to get somewhere else."""
    tail = rng.choice(
        (
            "/v1/../../etc/passwd", "/v1/%2e%2e/%2e%2e/etc/passwd", "//v1/models", "/v1/models/..%2f..%2fconfig", "/%00",
            "/v1/models/" + "a" * 8_000, "/v1/models/%ff%fe", "/health?" + "a=b&" * 2_000, "http://169.254.169.254/latest",
            "/v1/models;x", "/v1/images/generations/", "/V1/MODELS", "/openapi.json/../health", "/metrics%0d%0aa:b",
        )
    )  # fmt: skip
    method = rng.choice(("GET", "POST", "DELETE", "OPTIONS"))
    return f"{method} {tail} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode()


PICTURES = (
    png(60_000, 60_000), png(5_000, 5_000, 5_000, 0), png(3_000, 3_000, 3_000, 0), png(40, 40), png(2**31 - 1, 1),
    png(64, 64, 3), png(1, 4000, 4000),
)  # fmt: skip


def bombs(rng):
    """Pictures that are none, or that are larger than they seem."""
    picture = rng.choice(
        [
            *PICTURES, png(64, 64, 64)[: rng.randrange(9, 90)], rng.randbytes(500), b"",
            b"GIF89a" + struct.pack("<HH", 65535, 65535) + rng.randbytes(60), b"\xff\xd8\xff\xe0" + rng.randbytes(300),
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", b"<svg onload=alert(1)>", b"II*\0" + rng.randbytes(200),
            b"RIFF\xff\xff\xff\xffWEBPVP8L" + rng.randbytes(99), b"BM" + rng.randbytes(80),
        ]
    )  # fmt: skip
    if rng.random() < 0.5:
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        if rng.random() < 0.3:
            url = rng.choice(
                (url[:-3], url.replace("base64,", "base64,%%"), "data:" + "a" * 5_000, "http://127.0.0.1:1/a.png",
                 "http://[::1]/", "file:///etc/passwd", "http://169.254.169.254/", "gopher://x", "")
            )  # fmt: skip
        content = [{"type": "image_url", "image_url": {"url": url}}] * rng.choice((1, 3, 40))
        return post(
            PATHS[2],
            json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 2}).encode(),
        )
    parts = [("image", "a.png", picture), ("prompt", None, b"make it blue")]
    if rng.random() < 0.4:
        parts.append(("mask", "m.png", rng.choice((picture, png(64, 64, 64), png(7, 9, 9)))))
    return post(PATHS[1], form(parts), "multipart/form-data; boundary=b")


def bad_forms(rng):
    """Multipart bodies that are not quite."""
    good = [("image", "a.png", png(64, 64, 64)), ("prompt", None, b"make it blue"), ("n", None, b"1")]
    kind = "multipart/form-data; boundary=b"
    body, kind = rng.choice(
        [
            (form(good)[:-9], kind), (form(good), "multipart/form-data"), (form(good, "c"), kind), (b"", kind),
            (form(good * 60), kind), (form([*good, ("n", None, b"2")]), kind), (form([("image", None, b"text")]), kind),
            (form([("../x", "a", b"1")]), kind), (form([*good, ("x" * 5_000, None, b"1")]), kind),
            (form([("prompt", None, b"\xff\xfe"), good[0]]), kind), (form([("prompt", "f.txt", b"a"), good[0]]), kind),
            (form([good[0], ("prompt", None, b"a" * 2_000_000)]), kind), (b"--b\r\n" * 5_000, kind),
            (form([("image[]", "a.png", png(64, 64, 64))] * 30 + [good[1]]), kind),
            (form([*good, ("n", None, b"1e9")]), kind + ";" * 2_000),
            (form(good), "multipart/form-data; boundary=" + "b" * 900),
        ]
    )  # fmt: skip
    return post(PATHS[1], body, kind)


def leaves(rng):
    """A good request whose client is gone at once."""
    return post(PATHS[0], json.dumps({"prompt": "a red circle", "stream": rng.random() < 0.5}).encode())


def slow(rng):
    """The first part of a good request; the rest comes a byte at a time, and never all of it."""
    whole = post(PATHS[0], json.dumps({"prompt": "a red circle"}).encode())
    return whole[: rng.randrange(1, len(whole) - 1)]


ATTACKS = {
    wrong_types: 30, broken_json: 15, huge: 8, cut_off: 8, bad_heads: 12, path_tricks: 10, bombs: 12, bad_forms: 8,
    leaves: 4, slow: 2,
}  # fmt: skip


def attack(address, kind, rng, patience=90.0):
    """Send one hostile request. Returns what came of it: a status, "closed", or "no answer"."""
    sent = kind(rng)
    try:
        with socket.create_connection(address, timeout=patience) as s:
            s.sendall(sent)
            if kind is slow:
                for _ in range(10):
                    time.sleep(0.05)
                    s.sendall(b"x")
                return "closed"
            if kind is leaves:
                time.sleep(rng.random() * 0.2)
                return "closed"
            if kind in (cut_off, bad_heads):
                s.shutdown(socket.SHUT_WR)
            answer = b""
            while b"\r\n\r\n" not in answer:
                more = s.recv(65536)
                if not more:
                    return "closed"
                answer += more
            status = answer.split(b" ", 2)[1].decode("latin-1")
            if status.startswith(("4", "5")) and b"application/json" not in answer:
                return status + " in another shape"
            return status
    except TimeoutError:
        return "no answer"
    except OSError:
        return "closed"


def accepted(result):
    """Whether a result is one of those that there may be."""
    return result in ANSWERS or result in ("200", "closed")


def memory(pid):
    """MiB of a process and of those that it started, such as engines, in memory now."""
    with open(f"/proc/{pid}/status") as file:
        own = int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return own + sum(memory(int(child)) for several in lists for child in several)


def asked(address, path):
    """A plain GET's body."""
    with socket.create_connection(address, timeout=60) as s:
        s.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        out = io.BytesIO()
        while more := s.recv(65536):
            out.write(more)
    return out.getvalue().partition(b"\r\n\r\n")[2]


def start(model, *more):
    """A server on a free port: (process, address)."""
    command = [sys.executable, "-m", "nextflow_ar.app.cli", "serve", "--port", "0", "-m", model, *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if '"event": "serving"' in line:
            address = ("127.0.0.1", int(json.loads(line)["url"].rsplit(":", 1)[1]))
            threading.Thread(target=lambda: collections.deque(process.stderr, maxlen=0), daemon=True).start()
            break
    else:
        raise SystemExit("the server did not start")
    while b'"ok"' not in asked(address, "/health"):
        time.sleep(0.1)
    return process, address


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=300)  # make bench runs all files: few unless told
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--engines", type=int, default=1)
    given = parser.parse_args()
    process, address = start(
        given.model, "--timeout", "60", "--max-body", "5", "--engines", str(given.engines)
    )
    numbers = iter(range(given.requests))
    lock, found = threading.Lock(), collections.Counter()
    told = [("start", memory(process.pid))]
    began = time.perf_counter()

    def work():
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            rng = random.Random(given.seed * 1_000_003 + number)
            kind = rng.choices(list(ATTACKS), list(ATTACKS.values()))[0]
            result = attack(address, kind, rng)
            with lock:
                found[kind.__name__, result] += 1
                if number and number % max(1, given.requests // 10) == 0:
                    told.append((f"{number}", memory(process.pid)))

    threads = [threading.Thread(target=work) for _ in range(given.threads)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    seconds = time.perf_counter() - began
    for _ in range(600):
        health = json.loads(asked(address, "/health"))
        if not health["open"]:
            break
        time.sleep(0.1)
    told.append(("end", memory(process.pid)))
    process.terminate()
    status = process.wait(timeout=60)
    for (kind, result), count in sorted(found.items()):
        print(f"{kind:<14}{result:<28}{count:>7}{'' if accepted(result) else '   WRONG'}")
    print("memory, MiB: " + ", ".join(f"{name} {size:.0f}" for name, size in told))
    print(f"{given.requests} requests in {seconds:.0f} s; {health}; exit status {status}")
    wrong = sum(count for (_, result), count in found.items() if not accepted(result))
    if wrong or health["status"] != "ok" or health["open"] or status != 0:
        raise SystemExit(f"{wrong} answers are wrong")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
