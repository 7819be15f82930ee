"""Computes in this process: what a replica does, and what an application without Ray runs on."""

import torch

from sae import artifact
from sae.artifact import ArtifactError
from sae.dictionary import Dictionary
from sae.kernels.found import above
from serve.catalog import Catalog
from serve.compute import Answer, Work, compute
from serve.problems import Problem
from serve.shelf import Shelf

GONE = "this dictionary is not available any more: GET /v1/dictionaries lists those that are"


class Local:
    """The dictionaries of a catalog."""

    def __init__(self, catalog: Catalog, capacity_bytes: int, *, packed: bool = True):
        self.catalog, self.shelf, self.packed = catalog, Shelf(capacity_bytes, self._load), packed
        above(torch.zeros(1, 1), torch.zeros(1))  # compiled now, not while somebody waits

    async def run(self, digest: str, work: Work) -> Answer:
        """In the caller's loop: for what takes less time than a thread's start and end."""
        (answer,) = compute(await self.dictionary(digest), [work])
        return answer

    async def ready(self) -> bool:
        return True

    async def dictionary(self, digest: str) -> Dictionary:
        try:
            return await self.shelf.get(digest)
        except (ArtifactError, LookupError, OSError):
            raise Problem(409, GONE) from None  # anew: one that is kept collects the frames of every raise

    def _load(self, digest: str) -> Dictionary:
        """Only what has the digest that was asked for is used, whatever became of the folder meanwhile."""
        if digest not in self.catalog.folders:
            self.catalog.refresh()
        folder = self.catalog.folders[digest]
        dictionary, _ = artifact.read(folder)
        if artifact.sha256(folder / artifact.MANIFEST) != digest:
            raise LookupError(digest)
        return dictionary.packed() if self.packed else dictionary
