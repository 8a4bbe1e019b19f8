"""Many clients for minutes, each asking for one thing after the other: pictures, streams, talks, questions, edits.

    python benchmarks/serving_soak.py --clients 64 --seconds 300 --engines 2

starts ``nextflow-ar serve`` with the bundled model, and prints what was answered by kind, the times of good answers, and
the server's memory before, on the way and after. Exit status 1 where an answer is neither 200, 429 nor 503, where a good
one is not whole, or where the server is not well afterwards.
"""

import argparse
import base64
import collections
import http.client
import io
import json
import os
import random
import threading
import time

from PIL import Image
from serving_abuse import asked, form, memory, start

PROMPTS = (
    "a red circle on a blue background", "three frogs on an orange background", "a dog left of a cat",
    "two rockets, green background",
)  # fmt: skip
ALLOWED = {200, 429, 503}


def png(rng):
    """A picture of one colour with a square of another, as a file."""
    image = Image.new("RGB", (64, 64), tuple(rng.randrange(256) for _ in range(3)))
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (8, 8, 40, 40))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def shown(data):
    """A picture as part of a message."""
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()},
    }


class Client:
    """One of many: asks, waits for the answer, asks again; its talk goes on from turn to turn."""

    def __init__(self, address, seed):
        self.address, self.rng = address, random.Random(seed)
        self.talk, self.picture = [], png(self.rng)

    def ask(self):
        """(kind, status or what went wrong, seconds)"""
        kind = self.rng.choices(("generate", "stream", "chat", "describe", "edit"), (35, 20, 20, 15, 10))[0]
        began = time.perf_counter()
        try:
            status = getattr(self, kind)()
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
        except (ValueError, KeyError, IndexError):
            status = "not whole"
        return kind, status, time.perf_counter() - began

    def _post(self, path, body, kind="application/json"):
        connection = http.client.HTTPConnection(*self.address, timeout=600)
        try:
            connection.request("POST", path, body, {"content-type": kind})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _json(self, path, **body):
        status, found = self._post(path, json.dumps(body))
        return status, json.loads(found) if not body.get("stream") or status != 200 else found

    def _prompt(self):
        return {"prompt": self.rng.choice(PROMPTS), "seed": self.rng.randrange(10**9)}

    def generate(self):
        """A picture, now and then several, some without a plan in words."""
        n = self.rng.choice((1, 1, 1, 2))
        think = self.rng.random() < 0.6
        status, found = self._json("/v1/images/generations", **self._prompt(), n=n, think=think)
        if status == 200:
            self.picture = base64.b64decode(found["data"][n - 1]["b64_json"])
            Image.open(io.BytesIO(self.picture)).load()
        return status

    def stream(self):
        """A picture as it sharpens."""
        status, found = self._json("/v1/images/generations", **self._prompt(), stream=True, partial_images=2)
        if status == 200 and (
            found.count(b"partial_image_index") != 2 or b"image_generation.completed" not in found
        ):
            raise ValueError("a stream broke off")
        return status

    def chat(self):
        """The next turn of the talk, which begins anew when it is long."""
        if len(self.talk) >= 5:
            self.talk = []
        turn = [shown(self.picture), {"type": "text", "text": "what is this?"}]
        if self.talk:
            turn = self.rng.choice(PROMPTS)
        self.talk.append({"role": "user", "content": turn})
        status, found = self._json(
            "/v1/chat/completions", messages=self.talk, max_tokens=16, max_pictures=len(self.talk) % 2
        )
        if status == 200:
            self.talk.append(found["choices"][0]["message"])
        elif status in ALLOWED:
            self.talk.pop()  # once more another time
        return status

    def describe(self):
        """A question about the picture, which was asked about before as often as not."""
        if self.rng.random() < 0.5:
            self.picture = png(self.rng)
        words = {"type": "text", "text": self.rng.choice(("what is this?", "what is left?", "how many?"))}
        messages = [{"role": "user", "content": [shown(self.picture), words]}]
        status, found = self._json(
            "/v1/chat/completions", messages=messages, max_tokens=16, modalities=["text"]
        )
        if status == 200:
            found["choices"][0]["message"]["content"].strip()
        return status

    def edit(self):
        """The picture changed."""
        parts = [("image", "a.png", self.picture), ("prompt", None, b"make the background green")]
        status, found = self._post("/v1/images/edits", form(parts), "multipart/form-data; boundary=b")
        if status == 200:
            self.picture = base64.b64decode(json.loads(found)["data"][0]["b64_json"])
        return status


def load(address, clients, seconds, watch):
    """(kind, status, seconds) of every answer; ``watch`` is called some times on the way."""
    lock, found = threading.Lock(), []
    end = time.perf_counter() + seconds

    def work(seed):
        client = Client(address, seed)
        while time.perf_counter() < end:
            answer = client.ask()
            with lock:
                found.append(answer)
            if answer[1] in (429, 503):
                time.sleep(0.2)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(clients)]
    [thread.start() for thread in threads]
    while time.perf_counter() < end:
        watch()
        time.sleep(min(seconds / 10, max(0.0, end - time.perf_counter())))
    [thread.join() for thread in threads]
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=4)  # make bench runs all files: little unless told
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--queue", type=int, default=128)
    parser.add_argument("--engines", type=int, default=1)
    given = parser.parse_args()
    process, address = start(given.model, "--queue", str(given.queue), "--engines", str(given.engines))
    before, on_the_way = memory(process.pid), []
    found = load(address, given.clients, given.seconds, lambda: on_the_way.append(memory(process.pid)))
    health = json.loads(asked(address, "/health"))
    figures = asked(address, "/metrics").decode()
    after = memory(process.pid)
    process.terminate()
    status = process.wait(timeout=90)
    print(f"{'kind':<12}{'answered':>10}{'p50 s':>9}{'p99 s':>9}  by status")
    for kind in (*dict.fromkeys(kind for kind, _, _ in found), "all"):
        mine = [one for one in found if kind in (one[0], "all")]
        times = sorted(seconds for _, what, seconds in mine if what == 200) or [float("nan")]
        p50, p99 = times[len(times) // 2], times[min(len(times) - 1, int(len(times) * 0.99))]
        counts = dict(collections.Counter(what for _, what, _ in mine))
        print(f"{kind:<12}{len(mine):>10}{p50:>9.2f}{p99:>9.2f}  {counts}")
    print(
        f"memory, MiB: before {before:.0f}, "
        + " ".join(f"{x:.0f}" for x in on_the_way)
        + f", after {after:.0f}"
    )
    for line in figures.splitlines():
        if line.startswith(("nextflow_ar_prefix", "nextflow_ar_pictures_known_total")):
            print(line)
    wrong = sum(what not in ALLOWED for _, what, _ in found)
    print(f"{len(found)} answers, {wrong} wrong; {health}; exit status {status}")
    if wrong or health["status"] != "ok" or health["open"] or status != 0:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
