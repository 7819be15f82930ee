"""Harvest: Ray Data actors that run Gemma 3 over token sequences and emit activation rows.

A *block* is the sequences of one forward pass, a fixed range of them, so that its bits depend on nothing else.
An activation row carries its global id, sequence·context + position. bf16 travels as int16 (Ray Data has no bf16,
and fp16 overflows on Gemma 3).
Block numbers go on from epoch to epoch; the ids of their rows are the same in each.
"""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy
from torch import Tensor

from cluster import gang
from cluster.cache import Cache, Shard
from cluster.calibrate import SiteScale, kept
from cluster.recipe import Recipe
from cluster.tokens import Sequences, Span
from sae import hooks
from sae.sites import Site

Rows = dict[str, np.ndarray]
ROW, BLOCK, BLOCK_ROWS = "row", "block", "block_rows"


def harvest_block(
    model: torch.nn.Module, span: Span, sites: list[Site], limits: dict[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`kept_rows` of a model in this process."""
    return kept_rows(hooks.capture(model, span.ids, sites), span, limits)


def kept_rows(captured: dict[Site, Tensor], span: Span, limits: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Kept positions [n] of a block, as indices into its tokens [sequences, T], and the rows there, each [n, D]."""
    norms = {site.key: tensor.float().norm(dim=-1) for site, tensor in captured.items()}
    positions = kept(span.eligible, norms, limits).flatten().nonzero()[:, 0]
    return positions, {site.key: tensor.flatten(0, 1)[positions] for site, tensor in captured.items()}


def eligible_rows(captured: dict[Site, Tensor], span: Span) -> Shard:
    """All eligible rows of a block, whatever their norms."""
    positions = span.eligible.flatten().nonzero()[:, 0]
    rows = {site.key: tensor.flatten(0, 1)[positions] for site, tensor in captured.items()}
    norms = {site.key: tensor.float().norm(dim=-1).flatten()[positions] for site, tensor in captured.items()}
    return Shard(
        positions.cpu().numpy(),
        {key: norm.cpu().numpy() for key, norm in norms.items()},
        {key: encode_bf16(tensor) for key, tensor in rows.items()},
    )


class Harvester:
    """Ray Data UDF: block numbers → activation rows. Owns one model, and the ranks that share it; it is loaded for the
    first block that no cache has."""

    def __init__(
        self, recipe: Recipe, sites: list[Site], scales: dict[str, SiteScale], tokens_path: Path, cache: Cache | None
    ):
        self.recipe, self.cache = recipe, cache
        self.tokens = Sequences(recipe, tokens_path, gang.device(recipe.harvest))
        self.sequences, self.context, self.sites = recipe.harvest.sequences, recipe.corpus.context, sites
        self.blocks_of_an_epoch = math.ceil(recipe.train_sequences / self.sequences)
        self.limits = {key: recipe.harvest.outlier_norm * scale.median_norm for key, scale in scales.items()}

    @functools.cached_property
    def model(self) -> gang.Whole | gang.Gang:
        return gang.open_model(self.recipe, self.cache.sites if self.cache else self.sites)

    def __call__(self, batch: Rows) -> Rows:
        block = int(batch[BLOCK][0])
        place = block % self.blocks_of_an_epoch
        positions, columns = self._cached_rows(place, self.cache) if self.cache else self._rows(place)
        n = len(positions)
        return columns | {
            ROW: place * self.sequences * self.context + positions,
            BLOCK: np.full(n, block),
            BLOCK_ROWS: np.full(n, n),
        }

    def _rows(self, place: int) -> tuple[np.ndarray, Rows]:
        """Kept positions of a block of the text, and bf16 bits by site key."""
        span = self._span(place)
        positions, rows = kept_rows(self.model.capture(span.ids), span, self.limits)
        return positions.cpu().numpy(), {key: encode_bf16(tensor) for key, tensor in rows.items()}

    def _cached_rows(self, place: int, cache: Cache) -> tuple[np.ndarray, Rows]:
        """The same from the cache, into which they are put if it lacks them."""
        shard = cache.read(place, self.limits)
        if shard is None:
            span = self._span(place)
            shard = eligible_rows(self.model.capture(span.ids), span)
            cache.write(place, shard)
        return shard.within(self.limits)

    def _span(self, place: int) -> Span:
        return self.tokens.read(place * self.sequences, self.sequences)


def encode_bf16(rows: Tensor) -> np.ndarray:
    """The bits of rows in bf16, as int16."""
    return rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()


def decode_bf16(bits: np.ndarray) -> Tensor:
    """The rows again; `bits` is copied, since Ray's blocks are read-only."""
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


def activations(
    recipe: Recipe,
    sites: list[Site],
    scales: dict[str, SiteScale],
    tokens_path: Path,
    cache: Cache | None,
    first_block: int,
    n_blocks: int,
) -> ray.data.Dataset:
    """The stream of activation rows of blocks first_block … n_blocks − 1, in that order, harvested as it is read."""
    return blocks(first_block, n_blocks).map_batches(
        Harvester,
        fn_constructor_args=(recipe, sites, scales, tokens_path, cache),
        batch_size=1,
        num_cpus=recipe.harvest.cpus * recipe.harvest.ranks,
        num_gpus=recipe.harvest.gpus * recipe.harvest.ranks,
        compute=ActorPoolStrategy(size=recipe.harvest.actors),
    )


def blocks(first: int, end: int) -> ray.data.Dataset:
    """Block numbers, one a task, so that a task that is retried after a crash repeats one forward pass."""
    items: list[Any] = [{BLOCK: block} for block in range(first, end)]
    return ray.data.from_items(items, override_num_blocks=max(1, len(items)))
