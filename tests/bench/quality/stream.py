"""Reading the harvested rows: the same rows in the same order for every trainer."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read(bits: np.ndarray) -> Tensor:
    """float32 rows of bf16 bits; a fresh tensor, since dictionary_learning divides its batches in place."""
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).float()


class Batches:
    """One pass over the training rows; every `iter` begins again at the first row."""

    def __init__(self, folder: Path, batch_rows: int, divide_by: float = 1.0):
        self.bits = np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False)
        self.batch_rows, self.divide_by = batch_rows, divide_by

    def __len__(self) -> int:
        return len(self.bits) // self.batch_rows

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(len(self)):
            first = step * self.batch_rows
            yield read(self.bits[first : first + self.batch_rows]) / self.divide_by


def heldout(folder: Path, chunk_rows: int = 2048) -> Iterator[Tensor]:
    """The held-out rows, raw, in chunks."""
    bits = np.load(folder / "heldout.npy", mmap_mode="r", allow_pickle=False)
    for first in range(0, len(bits), chunk_rows):
        yield read(bits[first : first + chunk_rows])
