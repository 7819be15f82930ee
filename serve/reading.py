# No `from __future__ import annotations` here: FastAPI could not read the routes' types, and would answer 422 to all.
"""The routes for texts: a text's features in several dictionaries from one pass of the model, and steered answers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from sae.sites import Site
from serve import contract, formats, schemas
from serve.catalog import Catalog, Entry
from serve.compute import Engine, Features, Selection, Work
from serve.limits import Limits, in_time
from serve.model import Order, site_of
from serve.problems import Problem
from serve.steering import Change
from serve.texts import Prompt, Reading, Sampling, Step

LINES = "application/x-ndjson"
Body = TypeVar("Body", bound=schemas.PromptBody)


class Reader(Protocol):
    """Where the model is held."""

    name: str
    """As dictionaries name it."""

    async def read(self, prompt: Prompt, sites: list[Site]) -> Reading | Problem: ...

    def answer(self, order: Order) -> AsyncIterator[Step | Problem]:
        """A Problem, if there is one, comes first and alone."""


class House(NamedTuple):
    """What the routes need."""

    reader: Reader
    engine: Engine
    catalog: Catalog
    limits: Limits

    def usable(self, name: str) -> Entry:
        """Problem unless it is there and of the model that this service runs."""
        entry = self.catalog.usable(name)
        if entry.model != self.reader.name:
            raise Problem(422, f"{entry.id} is of another model than {self.reader.name}")
        return entry


def add_routes(app: FastAPI, house: House) -> None:
    @app.post("/v1/features", tags=["texts"], response_class=Response, **_contract(schemas.FeaturesBody, schemas.Read))
    async def features(request: Request) -> Response:
        """A text → the active latents of every token, in several dictionaries."""
        body = await _body(request, schemas.FeaturesBody, house.limits)
        if len(body.dictionaries) > house.limits.text_dictionaries:
            raise Problem(413, f"dictionaries: at most {house.limits.text_dictionaries} read one text")
        entries = [house.usable(name) for name in dict.fromkeys(body.dictionaries)]
        selection = Selection(body.top_k, body.threshold, (), house.limits.numbers)
        return Response(await _read(house, _prompt(body), entries, selection), media_type=formats.JSON)

    @app.post("/v1/steer", tags=["texts"], response_class=Response, **_contract(schemas.SteerBody, schemas.Said, LINES))
    async def steer(request: Request) -> Response:
        """A text → the model's answer with some latents changed, and that without, token by token: a JSON a line."""
        body = await _body(request, schemas.SteerBody, house.limits)
        steps = house.reader.answer(_order(house, body))
        first = await in_time(anext(steps), house.limits)  # before the answer begins: a refusal has a status of its own
        if isinstance(first, Problem):
            raise first
        return StreamingResponse(_lines(first, steps), media_type=LINES)


async def _read(house: House, prompt: Prompt, entries: list[Entry], selection: Selection) -> bytes:
    sites = {site_of(part) for entry in entries for part in entry.reads}
    reading = await in_time(house.reader.read(prompt, sorted(sites, key=lambda site: site.depth)), house.limits)
    if isinstance(reading, Problem):
        raise reading
    found = await asyncio.gather(*(_features(house, entry, reading, selection) for entry in entries))
    content = schemas.Read.model_construct(
        model=house.reader.name,
        tokens=[schemas.Token.model_construct(**token._asdict()) for token in reading.tokens],
        dictionaries=[
            schemas.TextFeatures.model_construct(dictionary=entry.id, digest=entry.digest, features=rows)
            for entry, rows in zip(entries, found, strict=True)
        ],
    )
    return content.model_dump_json().encode()


async def _features(house: House, entry: Entry, reading: Reading, selection: Selection) -> list[schemas.RowFeatures]:
    """Of every token; of masked ones none."""
    found: list[tuple[list[int], list[float]]] = []
    if reading.rows:
        x = np.concatenate([reading.rows[part.site] for part in entry.reads], axis=1)
        if x.shape[1] != entry.d_in:
            raise Problem(422, f"dictionaries: {entry.id} reads {entry.d_in} columns, and the model has {x.shape[1]}")
        work = Work("encode", len(x), x, selection=selection)
        answer = await in_time(house.engine.run(entry.digest, work), house.limits)
        if isinstance(answer, Problem):
            raise answer
        assert isinstance(answer, Features)
        bounds = zip(answer.offsets[:-1], answer.offsets[1:], strict=True)
        found = [(answer.indices[a:b].tolist(), answer.values[a:b].tolist()) for a, b in bounds]
    rows = iter(found)
    every = [([], []) if token.masked else next(rows) for token in reading.tokens]
    return [schemas.RowFeatures.model_construct(indices=indices, values=values) for indices, values in every]


async def _lines(first: Step, rest: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    whole = schemas.Said(steered="", plain="", done=True)
    step: Step | None = first
    while step is not None:
        whole.steered, whole.plain = whole.steered + step.steered, whole.plain + step.plain
        yield schemas.Said(**step._asdict()).model_dump_json().encode() + b"\n"
        step = await anext(rest, None)
    yield whole.model_dump_json().encode() + b"\n"


def _order(house: House, body: schemas.SteerBody) -> Order:
    limits = house.limits
    if len(body.changes) > limits.changes:
        raise Problem(413, f"changes: at most {limits.changes} latents can be changed")
    if body.new_tokens > limits.new_tokens:
        raise Problem(413, f"new_tokens: an answer has at most {limits.new_tokens}")
    changes = []
    for one in body.changes:
        entry = house.usable(one.dictionary)
        if one.feature >= entry.width:
            raise Problem(422, f"changes: {entry.id} has the latents 0 to {entry.width - 1}")
        changes.append(Change(entry.digest, one.feature, one.change, one.value))
    sampling = Sampling(body.new_tokens, body.temperature, body.seed)
    return Order(_prompt(body), tuple(changes), sampling)


def _prompt(body: schemas.PromptBody) -> Prompt:
    if (body.text is None) == (body.messages is None):
        raise Problem(422, "text, messages: give one of them")
    return Prompt(body.text, tuple(message.model_dump() for message in body.messages or ()))


async def _body(request: Request, kind: type[Body], limits: Limits) -> Body:
    media_type = request.headers.get("content-type", formats.JSON).partition(";")[0].strip().lower()
    if media_type != formats.JSON:
        raise Problem(415, f"Content-Type can be {formats.JSON}")
    try:
        return kind.model_validate(formats.parse_json(await request.body(), limits.json_depth))
    except ValidationError as error:
        raise formats.problem_of(error) from None


def _contract(body: type[schemas.Body], answer: type, media_type: str = formats.JSON) -> dict[str, Any]:
    """The OpenAPI of a route that reads its body itself."""
    return {
        "openapi_extra": contract.posted(body),
        "responses": {200: {"model": answer} if media_type == formats.JSON else {"content": {media_type: {}}}},
    }
