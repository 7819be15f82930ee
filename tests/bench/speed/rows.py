"""Rows that every trainer steps on: sparse sums of unit directions and some noise, of unit mean square norm."""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

POOL = 4  # batches that are cycled through


def batches(n_rows: int, columns: int, active: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * columns, columns, generator=generator), dim=1)
    made = []
    for _ in range(POOL):
        chosen = torch.rand(n_rows, 4 * columns, generator=generator).topk(active, dim=1).indices
        strengths = torch.rand(n_rows, active, generator=generator) + 0.5
        x_BD = torch.zeros(n_rows, 4 * columns).scatter_(1, chosen, strengths) @ directions
        x_BD += 0.02 * torch.randn(n_rows, columns, generator=generator)
        made.append(x_BD / x_BD.square().sum(1).mean().sqrt())
    return made


class Timed:
    """An endless stream of batches that notes the clock whenever one is asked for: a trainer's own loop is timed."""

    def __init__(self, pool: list[Tensor], clock: Callable[[], float]):
        self.pool, self.clock, self.asked = pool, clock, []

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self.asked.append(self.clock())
        return self.pool[len(self.asked) % len(self.pool)].clone()  # dictionary_learning divides it in place

    def milliseconds(self, last: int) -> list[float]:
        """Of the last steps."""
        times = self.asked[-last - 1 :]
        return [1e3 * (end - start) for start, end in pairwise(times)]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
