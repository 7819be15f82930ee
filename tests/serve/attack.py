"""Figures under attack: answers in company, requests made to be wrong, bodies too large, routes without a token."""

import gzip
import json
import random
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from sae import artifact
from serve import gate
from serve.limits import Limits
from serve.problems import MEDIA_TYPE
from tests.published import KINDS, make_rows
from tests.report import Row, row
from tests.serve import contract
from tests.serve.live import Endpoint
from tests.serve.load import MIB, p99, timed

PROBLEM_KEYS = {"type", "title", "status", "detail", "request_id"}
SECRETS = (b"/work", b"/tmp", b"Traceback", b"site-packages", b"127.0.0.1", b"torch", b"ray::")
PROGRAMS = ("Ingress", "Proxy")
CANARY_PAUSE_SECONDS = 0.02
ROUNDS = 3  # what leaks does in most of them, an allocator that grows by a large step in few


class Reply(NamedTuple):
    """What a raw connection brought; status 0 if it was only closed."""

    status: int
    headers: dict[str, str]
    body: bytes


def answers(running: Endpoint, root: Path, count: int, where: str) -> list[Row]:
    """Of all kinds, computed `where`, by eight callers at once, against a notebook's; and the same with one bit
    changed."""
    client = running.client(retries=8)
    offline = {kind: artifact.read(root / "suite" / kind)[0] for kind in KINDS}

    def differs(n: int, flipped: bool = False) -> bool:
        chosen = random.Random(n)
        kind = chosen.choice(list(KINDS))
        x_BD = make_rows(offline[kind], 64)[: chosen.randint(1, 64)]
        y_BD = offline[kind].decode(offline[kind].encode(x_BD), x_BD).numpy()
        if flipped:
            y_BD.view(np.int32)[0, 0] ^= 1
        return not np.array_equal(client.reconstruct(f"suite.{kind}", x_BD).y, y_BD)

    with ThreadPoolExecutor(8) as pool:
        wrong = sum(pool.map(differs, range(count)))
    return [
        row(f"answers {where} compared", count, "answers", ">=", 1),
        row(f"answers {where} with other bits than offline", wrong, "wrong", "==", 0),
        row("sabotage: one bit flipped", differs(0, flipped=True), "flagged", "==", 1),
    ]


def send(running: Endpoint, *parts: bytes, pause: float = 0.0, timeout: float = 20.0) -> Reply:
    """Bytes on a connection of their own, and what comes back; closing early is not waited for."""
    received = b""
    with socket.create_connection(("127.0.0.1", running.port), timeout=timeout) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        except OSError:
            pass  # refused before all was sent
        try:
            while chunk := connection.recv(65536):
                received += chunk
                if _is_whole(received):
                    break
        except OSError:
            pass
    return _parsed(received)


def _is_whole(received: bytes) -> bool:
    head, _, body = received.partition(b"\r\n\r\n")
    length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(length) and len(body) >= int(length[0].split(b":")[1])


def _parsed(received: bytes) -> Reply:
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if len(lines[0].split()) < 2:
        return Reply(0, {}, b"")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return Reply(int(lines[0].split()[1]), headers, body)


def post(running: Endpoint, target: bytes, body: bytes, media_type: str = "application/json", **headers: str) -> Reply:
    return send(running, _head(running, target, media_type, {"Content-Length": str(len(body))} | headers) + body)


def _head(running: Endpoint, target: bytes, media_type: str, headers: dict[str, str]) -> bytes:
    told = {"Host": "x", "Authorization": f"Bearer {running.token}", "Content-Type": media_type} | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return b"POST " + target + b" HTTP/1.1\r\n" + lines.encode("latin-1") + b"\r\n"


def broken(seed: int) -> Iterator[tuple[bytes, bytes, str, dict[str, str]]]:
    """Requests none of which may be accepted: target, body, media type and headers, without end."""
    chosen = random.Random(seed)
    encode, decode = (b"/v1/dictionaries/suite.sae/" + name for name in (b"encode", b"decode"))
    number = [
        b"NaN",
        b"1e999",
        b"-Infinity",
        b"null",
        b'"1"',
        b"true",
        b"[]",
        b"{}",
        b"1e39",
        b"\x00",
        b"9" * 5000,
        b"\xff",
    ]
    octets = "application/octet-stream"
    while True:
        row = [b"0.5"] * 10
        row[chosen.randrange(10)] = chosen.choice(number)
        yield encode, b'{"rows": [[' + b",".join(row) + b"]]}", "application/json", {}
        width = chosen.choice([0, 1, 9, 11, 500])
        yield encode, json.dumps({"rows": [[0.5] * width]}).encode(), "application/json", {}
        yield encode, b"[" * chosen.randint(9, 10**5), "application/json", {}
        yield encode, chosen.randbytes(chosen.randint(0, 200)), "application/json", {}
        yield encode, chosen.randbytes(chosen.choice([39, 41, 44])), octets, {"X-Shape": "1,10"}
        yield encode, b"\x00\x00\xc0\x7f" * 10, octets, {"X-Shape": "1,10"}
        shape = chosen.choice(["1", "", "1,9", "-1,10", "1,10,1", "99999999999,10", "a,b", "1e0,10", "\u0661,10"])
        yield encode, b"\0" * 40, octets, {"X-Shape": shape.encode().decode("latin-1")}
        yield encode, chosen.randbytes(300), "application/vnd.apache.arrow.stream", {}
        yield encode, b"x", chosen.choice(["text/plain", "application/pickle", "", "multipart/form-data"]), {}
        latent = chosen.choice([-1, 24, 2**31, 2**70, 1.5])
        yield (
            decode,
            json.dumps({"features": [{"indices": [latent], "values": [1.0]}]}).encode(),
            "application/json",
            {},
        )
        pairs = b"".join(chosen.randbytes(8) for _ in range(3)) + chosen.randbytes(16)
        yield decode, pairs, octets, {"X-Shape": "2,24", "X-Layout": "csr", "X-Pairs": "2"}
        query = chosen.choice(
            [b"top_k=0", b"top_k=x", b"threshold=nan", b"threshold=-1", b"features=24", b"features=%00"]
        )
        yield encode + b"?" + query, json.dumps({"rows": [[0.5] * 10]}).encode(), "application/json", {}
        name = chosen.choice(
            [b"..%2f..%2fetc%2fpasswd", b"%00", b"suite", b"file:%2f%2f", b"%252e%252e", b"x" * 3000, b"%ff"]
        )
        yield b"/v1/dictionaries/" + name + b"/encode", b"{}", "application/json", {}
        yield encode, b"{}", "application/json", {"Content-Encoding": chosen.choice(["br", "gzip", "deflate"])}


def fuzz(running: Endpoint, count: int) -> list[Row]:
    client, x_BD = running.client(), torch.ones(3, 10)
    before = client.encode("suite.sae", x_BD)
    cases = broken(0)

    def one(case: tuple[bytes, bytes, str, dict[str, str]]) -> Reply:
        target, body, media_type, headers = case
        return post(running, target, body, media_type, **headers)

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(one, [next(cases) for _ in range(count)]))
    after = client.encode("suite.sae", x_BD)
    spoken = [reply for reply in replies if reply.headers.get("content-type") == MEDIA_TYPE]
    malformed = sum(_keys(reply.body) != PROBLEM_KEYS for reply in spoken)
    for reply in [reply for reply in replies if reply.status >= 500 or 0 < reply.status < 400][:3]:
        print("       ", reply.status, reply.body[:200])
    return [
        row("broken requests sent", count, "requests", ">=", 1),
        row("broken requests: our errors", sum(reply.status >= 500 for reply in replies), "5xx", "==", 0),
        row("broken requests: accepted", sum(0 < reply.status < 400 for reply in replies), "accepted", "==", 0),
        row("broken requests: no or no sound problem document", count - len(spoken) + malformed, "wrong", "==", 0),
        row("broken requests: told of the inside", sum(_leaks(reply.body) for reply in replies), "wrong", "==", 0),
        row("canary", not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), "changed", "==", 0),
    ]


def of_contract(running: Endpoint, examples: int) -> list[Row]:
    """Sound and unsound requests made from the contract; some hundred for each ten examples."""
    assert running.token is not None
    checked = contract.check(running.url, running.token, "suite.sae", examples)
    for failure in checked.failures[:3]:
        print("       ", failure)
    return [
        row("requests made from the contract", checked.cases, "requests", ">=", 1),
        row("requests made from the contract: answers that break it", len(checked.failures), "wrong", "==", 0),
    ]


def _keys(body: bytes) -> Any:
    try:
        return set(json.loads(body))
    except ValueError:
        return None


def _leaks(body: bytes) -> bool:
    return any(secret in body for secret in SECRETS)


def bodies(running: Endpoint, limits: Limits, count: int) -> list[Row]:
    """Each kind `count` times, with a canary that asks all the while."""
    target, limit = b"/v1/dictionaries/suite.sae/encode", limits.body_bytes
    octets = "application/octet-stream"
    chunked = _head(running, target, octets, {"Transfer-Encoding": "chunked"})
    chunk = b"10000\r\n" + b"\0" * 65536 + b"\r\n"
    declared = _head(running, target, octets, {"Content-Length": "100"})
    full = b'{"rows": [[' + b",".join([b"0.5"] * 10) + b"]]}"
    at_limit = post(running, target, full + b" " * (limit - len(full)))
    # Made once: this process, in which the canary asks too, has one interpreter lock.
    over = _head(running, target, "application/json", {"Content-Length": str(limit + 1)}) + b" " * (limit + 1)
    bomb = gzip.compress(b"\0" * (64 * limit))
    trials = {
        "a byte over": (lambda: send(running, over), 413),
        "chunks without end": (lambda: send(running, chunked, *[chunk] * (limit // 65536 + 8)), 413),
        "gzip bomb": (lambda: post(running, target, bomb, **{"Content-Encoding": "gzip"}), 413),
        "length that lies": (lambda: send(running, declared, b"\0" * 10, pause=limits.idle_seconds + 0.5), 408),
    }
    client, x_BD = running.client(retries=8), torch.ones(3, 10)
    calm = []
    for _ in range(200):
        calm.append(timed(client.encode, "suite.sae", x_BD))
        time.sleep(CANARY_PAUSE_SECONDS)
    rows = [row(f"{limit} bytes", at_limit.status, "status", "==", 200)]
    for name, (act, status) in trials.items():
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _, act=act: act(), range(40)))  # what is allocated once is not growth
            canary, statuses, grown = [], [], []
            for _ in range(ROUNDS):
                before = _resident(running)
                tasks = [pool.submit(act) for _ in range(count)]
                while len(canary) < 20 or not all(task.done() for task in tasks):
                    canary.append(timed(client.encode, "suite.sae", x_BD))
                    time.sleep(CANARY_PAUSE_SECONDS)
                statuses += [task.result().status for task in tasks]
                grown.append((_resident(running) - before) / MIB)
            other = [found for found in statuses if found not in (status, 503)]
        rows += [
            row(f"{name}, {len(statuses)} times: other answers", len(other), "wrong", "==", 0),
            row(f"{name}: growth of memory", statistics.median(grown), "MiB", "<=", max(1.0, count / 100)),
            row(f"{name}: canary's p99 to the calm one's", p99(canary) / p99(calm), "ratio", "<=", 2),
        ]
    return rows


def _resident(running: Endpoint) -> float:
    processes: list[psutil.Process] = [one for name in PROGRAMS for one in running.processes(name)]
    return float(sum(process.memory_info().rss for process in processes))


def auth(running: Endpoint) -> list[Row]:
    """Every route that the contract of the running service names, and one that is planted, without a valid token."""
    paths = json.loads(running.client()._call("GET", "/openapi.json")[0])["paths"]
    routes = [(method.upper(), path) for path, methods in paths.items() for method in methods if path not in gate.OPEN]
    routes.append(("GET", "/openapi.json"))

    def is_open(method: str, path: str) -> bool:
        target = path.replace("{name}", "suite.sae").encode()
        values = [
            "",
            "Authorization: Bearer\r\n",
            "Authorization: Bearer wrong\r\n",
            f"Authorization: {running.token}\r\n",
        ]
        requests = [f"{method} {target.decode()} HTTP/1.1\r\nHost: x\r\n{value}\r\n".encode() for value in values]
        return any(send(running, request).status != 401 for request in requests)

    planted = sorted(gate.OPEN)[0]  # open on purpose: what finds open routes must find it
    return [
        row("routes gated", len(routes), "routes", "==", 8),
        row("routes that are open", sum(is_open(*route) for route in routes), "open", "==", 0),
        row("sabotage: an open route", is_open("GET", planted), "flagged", "==", 1),
    ]
