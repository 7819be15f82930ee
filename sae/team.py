"""The ranks that train one dictionary together: a mesh of latents × rows, and the sums over it.

*Latents over ranks*: shard r of m holds latents r, r + m, r + 2m, … of the dictionary and sees all rows of its batch;
what the shards decode is summed. *Rows over ranks*: a replica sees some rows of each batch and holds all latents of its
shard; gradients are summed. A dictionary alone on its rank is the mesh 1 × 1, on which every sum is what it is given.

Sums are in float arithmetic and in the order of the collective: a mesh trains to the same weights as one rank up to
the rounding of sums. What decides which latents are active is exact: it compares values and adds none.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Axis:
    """The ranks along one direction of the mesh."""

    def __init__(self, index: int = 0, count: int = 1, group: dist.ProcessGroup | None = None):
        self.index, self.count, self.group = index, count, group

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place; the same bits at each."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def total(self, number: int, device: torch.device) -> int:
        """The sum of a number over the ranks."""
        return number if self.count == 1 else int(self.sum(torch.tensor(number, device=device)))

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, of one shape, stacked along a new first axis."""
        if self.count == 1:
            return tensor[None]
        gathered = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.group)
        return torch.stack(gathered)


class Team(NamedTuple):
    """One rank's place in the mesh of a dictionary."""

    latents: Axis
    rows: Axis

    @property
    def alone(self) -> bool:
        return self.latents.count == self.rows.count == 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the whole mesh, in place."""
        return self.rows.sum(self.latents.sum(tensor))

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor of the mesh. [ranks, …]"""
        return self.rows.gather(self.latents.gather(tensor)).flatten(0, 1)

    def mine(self, tensor: Tensor) -> Tensor:
        """This shard's entries of a tensor over all latents. [F, …] to [F of the shard, …]"""
        return tensor[self.latents.index :: self.latents.count]


ALONE = Team(Axis(), Axis())
