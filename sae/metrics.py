"""Sums from which the figures of a dictionary follow: they add over batches, blocks and ranks."""

from typing import NamedTuple

import torch
from torch import Tensor


class FitSums:
    """Running figures of a dictionary in training, kept on its device until `take` reads them."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x_BD: Tensor, error_BD: Tensor, values_P: Tensor) -> None:
        variance = (x_BD - x_BD.mean(0)).square().sum()
        self.sums += torch.stack([error_BD.square().sum(), variance, (values_P > 0).sum()])
        self.rows += len(x_BD)

    def take(self) -> dict[str, float]:
        """FVU and L0 over the batches since the last call."""
        squared_error, variance, active = self.sums.tolist()
        figures = {"fvu": squared_error / variance, "l0": active / self.rows}
        self.sums.zero_()
        self.rows = 0
        return figures


class HeldoutSums(NamedTuple):
    """What one dictionary did on some held-out rows; `plus` adds what it did on others."""

    rows: int
    squared_error: float
    """Σ ‖x̂ − x‖² over rows."""
    active: int
    """Active (row, latent) pairs."""
    row_sum_D: Tensor
    square_sum: float
    """Σ ‖x‖² over rows."""
    fired_F: Tensor
    """Rows on which each latent was active."""

    @staticmethod
    def of(x_BD: Tensor, reconstruction_BD: Tensor, latents_BF: Tensor) -> "HeldoutSums":
        fired_F = (latents_BF > 0).sum(0)
        x = x_BD.double()
        return HeldoutSums(
            rows=len(x_BD),
            squared_error=(reconstruction_BD - x_BD).double().square().sum().item(),
            active=int(fired_F.sum()),
            row_sum_D=x.sum(0),
            square_sum=x.square().sum().item(),
            fired_F=fired_F,
        )

    def plus(self, other: "HeldoutSums") -> "HeldoutSums":
        return HeldoutSums(
            rows=self.rows + other.rows,
            squared_error=self.squared_error + other.squared_error,
            active=self.active + other.active,
            row_sum_D=self.row_sum_D + other.row_sum_D,
            square_sum=self.square_sum + other.square_sum,
            fired_F=self.fired_F + other.fired_F,
        )

    @property
    def fvu(self) -> float:
        """Squared error over squared distance to the rows' mean (Gemma Scope 1, section 4)."""
        variance = self.square_sum - self.row_sum_D.square().sum().item() / self.rows
        return self.squared_error / variance

    @property
    def l0(self) -> float:
        return self.active / self.rows

    @property
    def dead_fraction(self) -> float:
        """Share of latents that were active on none of the rows."""
        return (self.fired_F == 0).double().mean().item()
