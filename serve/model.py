"""A process with the model: reads texts for all dictionaries at once, and answers with chosen latents changed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from sae.sites import Site
from serve.catalog import Catalog, SiteColumns
from serve.local import Local
from serve.problems import Problem
from serve.settings import Settings
from serve.sources import source
from serve.steering import Change, Latent, Steering
from serve.texts import Prompt, Reading, Sampling, Step, Texts

T = TypeVar("T")


class Order(NamedTuple):
    """An answer that is asked for."""

    prompt: Prompt
    changes: tuple[Change, ...]
    sampling: Sampling


class Model:
    """One forward pass at a time; between the tokens of a long answer those of other requests have their turn."""

    def __init__(self, settings: Settings):
        assert settings.model is not None
        self.name = settings.model_name or settings.model
        torch.set_num_threads(settings.threads)
        self.texts = Texts(settings.model, settings.model_dtype, settings.limits.text_tokens, settings.model_ranks)
        catalog = Catalog(source(settings.catalog, Path(settings.cache)))
        self.local = Local(catalog, int(settings.memory_gib * 2**30), packed=False)
        self.turn = asyncio.Lock()

    async def ready(self) -> bool:
        return True

    async def check_health(self) -> None:
        """Asked by Ray, which puts a new process in the place of one that raises."""
        if not self.texts.passes.healthy:
            raise RuntimeError("a rank of the model is gone, or failed")

    async def read(self, prompt: Prompt, sites: list[Site]) -> Reading | Problem:
        try:
            self._check(sites)
            return await self._in_turn(lambda: self.texts.read(prompt, sites))
        except Problem as problem:
            return problem  # raised, it would arrive wrapped

    async def answer(self, order: Order) -> AsyncIterator[Step | Problem]:
        """A Problem, if there is one, comes first and alone."""
        try:
            steering = Steering([await self._latent(change) for change in order.changes])
            steps: Iterator[Step] = self.texts.answer(order.prompt, steering, order.sampling)
            while (step := await self._in_turn(lambda: next(steps, None))) is not None:
                yield step
        except Problem as problem:
            yield problem

    async def _in_turn(self, work: Callable[[], T]) -> T:
        async with self.turn:
            try:
                return await asyncio.to_thread(work)
            except Exception:
                if self.texts.passes.healthy:
                    raise
                raise Problem(503, "the model is being started anew", retry_after=5) from None

    async def _latent(self, change: Change) -> Latent:
        dictionary = await self.local.dictionary(change.digest)
        entry = self.local.catalog.find(change.digest)
        reads, writes = ([site_of(part) for part in parts] for parts in (entry.reads, entry.writes))
        self._check([*reads, *writes])
        return Latent(change, dictionary.to(self.texts.device), reads, writes)

    def _check(self, sites: list[Site]) -> None:
        if any(site.layer >= self.texts.layers for site in sites):
            raise Problem(422, f"this service's model has {self.texts.layers} layers, and the dictionary is of another")


def site_of(part: SiteColumns) -> Site:
    name, layer = part.site.rsplit(".", 1)
    return Site(int(layer), name)
