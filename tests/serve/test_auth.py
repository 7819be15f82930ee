"""Every route of the live router is gated; one that is not turns this red."""

from typing import Any

import pytest

from serve import gate
from tests.serve.asgi import call
from tests.serve.conftest import ADMIN, READER, Service

WRONG = ["", "Bearer", "Bearer wrong", f"Bearer {READER}x", f"Basic {READER}"]


def routes(app: Any) -> list[tuple[str, str]]:
    """Method and path of each, parameters filled in."""
    found = [(method, route.path) for route in app.routes for method in sorted(route.methods or ["GET"])]
    return [(method, path.replace("{name}", "suite.sae").replace("{number}", "0")) for method, path in found]


def ungated(app: Any, listed: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Routes that do something else than refuse a caller without a valid token."""
    closed = [one for one in listed if one[1] not in gate.OPEN]
    return [
        (method, path)
        for method, path in closed
        if any(call(app, method, path, {"authorization": value} if value else {}).status != 401 for value in WRONG)
    ]


def test_every_route__is_gated(service: Service) -> None:
    listed = routes(service.app)
    assert len(listed) == 14
    assert {("GET", path) for path in gate.OPEN} <= set(listed)  # no exemption for what is not there
    assert {"/healthz", "/readyz", "/", "/page.js", "/page.css"} == gate.OPEN
    assert ungated(service.app, listed) == []


def test_planted_route__is_found(service: Service) -> None:
    async def planted(scope, receive, send) -> None:
        if scope["path"] == "/planted":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            return await send({"type": "http.response.body", "body": b"open"})
        await service.app(scope, receive, send)

    assert ungated(planted, [*routes(service.app), ("GET", "/planted")]) == [("GET", "/planted")]


@pytest.mark.parametrize("path", gate.SCOPES)
def test_scope__is_asked_for(service: Service, path: str) -> None:
    assert call(service.app, "GET", path, {"authorization": f"Bearer {READER}"}).status == 403


def test_admin__is_let_in(service: Service) -> None:
    assert call(service.app, "GET", "/metrics", {"authorization": f"Bearer {ADMIN}"}).status == 200
