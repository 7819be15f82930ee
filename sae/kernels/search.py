"""Which pairs of a batch are active, on a CPU: the encoder's product in parts that stay in the cache, each searched
while it is there, in a buffer that is allocated once.

A part is all rows' products of some latents, so that each weight is read once. Parts of bfloat16 are compared as the
integers that their bits are, with limits that hold the bias; biases are added in float32 to what is found.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sae.kernels import TooDense
from sae.kernels import search_loops as loops
from sae.kernels.entries import Encoder
from sae.kernels.threads import SCRATCH, array, spread
from sae.pairs import Pairs

PART_BYTES = 16 << 20  # of products at once; measured here
LEAST_LATENTS = 256  # of a part
ROOM = 256  # pairs of a row, until more are seen
SPARE, ENOUGH = 1.25, 5  # times the most pairs of a row of this batch, or the mean: room for one of the next
SAMPLE_ROWS = 32  # from which a batch's threshold is guessed at first
MARGIN = 1.3  # times the pairs wanted are looked for: some batches have fewer above a guess
FALL, FALLS = 0.1, 1.5  # of a batch's threshold to the next, at first; as many such falls lower it is guessed to be
LEAST_SAMPLE = 2048  # latents from which a row's floor is guessed
DEVIATIONS = 4  # of the number of a row's largest among those: hardly a row has fewer
GROUPS_PER_RANK = 8  # of latents, of which the maxima are taken


class Search:
    """Finds pairs batch by batch. What it remembers of the last batch saves time and changes nothing else."""

    def __init__(self) -> None:
        self.cut, self.fall, self.room = 0.0, FALL, ROOM

    def largest_of_batch(self, x_BD: Tensor, encoder: Encoder, count: int, pre_BF: Tensor | None) -> Pairs:
        found = self._above_guess(x_BD, encoder, count, (0.99 - FALLS * self.fall) * self.cut, pre_BF)
        if len(found.pre_P) <= count:
            return found
        keys_P = found.pre_P.view(_KEYS[found.pre_P.dtype])  # of positive numbers
        cut = torch.tensor(loops.cut_of(keys_P.numpy(), count), dtype=keys_P.dtype).view(found.pre_P.dtype)
        if self.cut > 0:
            self.fall = max(1 - cut.item() / self.cut, 0.9 * self.fall)
        self.cut = cut.item()
        kept = [torch.empty_like(one) for one in found[:3]]
        end = loops.keep_above(self.cut, *map(array, found[:3]), *map(array, kept))
        rows_P, latents_P, values_P = (one[:end] for one in kept)
        return Pairs(rows_P, latents_P, values_P, values_P)

    def above(
        self, x_BD: Tensor, encoder: Encoder, threshold_F: Tensor, pre_BF: Tensor | None, most: int | None = None
    ) -> Pairs:
        threshold_F = threshold_F.to(encoder.bias_F.dtype).expand(encoder.width)
        rows = torch.arange(len(x_BD))
        rooms: list[Room] = []
        sizes = torch.full_like(rows, self.room)
        while len(rows):
            found = Room(rows, sizes, threshold_F.dtype, str(len(rooms)))
            # Of all rows again, if of few: other products could have other bits, and what is kept no longer be a
            # function of the batch.
            for first, part_BC in _parts(x_BD, encoder, None if rooms else pre_BF):
                here = slice(first, first + part_BC.shape[1])
                mine_BC = part_BC[rows] if rooms else part_BC
                found.add_above(first, mine_BC, encoder.bias_F[here], threshold_F[here])
            if not rooms:
                if most is not None and found.counts_B.sum() > most:
                    raise TooDense
                largest, mean = found.counts_B.max(), found.counts_B.float().mean()
                self.room = int(min(SPARE * largest, ENOUGH * mean)) + 2 * loops.WORD
            full_B = found.full_B
            rows, sizes = rows[full_B], found.counts_B[full_B] + found.counts_B[full_B] // 8 + 2 * loops.WORD
            found.counts_B[full_B] = 0
            rooms.append(found)
        return _gathered(rooms, len(x_BD))

    def _above_guess(self, x_BD: Tensor, encoder: Encoder, count: int, guess: float, pre_BF: Tensor | None) -> Pairs:
        """Positive pairs that include the `count` largest, and few others if rows are in random order."""
        for floor in _floors(x_BD, encoder, count, guess):
            found = self.above(x_BD, encoder, encoder.bias_F.new_tensor(floor), pre_BF)
            if len(found.pre_P) >= count:
                break
        return found


def largest_of_rows(x_BD: Tensor, encoder: Encoder, count: int, pre_BF: Tensor | None) -> Pairs:
    """A row's floor is guessed from some latents, among which about as many of its largest lie as among any others. For
    rows that have fewer above it than are wanted, or more than there is room for, all is done again."""
    n_rows, dtype = len(x_BD), encoder.bias_F.dtype
    floor_B, positive = encoder.bias_F.new_empty(n_rows), torch.finfo(dtype).smallest_normal
    for first, part_BC in _parts(x_BD, encoder, pre_BF):
        if first == 0:
            sample = min(part_BC.shape[1], max(LEAST_SAMPLE, encoder.width // 8))
            share = sample / encoder.width
            rank = count if share == 1 else math.ceil(count * share + DEVIATIONS * math.sqrt(count * share))
            n_groups, keys = min(sample, GROUPS_PER_RANK * rank), torch.empty(0, dtype=_KEYS[dtype])
            spread(loops.floors, n_rows, part_BC, encoder.bias_F, sample, rank, n_groups, keys, floor_B)
            floor_B.clamp_min_(positive)
            sizes = torch.full((n_rows,), math.ceil(4 * rank / share) + loops.WORD)
            found = Room(torch.arange(n_rows), sizes, dtype, "0")
        found.add_from(first, part_BC, encoder.bias_F[first : first + part_BC.shape[1]], floor_B)
    lacking_B = found.full_B | ((found.counts_B < count) & (floor_B > positive))
    found.counts_B[lacking_B] = 0
    latents = torch.empty(n_rows, count, dtype=torch.int64)
    values, counts_B = torch.empty(n_rows, count, dtype=dtype), torch.empty(n_rows, dtype=torch.int64)
    spread(
        loops.keep_largest, n_rows, found.starts, found.counts_B, found.latents, found.values,
        found.values.view(_KEYS[dtype]), count, latents, values, counts_B,
    )  # fmt: skip
    again = lacking_B.nonzero()[:, 0]
    for rows in again.split(max(1, PART_BYTES // (dtype.itemsize * encoder.width))) if len(again) else ():
        latents[rows], values[rows], counts_B[rows] = _largest_of_few(x_BD[rows], encoder, count)
    if counts_B.min() == count:
        rows_P, values_P = torch.arange(n_rows).repeat_interleave(count), values.flatten()
        return Pairs(rows_P, latents.flatten(), values_P, values_P)
    there = torch.arange(count) < counts_B[:, None]
    return Pairs(there.nonzero()[:, 0], latents[there], values[there], values[there])


def _largest_of_few(x_BD: Tensor, encoder: Encoder, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents and values [B, count], the first of which are of the positive ones, ascending by latent; how many. [B]"""
    values, latents = _pre_activations(x_BD, encoder).topk(count, dim=1)
    order = latents.where(values > 0, encoder.width).argsort(dim=1)
    return latents.gather(1, order), values.gather(1, order), (values > 0).sum(1)


def _floors(x_BD: Tensor, encoder: Encoder, count: int, guess: float) -> Iterator[float]:
    """Thresholds, lower and lower, that somewhat more than `count` pairs should be above: the guess, and from the first
    rows."""
    if guess > 0:
        yield guess
    sample = _pre_activations(x_BD[:SAMPLE_ROWS], encoder).flatten()
    rank = round(MARGIN * count * SAMPLE_ROWS / max(len(x_BD), SAMPLE_ROWS))
    floor = 0.0 if rank >= len(sample) else sample.kthvalue(len(sample) - rank).values.clamp_min(0).item()
    if guess > 0:
        floor = min(floor, guess / 2)
    yield from (floor, floor / 2, 0.0)


def _parts(x_BD: Tensor, encoder: Encoder, pre_BF: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """The products with some latents after others, of the weights' type and without the bias, with the number of the
    first. [B, C], overwritten by the next; with the bias all are left in `pre_BF`, if given"""
    dtype = encoder.weights[0].dtype
    x_BD = x_BD.to(dtype)
    latents = max(LEAST_LATENTS, PART_BYTES // (dtype.itemsize * len(x_BD)))
    for group, w_FD in zip(encoder.groups, encoder.weights, strict=True):
        for first in range(group.latents.start, group.latents.stop, latents):
            last = min(first + latents, group.latents.stop)
            part_BC = SCRATCH.get("part", len(x_BD), last - first, dtype)
            mine_FD = w_FD[first - group.latents.start : last - group.latents.start]
            torch.mm(x_BD[:, group.reads], mine_FD.T, out=part_BC)
            if pre_BF is not None:
                torch.add(part_BC, encoder.bias_F[first:last], out=pre_BF[:, first:last])
            yield first, part_BC


def _pre_activations(x_BD: Tensor, encoder: Encoder) -> Tensor:
    """[B, F]"""
    pre_BF = encoder.bias_F.new_empty(len(x_BD), encoder.width)
    for _ in _parts(x_BD, encoder, pre_BF):
        pass
    return pre_BF


class Room:
    """The pairs that are found of some rows, each of which has room for some."""

    def __init__(self, rows: Tensor, sizes: Tensor, dtype: torch.dtype, name: str):
        """`rows` are their numbers in the batch. Of one name there is one at a time. [B] both"""
        self.rows, self.counts_B = rows, torch.zeros_like(rows)
        self.starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        size = int(self.starts[-1])
        self.latents = SCRATCH.get(f"latents {name}", 1, size, torch.int32)[0]
        self.values = SCRATCH.get(f"values {name}", 1, size, dtype)[0]

    def add_above(self, first: int, part_BC: Tensor, bias_C: Tensor, threshold_C: Tensor) -> None:
        """The entries above their latent's threshold; only counted where there is no room."""
        limit_C = _keys(threshold_C - bias_C) >> _shift(part_BC.dtype)
        self._add(loops.append_above, part_BC, bias_C, limit_C.to(_KEYS[part_BC.dtype]), first)

    def add_from(self, first: int, part_BC: Tensor, bias_C: Tensor, floor_B: Tensor) -> None:
        """The entries no less than their row's floor; where there is no room, they are counted, and perhaps others."""
        filled = functional.pad(bias_C, (0, -len(bias_C) % loops.BLOCK), value=-torch.inf)
        tops = filled.view(-1, loops.BLOCK).amax(1)
        keys = torch.empty(0, dtype=_KEYS[part_BC.dtype])
        self._add(loops.append_from, part_BC, bias_C, tops, floor_B, keys, _shift(part_BC.dtype), first)

    def _add(self, loop: Callable[..., None], part_BC: Tensor, *arguments: Any) -> None:
        spread(loop, len(part_BC), part_BC, *arguments, self.starts, self.counts_B, self.latents, self.values)

    @property
    def full_B(self) -> Tensor:
        return self.counts_B > self.starts.diff() - loops.WORD


def _gathered(rooms: list[Room], n_rows: int) -> Pairs:
    """The pairs of all rooms, by row."""
    counts_B = torch.zeros(n_rows, dtype=torch.int64)
    for room in rooms:
        counts_B[room.rows] += room.counts_B
    starts_B, total = counts_B.cumsum(0) - counts_B, int(counts_B.sum())
    rows_P, latents_P = torch.empty(2, total, dtype=torch.int64)
    values_P = torch.empty(total, dtype=rooms[0].values.dtype)
    for room in rooms:
        spread(
            loops.gather, len(room.rows), room.rows, room.starts, room.counts_B, room.latents, room.values,
            starts_B[room.rows], rows_P, latents_P, values_P,
        )  # fmt: skip
    return Pairs(rows_P, latents_P, values_P, values_P)


_KEYS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def _keys(values: Tensor) -> Tensor:
    """`compiled.key` of each."""
    bits = values.view(_KEYS[values.dtype])
    sign = bits >> (8 * bits.itemsize - 1)
    return ((bits & torch.iinfo(bits.dtype).max) ^ sign) - sign


def _shift(dtype: torch.dtype) -> int:
    """By how many bits their keys are shorter than those of what they are added up in."""
    return 16 if dtype == torch.bfloat16 else 0
