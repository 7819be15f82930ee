"""Bodies, read whole and never beyond their limit, whatever their headers promise."""

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serve.limits import Limits
from serve.problems import Problem

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
PIECE = 2**17
INFLATING = ThreadPoolExecutor(1)  # at a time: each thread keeps the memory that it once needed
CLOSE = {"Connection": "close"}  # what is left of the body must not be read as the next request


class Gone(Exception):
    """The caller hung up."""


async def read(receive: Receive, headers: Mapping[str, str], limits: Limits) -> bytes:
    """The decompressed body; Problem if it is too large, too slow or not what its headers say."""
    declared, inflate = _declared(headers, limits), _inflater(headers, limits)
    parts: list[bytes] = []
    received = 0
    loop = asyncio.get_running_loop()
    deadline, more = loop.time() + limits.body_seconds, True
    while more:
        try:
            seconds = min(limits.idle_seconds, deadline - loop.time())
            async with asyncio.timeout(max(seconds, 0.001)):
                message = await receive()
        except TimeoutError:
            raise Problem(408, "the body came too slowly", headers=CLOSE) from None
        if message["type"] == "http.disconnect":
            raise Gone
        received += len(part := message.get("body", b""))
        if received > limits.body_bytes:
            raise too_large(limits)
        if part := await inflate(part):
            parts.append(part)
        more = message.get("more_body", False)
    if declared is not None and declared != received:
        raise Problem(400, "Content-Length is not the body's length", headers=CLOSE)
    inflate.finish()
    return b"".join(parts)


def too_large(limits: Limits) -> Problem:
    return Problem(413, f"a body has at most {limits.body_bytes} bytes, decompressed: send fewer rows", headers=CLOSE)


def _declared(headers: Mapping[str, str], limits: Limits) -> int | None:
    text = headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise Problem(400, "Content-Length is no number of bytes", headers=CLOSE)
    if int(text) > limits.body_bytes:
        raise too_large(limits)
    return int(text)


class _Plain:
    """A body that is sent as it is."""

    async def __call__(self, part: bytes) -> bytes:
        return part

    def finish(self) -> None:
        """Problem unless the body was whole."""


class _Gzip(_Plain):
    """Decompresses part by part, never more than a byte above the limit, while other requests have their turn."""

    def __init__(self, limits: Limits):
        self.stream, self.left, self.limits = zlib.decompressobj(wbits=31), limits.body_bytes + 1, limits

    async def __call__(self, part: bytes) -> bytes:
        try:
            inflated = await asyncio.get_running_loop().run_in_executor(INFLATING, self._inflate, part)
        except zlib.error:
            raise Problem(400, "the body is not gzip", headers=CLOSE) from None
        if not self.left:
            raise too_large(self.limits)
        return inflated

    def _inflate(self, part: bytes) -> bytes:
        """By pieces, since while one is put together the thread has the interpreter's lock, and resting as long as it
        works: a core that is kept busy doubles what others wait (tests/bench/LOG.md)."""
        pieces = []
        while part and self.left:
            started = time.perf_counter()
            pieces.append(self.stream.decompress(part, min(PIECE, self.left)))
            time.sleep(time.perf_counter() - started)
            self.left -= len(pieces[-1])
            part = self.stream.unconsumed_tail
        return b"".join(pieces) if self.left else b""

    def finish(self) -> None:
        if not self.stream.eof or self.stream.unused_data:
            raise Problem(400, "the body is not one whole gzip stream", headers=CLOSE)


def _inflater(headers: Mapping[str, str], limits: Limits) -> _Plain:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip"):
        raise Problem(415, "Content-Encoding can be gzip or identity", headers=CLOSE | {"Accept-Encoding": "gzip"})
    return _Gzip(limits) if encoding == "gzip" else _Plain()
