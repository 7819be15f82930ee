# No `from __future__ import annotations` here: FastAPI could not read the routes' types, and would answer 422 to all.
"""The routes, on whatever computes: the application of `serve.deploy`, and of tests without Ray."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, cast

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serve import contract, formats, page, reading, schemas
from serve.catalog import Catalog, Entry
from serve.compute import Described, Engine, Operation, Selection, Work
from serve.gate import Gate
from serve.limits import Limits, in_time
from serve.metrics import Metrics
from serve.problems import MEDIA_TYPE, Problem
from serve.tokens import Tokens

logger = logging.getLogger(__name__)

Named = Annotated[str, Path(description="An id or a digest", max_length=200)]
Kind = Literal["sae", "transcoder", "crosscoder", "clt"]


def create(
    engine: Engine,
    catalog: Catalog,
    tokens: Tokens | None,
    limits: Limits,
    refresh_seconds: float,
    reader: reading.Reader | None = None,
) -> FastAPI:
    """`tokens` is None for a service that is open on the loopback address alone; without a `reader` there are no
    routes for texts."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(keep_fresh(catalog, refresh_seconds))
        yield
        task.cancel()

    app = FastAPI(
        title="Scopeworks", version="1", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False,
        responses=dict.fromkeys((400, 401, 403, 404, 406, 408, 409, 413, 415, 422, 429, 500, 503), _PROBLEM),
    )  # fmt: skip
    app.add_middleware(cast("Any", Gate), tokens=tokens, limits=limits, metrics=metrics)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Problem, _problem)
    app.openapi_tags = [{"name": "dictionaries"}]
    _add_open_routes(app, engine, catalog, metrics)
    _add_listing(app, catalog)
    for operation in ("encode", "decode", "reconstruct"):
        _add_operation(app, cast("Operation", operation), engine, catalog, limits, metrics)
    _add_feature(app, engine, catalog, limits)
    if reader is not None:
        reading.add_routes(app, reading.House(reader, engine, catalog, limits))
    page.add_routes(app)
    contract.complete(app)
    return app


async def keep_fresh(catalog: Catalog, seconds: float) -> None:
    while True:
        try:
            await asyncio.to_thread(catalog.refresh)
        except Exception:  # a bucket may be away for a while; what was seen is still served
            logger.exception("the catalog could not be read")
        await asyncio.sleep(seconds)


def _add_open_routes(app: FastAPI, engine: Engine, catalog: Catalog, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["service"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["service"])
    async def readyz() -> dict[str, str]:
        """Whether the catalog was read and a replica holds dictionaries."""
        if not catalog.refreshed or not await engine.ready():
            raise Problem(503, "not ready yet", retry_after=1)
        return {"status": "ready"}

    @app.get("/metrics", tags=["service"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def scrape() -> Response:
        """For Prometheus; needs the scope admin."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _add_listing(app: FastAPI, catalog: Catalog) -> None:
    @app.get("/v1/dictionaries", tags=["dictionaries"])
    async def dictionaries(
        model: Annotated[str | None, Query(max_length=200)] = None,
        site: Annotated[str | None, Query(max_length=50, description="Such as resid_post")] = None,
        layer: Annotated[int | None, Query(ge=0, le=1000)] = None,
        kind: Kind | None = None,
        available: bool | None = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
        after: Annotated[str, Query(max_length=200, description="The `next` of the page before")] = "",
    ) -> schemas.Listing:
        """Those that there are, by id; damaged ones with the reason."""
        wanted = [
            entry
            for entry in sorted(catalog.entries, key=lambda entry: entry.id)
            if model in (None, entry.model)
            and (site is None or site in entry.sites)
            and (layer is None or layer in entry.layers)
            and kind in (None, entry.kind)
            and available in (None, entry.available)
        ]
        rest = [entry for entry in wanted if entry.id > after]
        following = rest[limit - 1].id if len(rest) > limit else None
        return schemas.Listing(dictionaries=rest[:limit], total=len(wanted), next=following)

    @app.get("/v1/dictionaries/{name}", tags=["dictionaries"])
    async def dictionary(name: Named) -> Entry:
        """Its config, figures and digest."""
        return catalog.find(name)


def _add_operation(
    app: FastAPI, operation: Operation, engine: Engine, catalog: Catalog, limits: Limits, metrics: Metrics
) -> None:
    async def answer(name: str, selection: Selection, request: Request) -> Response:
        entry = catalog.usable(name)
        media_type = formats.accepted(request.headers)
        body = await request.body()
        work = formats.read(entry, operation, selection, request.headers, body, limits)
        answered = await in_time(engine.run(entry.digest, work), limits)
        metrics.rows.labels(operation).inc(work.n_rows)
        reply = formats.write(entry, answered, media_type)
        return Response(reply.body, media_type=reply.media_type, headers=reply.headers)

    async def encode(
        request: Request,
        name: Named,
        top_k: Annotated[int | None, Query(ge=1, le=2**31, description="The largest of a row")] = None,
        threshold: Annotated[float, Query(ge=0, allow_inf_nan=False, description="Only values above it")] = 0.0,
        features: Annotated[
            str | None, Query(pattern=r"^\d{1,9}(,\d{1,9})*$", description="Only these latents")
        ] = None,
    ) -> Response:
        """Rows → active latents."""
        selection = Selection(top_k, threshold, _chosen(catalog.usable(name), features, limits), limits.numbers)
        return await answer(name, selection, request)

    async def rebuild(request: Request, name: Named) -> Response:
        return await answer(name, Selection(), request)

    endpoint: Callable[..., Any] = encode if operation == "encode" else rebuild
    answers = {"encode": schemas.Encoded, "decode": schemas.Decoded, "reconstruct": schemas.Reconstructed}
    app.post(
        f"/v1/dictionaries/{{name}}/{operation}", name=operation, operation_id=operation, tags=["dictionaries"],
        summary={"encode": "Rows → active latents", "decode": "Active latents → rows",
                 "reconstruct": "Rows → rows, and what of them is not explained"}[operation],
        response_class=Response,
        responses={200: {"model": answers[operation], "content": schemas.BINARY}},
        openapi_extra=contract.posted(formats.BODIES[operation], **schemas.BINARY),
    )(endpoint)  # fmt: skip


def _add_feature(app: FastAPI, engine: Engine, catalog: Catalog, limits: Limits) -> None:
    @app.get("/v1/dictionaries/{name}/features/{number}", tags=["dictionaries"])
    async def feature(name: Named, number: Annotated[int, Path(ge=0, le=2**31)]) -> schemas.Feature:
        """One latent: its threshold, what it writes, and where it was seen active, if that was published."""
        entry = catalog.usable(name)
        if number >= entry.width:
            raise Problem(404, f"this dictionary has the latents 0 to {entry.width - 1}")
        work = Work("describe", 1, selection=Selection(only=(number,)))
        described = await in_time(engine.run(entry.digest, work), limits)
        if isinstance(described, Problem):
            raise described
        assert isinstance(described, Described)
        norms = {part.site: norm for part, norm in zip(entry.writes, described.norms, strict=True) if norm is not None}
        return schemas.Feature(
            dictionary=entry.id, digest=entry.digest, feature=number, norms=norms,
            threshold=described.threshold, bias=described.bias,
        )  # fmt: skip


def _chosen(entry: Entry, features: str | None, limits: Limits) -> tuple[int, ...]:
    chosen = tuple(sorted({int(part) for part in features.split(",")})) if features else ()
    if len(chosen) > limits.named_features:
        raise Problem(422, f"features: at most {limits.named_features} can be named")
    if chosen and chosen[-1] >= entry.width:
        raise Problem(422, f"features: this dictionary has the latents 0 to {entry.width - 1}")
    return chosen


_PROBLEM = {"model": schemas.ProblemDocument, "content": {MEDIA_TYPE: {}}, "description": "A problem document"}


def _problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    body = problem.body(request.state.request_id)
    return Response(body, problem.status, problem.all_headers())


def _http_problem(request: Request, error: Exception) -> Response:
    """Of the router: no such path, or another method."""
    assert isinstance(error, HTTPException)
    detail = {404: "there is no such path", 405: "this path has another method"}.get(error.status_code, "refused")
    return _problem(request, Problem(error.status_code, detail, headers=dict(error.headers or {})))


def _invalid(request: Request, error: Exception) -> Response:
    return _problem(request, formats.problem_of(error))
