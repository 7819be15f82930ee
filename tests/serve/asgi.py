"""Calls of an ASGI application without a server: what is sent, part by part, and what came back. And a server."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tests.conftest import free_port

Messages = Callable[[], Awaitable[dict[str, Any]]]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def scope(method: str, target: str, headers: dict[str, str], client: str = "127.0.0.1", **more: Any) -> dict[str, Any]:
    path, _, query = target.partition("?")
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": query.encode(), "headers": encoded, "scheme": "http",
        "client": (client, 1), "server": ("127.0.0.1", 80), "root_path": "",
    } | more  # fmt: skip


def parts(*bodies: bytes, pause: float = 0.0) -> Messages:
    """A receive function that gives these parts; further calls wait."""
    waiting = list(bodies) or [b""]

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.sleep(3600)
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    return receive


async def exchange(app: Any, scope: dict[str, Any], receive: Messages) -> Answer:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return answered(sent)


def answered(sent: list[dict[str, Any]]) -> Answer:
    """What these messages say."""
    head, *rest = sent
    headers = {name.decode(): value.decode() for name, value in head["headers"]}
    return Answer(head["status"], headers, b"".join(message.get("body", b"") for message in rest))


def call(
    app: Any, method: str, target: str, headers: dict[str, str] | None = None, bodies: Iterable[bytes] = (), **more: Any
) -> Answer:
    """One request from start to end."""
    return asyncio.run(exchange(app, scope(method, target, headers or {}, **more), parts(*bodies)))


def answer_after_all(
    port: int, headers: dict[str, str], size: int, target: str = "/x", *, chunked: bool = False
) -> Answer:
    """To a caller that sends the whole body, so many bytes, before it reads; an error if it cannot."""
    body = iter([bytes(2**16)] * (size // 2**16) + [b"x"]) if chunked else bytes(size)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", target, body, headers)
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers), response.read())


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The application on a port of this machine, by a thread of this process; its URL."""
    import uvicorn

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
