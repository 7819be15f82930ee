"""Publishing: trained states → artifact folders, first staged, then sealed by their manifests and moved into place.

A suite is one model, one activation and one set of options, so that its folder (gemma-3-270m-jumprelu-matryoshka)
looks like a Gemma Scope 2 repository.
"""

import json
from pathlib import Path

import torch

from cluster import checkpoint, gang
from cluster.calibrate import SiteScale
from cluster.evaluate import Evaluated
from cluster.layout import Layout
from cluster.recipe import Recipe
from sae import artifact, saelens
from sae.step import TrainingDictionary


def folders(recipe: Recipe, root: Path) -> dict[str, Path]:
    """Where each dictionary's artifact lies below `root`."""
    model = Path(recipe.model.public_name).name
    return {cell.spec.id: root / f"{model}-{cell.suite}" / cell.spec.folder for cell in recipe.cells()}


def stage(recipe: Recipe, layout: Layout, scales: dict[str, SiteScale], trained: Path, root: Path) -> dict[str, Path]:
    """Folds every dictionary of a checkpoint and writes it below `root`, which must not exist yet."""
    places, factors = folders(recipe, root), {key: site.scale for key, site in scales.items()}
    for spec in recipe.specs():
        dictionary = TrainingDictionary(spec, layout.widths, torch.device("cpu"))
        dictionary.load(checkpoint.State(trained, spec.id))
        config = artifact.config(spec, recipe.model.public_name, layout.model_layers)
        artifact.write(places[spec.id], dictionary.folded(factors), config)
        artifact.seal(places[spec.id])
    return places


def publish(recipe: Recipe, staged: Path, published: Path, results: dict[str, Evaluated]) -> None:
    """Adds each dictionary's figures and recipe, seals it anew and makes all of them visible at once."""
    for id, folder in folders(recipe, staged).items():
        metrics = {"id": id} | results[id].scores._asdict() | gang.numerics(recipe)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        artifact.seal(folder)
    if recipe.publication.saelens:
        _write_for_saelens(recipe, staged)
    staged.rename(published)


def _write_for_saelens(recipe: Recipe, root: Path) -> None:
    """SAEs and transcoders in SAELens' own folders, in a suite beside that which holds them."""
    places = folders(recipe, root)
    for cell in recipe.cells():
        if cell.spec.kind in ("sae", "transcoder"):
            folder = places[cell.spec.id]
            suite = folder.parents[len(Path(cell.spec.folder).parts) - 1]
            saelens.write(suite.with_name(f"{suite.name}-saelens") / cell.spec.folder, *artifact.read(folder))
