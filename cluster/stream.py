"""Order: the batch at step s is a pure function of (corpus, recipe, seed, s).

A *window* is a fixed range of sequences. Ranks pull activation rows until a window is whole, whoever harvested
them; its rows are sorted by id, permuted with a generator seeded by (seed, window) and cut into batches of nearly
equal size, none left over. A further epoch has windows of the same sequences, with numbers of their own. Nothing here
depends on the number of ranks or actors, on timing or on crashes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.harvest import BLOCK, BLOCK_ROWS, ROW, Rows
from cluster.recipe import Recipe


@dataclass(frozen=True)
class Order:
    """Which rows belong to which window and batch."""

    sequences: int
    context: int
    block_sequences: int
    window_sequences: int
    batch_rows: int
    seed: int
    epochs: int = 1

    @staticmethod
    def of(recipe: Recipe) -> "Order":
        return Order(
            sequences=recipe.train_sequences,
            context=recipe.corpus.context,
            block_sequences=recipe.harvest.sequences,
            window_sequences=recipe.window_sequences,
            batch_rows=recipe.stream.batch_rows,
            seed=recipe.seed,
            epochs=recipe.stream.epochs,
        )

    @property
    def windows(self) -> int:
        """Of all epochs, numbered on from one to the next, as the blocks are."""
        return self.epochs * self._windows_of_an_epoch

    @property
    def blocks(self) -> int:
        return self.epochs * self._blocks_of_an_epoch

    @property
    def _windows_of_an_epoch(self) -> int:
        return math.ceil(self.sequences / self.window_sequences)

    @property
    def _blocks_of_an_epoch(self) -> int:
        return math.ceil(self.sequences / self.block_sequences)

    @property
    def steps(self) -> int:
        """Steps of the run if no row is dropped: what a plan and an ETA can know beforehand."""
        return sum(self._batches_of(self._sequences_in(window) * self.context) for window in range(self.windows))

    def blocks_of(self, window: int) -> range:
        epoch, place = divmod(window, self._windows_of_an_epoch)
        per_window, first = self.window_sequences // self.block_sequences, epoch * self._blocks_of_an_epoch
        ends = (min(number * per_window, self._blocks_of_an_epoch) for number in (place, place + 1))
        return range(*(first + end for end in ends))

    def batches(self, window: int, rows: int) -> list[Tensor]:
        """Indices into a window's rows, sorted by id, of each of its batches."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + window)
        return list(torch.randperm(rows, generator=generator).tensor_split(self._batches_of(rows)))

    def replica_of(self, window: int, rows: int, replicas: int) -> Tensor:
        """Which of a team's replicas each of a window's rows, sorted by id, goes to: of each batch in equal parts."""
        chosen = torch.empty(rows, dtype=torch.int64)
        for batch in self.batches(window, rows):
            for replica, part in enumerate(batch.tensor_split(replicas)):
                chosen[part] = replica
        return chosen

    def progress(self, window: int, batch: int, batches: int) -> float:
        """Share of the run that is done with batch `batch` of a window of `batches`, in (0, 1]."""
        epoch, place = divmod(window, self._windows_of_an_epoch)
        done = place * self.window_sequences + self._sequences_in(window) * (batch + 1) / batches
        return (epoch * self.sequences + done) / (self.epochs * self.sequences)

    def _batches_of(self, rows: int) -> int:
        return max(1, round(rows / self.batch_rows))

    def _sequences_in(self, window: int) -> int:
        place = window % self._windows_of_an_epoch
        return min(self.window_sequences, self.sequences - place * self.window_sequences)


class Window(NamedTuple):
    """This rank's share of a window that is whole across ranks."""

    number: int
    ids: np.ndarray
    """Global row ids [n]."""
    rows: Rows
    """For each site key, the rows' bf16 bits, int16 [n, D]."""


class WindowReader:
    """Pulls rows until every block of a window has arrived at some rank. All ranks must read in step."""

    def __init__(self, order: Order, source: Iterator[Rows], keys: list[str], group: dist.ProcessGroup | None = None):
        self.order, self.source, self.keys, self.group = order, source, keys, group
        self.held: list[Rows] = []
        self.exhausted = False

    def windows(self, first: int) -> Iterator[Window]:
        for number in range(first, self.order.windows):
            while not self._is_whole(number):
                self._pull()
            yield self._take(number)

    def _pull(self) -> None:
        try:
            self.held.append(next(self.source))
        except StopIteration:
            self.exhausted = True

    def _is_whole(self, number: int) -> bool:
        """Asks all ranks: has each block's every row arrived? At the end of the stream what is there is all."""
        numbers = self.order.blocks_of(number)
        mine = torch.zeros(2 * len(numbers) + 1, dtype=torch.int64)
        received, expected = mine[: len(numbers)], mine[len(numbers) : -1]
        for rows in self.held:
            for block, count, total in _block_counts(rows):
                if block in numbers:
                    received[block - numbers.start] += count
                    expected[block - numbers.start] = total
        mine[-1] = self.exhausted
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everyone, mine, group=self.group)
        table = torch.stack(everyone)
        arrived, promised = table[:, : len(numbers)].sum(0), table[:, len(numbers) : -1].amax(0)
        return bool(((arrived == promised) & (promised > 0)).all() or table[:, -1].all())

    def _take(self, number: int) -> Window:
        numbers = self.order.blocks_of(number)
        chosen = [{key: rows[key][rows[BLOCK] < numbers.stop] for key in (ROW, *self.keys)} for rows in self.held]
        later = [{key: column[rows[BLOCK] >= numbers.stop] for key, column in rows.items()} for rows in self.held]
        self.held = [rows for rows in later if len(rows[ROW])]
        merged = {key: np.concatenate([rows[key] for rows in chosen]) for key in (ROW, *self.keys)} if chosen else {}
        return Window(number, merged.pop(ROW, np.empty(0, np.int64)), merged)


def _block_counts(rows: Rows) -> list[tuple[int, int, int]]:
    """For each block in some rows: its number, its rows here, its rows in all."""
    numbers, starts, counts = np.unique(rows[BLOCK], return_index=True, return_counts=True)
    return [(int(n), int(c), int(rows[BLOCK_ROWS][s])) for n, s, c in zip(numbers, starts, counts, strict=True)]
