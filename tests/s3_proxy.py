"""A proxy before an S3 server that is slow, answers errors or breaks connections, and counts how often it did."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

ANSWERS = {500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True)
class Faults:
    """What happens to a share of the requests, in turn one of `kinds`: `slow`, `500`, `503`, `reset before` the server
    has seen it, `reset after` (it was done, and its answer is lost), `reset within` the answer's body."""

    kinds: tuple[str, ...]
    share: float
    seconds: float = 0.0
    """How much later a slow one comes."""


def of_a_run(target: str) -> bool:
    """Whether a request is about what a run keeps: not its claim, nor what is looked at before it starts."""
    return "/probe/" not in target and "owner" not in target and "/" in target.strip("/")


class S3Proxy:
    """In front of the server of a URL, on a port of its own. All passes until `faults` is set."""

    def __init__(self, server_url: str):
        self.server = urlparse(server_url).netloc
        self.faults: Faults | None = None
        self.happened: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()
        """Requests that reached the server, by method."""
        self.before: Callable[[str, str], None] = lambda method, target: None
        """Called with each request."""
        self.chosen, self.lock = random.Random(0), threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, method: str, target: str) -> str | None:
        """What is to happen to this request."""
        faults = self.faults
        with self.lock:
            if faults is None or not of_a_run(target) or self.chosen.random() >= faults.share:
                return None
            kinds = [kind for kind in faults.kinds if kind != "reset within" or method == "GET"]
            return self.chosen.choice(kinds)

    def count(self, kind: str) -> None:
        with self.lock:
            self.happened[kind] += 1


def _handler(proxy: S3Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            proxy.before(self.command, self.path)
            fault, faults = proxy.fault(self.command, self.path), proxy.faults
            if fault == "slow" and faults:
                proxy.count(fault)
                time.sleep(faults.seconds)
            elif fault == "reset before":
                return self.reset(fault)
            elif fault in ("500", "503"):
                proxy.count(fault)
                return self.answer(int(fault), [], b"" if self.command == "HEAD" else _error(int(fault)))
            try:
                status, headers, content = self.forwarded(body)
            except OSError:  # the server is away
                return self.reset("server away")
            proxy.passed[self.command] += 1
            if fault == "reset after":
                return self.reset(fault)
            if fault == "reset within" and len(content) > 1:
                self.answer(status, headers, content, sent=len(content) // 2)
                return self.reset(fault)
            self.answer(status, headers, content)

        def forwarded(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            """The server's answer. The Host header stays the proxy's, for it is signed."""
            connection = http.client.HTTPConnection(proxy.server, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer.status, answer.getheaders(), content

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, sent: int | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = {name.lower(): value for name, value in headers}.get("content-length")
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])
            self.wfile.flush()

        def reset(self, kind: str) -> None:
            """Breaks the connection off, so that the client sees an error and no end."""
            proxy.count(kind)
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if kind == "reset within":
                time.sleep(0.05)  # a reset would overtake what was sent
            self.connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: it would be printed among the test's own lines."""

    return Handler


def _error(status: int) -> bytes:
    code = ANSWERS[status]
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>a fault of the test</Message></Error>'.encode()
