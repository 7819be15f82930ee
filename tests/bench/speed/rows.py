"""Rows that every trainer steps on, of unit mean square norm: those of a real site, or sparse sums of unit directions
with some noise."""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

POOL = 4  # batches that are cycled through


def batches(job: dict[str, Any]) -> list[Tensor]:
    """POOL batches of the job's real rows, or of made ones if it names no file. [rows, columns] each"""
    made = _real(job) if job["file"] else _made(job)
    return [x_BD / x_BD.square().sum(1).mean().sqrt() for x_BD in made]


def _real(job: dict[str, Any]) -> Iterator[Tensor]:
    """Of the bits of bfloat16 that tests/bench/quality/rows.py wrote."""
    bits = np.load(job["file"], mmap_mode="r")
    for first in range(0, POOL * job["rows"], job["rows"]):
        yield torch.from_numpy(bits[first : first + job["rows"]].copy()).view(torch.bfloat16).float()


def _made(job: dict[str, Any]) -> Iterator[Tensor]:
    n_rows, columns, active = job["rows"], job["columns"], job["k"]
    generator = torch.Generator().manual_seed(1)  # 0 is where dictionaries get their first rows from
    directions = torch.nn.functional.normalize(torch.randn(4 * columns, columns, generator=generator), dim=1)
    for _ in range(POOL):
        chosen = torch.rand(n_rows, 4 * columns, generator=generator).topk(active, dim=1).indices
        strengths = torch.rand(n_rows, active, generator=generator) + 0.5
        x_BD = torch.zeros(n_rows, 4 * columns).scatter_(1, chosen, strengths) @ directions
        yield x_BD + 0.02 * torch.randn(n_rows, columns, generator=generator)


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
