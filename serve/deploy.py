# No `from __future__ import annotations` here: Ray could not read the type of `build`'s argument, and passed a dict.
"""The Serve application: an ingress that is asked, and replicas that hold the dictionaries.

serve.deploy:build is the import path of `serve/config.yaml`; its args are `Settings`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from sae.sites import Site
from serve import app, passes, tokens
from serve.catalog import Catalog
from serve.compute import Answer, Work
from serve.local import Local
from serve.model import Model, Order
from serve.problems import Problem
from serve.replica import Dictionaries
from serve.settings import Settings
from serve.sources import source
from serve.texts import Prompt, Reading, Step
from serve.tokens import Tokens

INGRESS, DICTIONARIES, MODEL = "Ingress", "Dictionaries", "Model"
ATTEMPTS = 3
READY_SECONDS = 2.0
QUIET = {"enable_access_log": False}  # /metrics counts requests; a line for each took a tenth of the ingress' time
NEAR_MEMORY = 2**29  # bytes of dictionaries that the ingress itself holds
GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
T = TypeVar("T")


class Replicas:
    """The dictionaries of all replicas, through Ray's router; what takes less than the way there is computed here."""

    def __init__(self, catalog: Catalog, near_bytes: float) -> None:
        app_name = ray_serve.get_replica_context().app_name
        self.handle = ray_serve.get_deployment_handle(DICTIONARIES, app_name=app_name)
        self.catalog, self.near_bytes, self.near = catalog, near_bytes, Local(catalog, NEAR_MEMORY)

    async def run(self, digest: str, work: Work) -> Answer:
        if work.n_rows * self.catalog.find(digest).bytes <= self.near_bytes:
            return await self.near.run(digest, work)
        return await _somewhere(lambda: self.handle.run.remote(digest, work))

    async def ready(self) -> bool:
        try:
            return await asyncio.wait_for(self.handle.ready.remote(), READY_SECONDS)
        except (TimeoutError, *GONE):
            return False


class Models:
    """The model, through Ray's router."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.handle = ray_serve.get_deployment_handle(MODEL, app_name=ray_serve.get_replica_context().app_name)

    async def read(self, prompt: Prompt, sites: list[Site]) -> Reading | Problem:
        return await _somewhere(lambda: self.handle.read.remote(prompt, sites))

    async def answer(self, order: Order) -> AsyncIterator[Step | Problem]:
        """Not tried again: a part of it may have been read."""
        steps: Any = self.handle.options(stream=True).answer.remote(order)
        async for step in steps:
            yield step


async def _somewhere(ask: Callable[[], Awaitable[T]]) -> T:
    for _ in range(ATTEMPTS):
        try:
            return await ask()
        except GONE:
            pass  # a replica died; nothing but an answer was lost, and another can compute it
    raise Problem(503, "no replica is there at the moment", retry_after=1)


def build(args: Settings) -> ray_serve.Application:
    """NoTokens, and nothing is started, unless a token is configured or the service is local; ValueError if there is no
    such model."""
    callers = None if args.insecure_local else tokens.load()
    if args.model is not None:
        passes.check(args.model, args.model_ranks)

    def make() -> FastAPI:
        torch.set_num_threads(args.threads)
        catalog = Catalog(source(args.catalog, Path(args.cache)))
        allowed = None if callers is None else Tokens(callers)
        reader = Models(args.model_name or args.model) if args.model else None
        return app.create(
            Replicas(catalog, args.near_mib * 2**20), catalog, allowed, args.limits, args.refresh_seconds, reader
        )

    room = args.limits.concurrent
    refusal = BackpressureConfig(status_code=503, retry_after_s=args.limits.retry_seconds)
    ingress: Any = ray_serve.deployment(
        name=INGRESS,
        # Far above what the gate lets in: it is the gate that refuses, with a reason.
        max_ongoing_requests=64 * room,
        max_queued_requests=64 * room,
        backpressure_config=refusal,
        ray_actor_options={"num_cpus": 0.5},
        logging_config=QUIET,
    )(ray_serve.ingress(make)())
    replicas: Any = ray_serve.deployment(
        name=DICTIONARIES,
        num_replicas=args.replicas,
        max_ongoing_requests=64 * room,
        ray_actor_options={"num_cpus": 1},
        logging_config=QUIET,
        health_check_period_s=2,
        request_router_config=RequestRouterConfig(request_router_class="serve.router.LeastBusy"),  # type: ignore[arg-type]
    )(Dictionaries)
    if args.model is None:
        return ingress.bind(replicas.bind(args))
    model: Any = ray_serve.deployment(
        name=MODEL,
        max_ongoing_requests=2 * room,
        ray_actor_options={"num_cpus": args.model_ranks},
        health_check_period_s=2,
    )(Model)
    return ingress.bind(replicas.bind(args), model.bind(args))
