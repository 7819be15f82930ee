"""The gate before every route: who calls, how fast, whether there is room, how large the body is.

It is fail-closed: what is not in `OPEN` needs a token, whether there is such a route or not, and what is not in
`SCOPES` needs "read". Nothing of a body is read before the token is known and there is room; after a
refusal it is read to be thrown away.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from serve import bodies, problems
from serve.bucket import Bucket
from serve.limits import Limits
from serve.metrics import Metrics
from serve.problems import Problem
from serve.tokens import ANYBODY, Caller, Scope, Tokens

logger = logging.getLogger(__name__)

OPEN = frozenset({"/healthz", "/readyz", "/", "/page.js", "/page.css"})
"""Every path that needs no token."""
SCOPES: dict[str, Scope] = {"/metrics": "admin", "/v1/steer": "steer"}
LOOPBACK = ("127.0.0.1", "::1")
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
LONGEST_TOKEN = 256
FULL = {"X-Full": "1"}  # tells HAProxy, which keeps it to itself; no other 503 means that (serve/haproxy.sh)
BURST_PER_SECOND = 0.1  # one a second was a hundredth of all who are let in under overload, and the slowest
LINGER_SECONDS, LINGER_PAUSE_SECONDS, LINGER_BYTES = 5.0, 0.5, 2**25  # after a refusal, for the rest of the body

Scopes = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scopes, bodies.Receive, Send], Awaitable[None]]


class Gate:
    """ASGI middleware; `tokens` is None for a service that is open on the loopback address alone."""

    def __init__(self, app: App, tokens: Tokens | None, limits: Limits, metrics: Metrics):
        self.app, self.tokens, self.limits, self.metrics = app, tokens, limits, metrics
        self.inside, self.burst = 0, Bucket(limits.burst, BURST_PER_SECOND)

    async def __call__(self, scope: Scopes, receive: bodies.Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        exchange = Exchange(scope, receive, send)
        try:
            await self._pass(exchange)
        except Problem as problem:
            await exchange.refuse(problem)
        except bodies.Gone:
            exchange.status = 499
        except Exception:
            logger.exception("request %s", exchange.id)
            await exchange.refuse(problems.unexpected())
        finally:
            self.metrics.answered(exchange.route(), exchange.status, time.perf_counter() - exchange.started)
        await exchange.end()

    async def _pass(self, exchange: "Exchange") -> None:
        if exchange.path in OPEN:
            return await self.app(exchange.scope, exchange.receive, exchange.send)
        self._admit(exchange)
        if not self._has_room():
            raise Problem(503, "the service is full", self.limits.retry_seconds, bodies.CLOSE | FULL)
        self.inside += 1
        self.metrics.inside.set(self.inside)
        try:
            body = await bodies.read(exchange.receive, exchange.headers, self.limits)
            exchange.drop_encoding()
            await self.app(exchange.scope, replay(body, exchange.receive), exchange.send)
        finally:
            self.inside -= 1
            self.metrics.inside.set(self.inside)

    def _has_room(self) -> bool:
        """A few more are let in now and then, so that callers who come together once are not sent away."""
        over = self.inside - self.limits.concurrent
        return over < 0 or (over < self.limits.burst and not self.burst.take())

    def _admit(self, exchange: "Exchange") -> None:
        """Problem unless this caller may call this path now."""
        caller = self._caller(exchange)
        needed = SCOPES.get(exchange.path, "read")
        if needed not in caller.scopes:
            raise Problem(403, f"this token lacks the scope {needed}", headers=bodies.CLOSE)
        if self.tokens is not None and (wait := self.tokens.wait(caller)):
            raise Problem(429, "this token calls faster than its rate", math.ceil(wait), bodies.CLOSE)

    def _caller(self, exchange: "Exchange") -> Caller:
        if self.tokens is None:
            host = exchange.headers.get("host", "").rsplit(":", 1)[0]  # a browser that was led here by another name
            if (exchange.scope.get("client") or ("",))[0] in LOOPBACK and host in LOCAL_NAMES:
                return ANYBODY
            raise Problem(403, "this service answers its own machine only", headers=bodies.CLOSE)
        scheme, _, token = exchange.headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and 0 < len(token) <= LONGEST_TOKEN
        caller = self.tokens.find(token) if known else None
        if caller is None:
            challenge = {"WWW-Authenticate": 'Bearer realm="scopeworks"'}
            raise Problem(401, "send Authorization: Bearer and a token of this service", None, challenge | bodies.CLOSE)
        return caller


class Exchange:
    """One request and what was answered."""

    def __init__(self, scope: Scopes, receive: bodies.Receive, send: Send):
        self.scope, self._receive, self._send = scope, receive, send
        self.more, self.refusal = True, False
        self.id = secrets.token_hex(8)
        self.path = scope["path"].removeprefix(scope.get("root_path", ""))  # as the router sees it
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.started, self.status = time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = self.id

    async def receive(self) -> MutableMapping[str, Any]:
        """Notes whether more of the body follows."""
        message = await self._receive()
        self.more = message.get("more_body", False)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Passes what the application answers, with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
            message = dict(message) | {"headers": [*message.get("headers", []), *own]}
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        if self.status:  # the answer is under way: cutting it off is all that can be done
            raise problem
        body = problem.body(self.id)
        headers = problem.all_headers() | {"Content-Length": str(len(body))}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": encoded})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self.refusal = True

    async def end(self) -> None:
        """After a refusal reads what is left of the body: a connection closed on bytes that nobody read is reset, and
        the caller, who may still be sending, loses the answer."""
        if not self.refusal:
            return
        left = LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self.more and left > 0:
                    async with asyncio.timeout(LINGER_PAUSE_SECONDS):
                        left -= len((await self.receive()).get("body", b""))
        await self._send({"type": "http.response.body", "body": b""})

    def drop_encoding(self) -> None:
        """The application gets the body decompressed."""
        gone = (b"content-encoding", b"content-length")
        self.scope["headers"] = [pair for pair in self.scope["headers"] if pair[0] not in gone]

    def route(self) -> str:
        """The pattern that matched, so that a caller cannot make up labels of metrics."""
        return getattr(self.scope.get("route"), "path", "none")


def replay(body: bytes, receive: bodies.Receive) -> bodies.Receive:
    """A body that was read, as one message, and then whatever comes."""
    first = True

    async def again() -> MutableMapping[str, Any]:
        nonlocal first
        if not first:
            return await receive()
        first = False
        return {"type": "http.request", "body": body, "more_body": False}

    return again
