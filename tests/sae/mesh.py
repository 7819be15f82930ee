"""A team of ranks that are threads of one process, for tests of what a mesh computes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from sae.team import Axis, Team

T = TypeVar("T")


class Board:
    """Where the ranks of one axis show each other their tensors."""

    def __init__(self, count: int):
        self.slots: list[Tensor] = [torch.empty(0)] * count
        self.barrier = threading.Barrier(count, timeout=60)

    def everyones(self, index: int, tensor: Tensor) -> list[Tensor]:
        self.slots[index] = tensor.clone()
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class ThreadAxis(Axis):
    def __init__(self, index: int, board: Board):
        super().__init__(index, len(board.slots))
        self.board = board

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.board.everyones(self.index, tensor)).sum(0))

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.board.everyones(self.index, tensor))


def on_mesh(shards: int, replicas: int, body: Callable[[Team], T]) -> list[list[T]]:
    """What `body` returns at each rank, by replica and shard."""
    across_latents = [Board(shards) for _ in range(replicas)]
    across_rows = [Board(replicas) for _ in range(shards)]

    def rank(number: int) -> T:
        replica, shard = divmod(number, shards)
        team = Team(ThreadAxis(shard, across_latents[replica]), ThreadAxis(replica, across_rows[shard]))
        try:
            return body(team)
        except BaseException:
            for board in (*across_latents, *across_rows):
                board.barrier.abort()
            raise

    with ThreadPoolExecutor(shards * replicas) as pool:
        results = list(pool.map(rank, range(shards * replicas)))
    return [results[replica * shards : (replica + 1) * shards] for replica in range(replicas)]
