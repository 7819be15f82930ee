"""Evaluation on held-out text: FVU, L0, dead latents, and the loss recovered when reconstructions are spliced in.

Splicing replaces the rows that dictionaries are trained on, and leaves BOS, a chat's other tokens and the filtered rows
as they are; the other end of the scale zeroes those same rows. The loss is of all tokens but padding. Loss recovered =
(zeroed − spliced) / (zeroed − clean). A dictionary that writes several sites is spliced in at all of them at once,
rebuilt from the undisturbed model's activations.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy
from torch import Tensor

from cluster import gemma
from cluster.calibrate import SiteScale
from cluster.harvest import BLOCK, blocks, harvest_block
from cluster.memory import PORTION_BYTES
from cluster.recipe import Recipe
from cluster.tokens import Sequences, Span
from sae import artifact, hooks
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
    max_frequency: float
    """The highest share of rows on which any latent is active."""
    loss_recovered: float
    loss_clean: float
    loss_spliced: float
    loss_zeroed: float
    rows: int
    rows_dropped: int
    """Rows that are eligible (no BOS; of a chat, of the roles that are trained on) and beyond the norm limit."""
    rows_large: int
    """Kept rows whose norm exceeds LARGE_NORM times the median at a site that is written."""


class Evaluator:
    """Ray Data UDF: held-out block numbers → sums from which `Scores` follow. Owns one model and some dictionaries."""

    def __init__(
        self,
        recipe: Recipe,
        folders: dict[str, Path],
        specs: list[DictionarySpec],
        scales: dict[str, SiteScale],
        tokens_path: Path,
    ):
        torch.set_num_threads(max(1, int(recipe.harvest.cpus)))
        self.device = torch.device("cuda" if recipe.harvest.gpus_for_whole else "cpu")
        self.model = gemma.load(recipe.model, self.device)
        self.tokens = Sequences(recipe, tokens_path, self.device)
        self.specs, self.scales = specs, scales
        # All the sweep's, since which rows are kept depends on the norms at all of them.
        sites = {site for spec in recipe.specs() for site in spec.sites}
        self.sites = sorted(sites, key=lambda site: site.depth)
        self.limits = {key: recipe.harvest.outlier_norm * scale.median_norm for key, scale in scales.items()}
        self.sequences = recipe.harvest.sequences
        self.loss_sequences = math.ceil(recipe.evaluation.loss_tokens / recipe.corpus.context)
        self.dictionaries = {id: artifact.read(folder)[0].to(self.device) for id, folder in folders.items()}

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        first = int(batch[BLOCK][0]) * self.sequences
        span = self.tokens.read(first, self.sequences)
        positions, rows = harvest_block(self.model, span, self.sites, self.limits)
        scored = Span(*(part[: max(0, self.loss_sequences - first)] for part in span))
        clean = self._loss_with(scored, {}, positions)
        zeroed = functools.cache(lambda sites: self._loss_with(scored, dict.fromkeys(sites), positions))
        dropped = int(span.eligible.sum()) - len(positions)
        large = {key: _norm(x_BD) > LARGE_NORM * self.scales[key].median_norm for key, x_BD in rows.items()}
        table: dict[str, list[Any]] = defaultdict(list)
        for spec in self.specs:
            dictionary, written = self.dictionaries[spec.id], tuple(spec.writes)
            sums, rebuilt_BD = _reconstruct(dictionary, _concatenated(rows, spec.reads), _concatenated(rows, written))
            parts = rebuilt_BD.split(dictionary.shape.write_widths, dim=1)
            figures = {name: _sendable(value) for name, value in sums._asdict().items()} | {
                "id": spec.id,
                "dropped": dropped,
                "large": int(torch.stack([large[site.key] for site in written]).any(0).sum()),
                "predicted": int(scored.real[:, 1:].sum()),
                "clean": clean,
                "zeroed": zeroed(written),
                "spliced": self._loss_with(scored, dict(zip(written, parts, strict=True)), positions),
            }
            for name, value in figures.items():
                table[name].append(value)
        return dict(table)

    def _loss_with(self, scored: Span, replaced: Mapping[Site, Tensor | None], positions: Tensor) -> float:
        """Loss with the rows at `positions` of the block replaced at some sites, by zeros where there is None."""
        if not len(scored.ids):
            return 0.0
        here = positions < scored.ids.numel()
        edits: dict[Site, hooks.Edit] = {
            site: functools.partial(hooks.splice, positions[here], None if rows_BD is None else rows_BD[here])
            for site, rows_BD in replaced.items()
        }
        with hooks.hooked(self.model, edits):
            return gemma.loss(self.model, scored.ids, scored.real)


def _norm(x_BD: Tensor) -> Tensor:
    return x_BD.float().norm(dim=-1)


def _concatenated(rows: dict[str, Tensor], sites: Iterable[Site]) -> Tensor:
    return torch.cat([rows[site.key].float() for site in sites], dim=1)


def _reconstruct(dictionary: Dictionary, x_BD: Tensor, y_BD: Tensor) -> tuple[HeldoutSums, Tensor]:
    sums, rebuilt = [], []
    for x_part, y_part in zip(x_BD.split(ROWS_AT_ONCE), y_BD.split(ROWS_AT_ONCE), strict=True):
        latents_BF = dictionary.encode(x_part)
        rebuilt.append(dictionary.decode(latents_BF, x_part))
        sums.append(HeldoutSums.of(y_part, rebuilt[-1], latents_BF))
    return functools.reduce(HeldoutSums.plus, sums), torch.cat(rebuilt)


class Evaluated(NamedTuple):
    """Figures of one dictionary, and on how many held-out rows each latent fired [F]."""

    scores: Scores
    fired_F: np.ndarray


def evaluate(
    recipe: Recipe, folders: dict[str, Path], scales: dict[str, SiteScale], tokens_path: Path
) -> dict[str, Evaluated]:
    """The held-out figures of each dictionary, read from its (staged) artifact folder."""
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for specs in _portions(recipe.specs(), folders):
        for row in _sweep_heldout(recipe, specs, folders, scales, tokens_path).iter_rows():
            by_id[row["id"]].append(row)
    return {spec.id: _total(spec, by_id[spec.id]) for spec in recipe.specs()}


def _portions(specs: list[DictionarySpec], folders: dict[str, Path]) -> list[list[DictionarySpec]]:
    """Runs of dictionaries whose files are PORTION_BYTES together: each takes a pass over the held-out text."""
    portions: list[list[DictionarySpec]] = [[]]
    total = 0
    for spec in specs:
        size = sum(path.stat().st_size for path in folders[spec.id].glob("params*"))
        if portions[-1] and total + size > PORTION_BYTES:
            portions.append([])
            total = 0
        portions[-1].append(spec)
        total += size
    return portions


def _sweep_heldout(
    recipe: Recipe,
    specs: list[DictionarySpec],
    folders: dict[str, Path],
    scales: dict[str, SiteScale],
    tokens_path: Path,
) -> ray.data.Dataset:
    """A row a dictionary and block."""
    n_blocks = math.ceil(recipe.heldout_sequences / recipe.harvest.sequences)
    return blocks(0, n_blocks).map_batches(
        Evaluator,
        fn_constructor_args=(recipe, {spec.id: folders[spec.id] for spec in specs}, specs, scales, tokens_path),
        batch_size=1,
        num_cpus=recipe.harvest.cpus,
        num_gpus=recipe.harvest.gpus_for_whole,
        compute=ActorPoolStrategy(size=recipe.evaluators),
    )


def _total(spec: DictionarySpec, parts: list[dict[str, Any]]) -> Evaluated:
    sums = functools.reduce(HeldoutSums.plus, map(_sums, parts))
    predicted = sum(part["predicted"] for part in parts)
    clean, spliced, zeroed = (sum(part[name] for part in parts) / predicted for name in ("clean", "spliced", "zeroed"))
    scores = Scores(
        fvu=sums.fvu(len(spec.writes)),
        l0=sums.l0,
        dead_fraction=sums.dead_fraction,
        max_frequency=sums.max_frequency,
        loss_recovered=(zeroed - spliced) / (zeroed - clean),
        loss_clean=clean,
        loss_spliced=spliced,
        loss_zeroed=zeroed,
        rows=sums.rows,
        rows_dropped=sum(part["dropped"] for part in parts),
        rows_large=sum(part["large"] for part in parts),
    )
    return Evaluated(scores, sums.fired_F.numpy())


def _sendable(value: Any) -> Any:
    """A vector as bytes: Ray's tables would pad columns of unequal lengths."""
    return value.cpu().numpy().tobytes() if isinstance(value, Tensor) else value


def _sums(part: dict[str, Any]) -> HeldoutSums:
    fields = {name: part[name] for name in HeldoutSums._fields}
    for name in ("squared_error_D", "row_sum_D", "square_sum_D", "fired_F"):
        dtype = torch.int64 if name == "fired_F" else torch.float64
        fields[name] = torch.frombuffer(bytearray(part[name]), dtype=dtype)
    return HeldoutSums(**fields)
