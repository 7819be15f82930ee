"""Evaluation on held-out text: FVU, L0, dead latents, and the loss recovered when reconstructions are spliced in.

Splicing replaces the rows that dictionaries are trained on, and leaves BOS and the filtered rows as they are; the
other end of the scale zeroes those same rows. Loss recovered = (zeroed − spliced) / (zeroed − clean).
"""

import functools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ray.data import ActorPoolStrategy
from torch import Tensor

from cluster import gemma
from cluster.calibrate import SiteScale
from cluster.harvest import BLOCK, blocks, harvest_block
from cluster.recipe import Recipe
from sae import artifact
from sae.dictionary import Dictionary
from sae.metrics import HeldoutSums
from sae.sites import Site
from sae.spec import DictionarySpec

LARGE_NORM = 3  # rows above this multiple of the median are counted: few, but they weigh in FVU
ROWS_AT_ONCE = 1024  # of an encode: bounds the dense latents


class Scores(NamedTuple):
    """Held-out figures of one dictionary."""

    fvu: float
    l0: float
    dead_fraction: float
    loss_recovered: float
    loss_clean: float
    loss_spliced: float
    loss_zeroed: float
    rows: int
    rows_dropped: int
    """Rows that are neither BOS nor within the norm limit."""
    rows_large: int
    """Kept rows whose norm exceeds LARGE_NORM times the median."""


class Evaluator:
    """Ray Data UDF: held-out block numbers → sums from which `Scores` follow. Owns one model and all dictionaries."""

    def __init__(
        self,
        recipe: Recipe,
        folders: dict[str, Path],
        specs: list[DictionarySpec],
        scales: dict[str, SiteScale],
        tokens_path: Path,
    ):
        torch.set_num_threads(max(1, int(recipe.harvest.cpus)))
        self.device = torch.device("cuda" if recipe.harvest.gpus else "cpu")
        self.model = gemma.load(recipe.model, self.device)
        self.bos = gemma.text_config(recipe.model).bos_token_id
        self.tokens = torch.from_numpy(np.load(tokens_path, allow_pickle=False)).long()
        self.specs, self.scales = specs, scales
        self.sites = sorted({spec.reads for spec in specs}, key=lambda site: site.depth)
        self.limits = {key: recipe.harvest.outlier_norm * scale.median_norm for key, scale in scales.items()}
        self.sequences = recipe.harvest.sequences
        self.loss_sequences = math.ceil(recipe.evaluation.loss_tokens / recipe.corpus.context)
        self.dictionaries = {
            id: Dictionary(*(tensor.to(self.device) for tensor in artifact.read(folder)[0]))
            for id, folder in folders.items()
        }

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        first = int(batch[BLOCK][0]) * self.sequences
        tokens = self.tokens[first : first + self.sequences].to(self.device)
        positions, rows = harvest_block(self.model, tokens, self.sites, self.limits, self.bos)
        scored = tokens[: max(0, self.loss_sequences - first)]
        zeroed = {site: self._loss_with(scored, site, positions, None) for site in self.sites}
        clean = gemma.loss(self.model, scored) if len(scored) else 0.0
        dropped = int((tokens != self.bos).sum()) - len(positions)
        columns: dict[str, list[Any]] = defaultdict(list)
        for spec in self.specs:
            site, dictionary = spec.reads, self.dictionaries[spec.id]
            x_BD = rows[site.key].float()
            sums, rebuilt_BD = _reconstruct(dictionary, x_BD)
            large = x_BD.norm(dim=-1) > LARGE_NORM * self.scales[site.key].median_norm
            figures = sums._asdict() | {
                "id": spec.id,
                "row_sum_D": sums.row_sum_D.cpu().numpy().tobytes(),
                "fired_F": sums.fired_F.cpu().numpy().tobytes(),
                "dropped": dropped,
                "large": int(large.sum()),
                "predicted": scored[:, 1:].numel(),
                "clean": clean,
                "zeroed": zeroed[site],
                "spliced": self._loss_with(scored, site, positions, rebuilt_BD),
            }
            for name, value in figures.items():
                columns[name].append(value)
        return dict(columns)

    def _loss_with(self, tokens: Tensor, site: Site, positions: Tensor, rows_BD: Tensor | None) -> float:
        """Loss with the rows at `positions` of the block replaced, by zeros if `rows_BD` is None."""
        if not len(tokens):
            return 0.0
        here = positions < tokens.numel()

        def splice(tensor: Tensor) -> Tensor:
            flat = tensor.flatten(0, 1).clone()
            flat[positions[here]] = 0 if rows_BD is None else rows_BD[here].to(flat.dtype)
            return flat.view_as(tensor)

        with gemma.hooked(self.model, {site: splice}):
            return gemma.loss(self.model, tokens)


def _reconstruct(dictionary: Dictionary, x_BD: Tensor) -> tuple[HeldoutSums, Tensor]:
    sums, rebuilt = [], []
    for part_BD in x_BD.split(ROWS_AT_ONCE):
        latents_BF = dictionary.encode(part_BD)
        rebuilt.append(dictionary.decode(latents_BF))
        sums.append(HeldoutSums.of(part_BD, rebuilt[-1], latents_BF))
    return functools.reduce(HeldoutSums.plus, sums), torch.cat(rebuilt)


class Evaluated(NamedTuple):
    """Figures of one dictionary, and on how many held-out rows each latent fired [F]."""

    scores: Scores
    fired_F: np.ndarray


def evaluate(
    recipe: Recipe, folders: dict[str, Path], scales: dict[str, SiteScale], tokens_path: Path
) -> dict[str, Evaluated]:
    """The held-out figures of each dictionary, read from its (staged) artifact folder."""
    specs = recipe.specs()
    table = blocks(0, math.ceil(recipe.heldout_sequences / recipe.harvest.sequences)).map_batches(
        Evaluator,
        fn_constructor_args=(recipe, folders, specs, scales, tokens_path),
        batch_size=1,
        num_cpus=recipe.harvest.cpus,
        num_gpus=recipe.harvest.gpus,
        compute=ActorPoolStrategy(size=max(recipe.harvest.actors, 1 if recipe.harvest.gpus else recipe.fit.workers)),
    )
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in table.iter_rows():
        by_id[row["id"]].append(row)
    return {spec.id: _total(by_id[spec.id]) for spec in specs}


def _total(parts: list[dict[str, Any]]) -> Evaluated:
    sums = functools.reduce(HeldoutSums.plus, map(_sums, parts))
    predicted = sum(part["predicted"] for part in parts)
    clean, spliced, zeroed = (sum(part[name] for part in parts) / predicted for name in ("clean", "spliced", "zeroed"))
    scores = Scores(
        fvu=sums.fvu,
        l0=sums.l0,
        dead_fraction=sums.dead_fraction,
        loss_recovered=(zeroed - spliced) / (zeroed - clean),
        loss_clean=clean,
        loss_spliced=spliced,
        loss_zeroed=zeroed,
        rows=sums.rows,
        rows_dropped=sum(part["dropped"] for part in parts),
        rows_large=sum(part["large"] for part in parts),
    )
    return Evaluated(scores, sums.fired_F.numpy())


def _sums(part: dict[str, Any]) -> HeldoutSums:
    vectors = {
        "row_sum_D": torch.frombuffer(bytearray(part["row_sum_D"]), dtype=torch.float64),
        "fired_F": torch.frombuffer(bytearray(part["fired_F"]), dtype=torch.int64),
    }
    return HeldoutSums(**({name: part[name] for name in HeldoutSums._fields} | vectors))
