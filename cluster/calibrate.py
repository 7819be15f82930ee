"""Calibration: each site's scale and median norm, from the first training sequences."""

import json
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray
import torch
from torch import Tensor

from cluster import gang, gemma
from cluster.recipe import Recipe
from cluster.store import replace_text
from sae.sites import Site


class SiteScale(NamedTuple):
    """How large a site's rows are."""

    median_norm: float
    scale: float
    """Root mean square norm of the kept rows: dividing by it gives E‖x‖² = 1 (*published*: Gemma Scope 1, 3.1)."""
    rows: int
    """Kept rows of the sample."""


def kept(tokens: Tensor, norms: dict[str, Tensor], limits: dict[str, float], bos: int) -> Tensor:
    """Mask [sequences, T] of the rows that dictionaries see: not BOS, and below every site's norm limit.

    Gemma 3 has attention sinks whose norm is many times the median; one of them outweighs a batch.
    """
    mask = tokens != bos
    for key, limit in limits.items():
        mask &= norms[key] <= limit
    return mask


def measure(tokens: Tensor, captured: dict[Site, Tensor], outlier_norm: float, bos: int) -> dict[str, SiteScale]:
    """Scales from captured tensors [sequences, T, D]; medians are of all rows but BOS."""
    norms = {site.key: tensor.float().norm(dim=-1) for site, tensor in captured.items()}
    medians = {key: norm[tokens != bos].median().item() for key, norm in norms.items()}
    mask = kept(tokens, norms, {key: outlier_norm * median for key, median in medians.items()}, bos)
    return {
        key: SiteScale(medians[key], norm[mask].square().mean().sqrt().item(), int(mask.sum()))
        for key, norm in norms.items()
    }


@ray.remote
def _calibrate(recipe: Recipe, sites: list[Site], tokens: np.ndarray) -> dict[str, SiteScale]:
    bos = gemma.text_config(recipe.model).bos_token_id
    with closing(gang.open_model(recipe, sites)) as model:  # the process of a task outlives it
        batch = torch.from_numpy(tokens).long().to(model.device)
        return measure(batch, model.capture(batch), recipe.harvest.outlier_norm, bos)


def calibrate(recipe: Recipe, sites: list[Site], tokens: np.ndarray, path: Path) -> dict[str, SiteScale]:
    """The scales by site key, computed on the cluster once and kept in `path`."""
    if not path.exists():
        ranks = recipe.harvest.ranks
        remote = _calibrate.options(num_cpus=recipe.harvest.cpus * ranks, num_gpus=recipe.harvest.gpus * ranks)
        sample = np.ascontiguousarray(tokens[: recipe.harvest.calibration_sequences])
        scales = ray.get(remote.remote(recipe, sites, sample))
        replace_text(path, json.dumps({key: scale._asdict() for key, scale in scales.items()}, indent=2) + "\n")
    return {key: SiteScale(**value) for key, value in json.loads(path.read_text()).items()}
