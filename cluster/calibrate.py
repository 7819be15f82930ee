"""Calibration: each site's scale and median norm, from the first training sequences."""

import json
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import ray
from torch import Tensor

from cluster import gang
from cluster.recipe import Recipe
from cluster.run_folder import replace_text
from cluster.tokens import Sequences
from sae.sites import Site


class SiteScale(NamedTuple):
    """How large a site's rows are."""

    median_norm: float
    scale: float
    """Root mean square norm of the kept rows: dividing by it gives E‖x‖² = 1 (*published*: Gemma Scope 1, 3.1)."""
    rows: int
    """Kept rows of the sample."""


def kept(eligible: Tensor, norms: dict[str, Tensor], limits: dict[str, float]) -> Tensor:
    """Mask of the rows that dictionaries see: the eligible ones (`Span.eligible`) below every site's norm limit.

    Gemma 3 has attention sinks whose norm is many times the median; one of them outweighs a batch.
    """
    mask = eligible.clone()
    for key, limit in limits.items():
        mask &= norms[key] <= limit
    return mask


def measure(eligible: Tensor, captured: dict[Site, Tensor], outlier_norm: float) -> dict[str, SiteScale]:
    """Scales from captured tensors [sequences, T, D]; medians are of all eligible rows (`Span.eligible`)."""
    norms = {site.key: tensor.float().norm(dim=-1) for site, tensor in captured.items()}
    medians = {key: norm[eligible].median().item() for key, norm in norms.items()}
    mask = kept(eligible, norms, {key: outlier_norm * median for key, median in medians.items()})
    return {
        key: SiteScale(medians[key], norm[mask].square().mean().sqrt().item(), int(mask.sum()))
        for key, norm in norms.items()
    }


@ray.remote
def _calibrate(recipe: Recipe, sites: list[Site], tokens_path: Path) -> dict[str, SiteScale]:
    with closing(gang.open_model(recipe, sites)) as model:  # the process of a task outlives it
        sample = Sequences(recipe, tokens_path, model.device).read(0, recipe.harvest.calibration_sequences)
        return measure(sample.eligible, model.capture(sample.ids), recipe.harvest.outlier_norm)


def calibrate(recipe: Recipe, sites: list[Site], tokens_path: Path, path: Path) -> dict[str, SiteScale]:
    """The scales by site key, computed on the cluster once and kept in `path`."""
    if not path.exists():
        harvest = recipe.harvest
        remote = _calibrate.options(
            num_cpus=harvest.cpus * harvest.ranks,
            num_gpus=harvest.gpus * harvest.ranks,
            label_selector=harvest.label_selector,
        )
        scales = ray.get(remote.remote(recipe, sites, tokens_path))
        replace_text(path, json.dumps({key: scale._asdict() for key, scale in scales.items()}, indent=2) + "\n")
    return {key: SiteScale(**value) for key, value in json.loads(path.read_text()).items()}
