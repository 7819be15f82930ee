"""Triton: the largest of many values, exactly, with one reading of them and none by the host.

The n groups with the largest maxima hold the n largest values, for each of these groups has a value at least as large
as the smallest of their maxima. So n is sought twice among few: among the groups' maxima, and among the values of n
groups. Of F values in groups of √(F/n) both are about √(F·n).

Values are compared as *keys*: the bits of a positive float32 ascend as it does, 0 stands for what is not positive and
-1 for what is not there.
"""

import triton
import triton.language as tl


@triton.jit
def _keys(pre, bias, row, latents, inside, width):
    """Of the pre-activations at some latents of a row (64-bit, as row · width may be)."""
    value = tl.load(pre + row * width + latents, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + latents, mask=inside, other=0.0)
    key = tl.where(value > 0, value, 0.0).to(tl.int32, bitcast=True)
    return tl.where(inside, key, -1)


@triton.jit
def group_maxima(pre, bias, maxima, width, n_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key of each group of a row. Grid [B, blocks of groups]; pre [B, F], maxima [B, groups]"""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latents = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    key = _keys(pre, bias, row, latents, latents < width, width)
    tl.store(maxima + row * n_groups + groups, tl.max(key, axis=1), mask=groups < n_groups)


@triton.jit
def candidates(pre, bias, groups, keys, width, n_groups, n_chosen, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The keys in some groups of each row, or in some of all rows' groups, for a grid of one row. Grid [rows, blocks of
    places]; groups [rows, chosen], keys [rows, chosen · GROUP]"""
    line = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = place < n_chosen * GROUP
    number = line * n_groups + tl.load(groups + line * n_chosen + place // GROUP, mask=there, other=0)
    latents = (number % n_groups) * GROUP + place % GROUP
    key = _keys(pre, bias, number // n_groups, latents, there & (latents < width), width)
    tl.store(keys + line * n_chosen * GROUP + place, key, mask=there)


@triton.jit
def largest_of_rows(keys, places, chosen, n_keys, count, BLOCK: tl.constexpr):
    """Where the `count` largest keys of each row lie, ascending, and they. Grid [B]; keys [B, n], the rest [B, count]

    Of those equal to the smallest the first.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    key = tl.load(keys + row * n_keys + place, mask=place < n_keys, other=-1)
    smallest = 0
    for bit in range(31):
        higher = smallest | (1 << (30 - bit))
        smallest = tl.where(tl.sum((key >= higher).to(tl.int32)) >= count, higher, smallest)
    above, equal = (key > smallest).to(tl.int32), (key == smallest).to(tl.int32)
    fits = equal * (tl.cumsum(equal) <= count - tl.sum(above))
    taken = above + fits
    target = row * count + tl.cumsum(taken) - 1
    tl.store(places + target, place, mask=taken > 0)
    tl.store(chosen + target, key, mask=taken > 0)


@triton.jit
def _smallest(counts, count, LEVELS: tl.constexpr):
    """The bytes found so far of the smallest of the `count` largest keys, the highest first."""
    digits = tl.arange(0, 256)
    key, above = 0, 0
    for level in tl.static_range(LEVELS):
        found = tl.load(counts + level * 256 + digits)
        digit = tl.sum((above + tl.cumsum(found, reverse=True) >= count).to(tl.int32)) - 1
        above += tl.sum(tl.where(digits > digit, found, 0))
        key += digit << (24 - 8 * level)
    return key


@triton.jit
def count_digits(keys, counts, n_keys, count, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the keys that share the bytes found so far have each next byte. Grid [blocks]; counts [4, 256], zeros
    before"""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + place, mask=place < n_keys, other=-1)
    digits = tl.arange(0, 256)
    shared = key >= 0
    if LEVEL > 0:
        shared &= (key >> (32 - 8 * LEVEL)) == (_smallest(counts, count, LEVEL) >> (32 - 8 * LEVEL))
    if tl.max(shared.to(tl.int32)) > 0:  # few blocks have any of those that the last bytes are of
        found = tl.histogram((key >> (24 - 8 * LEVEL)) & 255, 256, mask=shared)
        tl.atomic_add(counts + LEVEL * 256 + digits, found, mask=found > 0)


@triton.jit
def count_taken(keys, counts, taken, n_keys, count, BLOCK: tl.constexpr):
    """How many keys of each block lie above the smallest to be taken, and equal it. Grid [blocks]; taken [2, blocks]"""
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + place, mask=place < n_keys, other=-1)
    smallest = _smallest(counts, count, 4)
    tl.store(taken + block, tl.sum((key > smallest).to(tl.int32)))
    tl.store(taken + tl.num_programs(0) + block, tl.sum((key == smallest).to(tl.int32)))


@triton.jit
def write_taken(keys, counts, ends, places, chosen, n_keys, count, BLOCK: tl.constexpr):
    """Where the `count` largest keys lie, ascending, and they. Grid [blocks]; `ends` is the running sum of `taken`."""
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + place, mask=place < n_keys, other=-1)
    smallest = _smallest(counts, count, 4)
    above, equal = (key > smallest).to(tl.int32), (key == smallest).to(tl.int32)
    above_before = (tl.load(ends + block) - tl.sum(above)).to(tl.int32)
    equal_before = (tl.load(ends + n_blocks + block) - tl.sum(equal)).to(tl.int32)
    room = count - tl.load(ends + n_blocks - 1).to(tl.int32)  # for keys equal to the smallest
    fits = equal * (equal_before + tl.cumsum(equal) <= room)
    taken = above + fits
    target = above_before + tl.minimum(equal_before, room) + tl.cumsum(taken) - 1
    tl.store(places + target, place, mask=taken > 0)
    tl.store(chosen + target, key, mask=taken > 0)


@triton.jit
def pairs_at(places, groups, rows, latents, n_groups, count, n_pairs, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The row and latent of each chosen candidate, `count` a row of candidates. Grid [blocks of pairs]; all [P]"""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = pair < n_pairs
    line, place = (pair // count).to(tl.int64), tl.load(places + pair, mask=there, other=0)
    number = line * n_groups + tl.load(groups + line * count + place // GROUP, mask=there, other=0)
    tl.store(rows + pair, number // n_groups, mask=there)
    tl.store(latents + pair, (number % n_groups) * GROUP + place % GROUP, mask=there)
