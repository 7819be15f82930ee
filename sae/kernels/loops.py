"""Loops that sum rows of tables over a batch's pairs and step matrices.

Each works on its part [first, last) of what it writes and releases the interpreter's lock, so that threads share the
work; only `backs` of `fit_rows` depend on their number. Sums are reassociated into vectors; nothing else is (no fast
division, NaN stays NaN).
"""

import numpy as np

from sae.kernels.compiled import compiled, narrow, part_of, stored, wide


@compiled
def centre_rows(x, middle, out, first, last):
    """out = x − middle"""
    for row in range(first, last):
        one, away = x[row], out[row]
        for column in range(one.shape[0]):
            away[column] = stored(wide(one[column]) - middle[column], away)


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
def rebuild(starts, order, latents, values, table, rest, scale, grad, squares, first, last):
    """Adds to each row of `rest` what its pairs give, puts `scale` times that in `grad`, and the sum of its squares in
    `squares`. [B]"""
    room = np.empty(longest(starts) + 1, order.dtype)
    for row in range(first, last):
        error, slope, total = rest[row], grad[row], squares.dtype.type(0)
        add_rows(error, weighty(order[starts[row] : starts[row + 1]], values, room), latents, values, table)
        for column in range(error.shape[0]):
            total += error[column] * error[column]
        squares[row] = total
        for column in range(error.shape[0]):
            slope[column] = stored(scale * error[column], slope)


@compiled
def gate(grad, f, sums, first, last):
    """Puts 0 in the gradients of what is 0. sums: of each part the columns' sums"""
    total, zero = sums[part_of(first, sums, grad)], grad.dtype.type(0)
    for row in range(first, last):
        slopes, values = grad[row], f[row]
        for n in range(slopes.shape[0]):
            slopes[n] = slopes[n] if values[n] != zero else zero
            total[n] += wide(slopes[n])


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
    back = backs[part_of(first, backs, parameter)]
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
