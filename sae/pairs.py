"""Products over the active (row, latent) pairs of a batch.

Only the encoder product of a training step needs to be dense; decoding and every gradient touch the active pairs
alone, so each is a weighted sum of table rows (`embedding_bag`), grouped by row or by latent. While so many latents
are active that this costs more (ReLU and Gated dictionaries at their start), the same products are done densely.

Where prefixes of the latents are rebuilt one by one, a row's pairs are cut into *segments*, those between two prefixes:
a batch is decoded once, into [B, segments, D], and the prefixes are its cumulative sums.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae.shape import Group

DENSE_SHARE = 0.3  # of active pairs, from which dense products are faster; measured here, one CPU thread


class Pairs(NamedTuple):
    """Active (row, latent) pairs of a batch, sorted by row and then by latent."""

    rows_P: Tensor
    latents_P: Tensor
    pre_P: Tensor
    """Pre-activations of the pairs."""
    values_P: Tensor
    """Activations; 0 for a pair that is kept only because its threshold needs a gradient."""

    @staticmethod
    def where(mask_BF: Tensor, pre_BF: Tensor) -> "Pairs":
        """The pairs that a mask names, with their pre-activations as values."""
        flat_P = mask_BF.flatten().nonzero()[:, 0]
        pre_P = pre_BF.flatten()[flat_P]
        width = mask_BF.shape[1]
        return Pairs(flat_P // width, flat_P % width, pre_P, pre_P)


class Active:
    """The pairs of one group of latents, with the products that training needs."""

    def __init__(self, pairs: Pairs, chosen: Tensor | slice, group: Group, n_rows: int, ends: list[int]):
        """`chosen` are those of all pairs whose latents are of the group; `ends` the segments' last + 1."""
        self.n_rows, self.width, self.ends, self.chosen = n_rows, group.width, ends, chosen
        self.rows_P = pairs.rows_P[self.chosen]
        self.latents_P = pairs.latents_P[self.chosen] - group.latents.start
        inner = torch.tensor(ends[:-1], device=self.rows_P.device)
        self.bags_P = self.rows_P * len(ends) + torch.bucketize(self.latents_P, inner, right=True)
        self.dense = len(self.rows_P) > DENSE_SHARE * n_rows * self.width

    def decode(self, values_P: Tensor, w_FD: Tensor) -> Tensor:
        """Σ of each row's active decoder rows, weighted by activation. [B, segments, D]"""
        if self.dense:
            values_BF = self._spread(values_P)
            return torch.stack([values_BF[:, part] @ w_FD[part] for part in self._segments()], dim=1)
        n_bags = self.n_rows * len(self.ends)
        return _grouped_sum(self.bags_P, n_bags, self.latents_P, values_P, w_FD).view(self.n_rows, len(self.ends), -1)

    def value_gradients(self, grad_BnD: Tensor, w_FD: Tensor) -> Tensor:
        """∂/∂values[p] = grad[row, segment]·w[latent], without gathering [P, D]. [P]"""
        if self.dense:
            parts = [grad_BnD[:, n] @ w_FD[part].T for n, part in enumerate(self._segments())]
            return torch.cat(parts, dim=1)[self.rows_P, self.latents_P]
        flat = grad_BnD.reshape(-1, grad_BnD.shape[-1])
        offsets = starts(self.bags_P, len(flat))
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            flat, w_FD, self.latents_P, offsets, self.bags_P, 0
        )

    def decoder_gradient(self, values_P: Tensor, grad_BnD: Tensor) -> Tensor:
        """out[f] = Σ values[p]·grad[row, segment] over the pairs of latent f. [F, D]"""
        if self.dense:
            values_BF = self._spread(values_P)
            return torch.cat([values_BF[:, part].T @ grad_BnD[:, n] for n, part in enumerate(self._segments())])
        return self._per_latent(values_P, self.bags_P, grad_BnD.reshape(-1, grad_BnD.shape[-1]))

    def encoder_gradient(self, grad_pre_P: Tensor, x_BD: Tensor) -> Tensor:
        """out[f] = Σ grad_pre[p]·x[row] over the pairs of latent f. [F, D]"""
        return self._spread(grad_pre_P).T @ x_BD if self.dense else self._per_latent(grad_pre_P, self.rows_P, x_BD)

    def _per_latent(self, weights_P: Tensor, indices_P: Tensor, table: Tensor) -> Tensor:
        order_P, latents_P = self._by_latent
        return _grouped_sum(latents_P, self.width, indices_P[order_P], weights_P[order_P], table)

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor]:
        """The order that sorts the pairs by latent, and the latents in it: both weight gradients need them."""
        latents_P, order_P = self.latents_P.sort(stable=True)
        return order_P, latents_P

    def _segments(self) -> list[slice]:
        return [slice(start, end) for start, end in zip([0, *self.ends[:-1]], self.ends, strict=True)]

    def _spread(self, values_P: Tensor) -> Tensor:
        values_BF = values_P.new_zeros(self.n_rows, self.width)
        values_BF[self.rows_P, self.latents_P] = values_P
        return values_BF


def starts(groups_P: Tensor, n_groups: int) -> Tensor:
    """The place of each group's first pair, or where that would be; `groups_P` ascends. [n_groups]"""
    numbers = torch.arange(n_groups, device=groups_P.device, dtype=groups_P.dtype)
    return torch.searchsorted(groups_P.contiguous(), numbers)


def _grouped_sum(groups_P: Tensor, n_groups: int, indices_P: Tensor, weights_P: Tensor, table: Tensor) -> Tensor:
    """out[g] = Σ weights[p]·table[indices[p]] over the pairs of group g; `groups_P` ascends. [n_groups, D]"""
    offsets = starts(groups_P, n_groups)
    return functional.embedding_bag(indices_P, table, offsets, mode="sum", per_sample_weights=weights_P)
