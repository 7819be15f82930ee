"""An endpoint with a tiny Gemma 3 that reads texts, without Ray, and dictionaries of most kinds at its sites."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from sae import artifact
from sae.dictionary import Dictionary
from sae.spec import DictionarySpec
from serve import app
from serve.catalog import Catalog, Entry
from serve.limits import Limits
from serve.local import Local
from serve.model import Model
from serve.settings import Settings
from serve.sources import Folder
from serve.tokens import Caller, Tokens, sha256
from tests.conftest import WORDS
from tests.published import make_config, make_dictionary, make_spec
from tests.serve.asgi import Answer, call

D, HEADS, LAYERS = 32, 48, 4
READER, STEERER = "reader-of-texts", "steerer"
TEXT = " ".join(WORDS[10:34])
PLACED: dict[str, tuple[int, ...]] = {
    "sae": (1,), "attn_sae": (2,), "transcoder": (0,), "skip_transcoder": (3,), "crosscoder": (0, 1, 3),
    "acausal_crosscoder": (0, 2), "clt": (0, 1, 2, 3),
}  # fmt: skip


class Service(NamedTuple):
    app: Any
    catalog: Catalog
    root: Path

    def ask(self, path: str, body: object, token: str = STEERER) -> Answer:
        headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        return call(self.app, "POST", path, headers, [json.dumps(body).encode()])

    def dictionary(self, kind: str) -> Dictionary:
        """As a notebook reads it."""
        return artifact.read(self.root / "of-texts" / kind)[0]

    def entry(self, kind: str) -> Entry:
        return self.catalog.find(f"of-texts.{kind}")


def make_service(root: Path, model: Path, limits: Limits) -> Service:
    """One dictionary is of another model."""
    for kind in PLACED:
        _publish(root / "of-texts" / kind, kind, "tiny")
    _publish(root / "foreign" / "sae", "sae", "another")
    catalog = Catalog(Folder(root))
    catalog.refresh()
    settings = Settings(catalog=str(root), model=str(model), model_name="tiny", limits=limits)
    callers = [_caller(READER, "read"), _caller(STEERER, "read", "steer", "admin")]
    built = app.create(Local(catalog, 2**30), catalog, Tokens(callers), limits, 1.0, Model(settings))
    return Service(built, catalog, root)


def placed(kind: str) -> DictionarySpec:
    return make_spec(kind).model_copy(update={"layers": PLACED[kind]})


def _publish(folder: Path, kind: str, model: str) -> None:
    spec = placed(kind)
    dictionary = make_dictionary(spec, d=HEADS if kind == "attn_sae" else D)
    artifact.write(folder, dictionary, make_config(spec, model, LAYERS))
    artifact.seal(folder)


def _caller(token: str, *scopes: Any) -> Caller:
    return Caller(name=token, sha256=sha256(token), scopes=frozenset(scopes), requests_per_second=1e6, burst=10**6)
