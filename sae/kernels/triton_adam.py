"""Triton: Adam in one pass over a parameter and its moments."""

import triton
import triton.language as tl

from sae.kernels.triton_products import bounds, weighted_rows


@triton.jit
def _moved(mean, square, place, inside, w, gradient, rate, mean_share, square_share, scale, epsilon):
    """What some entries become; their moments are stored. `rate` and `scale` correct these for their start at 0."""
    m = tl.load(mean + place, mask=inside, other=0.0, eviction_policy="evict_first")
    v = tl.load(square + place, mask=inside, other=0.0, eviction_policy="evict_first")
    m += mean_share * (gradient - m)
    v += square_share * (gradient * gradient - v)
    tl.store(mean + place, m, mask=inside)
    tl.store(square + place, v, mask=inside)
    return w - rate * m / (tl.sqrt(v) * scale + epsilon)


@triton.jit
def step_summed_rows(
    parameter, starts, rows, weights, table, mean, square, copy, along, n_pairs, n_columns, rates,
    UNIT: tl.constexpr, TILES: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of Adam on rows whose gradients are sums over pairs, never written. Grid [latents, parts]; [latents, D]

    Pairs are in the order of their latents. A part is TILES times BLOCK columns; if UNIT, a row has one part. Small
    tiles need few registers: so many programs run at once, and hide how long the rows of the table take to come.
    """
    latent = tl.program_id(0)
    base = latent.to(tl.int64) * n_columns
    first, end = bounds(starts, latent, tl.num_programs(0), n_pairs)
    rate, mean_share, square_share = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    scale, epsilon = tl.load(rates + 3), tl.load(rates + 4)
    squares = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        columns = (tl.program_id(1) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < n_columns
        w = tl.load(parameter + base + columns, mask=inside, other=0.0, eviction_policy="evict_first")
        g = weighted_rows(rows, weights, table, first, end, columns, n_columns, PAIRS, BLOCK)
        if UNIT:
            g -= tl.load(along + latent) * w
        w = _moved(mean, square, base + columns, inside, w, g, rate, mean_share, square_share, scale, epsilon)
        squares += w * w
        tl.store(parameter + base + columns, w, mask=inside)
        if not UNIT:
            tl.store(copy + base + columns, w, mask=inside)
    if UNIT:
        norm = tl.sqrt(tl.sum(squares))
        tl.debug_barrier()  # what is read now was stored above, perhaps by another thread
        for tile in range(TILES):
            columns = tile * BLOCK + tl.arange(0, BLOCK)
            inside = columns < n_columns
            w = tl.load(parameter + base + columns, mask=inside, other=0.0) / norm
            tl.store(parameter + base + columns, w, mask=inside)
            tl.store(copy + base + columns, w, mask=inside)


@triton.jit
def step_decoder_rows(
    parameter, starts, order, rows, values, grad, out, mean, square, copy, n_pairs, n_columns, rates,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `step_summed_rows` if UNIT, whole rows at once; and grad[row of p]·w[latent of p], at `order` of p. Grid
    [latents]"""
    latent = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    place, inside = latent.to(tl.int64) * n_columns + columns, columns < n_columns
    first, end = bounds(starts, latent, tl.num_programs(0), n_pairs)
    w = tl.load(parameter + place, mask=inside, other=0.0, eviction_policy="evict_first")
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        there = pair < end
        row = tl.load(rows + pair, mask=there, other=0).to(tl.int64)
        value = tl.load(values + pair, mask=there, other=0.0)
        target = tl.load(order + pair, mask=there, other=0)
        part = tl.load(
            grad + row[:, None] * n_columns + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(value[:, None] * part, axis=0)
        tl.store(out + target, tl.sum(part * w[None, :], axis=1), mask=there)
    total -= tl.sum(total * w) * w
    rate, mean_share, square_share = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    scale, epsilon = tl.load(rates + 3), tl.load(rates + 4)
    w = _moved(mean, square, place, inside, w, total, rate, mean_share, square_share, scale, epsilon)
    w /= tl.sqrt(tl.sum(w * w))
    tl.store(parameter + place, w, mask=inside)
    tl.store(copy + place, w, mask=inside)
