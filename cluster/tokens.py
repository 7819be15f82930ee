"""The token sequences of a run: their two sides, and which tokens' rows dictionaries see."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cluster import gemma
from cluster.recipe import Recipe
from sae.sites import STATIC_TOKENS

SIDES = ("train", "heldout")
HELDOUT_TENTH = 2**64 // 10

PADDING, USER, ASSISTANT = 0, 1, 2
"""A token's role in a chat corpus' role files, uint8 [sequences, context] beside the tokens'."""
ROLES = {"user": USER, "assistant": ASSISTANT}


def is_heldout(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") < HELDOUT_TENTH


def roles_path(tokens_path: Path) -> Path:
    """The role file of a side's tokens; a text corpus has none."""
    return tokens_path.with_name(f"{tokens_path.stem}-roles.npy")


class Span(NamedTuple):
    """Some consecutive sequences, each part [sequences, T]."""

    ids: Tensor
    real: Tensor
    """Whether it is a token and no padding."""
    eligible: Tensor
    """Whether its row may be seen by dictionaries, as far as that depends on tokens."""

    @staticmethod
    def of_text(ids: Tensor, bos: int) -> "Span":
        """Every token is real, and each but BOS eligible."""
        return Span(ids, torch.ones_like(ids, dtype=torch.bool), ids != bos)


class Sequences:
    """One side's token sequences, read from the disk as they are asked for."""

    def __init__(self, recipe: Recipe, path: Path, device: torch.device):
        self.bos, self.device = gemma.text_config(recipe.model).bos_token_id, device
        self.ids = np.load(path, mmap_mode="r", allow_pickle=False)
        self.roles: np.ndarray | None = None
        if recipe.corpus.kind == "chat":
            self.roles = np.load(roles_path(path), mmap_mode="r", allow_pickle=False)
        self.trained_roles = torch.tensor([ROLES[role] for role in recipe.corpus.roles], device=device)

    def read(self, first: int, count: int) -> Span:
        ids = self._tensor(self.ids, first, count)
        if self.roles is None:
            return Span.of_text(ids, self.bos)
        roles = self._tensor(self.roles, first, count)
        eligible = torch.isin(roles, self.trained_roles)
        eligible[:, :STATIC_TOKENS] = False
        return Span(ids, roles != PADDING, eligible)

    def _tensor(self, values: np.ndarray, first: int, count: int) -> Tensor:
        return torch.from_numpy(np.array(values[first : first + count])).long().to(self.device)
