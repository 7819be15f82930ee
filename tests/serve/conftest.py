"""Published dictionaries of every kind, and the application on them without Ray."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sae import artifact
from sae.dictionary import Dictionary
from serve import app, tokens
from serve.catalog import Catalog, Entry
from serve.limits import Limits
from serve.local import Local
from serve.sources import Folder
from serve.tokens import Caller, Tokens
from tests.published import KINDS, make_config, make_dictionary, make_spec

READER, ADMIN = "reader-token", "admin-token"
CALLERS = [
    Caller(
        name="reader", sha256=tokens.sha256(READER), scopes=frozenset({"read"}), requests_per_second=1e6, burst=10**6
    ),
    Caller(name="admin", sha256=tokens.sha256(ADMIN), scopes=frozenset({"read", "admin"})),
]
BEARER = {"authorization": f"Bearer {READER}"}
LIMITS = Limits(body_bytes=2**20, rows=300, numbers=10_000)


class Service(NamedTuple):
    """An application and what it serves."""

    app: Any
    catalog: Catalog
    root: Path

    def entry(self, kind: str) -> Entry:
        return self.catalog.find(f"suite.{kind}")

    def dictionary(self, kind: str) -> Dictionary:
        """As a notebook reads it."""
        return artifact.read(self.root / "suite" / kind)[0]


def publish(root: Path, width: int = 24, d: int = 10) -> None:
    for kind in KINDS:
        spec = make_spec(kind, width=width)
        folder = root / "suite" / kind
        artifact.write(folder, make_dictionary(spec, d=d), make_config(spec))
        artifact.seal(folder)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    publish(root)
    return root


def make_service(root: Path, limits: Limits = LIMITS) -> Service:
    catalog = Catalog(Folder(root))
    catalog.refresh()
    return Service(app.create(Local(catalog, 2**30), catalog, Tokens(CALLERS), limits, 1.0), catalog, root)


@pytest.fixture(scope="session")
def service(published: Path) -> Service:
    return make_service(published)
