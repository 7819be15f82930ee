"""Sums from which the figures of a dictionary follow: they add over batches, blocks and ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.team import ALONE, Team


class FitSums:
    """Running figures of a dictionary in training, kept on its device until `take` reads them."""

    def __init__(self, device: torch.device, team: Team = ALONE):
        self.team = team
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, squared_error: Tensor, variance: Tensor, values_P: Tensor, n_rows: int) -> None:
        """Σ (ŷ − y)², Σ of y's squared distance to its mean, and the activations of `n_rows` rows."""
        self.sums += torch.stack([squared_error, variance, (values_P > 0).sum()])
        self.rows += n_rows

    def take(self) -> dict[str, float]:
        """FVU and L0 over the batches since the last call; every rank of the team calls."""
        self.team.latents.sum(self.sums[2:])  # every shard has the whole error, and the active pairs of its latents
        squared_error, variance, active = self.team.rows.sum(self.sums).tolist()
        rows = self.team.rows.total(self.rows, self.sums.device)
        figures = {"fvu": squared_error / variance, "l0": active / rows}
        self.sums.zero_()
        self.rows = 0
        return figures


class HeldoutSums(NamedTuple):
    """What one dictionary did on some held-out rows; `plus` adds what it did on others."""

    rows: int
    active: int
    """Active (row, latent) pairs."""
    squared_error_D: Tensor
    """Σ (ŷ − y)² over rows."""
    row_sum_D: Tensor
    """Σ y over rows."""
    square_sum_D: Tensor
    """Σ y² over rows."""
    fired_F: Tensor
    """Rows on which each latent was active."""

    @staticmethod
    def of(y_BD: Tensor, reconstruction_BD: Tensor, latents_BF: Tensor) -> "HeldoutSums":
        fired_F = (latents_BF > 0).sum(0)
        y = y_BD.double()
        return HeldoutSums(
            rows=len(y_BD),
            active=int(fired_F.sum()),
            squared_error_D=(reconstruction_BD - y_BD).double().square().sum(0),
            row_sum_D=y.sum(0),
            square_sum_D=y.square().sum(0),
            fired_F=fired_F,
        )

    def plus(self, other: "HeldoutSums") -> "HeldoutSums":
        return HeldoutSums(
            rows=self.rows + other.rows,
            active=self.active + other.active,
            squared_error_D=self.squared_error_D + other.squared_error_D,
            row_sum_D=self.row_sum_D + other.row_sum_D,
            square_sum_D=self.square_sum_D + other.square_sum_D,
            fired_F=self.fired_F + other.fired_F,
        )

    def fvu(self, n_sites: int) -> float:
        """Squared error over squared distance to the rows' mean (Gemma Scope 1, section 4), averaged over the sites
        written, all of one width: summed, the later layers' larger rows would hide the others."""
        variance_D = self.square_sum_D - self.row_sum_D.square() / self.rows
        error_S, variance_S = (part_D.view(n_sites, -1).sum(1) for part_D in (self.squared_error_D, variance_D))
        return (error_S / variance_S).mean().item()

    @property
    def l0(self) -> float:
        return self.active / self.rows

    @property
    def dead_fraction(self) -> float:
        """Share of latents that were active on none of the rows."""
        return (self.fired_F == 0).double().mean().item()

    @property
    def max_frequency(self) -> float:
        """The highest share of rows on which any latent was active."""
        return self.fired_F.max().item() / self.rows
