"""The operations on a CPU: the encoder product in parts that stay in the cache, the rest by compiled loops.

A part's pre-activations are selected from while they are in the cache, into a buffer that is allocated once: writing
all of [B, F] to fresh memory would cost more than the selection.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sae.kernels import Kernels, loops
from sae.kernels.entries import ByLatent, Encoder, Entries, Matrix
from sae.pairs import Pairs

PART_BYTES = 16 << 20  # of pre-activations at once; measured here
LEAST_ROWS = 64  # of a part: with fewer, reading the weights costs more than what the cache saves
SAMPLE_ROWS = 32  # from which a batch's threshold is guessed
GUESSED_SHARE = 0.9  # of the last batch's threshold, above which the next one's largest are looked for
MARGIN = 1.3  # times the pairs wanted are looked for: some batches have fewer above a guess


class Cpu(Kernels):
    """`sae.kernels.Kernels` for float32 and float64, on torch's number of threads."""

    def __init__(self) -> None:
        self.cut = 0.0  # of the last batch: the next one's is near it, which saves time and changes nothing else

    def select_topk(
        self, x_BD: Tensor, encoder: Encoder, count: int, per: Literal["row", "batch"], pre_BF: Tensor | None = None
    ) -> Pairs:
        if per == "row":
            parts = [_largest_of_rows(part_CF, count, first) for first, part_CF in _parts(x_BD, encoder, pre_BF)]
            return _joined(parts)
        found = self._above_guess(x_BD, encoder, count, GUESSED_SHARE * self.cut, pre_BF)
        if len(found.pre_P) <= count:
            return found
        cut = found.pre_P.kthvalue(len(found.pre_P) - count + 1).values
        self.cut = cut.item()
        return found.where_also(found.pre_P >= cut)

    def select_threshold(
        self, x_BD: Tensor, encoder: Encoder, threshold_F: Tensor, pre_BF: Tensor | None = None
    ) -> Pairs:
        threshold_F = threshold_F.expand(encoder.width).contiguous()
        return _joined([_above(part_CF, threshold_F, first) for first, part_CF in _parts(x_BD, encoder, pre_BF)])

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
        floor_F, parts = encoder.bias_F.new_full((encoder.width,), guess), []
        for first, part_CF in _parts(x_BD, encoder, pre_BF):
            if first == 0:
                floor_F.fill_(_floor(part_CF, count / len(x_BD), guess))
            parts.append(_above(part_CF, floor_F, first))
        found, floor = _joined(parts), floor_F[0].item()
        for lower in (floor / 2, 0.0):
            if len(found.pre_P) >= count or floor == 0:
                break
            found = self.select_threshold(x_BD, encoder, floor_F.fill_(lower), pre_BF)
        return found


def _floor(part_CF: Tensor, per_row: float, guess: float) -> float:
    """A threshold that somewhat more than so many pairs a row are above: the guess, or from the first rows."""
    wanted = per_row * len(part_CF)
    above = _count_above(part_CF, part_CF.new_full((part_CF.shape[1],), guess)).sum()
    if 1.1 * wanted <= above <= 3 * wanted:
        return guess
    sample = part_CF[:SAMPLE_ROWS].flatten()
    rank = round(MARGIN * per_row * len(part_CF[:SAMPLE_ROWS]))
    return 0.0 if rank >= len(sample) else sample.kthvalue(len(sample) - rank).values.clamp_min(0).item()


def _parts(x_BD: Tensor, encoder: Encoder, pre_BF: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """The pre-activations of some rows after others, with the number of the first. [C, F], overwritten by the next,
    unless they are parts of `pre_BF`"""
    dtype, width = encoder.bias_F.dtype, encoder.width
    rows = min(len(x_BD), max(LEAST_ROWS, PART_BYTES // (dtype.itemsize * width)))
    for first in range(0, len(x_BD), rows):
        last = min(first + rows, len(x_BD))
        part_CF = SCRATCH.get("part", rows, width, dtype)[: last - first] if pre_BF is None else pre_BF[first:last]
        for group, w_FD in zip(encoder.groups, encoder.weights, strict=True):
            _product(x_BD[first:last, group.reads], w_FD, encoder.bias_F[group.latents], part_CF[:, group.latents])
        yield first, part_CF


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


def _largest_of_rows(part_CF: Tensor, count: int, first: int) -> Pairs:
    count, n_rows = min(count, part_CF.shape[1]), len(part_CF)
    latents = torch.empty(n_rows, count, dtype=torch.int64)
    values, counts = part_CF.new_empty(n_rows, count), torch.empty(n_rows, dtype=torch.int64)
    _spread(loops.largest_of_rows, n_rows, part_CF, count, latents, values, counts)
    rows = torch.arange(first, first + n_rows).repeat_interleave(counts)
    if len(rows) < n_rows * count:
        there = torch.arange(count) < counts[:, None]
        latents, values = latents[there], values[there]
    return Pairs(rows, latents.flatten(), values.flatten(), values.flatten())


def _above(part_CF: Tensor, threshold_F: Tensor, first: int) -> Pairs:
    counts = _count_above(part_CF, threshold_F)
    ends = counts.cumsum(0)
    latents = torch.empty(int(ends[-1]), dtype=torch.int64)
    values = part_CF.new_empty(len(latents))
    _spread(loops.write_above, len(part_CF), part_CF, threshold_F, ends - counts, latents, values)
    rows = torch.arange(first, first + len(part_CF)).repeat_interleave(counts, output_size=len(latents))
    return Pairs(rows, latents, values, values)


def _count_above(part_CF: Tensor, threshold_F: Tensor) -> Tensor:
    counts = torch.empty(len(part_CF), dtype=torch.int64)
    _spread(loops.count_above, len(part_CF), part_CF, threshold_F, counts)
    return counts


def _joined(parts: list[Pairs]) -> Pairs:
    rows_P, latents_P, values_P = (torch.cat(some) for some in list(zip(*parts, strict=True))[:3])
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
