"""Publishing: trained states → artifact folders, first staged, then sealed by their manifests and moved into place.

A suite is one model and one activation recipe, so that a suite folder looks like one Gemma Scope 2 repository.
"""

import json
from pathlib import Path

import torch

from cluster import checkpoint, gemma
from cluster.calibrate import SiteScale
from cluster.evaluate import Evaluated
from cluster.layout import Layout
from cluster.recipe import Recipe
from sae import artifact
from sae.spec import DictionarySpec
from sae.step import TrainingDictionary


def suite_name(recipe: Recipe, spec: DictionarySpec) -> str:
    """gemma-3-270m-batch_topk: the model's short name and the activation."""
    return f"{Path(gemma.published_name(recipe.model)).name}-{spec.activation}"


def folders(recipe: Recipe, root: Path) -> dict[str, Path]:
    """Where each dictionary's artifact lies below `root`."""
    return {spec.id: root / suite_name(recipe, spec) / artifact.folder_name(spec) for spec in recipe.specs()}


def stage(recipe: Recipe, layout: Layout, scales: dict[str, SiteScale], trained: Path, root: Path) -> dict[str, Path]:
    """Folds every dictionary of a checkpoint and writes it below `root`, which must not exist yet."""
    places = folders(recipe, root)
    for spec in recipe.specs():
        dictionary = TrainingDictionary(spec, layout.widths[spec.reads.key], torch.device("cpu"))
        dictionary.load(checkpoint.load(trained, spec.id))
        folded = dictionary.folded(scales[spec.reads.key].scale)
        artifact.write(places[spec.id], folded, artifact.config(spec, gemma.published_name(recipe.model)))
        artifact.seal(places[spec.id])
    return places


def publish(recipe: Recipe, staged: Path, published: Path, results: dict[str, Evaluated]) -> None:
    """Adds each dictionary's figures and recipe, seals it anew and makes all of them visible at once."""
    for id, folder in folders(recipe, staged).items():
        (folder / "metrics.json").write_text(json.dumps({"id": id} | results[id].scores._asdict(), indent=2) + "\n")
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        artifact.seal(folder)
    staged.rename(published)
