"""Triton: products over the active pairs, each output row or value summed by one program in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def weighted_rows(rows, weights, table, first, end, columns, n_columns, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Σ weights[p]·table[rows[p]] over the pairs `first` to `end`. [BLOCK] columns"""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        inside = pair < end
        weight = tl.load(weights + pair, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(rows + pair, mask=inside, other=0).to(tl.int64)
        part = tl.load(
            table + row[:, None] * n_columns + columns[None, :],
            mask=inside[:, None] & (columns < n_columns)[None, :],
            other=0.0,
        )
        total += tl.sum(weight[:, None] * part.to(tl.float32), axis=0)
    return total


@triton.jit
def bounds(starts, group, n_groups, n_pairs):
    """Where the pairs of a group begin and end."""
    first = tl.load(starts + group).to(tl.int32)
    end = tl.load(starts + group + 1, mask=group + 1 < n_groups, other=n_pairs).to(tl.int32)
    return first, end


@triton.jit
def centred_rows(
    x, y, centre, b_dec, centred, rest, sums, squares, n_rows, n_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x − centre, b_dec − y, and the latter's sums and sums of squares over each ROWS rows. Grid [parts of the rows,
    blocks of columns]; the last two [parts, D], the rest [B, D]"""
    part, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    middle = tl.load(centre + columns, mask=inside, other=0.0)
    bias = tl.load(b_dec + columns, mask=inside, other=0.0)
    row = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    place = row[:, None] * n_columns + columns[None, :]
    there = (row < n_rows)[:, None] & inside[None, :]
    read = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    tl.store(centred + place, read - middle[None, :], mask=there)
    left = tl.where(there, bias[None, :] - tl.load(y + place, mask=there, other=0.0).to(tl.float32), 0.0)
    tl.store(rest + place, left, mask=there)
    tl.store(sums + part * n_columns + columns, tl.sum(left, axis=0), mask=inside)
    tl.store(squares + part * n_columns + columns, tl.sum(left * left, axis=0), mask=inside)


@triton.jit
def rebuilt(
    starts, latents, values, w, rest, grad, squares, scale, n_pairs, n_columns,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds Σ values[p]·w[latents[p]] over each row's pairs to its rest; `scale` times the sum is its gradient. Grid
    [rows, blocks of columns], as the sums of its squares; rest and gradient [rows, D]"""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = row.to(tl.int64) * n_columns + columns
    total = tl.load(rest + place, mask=columns < n_columns, other=0.0)
    first, end = bounds(starts, row, tl.num_programs(0), n_pairs)
    total += weighted_rows(latents, values, w, first, end, columns, n_columns, PAIRS, BLOCK)
    tl.store(rest + place, total, mask=columns < n_columns)
    tl.store(grad + place, total * scale, mask=columns < n_columns)
    tl.store(squares + row * tl.num_programs(1) + tl.program_id(1), tl.sum(total * total))


@triton.jit
def latent_rows(starts, rows, weights, table, out, n_pairs, n_columns, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Σ weights[p]·table[rows[p]] over each latent's pairs, which are in the order of latents. Grid [latents, blocks of
    columns]; out [latents, D]"""
    latent = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, end = bounds(starts, latent, tl.num_programs(0), n_pairs)
    total = weighted_rows(rows, weights, table, first, end, columns, n_columns, PAIRS, BLOCK)
    tl.store(out + latent.to(tl.int64) * n_columns + columns, total, mask=columns < n_columns)


@triton.jit
def pair_products(rows, latents, left, right, out, n_pairs, n_columns, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """left[rows[p]] · right[latents[p]] of each pair. Grid [blocks of pairs]; out [P]"""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < n_pairs
    row = tl.load(rows + pair, mask=inside, other=0).to(tl.int64)
    latent = tl.load(latents + pair, mask=inside, other=0).to(tl.int64)
    total = tl.zeros([PAIRS, BLOCK], tl.float32)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        there = inside[:, None] & (columns < n_columns)[None, :]
        a = tl.load(left + row[:, None] * n_columns + columns[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(right + latent[:, None] * n_columns + columns[None, :], mask=there, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + pair, tl.sum(total, axis=1), mask=inside)


@triton.jit
def latent_sums(starts, order, weights, out, n_pairs, BLOCK: tl.constexpr):
    """Σ weights[p] over the pairs of each latent. Grid [latents]; out [latents]"""
    latent = tl.program_id(0)
    first, end = bounds(starts, latent, tl.num_programs(0), n_pairs)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        pair = tl.load(order + place, mask=place < end, other=0)
        total += tl.load(weights + pair, mask=place < end, other=0.0)
    tl.store(out + latent, tl.sum(total))
