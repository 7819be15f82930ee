"""Rows for tests and timings on a GPU, and the dictionary of one site that is trained on them."""

import torch
from torch import Tensor

from sae.spec import DictionarySpec

COLUMNS, ATOMS = 256, 1024
SITE = {"resid_post.1": COLUMNS}


def make_spec(activation: str, width: int = 2048, l0: int = 16) -> DictionarySpec:
    return DictionarySpec(
        id="x", kind="sae", site="resid_post", layers=(1,), activation=activation, width=width, l0=l0, seed=3,
        folder="x",
    )  # fmt: skip


def make_rows(seed: int, n_rows: int, columns: int = COLUMNS, device: str = "cpu") -> Tensor:
    """Sparse sums of some directions, the first of which are in many rows, with noise; of unit mean square norm."""
    directions = torch.randn(ATOMS, columns, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    strengths = torch.rand(n_rows, ATOMS, generator=generator)
    present = torch.rand(n_rows, ATOMS, generator=generator) < 4 / torch.arange(4, ATOMS + 4)
    rows = (strengths * present) @ directions + 0.1 * torch.randn(n_rows, columns, generator=generator)
    return (rows / rows.square().sum(1).mean().sqrt()).to(device)
