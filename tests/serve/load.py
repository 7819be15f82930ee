"""Figures under load: speed beside bare torch, twice the capacity, replicas that are killed, a soak.

Load is open: requests are sent at their times whether or not earlier ones were answered.
"""

import asyncio
import contextlib
import gc
import re
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import psutil
import torch
import yaml

from sae import artifact
from sae.dictionary import Dictionary
from serve import raw
from serve.client import Client
from tests.report import Row, row
from tests.serve.live import Endpoint

ROWS = 64  # of a request under load
MIB = 2**20
PLANTED, SOAK_PAUSE_SECONDS = 2**17, 0.1
KILL_SECONDS = 5.0


class Seen(NamedTuple):
    """One request's fate."""

    status: int
    """0 if the connection broke."""
    seconds: float
    retry_after: bool


def bare(dictionary: Dictionary, x_BD: torch.Tensor) -> torch.Tensor:
    """What somebody writes who has the weights."""
    pre_BF = x_BD @ dictionary.w_enc[0] + dictionary.b_enc_F
    f_BF = pre_BF.clamp_min(0) * (pre_BF > dictionary.threshold_F)
    return f_BF[f_BF > 0]


def timed(act, *arguments) -> float:
    started = time.perf_counter()
    act(*arguments)
    return time.perf_counter() - started


def speed(running: Endpoint, root: Path, name: str, seconds: float) -> list[Row]:
    dictionary, _ = artifact.read(root / "suite" / "wide")
    x_BD, client = torch.randn(256, 640, generator=torch.Generator().manual_seed(0)), running.client()
    client.encode(name, x_BD)
    served, alone = [], []
    deadline = time.monotonic() + seconds / 4
    while time.monotonic() < deadline:  # by turns, so that a busy machine is busy for both
        served.append(timed(client.encode, name, x_BD[:1]))
        alone.append(timed(bare, dictionary, x_BD[:1]))
    one, limit = (1e3 * statistics.median(part) for part in (served, alone))
    ratios = []
    for _ in range(max(1, round(seconds / 10))):
        torch.set_num_threads(2)
        local = _per_second(lambda: bare(dictionary, x_BD), 1, 1.0)
        torch.set_num_threads(1)
        ratios.append(_per_second(lambda: client.encode(name, x_BD), 4, 4.0) / local)
    text = [x_BD[:1].tolist(), x_BD.tolist()]
    json_ms = [1e3 * statistics.median(timed(_encode_json, running, name, part) for _ in range(5)) for part in text]
    return [
        row("one row, p50", one, "ms", "<=", 1.3 * limit + 3),
        row("256 rows, share of bare torch's rows/s on all cores", statistics.median(ratios), "ratio", ">=", 0.8),
        row("one row in JSON, p50", json_ms[0], "ms", ">=", 0),
        row("256 rows in JSON, p50", json_ms[1], "ms", ">=", 0),
    ]


def _encode_json(running: Endpoint, name: str, rows: list) -> None:
    import json

    headers = {"Content-Type": "application/json"}
    client = running.client()
    client._call("POST", f"/v1/dictionaries/{name}/encode", json.dumps({"rows": rows}).encode(), headers)


def _per_second(act, callers: int, seconds: float) -> float:
    """Calls a second by so many callers at once."""
    deadline = time.monotonic() + seconds

    def call(_: int) -> int:
        done = 0
        while time.monotonic() < deadline:
            act()
            done += 1
        return done

    started = time.monotonic()
    with ThreadPoolExecutor(callers) as pool:
        done = sum(pool.map(call, range(callers)))
    return done / (time.monotonic() - started)


def shoot(running: Endpoint, name: str, rate: float, seconds: float) -> list[Seen]:
    """An open load of encode requests of `ROWS` rows."""
    body, headers = raw.rows_to_bytes(torch.randn(ROWS, 640))
    headers |= {"Content-Type": "application/octet-stream", "Authorization": f"Bearer {running.token}"}
    url = f"{running.url}/v1/dictionaries/{name}/encode?top_k=32"

    async def one(session: aiohttp.ClientSession) -> None:
        started = time.perf_counter()
        try:
            async with session.post(url, data=body, headers=headers) as answer:
                content = await answer.read()
                whole = answer.status != 200 or len(content) == int(answer.headers["X-Pairs"]) * 8 + (ROWS + 1) * 8
                status = answer.status if whole else 0
                seen.append(Seen(status, time.perf_counter() - started, "Retry-After" in answer.headers))
        except aiohttp.ClientError:
            seen.append(Seen(0, time.perf_counter() - started, False))

    async def all_of_them() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session,
            asyncio.TaskGroup() as group,
        ):
            started = time.perf_counter()
            for n in range(int(rate * seconds)):
                await asyncio.sleep(max(0, started + n / rate - time.perf_counter()))
                group.create_task(one(session))

    seen: list[Seen] = []
    with _no_pauses():
        asyncio.run(all_of_them())
    return seen


@contextlib.contextmanager
def _no_pauses() -> Iterator[None]:
    """Python looks through all that this process has imported in a fifth of a second, and what was to be sent meanwhile
    would come to the service at once."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def capacity(running: Endpoint, name: str, callers: int, seconds: float) -> float:
    """Requests a second of as many callers as are let in, who wait for their answers."""
    client, x_BD = running.client(), torch.randn(ROWS, 640)
    return _per_second(lambda: client.encode(name, x_BD, top_k=32), callers, seconds)


def p99(values: list[float]) -> float:
    return 1e3 * float(np.quantile(values, 0.99)) if values else 0.0


def memory(running: Endpoint) -> float:
    """Resident bytes of what a request passes through."""
    processes = [p for name in ("Ingress", "Proxy", "Dictionaries") for p in running.processes(name)]
    return float(sum(process.memory_info().rss for process in processes))


def overload(running: Endpoint, name: str, callers: int, seconds: float) -> list[Row]:
    most = capacity(running, name, callers, seconds / 4)
    calm = shoot(running, name, most / 2, seconds / 2)
    before = memory(running)
    busy = shoot(running, name, 2 * most, seconds)
    grown = memory(running) - before
    accepted, refused = ([one for one in busy if (one.status == 200) is right] for right in (True, False))
    told = [one for one in refused if one.status in (429, 503) and one.retry_after]
    calm_p99 = p99([one.seconds for one in calm if one.status == 200])
    return [
        row("capacity, 64 rows a request", most, "1/s", ">=", 0),
        row("half load: p99", calm_p99, "ms", ">=", 0),
        row("half load: not accepted", sum(one.status != 200 for one in calm), "refused", "==", 0),
        row("twice the capacity: accepted", len(accepted) / seconds, "1/s", ">=", 0),
        row(
            "twice the capacity: p99 of the accepted", p99([one.seconds for one in accepted]), "ms", "<=", 2 * calm_p99
        ),
        row("twice the capacity: refusals", len(told) / seconds, "1/s", ">=", 0),
        row("twice the capacity: p99 of refusals", p99([one.seconds for one in told]), "ms", "<=", 50),
        row("twice the capacity: neither answered nor told to wait", len(refused) - len(told), "lost", "==", 0),
        row("twice the capacity: growth of memory", grown / MIB, "MiB", "<=", 64),
    ]


class Callers:
    """Four that ask the same all the while, each trying once more; and what became of it."""

    def __init__(self, running: Endpoint, name: str):
        self.client, self.name = Client(running.url, running.token, retries=1), name
        self.x_BD = torch.randn(ROWS, 640)
        self.expected = self.client.encode(name, self.x_BD, top_k=32)
        self.failed: list[str] = []
        self.calls, self.wrong = 0, 0
        self.ended, self.pool = threading.Event(), ThreadPoolExecutor(4)

    def __enter__(self) -> "Callers":
        self.tasks = [self.pool.submit(self._call) for _ in range(4)]
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.pool.shutdown()
        for task in self.tasks:
            task.result()
        for error in self.failed[:3]:
            print(f"        failed: {error[:200]}")

    def _call(self) -> None:
        while not self.ended.is_set():
            try:
                answer = self.client.encode(self.name, self.x_BD, top_k=32)
                self.wrong += any(not np.array_equal(a, b) for a, b in zip(answer, self.expected, strict=True))
            except Exception as error:
                self.failed.append(repr(error))
            self.calls += 1
            time.sleep(0.05)

    def rows(self, what: str) -> list[Row]:
        return [
            row(f"{what}: calls", self.calls, "calls", ">=", 1),
            row(f"{what}: failed, with one retry", len(self.failed), "failed", "==", 0),
            row(f"{what}: other answers than before", self.wrong, "wrong", "==", 0),
        ]


def faults(running: Endpoint, name: str, seconds: float) -> list[Row]:
    """A replica of two is killed every few seconds."""
    kills: list[float] = []
    ends = time.monotonic() + max(seconds, 3 * KILL_SECONDS)
    with Callers(running, name) as callers:
        while time.monotonic() < ends:
            if len(alive := running.processes("Dictionaries")) > 1:
                alive[0].kill()
                alive[0].wait(10)
                kills.append(time.monotonic())
            time.sleep(KILL_SECONDS)
    while len(running.processes("Dictionaries")) < 2 and time.monotonic() < kills[-1] + 120:
        time.sleep(0.1)
    return [
        row("replicas killed", len(kills), "kills", ">=", 1),
        *callers.rows("meanwhile"),
        row("both replicas there again, after", time.monotonic() - kills[-1], "s", "<=", 60),
    ]


def rolling(running: Endpoint, name: str, settings: Path) -> list[Row]:
    """A new config is deployed under load; then one that is unsound."""

    def change(**fields: Any) -> str:
        """Deploys it, and what the service says of it."""
        said = len(running.log.read_text())
        settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | fields))
        running.process.send_signal(signal.SIGHUP)
        while not re.search("deployed anew|goes on as it was", told := running.log.read_text()[said:]):
            time.sleep(0.1)
        return told

    before = {process.pid for process in running.processes("Dictionaries")}
    with Callers(running, name) as callers:
        change(batch_rows=2048)
        after = {process.pid for process in running.processes("Dictionaries")}
        unsound = change(batch_rows=0)
        time.sleep(1)
    return [
        row("a new config: replicas replaced", len(after - before), "replicas", ">=", len(before)),
        *callers.rows("a new config"),
        row("a new config that is unsound: refused with its field", "batch_rows" in unsound, "flagged", "==", 1),
    ]


def slope(times: list[float], sizes: list[float]) -> tuple[float, float]:
    """MiB a minute, and the noise of that, by least squares over the second half."""
    half = len(times) // 2
    t, y = np.array(times[half:]) / 60, np.array(sizes[half:]) / MIB
    fitted, covariance = np.polyfit(t, y, 1, cov=True)
    return float(fitted[0]), float(3 * covariance[0, 0] ** 0.5)


def leaks(times: list[float], sizes: list[float]) -> bool:
    """More than the noise, and more than a MiB a minute."""
    rate, noise = slope(times, sizes)
    return rate > max(noise, 1.0)


def leak(running: Endpoint, name: str, seconds: float) -> list[Row]:
    """Some calls, a look at the memory, a pause: what the service keeps of a call, it keeps of slow ones."""
    client, x_BD = running.client(), torch.randn(ROWS, 640)
    times, sizes, hoard, own = [], [], [], []
    started = time.monotonic()
    while time.monotonic() < started + max(seconds, 10):
        for _ in range(5):
            client.encode(name, x_BD, top_k=32)
        times.append(time.monotonic() - started)
        sizes.append(memory(running))
        hoard.append(np.ones(PLANTED // 8))  # the planted leak: this process keeps some of each round
        own.append(float(psutil.Process().memory_info().rss))
        time.sleep(SOAK_PAUSE_SECONDS)
    rate, noise = slope(times, sizes)
    return [
        row("soak: calls", 5 * len(times), "calls", ">=", 1),
        row("soak: memory at its end", sizes[-1] / MIB, "MiB", ">=", 0),
        row("soak: growth of memory a minute", rate, "MiB", "<=", max(noise, 1.0)),
        row("soak: planted leak", leaks(times, own), "flagged", "==", 1),
    ]
