"""Nested prefixes of the latents: where they end, and their errors from one decode.

A group's latents are cut where the prefixes end; what each segment adds is decoded once, a prefix's reconstruction is
the sum over its segments, and a segment's gradient is the sum over the prefixes that hold it.
"""

import math

import torch
from torch import Tensor

from sae.shape import Group
from sae.spec import DictionarySpec
from sae.team import ALONE, Axis


def prefix_ends(spec: DictionarySpec, group: Group, step: int, shards: Axis = ALONE.latents) -> list[int]:
    """A shard's latents of a group in each prefix, ascending; the last is all. One entry without Matryoshka.

    Sampled sizes are a function of the seed and the step, so that a resumed run draws the same.
    """
    matryoshka = spec.options.matryoshka
    if matryoshka is None:
        return [group.width]
    shares = list(matryoshka.prefixes)
    if matryoshka.sampled:
        generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + step)
        drawn = torch.rand(len(shares), generator=generator, dtype=torch.float64)
        shares = sorted(torch.exp(drawn * math.log(shares[0])).tolist())
    width = group.width * shards.count
    whole = [*(max(1, round(share * width)) for share in shares), width]
    return [len(range(shards.index, end, shards.count)) for end in whole]


def prefix_errors(parts_BnD: Tensor, rest_BD: Tensor) -> Tensor:
    """Error of each prefix, given what each segment adds and what all share (biases, skip, minus the target).

    [B, segments, D]
    """
    return parts_BnD.cumsum(1).add_(rest_BD[:, None])


def segment_gradients(error_BnD: Tensor, n_rows: int) -> Tensor:
    """Gradient by what each segment adds, of the mean over prefixes and the batch's `n_rows` rows of the squared
    errors. [B, segments, D]"""
    return error_BnD.flip(1).cumsum(1).flip(1).mul_(2 / (n_rows * error_BnD.shape[1]))
