"""Sparse products over active (row, latent) pairs.

Only the encoder product of a training step needs to be dense; decoding and every gradient touch the active
pairs alone, so each is a weighted sum of table rows (`embedding_bag`), grouped by row or by latent.
Dense references and the comparison with autograd are in tests/sae/test_step.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Pairs(NamedTuple):
    """Active (row, latent) pairs of a batch, sorted by row and then by latent."""

    rows_P: Tensor
    latents_P: Tensor
    pre_P: Tensor
    """Pre-activations of the pairs."""
    values_P: Tensor
    """Activations; 0 for a pair that is kept only because its threshold needs a gradient."""


def grouped_sum(groups_P: Tensor, n_groups: int, indices_P: Tensor, weights_P: Tensor, table: Tensor) -> Tensor:
    """out[g] = Σ weights[p]·table[indices[p]] over the pairs of group g; `groups_P` ascends. [n_groups, D]"""
    starts = torch.searchsorted(groups_P, torch.arange(n_groups, device=groups_P.device))
    return functional.embedding_bag(indices_P, table, starts, mode="sum", per_sample_weights=weights_P)


def decode(pairs: Pairs, n_rows: int, w_dec_FD: Tensor) -> Tensor:
    """Σ of each row's active decoder rows, weighted by activation. [B, D]"""
    return grouped_sum(pairs.rows_P, n_rows, pairs.latents_P, pairs.values_P, w_dec_FD)


def value_gradients(pairs: Pairs, grad_BD: Tensor, w_dec_FD: Tensor) -> Tensor:
    """∂/∂values[p] = grad[rows[p]]·w_dec[latents[p]], without gathering [P, D]. [P]"""
    values_P = pairs.values_P.detach().requires_grad_()
    with torch.enable_grad():
        decoded_BD = decode(pairs._replace(values_P=values_P), len(grad_BD), w_dec_FD)
    return torch.autograd.grad(decoded_BD, values_P, grad_BD)[0]


def per_latent_sums(pairs: Pairs, n_latents: int, *terms: tuple[Tensor, Tensor]) -> list[Tensor]:
    """For each (weights [P], table [B, D]): out[f] = Σ weights[p]·table[rows[p]] over the pairs of latent f. [F, D]"""
    order_P = pairs.latents_P.argsort(stable=True)
    latents_P, rows_P = pairs.latents_P[order_P], pairs.rows_P[order_P]
    return [grouped_sum(latents_P, n_latents, rows_P, weights_P[order_P], table) for weights_P, table in terms]
