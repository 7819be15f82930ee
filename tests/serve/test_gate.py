"""The gate: tokens, scopes, rates, room, and bodies that are large, slow or not what they say."""

import asyncio
import gzip
import logging
import re
import time
import tracemalloc

import pytest

from serve import bodies, tokens
from serve.gate import Gate
from serve.limits import Limits
from serve.metrics import Metrics
from serve.tokens import Caller, NoTokens, Tokens
from tests.serve.asgi import Answer, answer_after_all, answered, call, exchange, parts, scope, serving

READER, ADMIN = "reader-token", "admin-token"
CALLERS = [
    Caller(name="reader", sha256=tokens.sha256(READER), scopes=frozenset({"read"})),
    Caller(name="admin", sha256=tokens.sha256(ADMIN), scopes=frozenset({"read", "admin"})),
]
LIMITS = Limits(body_bytes=1000, idle_seconds=0.05, body_seconds=0.15, concurrent=2, burst=0)
BEARER = {"authorization": f"Bearer {READER}"}


async def echo(scope, receive, send) -> None:
    message = await receive()
    if scope["path"] == "/broken":
        raise RuntimeError("a secret of /etc")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def gate(callers: list[Caller] | None = CALLERS, limits: Limits = LIMITS, app=echo) -> Gate:
    return Gate(app, None if callers is None else Tokens(callers), limits, Metrics())


def post(content=(b"",), headers: dict | None = None, path: str = "/x") -> Answer:
    return call(gate(), "POST", path, BEARER | (headers or {}), content)


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer wrong", f"Bearer  {READER}", f"Bearer {READER} ", f"Basic {READER}", READER,
     f"Bearer {READER}\udcff", "Bearer " + "x" * 5000, f"Bearer {tokens.sha256(READER)}"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/x", "/metrics", "/healthz/", "/HEALTHZ", "//healthz", "/v1/../healthz", ""])
def test_token__that_is_not_right_is_refused(value: str, path: str) -> None:
    headers = {"authorization": value.encode("utf-8", "surrogateescape").decode("latin-1")} if value else {}
    answer = call(gate(), "GET", path, headers)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer realm="scopeworks"')
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_token__opens_what_its_scopes_name() -> None:
    assert call(gate(), "GET", "/x", BEARER).status == 200
    assert call(gate(), "GET", "/metrics", BEARER).status == 403
    assert call(gate(), "GET", "/v1/steer", {"authorization": f"Bearer {ADMIN}"}).status == 403
    assert call(gate(), "GET", "/metrics", {"authorization": f"bearer {ADMIN}"}).status == 200
    assert call(gate(), "GET", "/at/metrics", BEARER, root_path="/at").status == 403
    assert call(gate(), "GET", "/healthz").status == 200


def test_websocket__is_closed() -> None:
    sent = []

    async def send(message) -> None:
        sent.append(message)

    asyncio.run(gate()({"type": "websocket", "path": "/x", "headers": []}, parts(), send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_without_tokens__only_this_machine_by_its_own_name_is_answered() -> None:
    host = {"host": "localhost:8000"}
    assert call(gate(None), "GET", "/metrics", host).status == 200
    assert call(gate(None), "GET", "/metrics", host, client="10.0.0.1").status == 403
    assert call(gate(None), "GET", "/metrics", {"host": "evil.example:8000"}).status == 403
    assert call(gate(None), "GET", "/metrics").status == 403


def test_rate__is_each_callers_own() -> None:
    now = [0.0]
    slow = [caller.model_copy(update={"requests_per_second": 2.0, "burst": 3}) for caller in CALLERS]
    limited = gate(slow)
    limited.tokens = Tokens(slow, now=lambda: now[0])
    answers = [call(limited, "GET", "/x", BEARER) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert answers[-1].headers["retry-after"] == "1"
    assert call(limited, "GET", "/x", {"authorization": f"Bearer {ADMIN}"}).status == 200
    now[0] = 0.5
    assert [call(limited, "GET", "/x", BEARER).status for _ in range(2)] == [200, 429]


def test_body__at_the_limit_passes_and_a_byte_more_does_not() -> None:
    assert len(post([b"x" * 1000]).body) == 1000
    assert post([b"x" * 1001]).status == 413
    assert post([b"x" * 100] * 11).status == 413
    assert post([b"x"], {"content-length": "1001"}).status == 413
    assert len(post([b"x" * 100] * 10, {"content-length": "1000"}).body) == 1000


@pytest.mark.parametrize("length", ["-1", "1e3", "x", "", " 5", "٣", "9" * 40, "0x10", "999", "1"])
def test_length__that_lies_is_refused(length: str) -> None:
    headers = {"content-length": length.encode().decode("latin-1")}
    assert post([b"x" * 500], headers).status == 400


@pytest.mark.parametrize("size", [1, 5, 997])
def test_gzip__is_opened_by_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PIECE", 7)
    content = b"ab" * 200 + bytes(range(256)) * 2
    packed = gzip.compress(content)
    parts = [packed[first : first + size] for first in range(0, len(packed), size)]
    assert post(parts, {"content-encoding": "gzip", "content-length": str(len(packed))}).body == content


def test_gzip__is_counted_after_it_is_opened() -> None:
    def send(content: bytes) -> Answer:
        return post([content], {"content-encoding": "gzip", "content-length": str(len(content))})

    assert send(gzip.compress(b"x" * 1000)).body == b"x" * 1000
    assert send(gzip.compress(b"x" * 1001)).status == 413
    assert send(gzip.compress(b"x" * 500)[:-3]).status == 400
    assert send(gzip.compress(b"x") + b"more").status == 400
    assert send(b"not gzip").status == 400
    assert post([b"x"], {"content-encoding": "br"}).status == 415


def test_bomb__takes_no_memory() -> None:
    limits = Limits(body_bytes=2**17)
    bomb = gzip.compress(b"\0" * 2**25)
    assert len(bomb) < limits.body_bytes
    tracemalloc.start()
    answer = call(gate(limits=limits), "POST", "/x", BEARER | {"content-encoding": "gzip"}, [bomb])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status == 413
    assert peak < 4 * limits.body_bytes


@pytest.mark.parametrize(("pause", "count"), [(0.2, 2), (0.03, 50)])
def test_slow_body__is_given_up(pause: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it stops, or trickles."""
    monkeypatch.setattr("serve.gate.LINGER_SECONDS", 0.1)
    started = time.monotonic()
    receive = parts(*[b"x"] * count, pause=pause)
    answer = asyncio.run(exchange(gate(), scope("POST", "/x", BEARER), receive))
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert time.monotonic() - started < 1


def test_full_house__is_told_at_once_and_before_anything_is_read() -> None:
    leave, sent, at, read = asyncio.Event(), [], [], []

    async def stay(scope, receive, send) -> None:
        await leave.wait()
        await echo(scope, receive, send)

    async def receive():
        read.append(len(sent))
        return {"type": "http.disconnect"}

    async def send(message) -> None:
        sent.append(message)
        at.append(time.monotonic())

    async def scenario() -> list[Answer]:
        full = gate(app=stay)
        inside = [asyncio.create_task(exchange(full, scope("POST", "/x", BEARER), parts(b"x"))) for _ in range(2)]
        await asyncio.sleep(0.01)
        at.append(time.monotonic())
        await full(scope("POST", "/x", BEARER), receive, send)
        leave.set()
        answers = [await task for task in inside]
        return [*answers, await exchange(full, scope("POST", "/x", BEARER), parts(b"x"))]

    answers, refused = asyncio.run(scenario()), answered(sent)
    assert (refused.status, refused.headers["retry-after"], refused.json()["status"]) == (503, "1", 503)
    assert read == [2]
    assert at[2] - at[0] < 0.05
    assert [answer.body for answer in answers] == [b"x"] * 3


@pytest.mark.parametrize("burst", [0, 1, 2])
def test_burst__is_let_in_above_a_full_house_and_no_more(burst: int) -> None:
    leave = asyncio.Event()

    async def stay(scope, receive, send) -> None:
        await leave.wait()
        await echo(scope, receive, send)

    async def ask(house: Gate) -> list[int]:
        asked = [asyncio.create_task(exchange(house, scope("POST", "/x", BEARER), parts(b"x"))) for _ in range(5)]
        await asyncio.sleep(0.01)
        leave.set()
        answers = [await task for task in asked]
        leave.clear()
        return [answer.status for answer in answers]

    async def scenario() -> tuple[list[int], list[int]]:
        house = gate(app=stay, limits=LIMITS.model_copy(update={"burst": burst}))
        return await ask(house), await ask(house)

    first, at_once_again = asyncio.run(scenario())
    assert first == [200] * (2 + burst) + [503] * (3 - burst)
    assert at_once_again == [200] * 2 + [503] * 3


@pytest.mark.parametrize(("headers", "status"), [({}, 401), (BEARER, 413)], ids=["a stranger", "too large"])
def test_refusal__reaches_a_caller_that_sends_all_before_it_reads(headers: dict, status: int) -> None:
    with serving(gate()) as url:
        for _ in range(10):
            answer = answer_after_all(int(url.rsplit(":", 1)[1]), headers, 2**24)
            assert (answer.status, answer.json()["status"]) == (status, status)


def test_refusal__reads_on_for_a_moment_and_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gate.LINGER_SECONDS", 0.1)
    monkeypatch.setattr("serve.gate.LINGER_BYTES", 1000)
    unread, started = [b"x" * 300] * 10, time.monotonic()

    async def receive():
        if not unread:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": unread.pop(), "more_body": True}

    closed = gate()
    for left in (6, 2, 0, 0):
        assert asyncio.run(exchange(closed, scope("POST", "/x", {}), receive)).status == 401
        assert len(unread) == left
    assert 0.1 < time.monotonic() - started < 1
    (seconds,) = re.findall(r"seconds_sum\S* (\S+)", closed.metrics.text().decode())
    assert float(seconds) < 0.1  # until the answer, not until the end of what is read on


def test_error_of_ours__tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = post(path="/broken")
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert answer.json()["request_id"] in caplog.text
    assert "secret" in caplog.text


def test_tokens__are_read_from_file_or_environment_or_refused(tmp_path) -> None:
    token, digest = tokens.new()
    text = f"- {{name: one, sha256: {digest}, scopes: [read, steer]}}"
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    for environment in ({tokens.TEXT: text}, {tokens.FILE: str(path)}):
        (caller,) = tokens.load(environment)
        assert Tokens([caller]).find(token) is caller
        assert token not in repr(caller)
    for environment in ({}, {tokens.TEXT: ""}, {tokens.TEXT: "[]"}):
        with pytest.raises(NoTokens, match="python -m serve token"):
            tokens.load(environment)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"scopes": []}, "scopes"), ({"scopes": ["root"]}, "scopes"), ({"sha256": "plain"}, "sha256"),
        ({"token": "plain"}, "token"), ({"requests_per_second": 0}, "requests_per_second"),
    ],
)  # fmt: skip
def test_tokens__that_are_not_sound_name_the_field(change: dict, part: str) -> None:
    import yaml

    entry = {"name": "one", "sha256": "0" * 64, "scopes": ["read"]} | change
    with pytest.raises(ValueError, match=part):
        tokens.load({tokens.TEXT: yaml.safe_dump([entry])})


def test_tokens__have_names_of_their_own() -> None:
    import yaml

    twice = [{"name": "one", "sha256": letter * 64, "scopes": ["read"]} for letter in "ab"]
    with pytest.raises(ValueError, match="name: two tokens"):
        tokens.load({tokens.TEXT: yaml.safe_dump(twice)})
