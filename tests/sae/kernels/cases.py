"""Small batches for the kernels: groups that read some columns each, rows of zeros, ties, K up to F."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.kernels import Kernels
from sae.kernels.entries import Encoder, Entries, Matrix
from sae.pairs import Pairs
from sae.shape import Group


class Case(NamedTuple):
    x_BD: Tensor
    encoder: Encoder
    w_dec_FD: Tensor
    error_BD: Tensor


def make_case(
    n_rows: int, columns: int, width: int, seed: int = 0, n_groups: int = 1, dtype: torch.dtype = torch.float32
) -> Case:
    """Some rows are 0, and every third latent is the same as the one before."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    share = width // n_groups
    groups = [
        Group(slice(n * share, (n + 1) * share), slice(n, columns - n_groups + n + 1), slice(0, columns))
        for n in range(n_groups)
    ]
    weights, bias_F = [draw(share, columns - n_groups + 1) for _ in groups], draw(width) - 0.5
    for w_FD, group in zip(weights, groups, strict=True):
        w_FD[2::3] = w_FD[1::3][: len(w_FD[2::3])]
        bias_F[group.latents][2::3] = bias_F[group.latents][1::3][: len(w_FD[2::3])]
    x_BD = draw(n_rows, columns)
    x_BD[::5] = 0
    return Case(x_BD, Encoder(weights, bias_F, groups), draw(width, columns), draw(n_rows, columns))


def spread(pairs: Pairs, case: Case) -> Tensor:
    """The values of some pairs as a matrix. [B, F]"""
    dense_BF = torch.zeros(len(case.x_BD), case.encoder.width, dtype=pairs.values_P.dtype)
    return dense_BF.index_put((pairs.rows_P.cpu(), pairs.latents_P.cpu()), pairs.values_P.cpu(), accumulate=True)


def entries_of(pairs: Pairs, case: Case) -> Entries:
    return Entries(pairs.rows_P, pairs.latents_P, len(case.x_BD), case.encoder.width)


def matrix_of(w_FD: Tensor) -> Matrix:
    """Before its first step, on the weights' device."""
    return Matrix(w_FD.clone(), (torch.zeros_like(w_FD), torch.zeros_like(w_FD)), w_FD.bfloat16())


def some_pairs(kernels: Kernels, case: Case, k: int) -> Pairs:
    return kernels.select_topk(case.x_BD, case.encoder, k, "row")
