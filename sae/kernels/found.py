"""The pairs that are found part by part: each thread appends what its rows have, so that they take the room that they
need and a row may have any number."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sae.kernels import search_loops as loops
from sae.kernels.threads import SCRATCH, array, spread
from sae.pairs import Pairs

KEYS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


class Found:
    """Of one batch; there is one at a time."""

    def __init__(self, n_rows: int, room: int, dtype: torch.dtype):
        """There is `room` for so many pairs at first."""
        self.n_rows, self.dtype = n_rows, dtype
        n_threads = min(torch.get_num_threads(), n_rows)
        self.ends_T = torch.tensor([n_rows * (part + 1) // n_threads for part in range(n_threads)])
        self.used_T = torch.zeros_like(self.ends_T)
        self.starts: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.latents, self.values = self._room(-(-room // n_threads))

    def add_above(self, first: int, part_BC: Tensor, bias_C: Tensor, threshold_C: Tensor) -> None:
        """The entries above their latent's threshold."""
        limit_C = _keys(threshold_C - bias_C) >> _shift(part_BC.dtype)
        self._add(loops.append_above, part_BC, bias_C, limit_C.to(KEYS[part_BC.dtype]), first)

    def add_from(self, first: int, part_BC: Tensor, bias_C: Tensor, floor_B: Tensor) -> None:
        """The entries no less than their row's floor."""
        filled = functional.pad(bias_C, (0, -len(bias_C) % loops.BLOCK), value=-torch.inf)
        tops = filled.view(-1, loops.BLOCK).amax(1)
        keys = torch.empty(0, dtype=KEYS[part_BC.dtype])
        self._add(loops.append_from, part_BC, bias_C, tops, floor_B, keys, _shift(part_BC.dtype), first)

    @property
    def total(self) -> int:
        return int(self.used_T.sum())

    @property
    def counts_B(self) -> Tensor:
        return torch.stack(self.counts).sum(0)

    def pairs(self) -> Pairs:
        """All, by row and, in it, by latent."""
        counts_B = self.counts_B
        rows_P, latents_P = torch.empty(2, self.total, dtype=torch.int64)
        values_P = torch.empty(self.total, dtype=self.dtype)
        spread(loops.gather, self.n_rows, *self._segments(), counts_B.cumsum(0) - counts_B, rows_P, latents_P, values_P)
        return Pairs(rows_P, latents_P, values_P, values_P)

    def largest_of_rows(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and values [B, count], the first of which are there, ascending by latent; how many. [B]"""
        latents = torch.empty(self.n_rows, count, dtype=torch.int64)
        values, counts_B = torch.empty(self.n_rows, count, dtype=self.dtype), torch.empty_like(self.counts[0])
        spread(
            loops.keep_largest, self.n_rows, *self._segments(), self.values.view(KEYS[self.dtype]), count,
            latents, values, counts_B,
        )  # fmt: skip
        return latents, values, counts_B

    def _segments(self) -> tuple[Tensor, ...]:
        return torch.stack(self.starts), torch.stack(self.counts), self.latents, self.values

    def _add(self, loop: Callable[..., None], part_BC: Tensor, *arguments: Any) -> None:
        starts_B, counts_B = torch.empty(2, self.n_rows, dtype=torch.int64)
        done_T = torch.cat([self.ends_T.new_zeros(1), self.ends_T[:-1]])
        while (done_T < self.ends_T).any():
            if part_BC.shape[1] > self.latents.shape[1] - int(self.used_T.max()) - loops.WORD:
                self._grow(self.latents.shape[1] * 5 // 4 + part_BC.shape[1] + loops.WORD)
            spread(
                loop, self.n_rows, part_BC, *arguments,
                done_T, self.used_T, starts_B, counts_B, self.latents, self.values,
            )  # fmt: skip
        self.starts.append(starts_B)
        self.counts.append(counts_B)

    def _grow(self, room: int) -> None:
        used = int(self.used_T.max())
        held = self.latents[:, :used].clone(), self.values[:, :used].clone()
        self.latents, self.values = self._room(room)
        self.latents[:, :used], self.values[:, :used] = held

    def _room(self, room: int) -> tuple[Tensor, Tensor]:
        """For latents and values of so many pairs of each thread, or as many as a batch before had."""
        n_threads = len(self.ends_T)
        latents = SCRATCH.wide("latents found", n_threads, room, torch.int32)
        values = SCRATCH.wide("values found", n_threads, room, self.dtype)
        most = min(latents.shape[1], values.shape[1])
        return latents[:, :most], values[:, :most]


def above(pre_BF: Tensor, threshold_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries above their latent's threshold, by row: where each row's start, [B + 1], latents and values. int64,
    int32 and of the entries' type"""
    starts = torch.zeros(len(pre_BF) + 1, dtype=torch.int64)
    latents, values = torch.empty(pre_BF.numel(), dtype=torch.int32), torch.empty_like(pre_BF).flatten()
    loops.append_rows(*map(array, (pre_BF, threshold_F, starts, latents, values)))
    return starts, latents[: starts[-1]], values[: starts[-1]]


def _keys(values: Tensor) -> Tensor:
    """`compiled.key` of each."""
    bits = values.view(KEYS[values.dtype])
    sign = bits >> (8 * bits.itemsize - 1)
    return ((bits & torch.iinfo(bits.dtype).max) ^ sign) - sign


def _shift(dtype: torch.dtype) -> int:
    """By how many bits their keys are shorter than those of what they are added up in."""
    return 16 if dtype == torch.bfloat16 else 0
