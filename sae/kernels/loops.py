"""Loops over rows, latents and pairs, compiled by numba where they first run: no compiler is needed.

Each works on its part [first, last) of what it writes and releases the interpreter's lock, so that threads share the
work and the bits do not depend on their number. Sums are reassociated into vectors; nothing else is (no fast division,
NaN stays NaN).
"""

from collections.abc import Callable

import numba
import numpy as np

BLOCK = 64  # entries that are looked at together when few of them are wanted
PER_LATENT = 4  # groups of a row of which the maxima are taken, for each latent wanted


def compiled(function: Callable) -> Callable:
    """Without Python's check of divisors, which keeps loops from becoming vectors; kept on disk for later processes."""
    return numba.njit(function, nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@compiled
def count_above(pre, threshold, floor, counts, first, last):
    """How many entries of each row are above their column's threshold and their row's floor. pre [B, C], threshold [C],
    floor [B], counts [B]"""
    for row in range(first, last):
        entries, least, total = pre[row], floor[row], 0
        for column in range(entries.shape[0]):
            total += (entries[column] > threshold[column]) & (entries[column] > least)
        counts[row] = total


@compiled
def write_above(pre, threshold, floor, starts, column, latents, values, first, last):
    """Writes those that `count_above` counted, each row's from its start on; `column` is the first one's latent.
    starts [B]"""
    for row in range(first, last):
        entries, least, at = pre[row], floor[row], starts[row]
        for begin in range(0, entries.shape[0], BLOCK):
            block, limits = entries[begin : begin + BLOCK], threshold[begin : begin + BLOCK]
            there = 0
            for n in range(block.shape[0]):
                there += (block[n] > limits[n]) & (block[n] > least)
            if there > 0:
                for n in range(block.shape[0]):
                    if block[n] > limits[n] and block[n] > least:
                        latents[at] = column + begin + n
                        values[at] = block[n]
                        at += 1


@compiled
def merge_rows(starts, counts, latents, values, out_starts, out_latents, out_values, first, last):
    """Each row's pairs of several parts, one part after another. starts, counts [parts, B], out_starts [B]"""
    for row in range(first, last):
        at = out_starts[row]
        for part in range(starts.shape[0]):
            for p in range(starts[part, row], starts[part, row] + counts[part, row]):
                out_latents[at] = latents[p]
                out_values[at] = values[p]
                at += 1


@compiled
def largest_of_parts(starts, counts, latents, values, count, out_latents, out_values, out_counts, first, last):
    """The `count` largest of each row's pairs of several parts, all positive. starts, counts [parts, B];
    out_latents, out_values [B, count]; out_counts [B]"""
    for row in range(first, last):
        n_found = 0
        for part in range(starts.shape[0]):
            n_found += counts[part, row]
        found, places = np.empty(n_found, values.dtype), np.empty(n_found, latents.dtype)
        at = 0
        for part in range(starts.shape[0]):
            for p in range(starts[part, row], starts[part, row] + counts[part, row]):
                found[at] = values[p]
                places[at] = latents[p]
                at += 1
        out_counts[row] = keep_largest(found, places, n_found, count, out_latents[row], out_values[row])


@compiled
def keep_largest(found, places, n_found, count, latents, values):
    """Writes the `count` largest of the first `n_found`, in their order; how many there are."""
    spare = count
    if n_found <= count:
        for n in range(n_found):
            latents[n] = places[n]
            values[n] = found[n]
        return n_found
    cut = np.partition(found[:n_found], n_found - count)[n_found - count]
    for n in range(n_found):
        spare -= found[n] > cut
    at = 0
    for n in range(n_found):
        if found[n] > cut or (found[n] == cut and spare > 0):
            spare -= found[n] == cut
            latents[at] = places[n]
            values[at] = found[n]
            at += 1
    return at


@compiled
def largest_of_rows(pre, count, latents, values, counts, first, last):
    """The `count` largest positive entries of each row, by column. pre [B, C]; latents, values [B, count]; counts [B]

    The count-th largest of the maxima of some groups is no larger than the count-th largest entry: all that is sought
    lies at or above it, and little else.
    """
    width = pre.shape[1]
    size = max(1, min(BLOCK, width // (PER_LATENT * count)))
    n_groups = (width + size - 1) // size
    maxima = np.empty(n_groups, pre.dtype)
    found, places = np.empty(width, pre.dtype), np.empty(width, np.int64)
    for row in range(first, last):
        entries = pre[row]
        for group in range(n_groups):
            block = entries[group * size : (group + 1) * size]
            largest = block[0]
            for n in range(1, block.shape[0]):
                largest = max(largest, block[n])
            maxima[group] = largest
        floor = np.partition(maxima, n_groups - count)[n_groups - count] if n_groups >= count else maxima[0] * 0
        n_found = 0
        for group in range(n_groups):
            if maxima[group] >= floor and maxima[group] > 0:
                for column in range(group * size, min(width, (group + 1) * size)):
                    if entries[column] >= floor and entries[column] > 0:
                        found[n_found] = entries[column]
                        places[n_found] = column
                        n_found += 1
        counts[row] = keep_largest(found, places, n_found, count, latents[row], values[row])


@compiled
def sum_rows(starts, order, rows, weights, table, out, first, last):
    """out[g] = Σ weights[p]·table[rows[p]] over the pairs p = order[starts[g]:starts[g + 1]]."""
    n_columns = table.shape[1]
    for group in range(first, last):
        total, at, end = out[group], starts[group], starts[group + 1]
        total[:] = 0
        while at + 4 <= end:
            p, q, r, s = order[at], order[at + 1], order[at + 2], order[at + 3]
            wp, wq, wr, ws = weights[p], weights[q], weights[r], weights[s]
            tp, tq, tr, ts = table[rows[p]], table[rows[q]], table[rows[r]], table[rows[s]]
            for column in range(n_columns):
                total[column] += wp * tp[column] + wq * tq[column] + wr * tr[column] + ws * ts[column]
            at += 4
        while at < end:
            weight, row = weights[order[at]], table[rows[order[at]]]
            for column in range(n_columns):
                total[column] += weight * row[column]
            at += 1


@compiled
def multiply_rows(rows, latents, left, right, out, first, last):
    """out[p] = left[rows[p]]·right[latents[p]]."""
    zero = left[0, 0] * 0
    for p in range(first, last):
        one, other, total = left[rows[p]], right[latents[p]], zero
        for column in range(one.shape[0]):
            total += one[column] * other[column]
        out[p] = total


@compiled
def fit_rows(
    parameter, starts, order, rows, weights, table, mean, square, along, unit,
    rate, mean_share, square_share, correction, epsilon, first, last,
):  # fmt: skip
    """Adam on each row with the gradient of `sum_rows`, which stays in the cache; `sae.kernels.rates` are its rates.

    If `unit`, to rows of norm 1, without the gradient's part along the row, which is `along` of it.
    """
    gradient, pairs = np.empty((1, table.shape[1]), table.dtype), np.empty(2, starts.dtype)
    for row in range(first, last):
        pairs[0], pairs[1] = starts[row], starts[row + 1]
        sum_rows(pairs, order, rows, weights, table, gradient, 0, 1)
        share = along[row] if unit else along[0] * 0
        adam_row(
            parameter[row], gradient[0], mean[row], square[row], share, unit,
            rate, mean_share, square_share, correction, epsilon,
        )  # fmt: skip


@compiled
def adam_row(w, g, m, v, along, unit, rate, mean_share, square_share, correction, epsilon):
    for column in range(w.shape[0]):
        slope = g[column] - along * w[column]
        m[column] += mean_share * (slope - m[column])
        v[column] += square_share * (slope * slope - v[column])
        w[column] -= rate * m[column] / (np.sqrt(v[column]) * correction + epsilon)
    if unit:
        norm = along * 0
        for column in range(w.shape[0]):
            norm += w[column] * w[column]
        scale = 1 / np.sqrt(norm)
        for column in range(w.shape[0]):
            w[column] *= scale
