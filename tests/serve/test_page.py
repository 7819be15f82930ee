"""The page is there for whoever asks, without a token and without data; one latent is described; the contract holds."""

import json
import re
from typing import Any

import pytest
import torch

from serve import page
from tests.published import KINDS
from tests.serve.asgi import call
from tests.serve.conftest import BEARER, Service


@pytest.mark.parametrize(("path", "name"), page.FILES.items())
def test_page__is_sent_as_it_lies_there(service: Service, path: str, name: str) -> None:
    answer = call(service.app, "GET", f"/{path}")
    assert answer.status == 200
    assert answer.body == (page.FOLDER / name).read_bytes()
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_page__needs_no_more_than_it_is_allowed() -> None:
    """What the policy forbids would only show in a browser: styles and handlers within the HTML, other hosts."""
    html = (page.FOLDER / "index.html").read_text()
    assert " style=" not in html
    assert not re.search(r"<[^>]*\son\w+=", html)
    assert not any(re.search(r"(https?:)?//\w", (page.FOLDER / name).read_text()) for name in page.FILES.values())


@pytest.mark.parametrize("kind", KINDS)
def test_feature__is_described(service: Service, kind: str) -> None:
    entry, dictionary = service.entry(kind), service.dictionary(kind)
    for number in (0, 11, 23):
        told = call(service.app, "GET", f"/v1/dictionaries/suite.{kind}/features/{number}", BEARER).json()
        assert (told["digest"], told["feature"], told["evidence"]) == (entry.digest, number, None)
        assert told["threshold"] == float(dictionary.threshold_F[number])
        assert told["bias"] == float(dictionary.b_enc_F[number])
        x_BD, f_BF = torch.zeros(1, entry.d_in), torch.eye(24)[[number]]
        written = (dictionary.decode(f_BF, x_BD) - dictionary.decode(0 * f_BF, x_BD))[0]
        parts = written.split([part.width for part in entry.writes])
        norms = {part.site: float(row.norm()) for part, row in zip(entry.writes, parts, strict=True) if row.any()}
        assert told["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(("number", "status"), [("24", 404), ("-1", 422), ("x", 422), (str(2**40), 422)])
def test_feature__that_is_not_there_is_told(service: Service, number: str, status: int) -> None:
    assert call(service.app, "GET", f"/v1/dictionaries/suite.sae/features/{number}", BEARER).status == status


def test_contract__refers_to_what_it_has(service: Service) -> None:
    document = call(service.app, "GET", "/openapi.json", BEARER).json()

    def references(part: Any) -> list[str]:
        if isinstance(part, list):
            return [found for one in part for found in references(one)]
        if not isinstance(part, dict):
            return []
        own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return own + [found for one in part.values() for found in references(one)]

    found = references(document)
    assert len(set(found)) >= 10
    for reference in found:
        place, name = reference.rsplit("/", 1)
        assert place == "#/components/schemas", reference
        assert name in document["components"]["schemas"], reference
    assert "$defs" not in json.dumps(document)
