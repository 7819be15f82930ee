"""The operations on a CPU: the encoder product in parts that stay in the cache, the rest by compiled loops.

A part is all rows' pre-activations of some latents, so that each weight is read once; they are selected from while they
are in the cache, in a buffer that is allocated once.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.kernels import Kernels, loops
from sae.kernels.entries import ByLatent, Encoder, Entries, Matrix
from sae.pairs import Pairs

PART_BYTES = 16 << 20  # of pre-activations at once; measured here
LEAST_LATENTS = 256  # of a part
SAMPLE_ROWS = 32  # from which a batch's threshold is guessed at first
GUESSED_SHARE = 0.9  # of the last batch's threshold, above which the next one's largest are looked for
MARGIN = 1.3  # times the pairs wanted are looked for: some batches have fewer above a guess


class Found(NamedTuple):
    """Pairs of one part, ascending by row and, in it, by latent."""

    counts_B: Tensor
    latents_P: Tensor
    values_P: Tensor


class Cpu(Kernels):
    """`sae.kernels.Kernels` for float32 and float64, on torch's number of threads."""

    def __init__(self) -> None:
        self.cut = 0.0  # of the last batch: the next one's is near it, which saves time and changes nothing else

    def select_topk(
        self, x_BD: Tensor, encoder: Encoder, count: int, per: Literal["row", "batch"], pre_BF: Tensor | None = None
    ) -> Pairs:
        if per == "row":
            return _largest_of_rows(_parts(x_BD, encoder, pre_BF), len(x_BD), min(count, encoder.width))
        found = self._above_guess(x_BD, encoder, count, GUESSED_SHARE * self.cut, pre_BF)
        if len(found.pre_P) <= count:
            return found
        cut = found.pre_P.kthvalue(len(found.pre_P) - count + 1).values
        self.cut = cut.item()
        return found.where_also(found.pre_P >= cut)

    def select_threshold(
        self, x_BD: Tensor, encoder: Encoder, threshold_F: Tensor, pre_BF: Tensor | None = None
    ) -> Pairs:
        threshold_F = threshold_F.to(encoder.bias_F.dtype).expand(encoder.width).contiguous()
        floor_B = threshold_F.new_full((len(x_BD),), -torch.inf)
        found = []
        for first, part_BC in _parts(x_BD, encoder, pre_BF):
            found.append(_above(first, part_BC, threshold_F[first : first + part_BC.shape[1]], floor_B))
        return _merged(found)

    def decode(self, entries: Entries, values_P: Tensor, w_FD: Tensor) -> Tensor:
        order_P = torch.arange(len(values_P))
        return _sums(entries.starts_G, order_P, entries.latents_P, values_P, w_FD)

    def value_gradients(self, entries: Entries, grad_GD: Tensor, w_FD: Tensor) -> Tensor:
        out_P = w_FD.new_empty(len(entries.rows_P))
        _spread(loops.multiply_rows, len(out_P), entries.rows_P, entries.latents_P, grad_GD.contiguous(), w_FD, out_P)
        return out_P

    def table_gradient(self, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor) -> Tensor:
        return _sums(by_latent.starts_F, by_latent.order_P, rows_P, weights_P, table_GD)

    def fit_rows(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        along_F: Tensor | None,
    ) -> None:  # fmt: skip
        starts = _with_end(by_latent.starts_F, len(rows_P))
        w_FD, moments, copy = matrix
        numbers = _numbers(w_FD.dtype, rates.tolist())
        _spread(
            loops.fit_rows, len(w_FD), w_FD, starts, by_latent.order_P, rows_P, weights_P.contiguous(),
            table_GD.contiguous(), *moments, w_FD.new_zeros(1) if along_F is None else along_F,
            along_F is not None, *numbers,
        )  # fmt: skip
        copy.copy_(w_FD)

    def latent_sums(self, by_latent: ByLatent, weights_P: Tensor) -> Tensor:
        starts = _with_end(by_latent.starts_F, len(weights_P))
        return torch.segment_reduce(weights_P[by_latent.order_P], "sum", offsets=starts, initial=0)

    def _above_guess(self, x_BD: Tensor, encoder: Encoder, count: int, guess: float, pre_BF: Tensor | None) -> Pairs:
        """Positive pairs that include the `count` largest, and few others if rows are in random order."""
        for floor in _floors(x_BD, encoder, count, guess):
            found = self.select_threshold(x_BD, encoder, encoder.bias_F.new_tensor(floor), pre_BF)
            if len(found.pre_P) >= count:
                break
        return found


def _floors(x_BD: Tensor, encoder: Encoder, count: int, guess: float) -> Iterator[float]:
    """Thresholds, lower and lower, that somewhat more than `count` pairs should be above: the guess, and from the first
    rows."""
    if guess > 0:
        yield guess
    sample = torch.cat([part_BC.flatten() for _, part_BC in _parts(x_BD[:SAMPLE_ROWS], encoder, None)])
    rank = round(MARGIN * count * SAMPLE_ROWS / max(len(x_BD), SAMPLE_ROWS))
    floor = 0.0 if rank >= len(sample) else sample.kthvalue(len(sample) - rank).values.clamp_min(0).item()
    if guess > 0:
        floor = min(floor, guess / 2)
    yield from (floor, floor / 2, 0.0)


def _parts(x_BD: Tensor, encoder: Encoder, pre_BF: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """The pre-activations of some latents after others, with the number of the first. [B, C], overwritten by the
    next; all are left in `pre_BF`, if given"""
    dtype = encoder.bias_F.dtype
    latents = max(LEAST_LATENTS, PART_BYTES // (dtype.itemsize * len(x_BD)))
    for group, w_FD in zip(encoder.groups, encoder.weights, strict=True):
        for first in range(group.latents.start, group.latents.stop, latents):
            last = min(first + latents, group.latents.stop)
            part_BC = SCRATCH.get("part", len(x_BD), last - first, dtype)
            mine = slice(first - group.latents.start, last - group.latents.start)
            _product(x_BD[:, group.reads], w_FD[mine], encoder.bias_F[first:last], part_BC)
            if pre_BF is not None:
                pre_BF[:, first:last] = part_BC
            yield first, part_BC


def _product(x_CD: Tensor, w_FD: Tensor, bias_F: Tensor, out_CF: Tensor) -> None:
    if w_FD.dtype == bias_F.dtype:
        torch.addmm(bias_F, x_CD, w_FD.T, out=out_CF)
        return
    narrow_CF = SCRATCH.get("narrow", len(x_CD), len(w_FD), w_FD.dtype)
    torch.mm(x_CD.to(w_FD.dtype), w_FD.T, out=narrow_CF)
    torch.add(narrow_CF, bias_F, out=out_CF)


class Scratch(threading.local):
    """Buffers of a thread, reused by all dictionaries: fresh ones cost page faults."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns], of undefined content"""
        size = rows * columns
        held = self.buffers.get(name)
        if held is None or held.dtype != dtype or len(held) < size:
            self.buffers[name] = held = torch.empty(size, dtype=dtype)
        return held[:size].view(rows, columns)


SCRATCH = Scratch()


def _largest_of_rows(parts: Iterator[tuple[int, Tensor]], n_rows: int, count: int) -> Pairs:
    """Only what is above all of a row's largest so far can be among its largest of all."""
    first, part_BC = next(parts)
    width = min(count, part_BC.shape[1])
    latents, values, counts_B = _wanted(part_BC, width)
    _spread(loops.largest_of_rows, n_rows, part_BC, width, latents, values, counts_B)
    latents += first
    for first, part_BC in parts:
        floor_B = torch.where(counts_B == count, values.amin(1), 0)
        more = _above(first, part_BC, part_BC.new_zeros(part_BC.shape[1]), floor_B)
        so_far = _side_by_side([_found(latents, values, counts_B), more])
        latents, values, counts_B = _wanted(values, count)
        _spread(loops.largest_of_parts, n_rows, *so_far, count, latents, values, counts_B)
    found = _found(latents, values, counts_B)
    rows_P = torch.arange(n_rows).repeat_interleave(counts_B, output_size=len(found.latents_P))
    return Pairs(rows_P, found.latents_P, found.values_P, found.values_P)


def _found(latents: Tensor, values: Tensor, counts_B: Tensor) -> Found:
    """Of [B, count], the first some of each row."""
    if counts_B.min() == latents.shape[1]:
        return Found(counts_B, latents.flatten(), values.flatten())
    there = torch.arange(latents.shape[1]) < counts_B[:, None]
    return Found(counts_B, latents[there], values[there])


def _wanted(like: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the latents and values of so many a row, and their number."""
    n_rows = len(like)
    return torch.zeros(n_rows, count, dtype=torch.int64), like.new_zeros(n_rows, count), torch.zeros(n_rows).long()


def _above(first: int, part_BC: Tensor, threshold_C: Tensor, floor_B: Tensor) -> Found:
    """The entries above their latent's threshold and their row's floor."""
    counts_B = torch.empty(len(part_BC), dtype=torch.int64)
    _spread(loops.count_above, len(part_BC), part_BC, threshold_C, floor_B, counts_B)
    ends_B = counts_B.cumsum(0)
    latents_P = torch.empty(int(ends_B[-1]), dtype=torch.int64)
    values_P = part_BC.new_empty(len(latents_P))
    starts_B = ends_B - counts_B
    _spread(loops.write_above, len(part_BC), part_BC, threshold_C, floor_B, starts_B, first, latents_P, values_P)
    return Found(counts_B, latents_P, values_P)


def _side_by_side(found: list[Found]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each part's pairs of each row start, and how many there are [parts, B]; all latents and values [P]."""
    counts = torch.stack([part.counts_B for part in found])
    ends = counts.flatten().cumsum(0).view_as(counts)
    latents_P, values_P = (torch.cat(some) for some in ([p.latents_P for p in found], [p.values_P for p in found]))
    return ends - counts, counts, latents_P, values_P


def _merged(found: list[Found]) -> Pairs:
    """All pairs, by row."""
    starts, counts, latents_P, values_P = _side_by_side(found)
    counts_B = counts.sum(0)
    if len(found) > 1:
        parts_latents_P, parts_values_P = latents_P, values_P
        latents_P, values_P = torch.empty_like(latents_P), torch.empty_like(values_P)
        _spread(
            loops.merge_rows, len(counts_B), starts, counts, parts_latents_P, parts_values_P,
            counts_B.cumsum(0) - counts_B, latents_P, values_P,
        )  # fmt: skip
    rows_P = torch.arange(len(counts_B)).repeat_interleave(counts_B, output_size=len(latents_P))
    return Pairs(rows_P, latents_P, values_P, values_P)


def _sums(starts: Tensor, order_P: Tensor, rows_P: Tensor, weights_P: Tensor, table: Tensor) -> Tensor:
    out = table.new_empty(len(starts), table.shape[1])
    starts = _with_end(starts, len(order_P))
    _spread(loops.sum_rows, len(out), starts, order_P, rows_P, weights_P.contiguous(), table.contiguous(), out)
    return out


def _with_end(starts: Tensor, end: int) -> Tensor:
    return torch.cat([starts, starts.new_tensor([end])])


def _numbers(dtype: torch.dtype, rates: list[float]) -> list[Any]:
    """Of the parameter's type: others would widen the loops' arithmetic."""
    number = np.float64 if dtype == torch.float64 else np.float32
    return [number(rate) for rate in rates]


def _spread(loop: Callable[..., None], n_items: int, *arguments: Any) -> None:
    """Runs a loop over [0, n_items), cut over torch's threads."""
    plain = [one.numpy() if isinstance(one, Tensor) else one for one in arguments]
    n_parts = min(torch.get_num_threads(), n_items)
    if n_parts <= 1:
        loop(*plain, 0, n_items)
        return
    ends = [n_items * part // n_parts for part in range(n_parts + 1)]
    others = [_pool().submit(loop, *plain, *ends[part : part + 2]) for part in range(1, n_parts)]
    loop(*plain, 0, ends[1])
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernels")
