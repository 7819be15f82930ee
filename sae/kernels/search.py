"""Which pairs of a batch are active, on a CPU: the encoder's product in parts that stay in the cache, each searched
while it is there, in a buffer that is allocated once.

A part is all rows' products of some latents, so that each weight is read once. Parts of bfloat16 are compared as the
integers that their bits are, with limits that hold the bias; biases are added in float32 to what is found.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sae.kernels import TooDense
from sae.kernels import search_loops as loops
from sae.kernels.entries import Encoder
from sae.kernels.found import KEYS, Found
from sae.kernels.threads import SCRATCH, array, spread
from sae.pairs import Pairs

PART_BYTES = 12 << 20  # of products at once; measured here
LEAST_LATENTS = 256  # of a part
ROOM = 256  # pairs of a row, until a batch is seen
SPARE = 1.125  # times the pairs of this batch there is room for of the next
SAMPLE_ROWS = 32  # from which a batch's threshold is guessed at first
MARGIN = 1.3  # times the pairs wanted are looked for: some batches have fewer above a guess
FALL, FALLS = 0.1, 1.5  # of a batch's threshold to the next, at first; as many such falls lower it is guessed to be
LEAST_SAMPLE = 2048  # latents from which a row's floor is guessed
DEVIATIONS = 4  # of the number of a row's largest among those: hardly a row has fewer
GROUPS_PER_RANK = 8  # of latents, of which the maxima are taken


class Search:
    """Finds pairs batch by batch. What it remembers of the last batch saves time and changes nothing else."""

    def __init__(self) -> None:
        self.cut, self.fall, self.room = 0.0, FALL, 0

    def largest_of_batch(self, x_BD: Tensor, encoder: Encoder, count: int, pre_BF: Tensor | None) -> Pairs:
        found = self._above_guess(x_BD, encoder, count, (0.99 - FALLS * self.fall) * self.cut, pre_BF)
        if len(found.pre_P) <= count:
            return found
        keys_P = found.pre_P.view(KEYS[found.pre_P.dtype])  # of positive numbers
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
        found = Found(len(x_BD), self.room or ROOM * len(x_BD), threshold_F.dtype)
        for first, part_BC in _parts(x_BD, encoder, pre_BF):
            here = slice(first, first + part_BC.shape[1])
            found.add_above(first, part_BC, encoder.bias_F[here], threshold_F[here])
            if most is not None and found.total > most:
                raise TooDense
        self.room = int(SPARE * found.total)
        return found.pairs()

    def _above_guess(self, x_BD: Tensor, encoder: Encoder, count: int, guess: float, pre_BF: Tensor | None) -> Pairs:
        """Positive pairs that include the `count` largest, and few others if rows are in random order."""
        for floor in _floors(x_BD, encoder, count, guess):
            found = self.above(x_BD, encoder, encoder.bias_F.new_tensor(floor), pre_BF)
            if len(found.pre_P) >= count:
                break
        return found


def largest_of_rows(x_BD: Tensor, encoder: Encoder, count: int, pre_BF: Tensor | None) -> Pairs:
    """A row's floor is guessed from some latents, among which about as many of its largest lie as among any others. For
    rows that have fewer above it than are wanted, all is done again."""
    n_rows, dtype = len(x_BD), encoder.bias_F.dtype
    floor_B, positive = encoder.bias_F.new_empty(n_rows), torch.finfo(dtype).smallest_normal
    for first, part_BC in _parts(x_BD, encoder, pre_BF):
        if first == 0:
            sample = min(part_BC.shape[1], max(LEAST_SAMPLE, encoder.width // 8))
            share = sample / encoder.width
            rank = count if share == 1 else math.ceil(count * share + DEVIATIONS * math.sqrt(count * share))
            n_groups, keys = min(sample, GROUPS_PER_RANK * rank), torch.empty(0, dtype=KEYS[dtype])
            spread(loops.floors, n_rows, part_BC, encoder.bias_F, sample, rank, n_groups, keys, floor_B)
            floor_B.clamp_min_(positive)
            found = Found(n_rows, int(SPARE * n_rows * rank / share), dtype)
        found.add_from(first, part_BC, encoder.bias_F[first : first + part_BC.shape[1]], floor_B)
    lacking_B = (found.counts_B < count) & (floor_B > positive)
    latents, values, counts_B = found.largest_of_rows(count)
    again = lacking_B.nonzero()[:, 0]
    for rows in again.split(max(1, PART_BYTES // (dtype.itemsize * encoder.width))) if len(again) else ():
        latents[rows], values[rows], counts_B[rows] = _largest_of_few(x_BD[rows], encoder, count)
    if counts_B.min() == count:
        rows_P, values_P = torch.arange(n_rows).repeat_interleave(count), values.flatten()
        return Pairs(rows_P, latents.flatten(), values_P, values_P)
    there = torch.arange(count) < counts_B[:, None]
    return Pairs(there.nonzero()[:, 0], latents[there], values[there], values[there])


def dense_topk(x_BD: Tensor, encoder: Encoder, count: int) -> Tensor:
    """`Kernels.dense_topk`. [B, F]"""
    f_BF = x_BD.new_empty(len(x_BD), encoder.width, dtype=encoder.weights[0].dtype)
    for first, part_BC in _parts(x_BD, encoder, None):
        f_BF[:, first : first + part_BC.shape[1]] = part_BC
    keys = torch.empty(0, dtype=KEYS[encoder.bias_F.dtype])
    spread(loops.leave_largest, len(f_BF), f_BF, encoder.bias_F, keys, count)
    return f_BF


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
