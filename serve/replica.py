"""A process that holds dictionaries and computes for all requests that wait, together."""

import os
from pathlib import Path

import torch
from ray import serve as ray_serve

from serve.batches import Batches
from serve.catalog import Catalog
from serve.compute import Answer, Work
from serve.local import Local
from serve.problems import Problem
from serve.settings import Settings
from serve.sources import source

NICENESS = 5  # below the ingress and proxy, whose refusals must not wait for products
MOST_DICTIONARIES = 1000  # by number; bytes are what limits them


class Dictionaries:
    """What requests are computed by; `serve.router` says by which of them."""

    def __init__(self, settings: Settings):
        os.nice(NICENESS)
        torch.set_num_threads(settings.threads)
        catalog = Catalog(source(settings.catalog, Path(settings.cache)))
        self.local = Local(catalog, int(settings.memory_gib * 2**30))
        self.batches = Batches(settings.batch_rows)

    async def run(self, digest: str, work: Work) -> Answer:
        try:
            if digest not in self.local.shelf.held:
                await self.announce(digest)
            # Before it waits for its turn: while one dictionary is loaded, those with others go on.
            return await self.batches.run(await self.local.dictionary(digest), work)
        except Problem as problem:
            return problem  # raised, it would arrive wrapped

    async def ready(self) -> bool:
        return True

    @ray_serve.multiplexed(max_num_models_per_replica=MOST_DICTIONARIES)
    async def announce(self, digest: str) -> str:
        """Tells the router who has a dictionary. Loading here would hold up every other load: Ray has one lock."""
        return digest
