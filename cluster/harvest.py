"""Harvest: Ray Data actors that run Gemma 3 over token sequences and emit activation rows.

A *block* is the sequences of one forward pass, a fixed range of them, so that its bits depend on nothing else.
An activation row carries its global id, sequence·context + position. bf16 travels as int16 (Ray Data has no bf16,
and fp16 overflows on Gemma 3).
"""

from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy
from torch import Tensor

from cluster import gang, gemma
from cluster.calibrate import SiteScale, kept
from cluster.recipe import Recipe
from sae.sites import Site

Rows = dict[str, np.ndarray]
ROW, BLOCK, BLOCK_ROWS = "row", "block", "block_rows"


def harvest_block(
    model: torch.nn.Module, tokens: Tensor, sites: list[Site], limits: dict[str, float], bos: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`kept_rows` of a model in this process."""
    return kept_rows(gemma.capture(model, tokens, sites), tokens, limits, bos)


def kept_rows(
    captured: dict[Site, Tensor], tokens: Tensor, limits: dict[str, float], bos: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Kept positions [n] of a block, as indices into its tokens [sequences, T], and the rows there, each [n, D]."""
    norms = {site.key: tensor.float().norm(dim=-1) for site, tensor in captured.items()}
    positions = kept(tokens, norms, limits, bos).flatten().nonzero()[:, 0]
    return positions, {site.key: tensor.flatten(0, 1)[positions] for site, tensor in captured.items()}


class Harvester:
    """Ray Data UDF: block numbers → activation rows. Owns one model, and the ranks that share it."""

    def __init__(self, recipe: Recipe, sites: list[Site], scales: dict[str, SiteScale], tokens_path: Path):
        self.model = gang.open_model(recipe, sites)
        self.bos = gemma.text_config(recipe.model).bos_token_id
        self.tokens = np.load(tokens_path, mmap_mode="r", allow_pickle=False)
        self.sequences, self.context = recipe.harvest.sequences, recipe.corpus.context
        self.limits = {key: recipe.harvest.outlier_norm * scale.median_norm for key, scale in scales.items()}

    def __call__(self, batch: Rows) -> Rows:
        block = int(batch[BLOCK][0])
        first = block * self.sequences
        ids = np.array(self.tokens[first : first + self.sequences])
        tokens = torch.from_numpy(ids).long().to(self.model.device)
        positions, rows = kept_rows(self.model.capture(tokens), tokens, self.limits, self.bos)
        n = len(positions)
        columns = {key: encode_bf16(tensor) for key, tensor in rows.items()}
        return columns | {
            ROW: first * self.context + positions.cpu().numpy(),
            BLOCK: np.full(n, block),
            BLOCK_ROWS: np.full(n, n),
        }


def encode_bf16(rows: Tensor) -> np.ndarray:
    """The bits of rows in bf16, as int16."""
    return rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()


def decode_bf16(bits: np.ndarray) -> Tensor:
    """The rows again; `bits` is copied, since Ray's blocks are read-only."""
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


def activations(
    recipe: Recipe, sites: list[Site], scales: dict[str, SiteScale], tokens_path: Path, first_block: int, n_blocks: int
) -> ray.data.Dataset:
    """The stream of activation rows of blocks first_block … n_blocks − 1, in that order, harvested as it is read."""
    return blocks(first_block, n_blocks).map_batches(
        Harvester,
        fn_constructor_args=(recipe, sites, scales, tokens_path),
        batch_size=1,
        num_cpus=recipe.harvest.cpus * recipe.harvest.ranks,
        num_gpus=recipe.harvest.gpus * recipe.harvest.ranks,
        compute=ActorPoolStrategy(size=recipe.harvest.actors),
    )


def blocks(first: int, end: int) -> ray.data.Dataset:
    """Block numbers, one a task, so that a task that is retried after a crash repeats one forward pass."""
    items: list[Any] = [{BLOCK: block} for block in range(first, end)]
    return ray.data.from_items(items, override_num_blocks=max(1, len(items)))
