"""Loops over rows, latents and pairs, compiled by numba where they first run: no compiler is needed.

Each works on its part [first, last) of what it writes and releases the interpreter's lock, so that threads share the
work and the bits do not depend on their number. Sums are reassociated into vectors; nothing else is (no fast division,
NaN stays NaN). Arrays of bfloat16 come as their bits, uint16: numba has no such type.
"""

from collections.abc import Callable

import numba
import numpy as np
from numba import types
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import overload

BLOCK = 64  # entries that are compared with one number
WORD = 8  # marks that are looked at together when few of them are set


def compiled(function: Callable) -> Callable:
    """Without Python's check of divisors, which keeps loops from becoming vectors; kept on disk for later processes."""
    return numba.njit(function, nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def wide(value):
    """A number to calculate with."""
    raise NotImplementedError


@overload(wide, inline="always")
def _wide(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def key(value):
    """An integer of its size, larger for a larger number; of bfloat16, the upper half of that of a float32."""
    raise NotImplementedError


@overload(key, inline="always")
def _key(value):
    if value == types.uint16:
        return lambda value: np.int16(_ordered(np.int16(value), np.int16(15), np.int16(0x7FFF)))
    if value == types.float32:
        return lambda value: np.int32(_ordered(np.float32(value).view(np.int32), np.int32(31), np.int32(0x7FFFFFFF)))
    return lambda value: _ordered(np.float64(value).view(np.int64), np.int64(63), np.int64(0x7FFFFFFFFFFFFFFF))


@compiled
def _ordered(bits, last, others):
    """Of the sign and the magnitude that the other bits are."""
    sign = bits >> last
    return ((bits & others) ^ sign) - sign


@compiled
def narrow(value):
    """The bits of the nearest bfloat16, of two equally near the even one."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def centre_columns(y, middle, rest, sums, squares, first, last):
    """rest = middle − y, and of each column the sum of that and of its square. sums, squares [D], of float64"""
    total, total_square, mine = np.zeros(last - first), np.zeros(last - first), middle[first:last]
    for row in range(y.shape[0]):
        one, away = y[row, first:last], rest[row, first:last]
        for column in range(one.shape[0]):
            away[column] = mine[column] - one[column]
            distance = np.float64(away[column])
            total[column] += distance
            total_square[column] += distance * distance
    sums[first:last] = total
    squares[first:last] = total_square


@compiled
def keep_above(cut, rows, latents, values, out_rows, out_latents, out_values):
    """Writes the pairs whose values are no less than the cut; how many they are. In one thread: each is written where
    those before it end."""
    at = 0
    for p in range(values.shape[0]):
        out_rows[at] = rows[p]
        out_latents[at] = latents[p]
        out_values[at] = values[p]
        at += np.int64(values[p] >= cut)
    return at


@compiled
def cut_of(keys, rank):
    """The largest number, or one that cuts off as many, that at least `rank` of the keys are no less than; 0 if there
    are fewer positive ones."""
    cut = 0
    for bit in range(8 * keys.itemsize - 2, -1, -1):
        trial, there = keys.dtype.type(cut | (1 << bit)), np.float32(0)
        for n in range(keys.shape[0]):
            there += np.float32(1) if keys[n] >= trial else np.float32(0)
        if there >= rank:
            cut = cut | (1 << bit)
        if there == rank:
            break
    return cut


@compiled
def floors(pre, bias, width, rank, n_groups, keys, floor, first, last):
    """Of each row a number that at least `rank` of the first `width` entries are no less than, and few others, or 0:
    the rank-th largest of the maxima of groups. keys: an empty array of the type of theirs. pre [B, C], bias [C],
    floor [B]"""
    maxima, cut = np.empty(n_groups, keys.dtype), np.empty(1, keys.dtype)
    for row in range(first, last):
        maxima[:] = 0
        for begin in range(0, width - n_groups + 1, n_groups):
            block, plus = pre[row, begin : begin + n_groups], bias[begin : begin + n_groups]
            for n in range(n_groups):
                maxima[n] = max(maxima[n], key(wide(block[n]) + plus[n]))
        cut[0] = cut_of(maxima, rank)
        floor[row] = cut.view(floor.dtype)[0]


@compiled
def append_above(pre, bias, limit, column, starts, counts, latents, values, first, last):
    """Appends to each row's pairs those of its entries whose keys are above their column's. limit [C]

    `column` is the first one's latent. A row's pairs lie from its start on; those for which there is no room before the
    next row's start, less a word, are only counted. pre [B, C], bias [C], counts [B], starts [B + 1]
    """
    marks, least = new_marks(pre.shape[1]), bias.dtype.type(-np.inf)
    for row in range(first, last):
        entries = pre[row]
        for n in range(entries.shape[0]):
            marks[n] = key(entries[n]) > limit[n]
        at = starts[row] + counts[row]
        end = append_marked(marks, entries, bias, least, column, latents, values, at, starts[row + 1])
        counts[row] = end - starts[row]


@compiled
def append_from(pre, bias, top, floor, keys, shift, column, starts, counts, latents, values, first, last):
    """As `append_above`, the entries that are with their bias no less than the row's floor.

    top: the largest bias of each `BLOCK` columns. keys: an empty array of the type of the entries' keys, which are
    those of the biases' type less `shift` bits. floor [B]
    """
    marks = new_marks(pre.shape[1])
    for row in range(first, last):
        entries, least = pre[row], floor[row]
        for block in range(top.shape[0]):
            some, marked = entries[BLOCK * block : BLOCK * (block + 1)], marks[BLOCK * block : BLOCK * (block + 1)]
            limit = keys.dtype.type(key(least - top[block]) >> shift)
            for n in range(some.shape[0]):
                marked[n] = key(some[n]) >= limit
        at = starts[row] + counts[row]
        end = append_marked(marks, entries, bias, least, column, latents, values, at, starts[row + 1])
        counts[row] = end - starts[row]


@compiled
def new_marks(width):
    """One for each entry, and as many more as fill a word."""
    return np.zeros((width + WORD - 1) // WORD * WORD, np.uint8)


@compiled
def append_marked(marks, entries, bias, least, column, latents, values, at, end):
    """Writes the marked entries that are no less than `least`, with their bias, from `at` on; where they end."""
    words = marks.view(np.int64)
    for word in range(words.shape[0]):
        left = words[word]
        if left != 0 and at + WORD > end:
            at += (left * 0x0101010101010101) >> 56  # how many marks
            left = 0
        while left != 0:
            n = WORD * word + (trailing_zeros(left) >> 3)
            value = wide(entries[n]) + bias[n]
            latents[at] = column + n
            values[at] = value
            at += np.int64(value >= least)
            left &= left - 1
    return at


@compiled
def gather(rows, starts, counts, latents, values, out_starts, out_rows, out_latents, out_values, first, last):
    """Writes each row's pairs where they are to be. rows: their numbers. out_starts [B]"""
    for row in range(first, last):
        begin, at = starts[row], out_starts[row]
        for n in range(counts[row]):
            out_rows[at + n] = rows[row]
            out_latents[at + n] = latents[begin + n]
            out_values[at + n] = values[begin + n]


@compiled
def sort_by_latent(latents, starts, order):
    """The pairs in the order of their latents, and the first of each latent. starts [F + 1], order [P]"""
    starts[:] = 0
    for latent in latents:
        starts[latent + 1] += 1
    for latent in range(starts.shape[0] - 1):
        starts[latent + 1] += starts[latent]
    place = starts.copy()
    for p in range(latents.shape[0]):
        order[place[latents[p]]] = p
        place[latents[p]] += 1


@compiled
def keep_largest(starts, counts, latents, values, keys, count, out_latents, out_values, out_counts, first, last):
    """The `count` largest of each row's pairs, all positive, in their order; of those equal to the smallest the first.
    keys: the values' bits. out_latents, out_values [B, count]; out_counts [B]"""
    for row in range(first, last):
        begin, end = starts[row], starts[row] + counts[row]
        mine, spare, at = keys[begin:end], count, 0
        cut = mine.dtype.type(cut_of(mine, count))
        for n in range(mine.shape[0]):
            spare -= mine[n] > cut
        for n in range(mine.shape[0]):
            if mine[n] > cut or (mine[n] == cut and spare > 0):
                spare -= mine[n] == cut
                out_latents[row, at] = latents[begin + n]
                out_values[row, at] = values[begin + n]
                at += 1
        out_counts[row] = at


@compiled
def add_rows(total, order, rows, weights, table):
    """total += Σ weights[p]·table[rows[p]] over the pairs p of `order`. total [D]"""
    at, n_columns = 0, table.shape[1]
    while at + 4 <= order.shape[0]:
        p, q, r, s = order[at], order[at + 1], order[at + 2], order[at + 3]
        wp, wq, wr, ws = weights[p], weights[q], weights[r], weights[s]
        tp, tq, tr, ts = table[rows[p]], table[rows[q]], table[rows[r]], table[rows[s]]
        for column in range(n_columns):
            total[column] += (
                wp * wide(tp[column]) + wq * wide(tq[column]) + wr * wide(tr[column]) + ws * wide(ts[column])
            )
        at += 4
    while at < order.shape[0]:
        weight, row = weights[order[at]], table[rows[order[at]]]
        for column in range(n_columns):
            total[column] += weight * wide(row[column])
        at += 1


@compiled
def longest(starts):
    length = 0
    for group in range(starts.shape[0] - 1):
        length = max(length, starts[group + 1] - starts[group])
    return length


@compiled
def weighty(order, weights, room):
    """The pairs that have a weight, of which sums are: others may be among them whose thresholds learn."""
    length = 0
    for p in order:
        room[length] = p
        length += np.int64(weights[p] != 0)
    return room[:length]


@compiled
def sum_rows(starts, order, rows, weights, table, out, first, last):
    """out[g] = Σ weights[p]·table[rows[p]] over the pairs p = order[starts[g]:starts[g + 1]]."""
    for group in range(first, last):
        out[group] = 0
        add_rows(out[group], order[starts[group] : starts[group + 1]], rows, weights, table)


@compiled
def rebuild(starts, order, latents, values, table, rest, scale, grad, is_narrow, squares, first, last):
    """Adds to each row of `rest` what its pairs give, puts `scale` times that in `grad`, which `is_narrow` if it is of
    bfloat16, and the sum of its squares in `squares`. [B]"""
    room = np.empty(longest(starts) + 1, order.dtype)
    for row in range(first, last):
        error, slope, total = rest[row], grad[row], squares.dtype.type(0)
        add_rows(error, weighty(order[starts[row] : starts[row + 1]], values, room), latents, values, table)
        for column in range(error.shape[0]):
            total += error[column] * error[column]
        squares[row] = total
        if is_narrow:
            for column in range(error.shape[0]):
                slope[column] = narrow(scale * error[column])
        else:
            for column in range(error.shape[0]):
                slope[column] = scale * error[column]


@compiled
def multiply_rows(rows, latents, left, right, out, first, last):
    """out[p] = left[rows[p]]·right[latents[p]]."""
    zero = out.dtype.type(0)
    for p in range(first, last):
        one, other, total = left[rows[p]], right[latents[p]], zero
        for column in range(one.shape[0]):
            total += wide(one[column]) * wide(other[column])
        out[p] = total


@compiled
def multiply_row(w, order, rows, table, out):
    """out[p] = w·table[rows[p]] for the pairs p of `order`."""
    at, zero = 0, w.dtype.type(0)
    while at + 4 <= order.shape[0]:
        p, q, r, s = order[at], order[at + 1], order[at + 2], order[at + 3]
        tp, tq, tr, ts = table[rows[p]], table[rows[q]], table[rows[r]], table[rows[s]]
        ap, aq, ar, as_ = zero, zero, zero, zero
        for column in range(w.shape[0]):
            ap += wide(tp[column]) * w[column]
            aq += wide(tq[column]) * w[column]
            ar += wide(tr[column]) * w[column]
            as_ += wide(ts[column]) * w[column]
        out[p], out[q], out[r], out[s] = ap, aq, ar, as_
        at += 4
    while at < order.shape[0]:
        row, total = table[rows[order[at]]], zero
        for column in range(w.shape[0]):
            total += wide(row[column]) * w[column]
        out[order[at]] = total
        at += 1


@compiled
def fit_rows(
    parameter, starts, order, rows, weights, table, mean, square, copy, is_narrow, place, more, more_sums, along, unit,
    sums, backs, rate, mean_share, square_share, correction, epsilon, first, last,
):  # fmt: skip
    """Adam on each row with the gradient that `sum_rows` gives, which stays in the cache; `sae.kernels.rates` are its
    rates.

    If `unit`, to rows of norm 1, without the gradient's part along the row, which is `along` of it. If `is_narrow`, a
    copy in bfloat16 is kept. sums: those of the weights [F]; backs: of each part Σ sums[row]·row, before the step.
    Where `place` has one for the row, it is given some `more` gradient.
    """
    gradient, room = np.empty(table.shape[1], parameter.dtype), np.empty(longest(starts) + 1, order.dtype)
    back = backs[(first * backs.shape[0] + parameter.shape[0] - 1) // parameter.shape[0]]
    for row in range(first, last):
        mine, w, total = order[starts[row] : starts[row + 1]], parameter[row], parameter.dtype.type(0)
        for p in mine:
            total += weights[p]
        gradient[:] = 0
        if place.shape[0] > 0 and place[row] >= 0:
            total += more_sums[place[row]]
            gradient[:] = more[place[row]]
        sums[row] = total
        for column in range(w.shape[0]):
            back[column] += total * w[column]
        add_rows(gradient, weighty(mine, weights, room), rows, weights, table)
        share = along[row] if unit else parameter.dtype.type(0)
        adam_row(
            w, gradient, mean[row], square[row], copy[row], is_narrow, share, unit,
            rate, mean_share, square_share, correction, epsilon,
        )  # fmt: skip


@compiled
def fit_decoder(
    parameter, starts, order, rows, values, table, mean, square, copy, is_narrow, place, more, slopes,
    rate, mean_share, square_share, correction, epsilon, first, last,
):  # fmt: skip
    """`fit_rows` to rows of norm 1, with what `multiply_rows` gives, of the same rows of the table, in `slopes`."""
    gradient, room = np.empty(table.shape[1], parameter.dtype), np.empty(longest(starts) + 1, order.dtype)
    for row in range(first, last):
        mine, along = order[starts[row] : starts[row + 1]], parameter.dtype.type(0)
        multiply_row(parameter[row], mine, rows, table, slopes)
        for p in mine:
            along += values[p] * slopes[p]
        gradient[:] = 0
        if place.shape[0] > 0 and place[row] >= 0:
            gradient[:] = more[place[row]]
            for column in range(gradient.shape[0]):
                along += gradient[column] * parameter[row, column]
        add_rows(gradient, weighty(mine, values, room), rows, values, table)
        adam_row(
            parameter[row], gradient, mean[row], square[row], copy[row], is_narrow, along, True,
            rate, mean_share, square_share, correction, epsilon,
        )  # fmt: skip


@compiled
def adam_row(w, g, m, v, copy, is_narrow, along, unit, rate, mean_share, square_share, correction, epsilon):
    for column in range(w.shape[0]):
        slope = g[column] - along * w[column]
        m[column] += mean_share * (slope - m[column])
        v[column] += square_share * (slope * slope - v[column])
        w[column] -= rate * m[column] / (np.sqrt(v[column]) * correction + epsilon)
        if is_narrow and not unit:
            copy[column] = narrow(w[column])
    if unit:
        norm = w.dtype.type(0)
        for column in range(w.shape[0]):
            norm += w[column] * w[column]
        scale = w.dtype.type(1) / np.sqrt(norm)
        for column in range(w.shape[0]):
            w[column] *= scale
            if is_narrow:
                copy[column] = narrow(w[column])
