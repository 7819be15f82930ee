"""The dictionaries that a process holds: so many bytes of them, the ones used longest ago given up first."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from sae.dictionary import Dictionary


class Shelf:
    """Loads in threads: one dictionary's does not hold up another's, and each is loaded once at a time."""

    def __init__(self, capacity_bytes: int, load: Callable[[str], Dictionary]):
        self.capacity_bytes, self.load = capacity_bytes, load
        self.held: OrderedDict[str, Dictionary] = OrderedDict()
        self.loading: dict[str, asyncio.Task[Dictionary]] = {}

    async def get(self, digest: str) -> Dictionary:
        """ArtifactError or LookupError if it cannot be loaded."""
        if digest in self.held:
            self.held.move_to_end(digest)
            return self.held[digest]
        if digest not in self.loading:
            self.loading[digest] = asyncio.create_task(self._load(digest))
        return await asyncio.shield(self.loading[digest])  # a caller that goes away does not stop it for the others

    async def _load(self, digest: str) -> Dictionary:
        try:
            dictionary = await asyncio.to_thread(self.load, digest)
        finally:
            del self.loading[digest]
        self.held[digest] = dictionary
        while len(self.held) > 1 and sum(map(bytes_of, self.held.values())) > self.capacity_bytes:
            self.held.popitem(last=False)
        return dictionary


def bytes_of(dictionary: Dictionary) -> int:
    """Of its float32 weights."""
    return 4 * dictionary.shape.parameter_count(affine=bool(dictionary.w_skip))
