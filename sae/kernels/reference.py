"""Every operation by dense formulas: the oracle of the others, for any device and type."""

from typing import Literal

import torch
from torch import Tensor

from sae.kernels import Kernels, TooDense
from sae.kernels.entries import ByLatent, Encoder, Entries, Matrix, More
from sae.pairs import Pairs


class Reference(Kernels):
    """`sae.kernels.Kernels`, with matrices [B, F] throughout."""

    def select_topk(
        self, x_BD: Tensor, encoder: Encoder, count: int, per: Literal["row", "batch"], pre_BF: Tensor | None = None
    ) -> Pairs:
        found_BF = _pre_activations(x_BD, encoder, pre_BF)
        if per == "row":
            largest = found_BF.sort(dim=1, descending=True, stable=True).indices[:, :count]
            mask_BF = torch.zeros_like(found_BF, dtype=torch.bool).scatter_(1, largest, True)
        else:
            mask_BF = found_BF >= found_BF.flatten().sort(descending=True).values[min(count, found_BF.numel()) - 1]
        return Pairs.where(mask_BF & (found_BF > 0), found_BF)

    def select_threshold(
        self, x_BD: Tensor, encoder: Encoder, threshold_F: Tensor, pre_BF: Tensor | None = None,
        most: int | None = None,
    ) -> Pairs:  # fmt: skip
        found_BF = _pre_activations(x_BD, encoder, pre_BF)
        pairs = Pairs.where(found_BF > threshold_F, found_BF)
        if most is not None and len(pairs.rows_P) > most:
            raise TooDense
        return pairs

    def decode(self, entries: Entries, values_P: Tensor, w_FD: Tensor) -> Tensor:
        return _spread(entries, values_P) @ w_FD

    def value_gradients(self, entries: Entries, grad_GD: Tensor, w_FD: Tensor) -> Tensor:
        return (grad_GD @ w_FD.T)[entries.rows_P, entries.latents_P]

    def table_gradient(self, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor) -> Tensor:
        n_latents = len(by_latent.starts_F)
        counts_F = torch.diff(by_latent.starts_F, append=by_latent.starts_F.new_tensor([len(rows_P)]))
        latents_P = torch.arange(n_latents, device=rows_P.device).repeat_interleave(counts_F)
        weights_FG = weights_P.new_zeros(n_latents, len(table_GD))
        weights_FG[latents_P, rows_P[by_latent.order_P]] = weights_P[by_latent.order_P]
        return weights_FG @ table_GD

    def fit_rows(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        along_F: Tensor | None, more: More | None = None,
    ) -> None:  # fmt: skip
        w_FD, (mean, square), copy = matrix
        rate, mean_share, square_share, correction, epsilon = rates.tolist()
        gradient = self.table_gradient(by_latent, weights_P, rows_P, table_GD)
        if more:
            gradient[more.latents_X] += more.rows_XD
        if along_F is not None:
            gradient -= along_F[:, None] * w_FD
        mean.lerp_(gradient, mean_share)
        square.lerp_(gradient.square(), square_share)
        w_FD -= rate * mean / (square.sqrt() * correction + epsilon)
        if along_F is not None:
            w_FD /= w_FD.norm(dim=1, keepdim=True)
        copy.copy_(w_FD)

    def latent_sums(self, by_latent: ByLatent, weights_P: Tensor) -> Tensor:
        latents_P = torch.searchsorted(by_latent.starts_F, torch.arange(len(weights_P)), right=True) - 1
        return weights_P.new_zeros(len(by_latent.starts_F)).index_add_(0, latents_P, weights_P[by_latent.order_P])


def _pre_activations(x_BD: Tensor, encoder: Encoder, pre_BF: Tensor | None) -> Tensor:
    """[B, F], in float32 if products are in a narrower type, else in theirs."""
    dtype = torch.promote_types(encoder.bias_F.dtype, torch.float32)
    parts = [
        x_BD[:, group.reads].to(w_FD.dtype).to(dtype) @ w_FD.to(dtype).T
        for group, w_FD in zip(encoder.groups, encoder.weights, strict=True)
    ]
    found_BF = torch.cat(parts, dim=1) + encoder.bias_F
    if pre_BF is not None:
        pre_BF.copy_(found_BF)
    return found_BF


def _spread(entries: Entries, values_P: Tensor) -> Tensor:
    values_GF = values_P.new_zeros(entries.n_rows, entries.width)
    values_GF[entries.rows_P, entries.latents_P] = values_P
    return values_GF
