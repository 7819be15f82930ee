"""Where the active pairs of a batch lie in a sparse matrix of rows × latents, and what the encoder is made of."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sae.pairs import starts
from sae.shape import Group


class Encoder(NamedTuple):
    """Pre-activations are x[:, reads]·Wᵀ + bias, for each group of latents."""

    weights: list[Tensor]
    """By group [F of the group, columns read]; of the type in which products are to be done."""
    bias_F: Tensor
    groups: list[Group]

    @property
    def width(self) -> int:
        """F of all groups."""
        return len(self.bias_F)


class Matrix(NamedTuple):
    """Weights that are being learned, a latent a row. [F, D]"""

    weights: Tensor
    moments: tuple[Tensor, Tensor]
    """Adam's, in the weights' type."""
    copy: Tensor
    """The weights in the type of the products; themselves, if it is theirs."""


class More(NamedTuple):
    """Gradients of X rows of a matrix, besides those that pairs give."""

    latents_X: Tensor
    rows_XD: Tensor
    sums_X: Tensor
    """Of the encoder's bias; nothing for a decoder."""


class Entries:
    """Places of pairs in a sparse [G, F] matrix in CSR order: ascending by row and, in it, by latent.

    A row is one of the batch or, where prefixes of the latents are rebuilt one by one, a segment of one.
    """

    def __init__(self, rows_P: Tensor, latents_P: Tensor, n_rows: int, width: int):
        self.rows_P, self.latents_P, self.n_rows, self.width = rows_P, latents_P, n_rows, width

    @cached_property
    def starts_G(self) -> Tensor:
        """The first pair of each row. [G]"""
        return starts(self.rows_P, self.n_rows)

    @cached_property
    def by_latent(self) -> "ByLatent":
        """The same pairs in the order of their latents: both weight gradients need it."""
        short = torch.int16 if self.width <= torch.iinfo(torch.int16).max else torch.int32  # fewer digits to sort by
        latents_P, order_P = self.latents_P.to(short).sort(stable=True)
        return ByLatent(order_P, starts(latents_P, self.width))


class ByLatent(NamedTuple):
    """An order of pairs that ascends by latent and, in it, by row (CSC)."""

    order_P: Tensor
    starts_F: Tensor
    """The first pair, in that order, of each latent."""
