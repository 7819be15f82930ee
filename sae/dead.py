"""Dead latents: how they are told, and the three ways of reviving them: AuxK, pre-activation loss, resampling."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.pairs import Pairs
from sae.spec import AuxK, DictionarySpec, Preactivation


class Idle:
    """For how many rows each latent has not fired."""

    def __init__(self, spec: DictionarySpec, device: torch.device):
        self.limit = spec.options.dead_after_rows
        self.rows_F = torch.zeros(spec.width, dtype=torch.int64, device=device)

    def update(self, pairs: Pairs, n_rows: int) -> None:
        fired = torch.bincount(pairs.latents_P[pairs.values_P > 0], minlength=len(self.rows_F)) > 0
        self.rows_F.add_(n_rows).masked_fill_(fired, 0)

    @property
    def dead(self) -> Tensor:
        """Indices of the dead latents, ascending."""
        return (self.rows_F >= self.limit).nonzero()[:, 0]


def auxk_pairs(options: AuxK, pre_BF: Tensor, dead: Tensor, d_out: int) -> Pairs:
    """The dead latents of each row with the largest positive pre-activations; the value is the pre-activation."""
    count = min(options.latents or d_out // 2, len(dead))
    pre_BX = pre_BF[:, dead]
    largest = pre_BX.topk(count, dim=1, sorted=False).indices
    mask_BX = torch.zeros_like(pre_BX, dtype=torch.bool).scatter_(1, largest, True)
    pairs = Pairs.where(mask_BX & (pre_BX > 0), pre_BX)
    return pairs._replace(latents_P=dead[pairs.latents_P])


def auxk_gradient(options: AuxK, rebuilt_BD: Tensor, error_BD: Tensor) -> Tensor:
    """Gradient by ê of α·Σ‖e − ê‖²/Σ‖e‖², where e is what the living leave over, y − ŷ, held constant. [B, D]"""
    return (rebuilt_BD + error_BD) * (2 * options.coefficient / error_BD.square().sum())


class PreactivationGradients(NamedTuple):
    """Gradients of λ·Σ max(0, θ − z) over dead latents, averaged over rows."""

    pre_BX: Tensor
    """By the dead latents' pre-activations."""
    threshold_X: Tensor


def preactivation_gradients(
    options: Preactivation, pre_BF: Tensor, dead: Tensor, threshold_F: Tensor
) -> PreactivationGradients:
    below_BX = pre_BF[:, dead] < threshold_F[dead]
    slope_BX = below_BX.to(pre_BF.dtype) * (options.coefficient / len(pre_BF))
    return PreactivationGradients(-slope_BX, slope_BX.sum(0))


def resampling_due(spec: DictionarySpec, previous: float, progress: float) -> bool:
    """Whether one of the shares of the run at which dead latents restart lies in (previous, progress]."""
    resampling = spec.options.resampling
    return resampling is not None and any(previous < at <= progress for at in resampling.at)


def badly_rebuilt_rows(error_BD: Tensor, count: int, seed: int, step: int) -> Tensor:
    """`count` different rows drawn with probability proportional to their loss.

    *Published* (Bricken et al. 2023): to the squared loss, from 819,200 rows, with replacement. *Measured here*: from
    one batch that draws Gemma 3's few rows of ten times the median norm again and again, and the copies take all of
    BatchTopK's budget (FVU 0.91 in place of 0.26).
    """
    weights_B = error_BD.square().sum(1).cpu()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.multinomial(weights_B, count, generator=generator).to(error_BD.device)
