"""Throughput and times of answers of a running server, and what it costs over the bare engine.

    python benchmarks/serving.py --clients 1 4 16 64 --pictures 64

Clients, in a process of their own, ask one picture after the other over HTTP; the bare engine is given the same requests,
as many at a time, in the server's process and without a server. Wall clock, and seconds of processor time a picture, which
a busy machine blurs less. ``--seconds`` keeps the clients at it for so long instead, and counts what is not answered with a
picture.
"""

import argparse
import asyncio
import collections
import http.client
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

import torch

from nextflow_ar.app.serve_command import loaded
from nextflow_ar.app.serving.app import create_app, make_server
from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.generation.engine import Failure, Rounds
from nextflow_ar.generation.tidying import settle_in
from nextflow_ar.types import Done, ImageReady, TextDelta

COLOURS = ("red", "blue", "green", "orange", "purple", "yellow")
THINGS = ("circle", "square", "star", "dog", "cat", "frog", "rocket")


def prompt(number):
    """Of a picture: no two of them alike for some hundreds, so that nothing but what all share is found kept."""
    thing, colour, ground = (
        THINGS[number % 7],
        COLOURS[number % 6],
        COLOURS[(number + 1 + number // 6 % 5) % 6],
    )
    one = f"a {colour} {thing} on a {ground} background"
    return (one, f"two {thing}s, {ground} background", f"a {thing} left of a {THINGS[(number // 7) % 7]}")[
        number % 3
    ]


def spent(engines):
    """Seconds of processor time so far, of this process and of those of the engines."""
    seconds = time.process_time()
    for process in multiprocessing.active_children() if engines else ():
        fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def bare(pipeline, engines, clients, pictures, think):
    """(wall, processor) seconds of pictures drawn by the engine or engines alone, ``clients`` at a time, each decoded."""
    rounds, requests, thoughts = engines or Rounds(pipeline.engine), {}, {}
    take = lambda number, request: rounds.take(pipeline.engine.job(number, request))  # noqa: E731
    numbers = iter(range(pictures))

    def begin():
        number = next(numbers, None)
        if number is not None:
            requests[number] = pipeline.requests([prompt(number)], [number])[0]
            if think:
                thoughts[number] = ""
            take(number, pipeline.thought_request(requests[number]) if think else requests[number])

    wall, cpu = time.perf_counter(), spent(engines)
    for _ in range(clients):
        begin()
    while rounds.busy:
        for event in list(rounds.step()):
            if isinstance(event, Failure):
                raise event.error
            if isinstance(event, TextDelta):
                thoughts[event.row] += event.text
            elif isinstance(event, ImageReady):
                pipeline.decode(event.codes)
                begin()
            elif isinstance(event, Done) and event.row in thoughts:
                said = thoughts.pop(event.row)
                take(event.row, pipeline.with_thought(requests[event.row], said))
    return time.perf_counter() - wall, spent(engines) - cpu


class Serving:
    """A server in a thread of this process."""

    def __init__(self, pipeline, engines):
        self.engines = engines
        app = create_app(pipeline, ServerSettings(max_open=256, grace=5), engines)
        settle_in()
        self.server = make_server(app, "127.0.0.1", 0)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def end(self):
        self.server.should_exit = True
        self.thread.join()

    def load(self, clients, think, pictures=None, seconds=None):
        """(wall, processor) seconds, seconds of each answer, and counts by status. The clients are a process of their
        own, as they would be: threads beside the engine's would take its turns.
        """
        command = [sys.executable, __file__, "--port", str(self.port), "--clients", str(clients)]
        command += ["--pictures", str(pictures or 10**9), "--seconds", str(seconds or 1e9)]
        command += [] if think else ["--no-think"]
        cpu = spent(self.engines)
        wall, times, found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return wall, spent(self.engines) - cpu, times, collections.Counter(found)


def ask(port, clients, think, pictures, seconds):
    """What :meth:`Serving.load` wants of its clients, as JSON."""
    numbers, lock, times, found = iter(range(pictures)), threading.Lock(), [], collections.Counter()
    end = time.perf_counter() + seconds

    def client():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while time.perf_counter() < end:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            body = {"prompt": prompt(number), "seed": number, "think": think}
            began = time.perf_counter()
            connection.request(
                "POST", "/v1/images/generations", json.dumps(body), {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            answer.read()
            with lock:
                found[str(answer.status)] += 1
                if answer.status == 200:
                    times.append(time.perf_counter() - began)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    wall = time.perf_counter()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return json.dumps((time.perf_counter() - wall, sorted(times), found))


def share(times, part):
    """The time within which ``part`` of the answers came."""
    return times[min(len(times) - 1, int(len(times) * part))]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--pictures", type=int, default=32, help="of each line; at least two for each client")
    parser.add_argument("--seconds", type=float, help="of each line, in place of so many pictures")
    parser.add_argument("--no-think", action="store_true", help="no plan in words first")
    parser.add_argument("--repeats", type=int, default=3, help="each line's median")
    parser.add_argument("--engines", type=int, default=1, help="as nextflow-ar serve has them")
    parser.add_argument("--threads", type=int, default=0, help="as nextflow-ar serve has them")
    parser.add_argument("--keep", type=int, default=256, help="as nextflow-ar serve has it")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # be the clients of a server there
    given = parser.parse_args()
    think = not given.no_think
    if given.port:
        print(ask(given.port, given.clients[0], think, given.pictures, given.seconds))
        return
    pipeline, engines = loaded(given.model, "cpu", 64, given.keep, given.engines, given.threads)
    serving = Serving(pipeline, engines)
    serving.load(2, think, 4)
    each = f"{given.engines} engines, {torch.get_num_threads()} threads each"
    print(f"{each}, {pipeline.bundle.model.head.weight.dtype}, plan in words: {think}")
    head = (
        "clients",
        "pictures/s",
        "p50 s",
        "p99 s",
        "cpu s",
        "bare/s",
        "bare cpu s",
        "overhead",
        "cpu over",
    )
    print("".join(f"{name:>11}" for name in head) + "  answers")
    for clients in given.clients:
        pictures = max(given.pictures, 2 * clients)
        if given.seconds:
            wall, cpu, times, found = serving.load(clients, think, seconds=given.seconds)
            rates = [(len(times) / wall, cpu / max(1, len(times)), float("nan"), float("nan"))]
        else:
            rates, times, found = [], [], collections.Counter()
            for _ in range(given.repeats):  # in turn, so that a busy machine is equally unkind to both
                alone = bare(pipeline, engines, clients, pictures, think)
                wall, cpu, more, statuses = serving.load(clients, think, pictures)
                times, found = times + more, found + statuses
                rates.append((pictures / wall, cpu / pictures, pictures / alone[0], alone[1] / pictures))
            times.sort()
        rate, cpu, bare_rate, bare_cpu = (statistics.median(column) for column in zip(*rates, strict=True))
        row = (rate, share(times, 0.5), share(times, 0.99), cpu, bare_rate, bare_cpu)
        over = f"{bare_rate / rate - 1:>11.1%}{cpu / bare_cpu - 1:>11.1%}"
        print(f"{clients:>11}" + "".join(f"{x:>11.3f}" for x in row) + over + f"  {dict(found)}", flush=True)
    serving.end()


if __name__ == "__main__":
    main()
