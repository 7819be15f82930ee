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
    HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """As `step_summed_rows` if UNIT, whole rows at once; and grad[row of p]·w[latent of p], at `order` of p. Grid
    [latents]

    A row is held in two parts, whose widths are powers of two as those of blocks must be: in one, up to half of the
    lanes would be idle.
    """
    latent = tl.program_id(0)
    base = latent.to(tl.int64) * n_columns
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    whole, inside = head < n_columns, tail < n_columns
    first, end = bounds(starts, latent, tl.num_programs(0), n_pairs)
    w_head = tl.load(parameter + base + head, mask=whole, other=0.0, eviction_policy="evict_first")
    w_tail = tl.load(parameter + base + tail, mask=inside, other=0.0, eviction_policy="evict_first")
    g_head, g_tail = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    for pair in range(first, end):
        row, value = grad + tl.load(rows + pair).to(tl.int64) * n_columns, tl.load(values + pair)
        part = tl.load(row + head, mask=whole, other=0.0).to(tl.float32)
        rest = tl.load(row + tail, mask=inside, other=0.0).to(tl.float32)
        g_head += value * part
        g_tail += value * rest
        tl.store(out + tl.load(order + pair), tl.sum(part * w_head) + tl.sum(rest * w_tail))
    along = tl.sum(g_head * w_head) + tl.sum(g_tail * w_tail)
    g_head -= along * w_head
    g_tail -= along * w_tail
    rate, mean_share, square_share = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    scale, epsilon = tl.load(rates + 3), tl.load(rates + 4)
    w_head = _moved(mean, square, base + head, whole, w_head, g_head, rate, mean_share, square_share, scale, epsilon)
    w_tail = _moved(mean, square, base + tail, inside, w_tail, g_tail, rate, mean_share, square_share, scale, epsilon)
    norm = tl.sqrt(tl.sum(w_head * w_head) + tl.sum(w_tail * w_tail))
    tl.store(parameter + base + head, w_head / norm, mask=whole)
    tl.store(copy + base + head, w_head / norm, mask=whole)
    tl.store(parameter + base + tail, w_tail / norm, mask=inside)
    tl.store(copy + base + tail, w_tail / norm, mask=inside)
