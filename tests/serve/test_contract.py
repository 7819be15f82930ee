"""Whatever the contract allows or forbids, the service answers as the contract says: checked by schemathesis."""

from pathlib import Path

import pytest
from fastapi import FastAPI

from serve.limits import Limits
from tests.serve.asgi import serving
from tests.serve.contract import check
from tests.serve.texts import STEERER, make_service

EXAMPLES = 10


@pytest.fixture
def built(tiny_gemma: Path, tmp_path: Path) -> FastAPI:
    return make_service(tmp_path, tiny_gemma, Limits(new_tokens=4)).app


def test_contract__is_kept(built: FastAPI) -> None:
    with serving(built) as url:
        checked = check(url, STEERER, "of-texts.sae", EXAMPLES)
    assert checked.failures == []
    assert checked.cases >= 800


def test_sabotage__a_route_that_breaks_it_is_noticed(built: FastAPI) -> None:
    @built.get("/v1/planted")
    async def planted(number: int) -> dict[str, int]:
        return {"number": 10 // number}

    with serving(built) as url:
        checked = check(url, STEERER, "of-texts.sae", EXAMPLES)
    assert any("/v1/planted" in failure for failure in checked.failures)
