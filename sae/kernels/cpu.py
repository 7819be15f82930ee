"""The operations on a CPU: the encoder product in parts that stay in the cache, the rest by compiled loops.

A part is all rows' products of some latents, so that each weight is read once; they are selected from while they are in
the cache, in a buffer that is allocated once. Where products are of bfloat16, parts, and whatever rows are read from,
are too: half the bytes. Their biases are added, and all sums are, in float32.

Loops run in threads of their own: torch's must not spin meanwhile, which takes their cores (OMP_WAIT_POLICY=PASSIVE
before torch is imported; *measured here*: a step in four fifths of the time).
"""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sae.kernels import Kernels, TooDense, loops
from sae.kernels.entries import ByLatent, Encoder, Entries, Matrix, More
from sae.pairs import Pairs

PART_BYTES = 16 << 20  # of pre-activations at once; measured here
LEAST_LATENTS = 256  # of a part
ROOM = 256  # pairs of a row, until more are seen
SAMPLE_ROWS = 32  # from which a batch's threshold is guessed at first
FALL, FALLS = 0.1, 1.5  # of a batch's threshold to the next, at first; as many such falls lower it is guessed to be
ENOUGH = 3  # times the mean number of pairs of a row of this batch: room for one of the next
LEAST_SAMPLE = 2048  # latents from which a row's floor is guessed
DEVIATIONS = 4  # of the number of a row's largest among those: hardly a row has fewer
GROUPS_PER_RANK = 8  # of latents, of which the maxima are taken
MARGIN = 1.3  # times the pairs wanted are looked for: some batches have fewer above a guess


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
        _spread(loop, len(part_BC), part_BC, *arguments, self.starts, self.counts_B, self.latents, self.values)

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
        _spread(
            loops.gather, len(room.rows), room.rows, room.starts, room.counts_B, room.latents, room.values,
            starts_B[room.rows], rows_P, latents_P, values_P,
        )  # fmt: skip
    return Pairs(rows_P, latents_P, values_P, values_P)


class Cpu(Kernels):
    """`sae.kernels.Kernels` for float32 and float64, and products of bfloat16, on torch's number of threads."""

    def __init__(self) -> None:
        # Of the last batch: the next one's are near, which saves time and changes nothing else.
        self.cut, self.fall, self.room = 0.0, FALL, ROOM

    def centre(
        self, x_BD: Tensor, y_BD: Tensor, centre_D: Tensor, b_dec_D: Tensor, centred_BD: Tensor, rest_BD: Tensor
    ) -> Tensor:
        torch.sub(x_BD, centre_D, out=centred_BD)
        n_rows, n_columns = y_BD.shape
        sums_D, squares_D = torch.empty(2, n_columns, dtype=torch.float64)
        _spread(loops.centre_columns, n_columns, y_BD, b_dec_D, rest_BD, sums_D, squares_D)
        return (squares_D - sums_D.square() / n_rows).sum().to(y_BD.dtype)

    def select_topk(
        self, x_BD: Tensor, encoder: Encoder, count: int, per: Literal["row", "batch"], pre_BF: Tensor | None = None
    ) -> Pairs:
        if per == "row":
            return _largest_of_rows(x_BD, encoder, min(count, encoder.width), pre_BF)
        found = self._above_guess(x_BD, encoder, count, (0.99 - FALLS * self.fall) * self.cut, pre_BF)
        if len(found.pre_P) <= count:
            return found
        keys_P = found.pre_P.view(_KEYS[found.pre_P.dtype])  # of positive numbers
        cut = torch.tensor(loops.cut_of(keys_P.numpy(), count), dtype=keys_P.dtype).view(found.pre_P.dtype)
        if self.cut > 0:
            self.fall = max(1 - cut.item() / self.cut, 0.9 * self.fall)
        self.cut = cut.item()
        kept = [torch.empty_like(one) for one in found[:3]]
        end = loops.keep_above(self.cut, *map(_array, found[:3]), *map(_array, kept))
        rows_P, latents_P, values_P = (one[:end] for one in kept)
        return Pairs(rows_P, latents_P, values_P, values_P)

    def select_threshold(
        self, x_BD: Tensor, encoder: Encoder, threshold_F: Tensor, pre_BF: Tensor | None = None,
        most: int | None = None,
    ) -> Pairs:  # fmt: skip
        threshold_F = threshold_F.to(encoder.bias_F.dtype).expand(encoder.width)
        rows = torch.arange(len(x_BD))
        rooms: list[Room] = []
        sizes = torch.full_like(rows, self.room)
        while len(rows):
            found = Room(rows, sizes, threshold_F.dtype, str(len(rooms)))
            for first, part_BC in _parts(x_BD[rows] if rooms else x_BD, encoder, None if rooms else pre_BF):
                here = slice(first, first + part_BC.shape[1])
                found.add_above(first, part_BC, encoder.bias_F[here], threshold_F[here])
            if not rooms:
                if most is not None and found.counts_B.sum() > most:
                    raise TooDense
                self.room = int(ENOUGH * found.counts_B.float().mean()) + 2 * loops.WORD
            full_B = found.full_B
            rows, sizes = rows[full_B], found.counts_B[full_B] + found.counts_B[full_B] // 8 + 2 * loops.WORD
            found.counts_B[full_B] = 0
            rooms.append(found)
        return _gathered(rooms, len(x_BD))

    def decode(self, entries: Entries, values_P: Tensor, w_FD: Tensor) -> Tensor:
        order_P = torch.arange(len(values_P))
        return _sums(entries.starts_G, order_P, entries.latents_P, values_P, w_FD)

    def rebuild(
        self, entries: Entries, values_P: Tensor, w_FD: Tensor, rest_GD: Tensor, scale: float, grad_GD: Tensor
    ) -> Tensor:
        squares_G = rest_GD.new_empty(len(rest_GD))
        starts, (scale,) = _with_end(entries.starts_G, len(values_P)), _numbers(rest_GD.dtype, [scale])
        _spread(
            loops.rebuild, len(rest_GD), starts, torch.arange(len(values_P)), entries.latents_P, values_P.contiguous(),
            w_FD, rest_GD, scale, grad_GD, grad_GD.dtype != rest_GD.dtype, squares_G,
        )  # fmt: skip
        return squares_G.sum()

    def value_gradients(self, entries: Entries, grad_GD: Tensor, w_FD: Tensor) -> Tensor:
        out_P = torch.empty(len(entries.rows_P), dtype=torch.promote_types(w_FD.dtype, torch.float32))
        _spread(loops.multiply_rows, len(out_P), entries.rows_P, entries.latents_P, grad_GD.contiguous(), w_FD, out_P)
        return out_P

    def table_gradient(self, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor) -> Tensor:
        return _sums(by_latent.starts_F, by_latent.order_P, rows_P, weights_P, table_GD)

    def fit_rows(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        along_F: Tensor | None, more: More | None = None,
    ) -> None:  # fmt: skip
        self._fit(matrix, by_latent, weights_P, rows_P, table_GD, rates, along_F, more)

    def fit_encoder(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        more: More | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self._fit(matrix, by_latent, weights_P, rows_P, table_GD, rates, None, more)

    def _fit(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        along_F: Tensor | None, more: More | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        w_FD, moments, copy = matrix
        sums_F = w_FD.new_empty(len(w_FD))
        backs = w_FD.new_zeros(min(torch.get_num_threads(), len(w_FD)), w_FD.shape[1])
        _spread(
            loops.fit_rows, len(w_FD), w_FD, *_in_order(by_latent, rows_P, weights_P), table_GD.contiguous(), *moments,
            copy, copy.dtype != w_FD.dtype, *_placed(more, w_FD),
            w_FD.new_zeros(1) if along_F is None else along_F, along_F is not None,
            sums_F, backs, *_numbers(w_FD.dtype, rates.tolist()),
        )  # fmt: skip
        return sums_F, backs.sum(0)

    def by_latent(self, entries: Entries) -> ByLatent:
        starts, order_P = torch.empty(entries.width + 1, dtype=torch.int64), torch.empty_like(entries.latents_P)
        loops.sort_by_latent(entries.latents_P.contiguous().numpy(), starts.numpy(), order_P.numpy())
        return ByLatent(order_P, starts[:-1])

    def fit_decoder(
        self, matrix: Matrix, entries: Entries, by_latent: ByLatent, values_P: Tensor, grad_GD: Tensor, rates: Tensor,
        more: More | None = None,
    ) -> Tensor:  # fmt: skip
        w_FD, moments, copy = matrix
        grad_values_P = torch.empty_like(values_P)
        _spread(
            loops.fit_decoder, len(w_FD), w_FD, *_in_order(by_latent, entries.rows_P, values_P),
            grad_GD.contiguous(), *moments, copy, copy.dtype != w_FD.dtype, *_placed(more, w_FD)[:2], grad_values_P,
            *_numbers(w_FD.dtype, rates.tolist()),
        )  # fmt: skip
        return grad_values_P

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
_KEYS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def _keys(values: Tensor) -> Tensor:
    """`loops.key` of each."""
    bits = values.view(_KEYS[values.dtype])
    sign = bits >> (8 * bits.itemsize - 1)
    return ((bits & torch.iinfo(bits.dtype).max) ^ sign) - sign


def _shift(dtype: torch.dtype) -> int:
    """By how many bits their keys are shorter than those of what they are added up in."""
    return 16 if dtype == torch.bfloat16 else 0


def _largest_of_rows(x_BD: Tensor, encoder: Encoder, count: int, pre_BF: Tensor | None) -> Pairs:
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
            _spread(loops.floors, n_rows, part_BC, encoder.bias_F, sample, rank, n_groups, keys, floor_B)
            floor_B.clamp_min_(positive)
            sizes = torch.full((n_rows,), math.ceil(4 * rank / share) + loops.WORD)
            found = Room(torch.arange(n_rows), sizes, dtype, "0")
        found.add_from(first, part_BC, encoder.bias_F[first : first + part_BC.shape[1]], floor_B)
    lacking_B = found.full_B | ((found.counts_B < count) & (floor_B > positive))
    found.counts_B[lacking_B] = 0
    latents = torch.empty(n_rows, count, dtype=torch.int64)
    values, counts_B = torch.empty(n_rows, count, dtype=dtype), torch.empty(n_rows, dtype=torch.int64)
    _spread(
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


def _sums(starts: Tensor, order_P: Tensor, rows_P: Tensor, weights_P: Tensor, table: Tensor) -> Tensor:
    out = weights_P.new_empty(len(starts), table.shape[1])
    starts = _with_end(starts, len(order_P))
    _spread(loops.sum_rows, len(out), starts, order_P, rows_P, weights_P.contiguous(), table.contiguous(), out)
    return out


def _in_order(by_latent: ByLatent, rows_P: Tensor, weights_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _with_end(by_latent.starts_F, len(rows_P)), by_latent.order_P, rows_P, weights_P.contiguous()


def _placed(more: More | None, w_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each latent which of `more` is its, or -1; nothing if there is none. Their rows and sums."""
    if more is None:
        return torch.empty(0, dtype=torch.int64), w_FD.new_empty(0, w_FD.shape[1]), w_FD.new_empty(0)
    place_F = torch.full((len(w_FD),), -1)
    place_F[more.latents_X] = torch.arange(len(more.latents_X))
    return place_F, more.rows_XD.to(w_FD.dtype).contiguous(), more.sums_X.to(w_FD.dtype)


def _with_end(starts: Tensor, end: int) -> Tensor:
    return torch.cat([starts, starts.new_tensor([end])])


def _numbers(dtype: torch.dtype, rates: list[float]) -> list[Any]:
    """Of the parameter's type: others would widen the loops' arithmetic."""
    number = np.float64 if dtype == torch.float64 else np.float32
    return [number(rate) for rate in rates]


def _spread(loop: Callable[..., None], n_items: int, *arguments: Any) -> None:
    """Runs a loop over [0, n_items), cut over torch's threads."""
    plain = [_array(one) if isinstance(one, Tensor) else one for one in arguments]
    n_parts = min(torch.get_num_threads(), n_items)
    if n_parts <= 1:
        loop(*plain, 0, n_items)
        return
    ends = [n_items * part // n_parts for part in range(n_parts + 1)]
    others = [_pool().submit(loop, *plain, *ends[part : part + 2]) for part in range(1, n_parts)]
    loop(*plain, 0, ends[1])
    for other in others:
        other.result()


def _array(tensor: Tensor) -> np.ndarray:
    """Of bfloat16 the bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernels")
