"""A real browser on the endpoint, which runs in this process without Ray: the page's code is what is tested here."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.limits import Limits
from tests.serve.asgi import serving
from tests.serve.texts import make_service

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="module")
def url(tiny_gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("page") / "published"
    with serving(make_service(root, tiny_gemma, Limits()).app) as at:
        yield at


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Closed with its tests: while it is open this thread has an event loop, and no other test could run one."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium, or name one in CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page as it opens; it must end without an error that nobody asked for in its console."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
    opened.set_default_timeout(15_000)
    opened.goto(url)
    yield opened
    opened.close()
    assert problems == []
