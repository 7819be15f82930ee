"""Dead latents: how they are told, and the three ways of reviving them: AuxK, pre-activation loss, resampling."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.largest import largest_of_rows
from sae.pairs import Pairs
from sae.spec import AuxK, DictionarySpec, Preactivation
from sae.team import ALONE, Axis, Team


class Idle:
    """For how many rows each latent has not fired."""

    def __init__(self, spec: DictionarySpec, device: torch.device, team: Team = ALONE):
        self.limit, self.team = spec.options.dead_after_rows, team
        self.rows_F = torch.zeros(spec.width // team.latents.count, dtype=torch.int64, device=device)

    def update(self, pairs: Pairs, n_rows: int) -> None:
        fired_F = torch.zeros_like(self.rows_F).scatter_reduce_(
            0, pairs.latents_P, (pairs.values_P > 0).to(self.rows_F.dtype), "amax"
        )
        self.rows_F.add_(n_rows).masked_fill_(self.team.rows.sum(fired_F) > 0, 0)

    @property
    def is_dead_F(self) -> Tensor:
        return self.rows_F >= self.limit

    @property
    def dead(self) -> Tensor:
        """Indices of the dead latents, ascending."""
        return self.is_dead_F.nonzero()[:, 0]


def auxk_pairs(count: int, pre_BF: Tensor, dead: Tensor, shards: Axis) -> Pairs:
    """The `count` dead latents of each row, of all shards, with the largest positive pre-activations; the value is the
    pre-activation."""
    pre_BX = pre_BF[:, dead]
    pairs = Pairs.where(largest_of_rows(pre_BX, count, shards) & (pre_BX > 0), pre_BX)
    return pairs._replace(latents_P=dead[pairs.latents_P])


def auxk_gradient(options: AuxK, rebuilt_BD: Tensor, error_BD: Tensor, replicas: Axis) -> Tensor:
    """Gradient by ê of α·Σ‖e − ê‖²/Σ‖e‖², where e is what the living leave over, y − ŷ, held constant. [B, D]"""
    return (rebuilt_BD + error_BD) * (2 * options.coefficient / replicas.sum(error_BD.square().sum()))


class PreactivationGradients(NamedTuple):
    """Gradients of λ·Σ max(0, θ − z) over dead latents, averaged over rows."""

    pre_BX: Tensor
    """By the dead latents' pre-activations."""
    threshold_X: Tensor


def preactivation_gradients(
    options: Preactivation, pre_BF: Tensor, dead: Tensor, threshold_F: Tensor, n_rows: int
) -> PreactivationGradients:
    """`pre_BF` are some of the batch's `n_rows` rows."""
    below_BX = pre_BF[:, dead] < threshold_F[dead]
    slope_BX = below_BX.to(pre_BF.dtype) * (options.coefficient / n_rows)
    return PreactivationGradients(-slope_BX, slope_BX.sum(0))


def resampling_due(spec: DictionarySpec, previous: float, progress: float) -> bool:
    """Whether one of the shares of the run at which dead latents restart lies in (previous, progress]."""
    resampling = spec.options.resampling
    return resampling is not None and any(previous < at <= progress for at in resampling.at)


def badly_rebuilt_rows(loss_B: Tensor, count: int, seed: int, step: int) -> Tensor:
    """`count` different rows drawn with probability proportional to their loss.

    *Published* (Bricken et al. 2023): to the squared loss, from 819,200 rows, with replacement. *Measured here*: from
    one batch that draws Gemma 3's few rows of ten times the median norm again and again, and the copies take all of
    BatchTopK's budget (FVU 0.91 in place of 0.26).
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.multinomial(loss_B.cpu(), count, generator=generator).to(loss_B.device)
