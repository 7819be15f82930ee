"""A process that holds dictionaries and computes for all requests that wait, together."""

import asyncio
import os
from pathlib import Path
from typing import NamedTuple

import torch
from ray import serve as ray_serve

from serve.catalog import Catalog
from serve.compute import Answer, Work, compute
from serve.local import Local
from serve.problems import Problem
from serve.settings import Settings
from serve.sources import source

NICENESS = 5  # below the ingress and proxy, whose refusals must not wait for products
MOST_DICTIONARIES = 1000  # by number; bytes are what limits them
BATCH_ROWS = 4096


class Asked(NamedTuple):
    """Some work with a dictionary."""

    digest: str
    work: Work


def rows_of(asked: list[Asked]) -> int:
    return sum(one.work.n_rows for one in asked)


class Dictionaries:
    """Most requests come with the digest of their dictionary as the id that Ray routes by."""

    def __init__(self, settings: Settings):
        os.nice(NICENESS)
        torch.set_num_threads(settings.threads)
        catalog = Catalog(source(settings.catalog, Path(settings.cache)))
        self.local = Local(catalog, int(settings.memory_gib * 2**30))
        self.together.set_max_batch_size(settings.batch_rows)  # type: ignore[attr-defined]

    async def run(self, digest: str, work: Work) -> Answer:
        await self.announce(digest)
        try:
            # Before the batch: while one dictionary is loaded, batches of others go on.
            await self.local.dictionary(digest)
            return await self.together(Asked(digest, work))
        except Problem as problem:
            return problem  # raised, it would arrive wrapped

    async def ready(self) -> bool:
        return True

    @ray_serve.multiplexed(max_num_models_per_replica=MOST_DICTIONARIES)
    async def announce(self, digest: str) -> str:
        """Tells the router who has a dictionary. Loading here would hold up every other load: Ray has one lock."""
        return digest

    # No wait for company: what came while the last batch was computed is the next.
    @ray_serve.batch(max_batch_size=BATCH_ROWS, batch_wait_timeout_s=0, max_concurrent_batches=1, batch_size_fn=rows_of)
    async def together(self, asked: list[Asked]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for digest in dict.fromkeys(one.digest for one in asked):
            dictionary = await self.local.dictionary(digest)
            mine = [n for n, one in enumerate(asked) if one.digest == digest]
            found = await asyncio.to_thread(compute, dictionary, [asked[n].work for n in mine])
            answers |= zip(mine, found, strict=True)
        return [answers[n] for n in range(len(asked))]
