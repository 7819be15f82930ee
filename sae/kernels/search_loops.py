"""Loops of `sae.kernels.search`, which look for a batch's largest or above its thresholds.

Each works on its rows [first, last) and releases the interpreter's lock, so that threads share the work and what is
found does not depend on their number. NaN is never found.
"""

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from sae.kernels.compiled import compiled, key, part_of, stored, wide

BLOCK = 64  # entries that are compared with one number
WORD = 8  # marks that are looked at together when few of them are set


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
def leave_largest(pre, bias, keys, count, first, last):
    """Adds the bias and leaves of each row the `count` largest that are positive, of those equal to the smallest the
    first, with 0 in the places of the others. keys: an empty array of the type of the biases' keys. pre [B, F],
    bias [F]"""
    mine = np.empty(pre.shape[1], keys.dtype)
    values = mine.view(bias.dtype)
    for row in range(first, last):
        entries = pre[row]
        for n in range(mine.shape[0]):
            mine[n] = max(key(wide(entries[n]) + bias[n]), 0)
        cut = max(mine.dtype.type(cut_of(mine, count)), 1)
        kept = 0
        for n in range(mine.shape[0]):
            kept += mine[n] >= cut
            mine[n] = mine[n] if mine[n] >= cut else 0
        for n in range(mine.shape[0] - 1, -1, -1):
            if kept <= count:
                break
            if mine[n] == cut:
                mine[n] = 0
                kept -= 1
        for n in range(mine.shape[0]):
            entries[n] = stored(values[n], entries)


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
def append_above(pre, bias, limit, column, done, used, starts, counts, latents, values, first, last):
    """Appends to the thread's pairs those of its rows' entries whose keys are above their column's, until there may be
    no room for a row's. limit [C]

    `column` is the first one's latent. `done` is the row at which the thread goes on, `used` how many pairs it has; of
    each row, where its pairs start and how many they are. pre [B, C], bias [C], latents, values [T, room]
    """
    thread, marks, least = part_of(first, used, pre), new_marks(pre.shape[1]), bias.dtype.type(-np.inf)
    for row in range(done[thread], last):
        if used[thread] + marks.shape[0] > latents.shape[1]:
            break
        entries = pre[row]
        for n in range(entries.shape[0]):
            marks[n] = key(entries[n]) > limit[n]
        starts[row] = used[thread]
        used[thread] = append_marked(marks, entries, bias, least, column, latents[thread], values[thread], starts[row])
        counts[row] = used[thread] - starts[row]
        done[thread] = row + 1


@compiled
def append_from(pre, bias, top, floor, keys, shift, column, done, used, starts, counts, latents, values, first, last):
    """As `append_above`, the entries that are with their bias no less than the row's floor.

    top: the largest bias of each `BLOCK` columns. keys: an empty array of the type of the entries' keys, which are
    those of the biases' type less `shift` bits. floor [B]
    """
    thread, marks = part_of(first, used, pre), new_marks(pre.shape[1])
    for row in range(done[thread], last):
        if used[thread] + marks.shape[0] > latents.shape[1]:
            break
        entries, least = pre[row], floor[row]
        for block in range(top.shape[0]):
            some, marked = entries[BLOCK * block : BLOCK * (block + 1)], marks[BLOCK * block : BLOCK * (block + 1)]
            limit = keys.dtype.type(key(least - top[block]) >> shift)
            for n in range(some.shape[0]):
                marked[n] = key(some[n]) >= limit
        starts[row] = used[thread]
        used[thread] = append_marked(marks, entries, bias, least, column, latents[thread], values[thread], starts[row])
        counts[row] = used[thread] - starts[row]
        done[thread] = row + 1


@compiled
def append_rows(pre, threshold, starts, latents, values):
    """Writes all rows' entries above their column's threshold, one after another, and where each row's start. pre [B,
    F], threshold [F], starts [B + 1], latents, values [B · F]"""
    marks, no_bias, least = new_marks(pre.shape[1]), np.zeros_like(threshold), threshold.dtype.type(-np.inf)
    for row in range(pre.shape[0]):
        entries = pre[row]
        for n in range(entries.shape[0]):
            marks[n] = entries[n] > threshold[n]
        starts[row + 1] = append_marked(marks, entries, no_bias, least, 0, latents, values, starts[row])


@compiled
def new_marks(width):
    """One for each entry, and as many more as fill a word."""
    return np.zeros((width + WORD - 1) // WORD * WORD, np.uint8)


@compiled
def append_marked(marks, entries, bias, least, column, latents, values, at):
    """Writes the marked entries that are no less than `least`, with their bias, from `at` on; where they end."""
    words = marks.view(np.int64)
    for word in range(words.shape[0]):
        left = words[word]
        while left != 0:
            n = WORD * word + (trailing_zeros(left) >> 3)
            value = wide(entries[n]) + bias[n]
            latents[at] = column + n
            values[at] = value
            at += np.int64(value >= least)
            left &= left - 1
    return at


@compiled
def gather(starts, counts, latents, values, out_starts, out_rows, out_latents, out_values, first, last):
    """Writes each row's pairs, of all parts, where they are to be. starts, counts [parts, B]; out_starts [B]"""
    thread = part_of(first, latents, out_starts)
    for row in range(first, last):
        at = out_starts[row]
        for part in range(starts.shape[0]):
            begin = starts[part, row]
            for n in range(counts[part, row]):
                out_rows[at + n] = row
                out_latents[at + n] = latents[thread, begin + n]
                out_values[at + n] = values[thread, begin + n]
            at += counts[part, row]


@compiled
def keep_largest(starts, counts, latents, values, keys, count, out_latents, out_values, out_counts, first, last):
    """The `count` largest of each row's pairs, all positive, in their order; of those equal to the smallest the first.
    keys: the values' bits. starts, counts [parts, B]; out_latents, out_values [B, count]; out_counts [B]"""
    thread, n_parts, room = part_of(first, latents, out_counts), starts.shape[0], np.empty(0, keys.dtype)
    for row in range(first, last):
        total = 0
        for part in range(n_parts):
            total += counts[part, row]
        if total > room.shape[0]:
            room = np.empty(2 * total, keys.dtype)
        end = 0
        for part in range(n_parts):
            begin, length = starts[part, row], counts[part, row]
            room[end : end + length] = keys[thread, begin : begin + length]
            end += length
        mine, spare, at = room[:total], count, 0
        cut = mine.dtype.type(cut_of(mine, count))
        for n in range(total):
            spare -= mine[n] > cut
        end = 0
        for part in range(n_parts):
            begin, length = starts[part, row] - end, counts[part, row]
            for n in range(end, end + length):
                if mine[n] > cut or (mine[n] == cut and spare > 0):
                    spare -= mine[n] == cut
                    out_latents[row, at] = latents[thread, begin + n]
                    out_values[row, at] = values[thread, begin + n]
                    at += 1
            end += length
        out_counts[row] = at
