"""The web page: static files, which a browser must be able to fetch before it has a token. They hold no data."""

import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Response

FOLDER = Path(__file__).resolve().parent / "page"
FILES = {"": "index.html", "page.js": "page.js", "page.css": "page.css"}
"""By path."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
}


def add_routes(app: FastAPI) -> None:
    for path, name in FILES.items():
        media_type = mimetypes.guess_type(name)[0]
        app.get(f"/{path}", include_in_schema=False)(_sender((FOLDER / name).read_bytes(), media_type))


def _sender(content: bytes, media_type: str | None) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send
