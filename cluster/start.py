"""Published dictionaries that others start from: read, checked before anything is started, and taken over."""

from pathlib import Path

from cluster.calibrate import SiteScale
from cluster.errors import UserError
from cluster.layout import Layout
from cluster.recipe import Recipe, below_home
from sae import artifact
from sae.fold import Scales, Trained
from sae.shape import Shape
from sae.spec import DictionarySpec, Start
from sae.start import StartError, finetune, join
from sae.step import TrainingDictionary


def check(recipe: Recipe, layout: Layout) -> None:
    """UserError if a dictionary cannot start from what its recipe names."""
    for spec in recipe.specs():
        if spec.start is not None:
            ones = Scales([1.0] * len(spec.reads), [1.0] * len(spec.writes))
            try:
                _weights(spec, spec.start, Shape.of(spec, layout.widths), ones)
            except (artifact.ArtifactError, StartError) as error:
                raise UserError(
                    "sweep.start_from", f"{spec.id} cannot start from {spec.start.folders}: {error}"
                ) from error


def take_over(dictionary: TrainingDictionary, scales: dict[str, SiteScale]) -> None:
    """Starts a dictionary from the published one that its spec names, if it names one."""
    spec = dictionary.spec
    if spec.start is not None:
        reads, writes = ([scales[site.key].scale for site in sites] for sites in (spec.reads, spec.writes))
        dictionary.take_over(_weights(spec, spec.start, dictionary.shape, Scales(reads, writes)))


def _weights(spec: DictionarySpec, start: Start, shape: Shape, scales: Scales) -> Trained:
    found = [artifact.read_gemma_scope_2(_folder(name))[0] for name in start.folders]
    if len(start.folders) == 1:
        return finetune(found[0], shape, scales, spec.autoencodes)
    return join(found, shape, scales, spec.autoencodes)


def _folder(name: str) -> Path:
    folder = below_home(name)
    if not folder.is_dir():
        raise artifact.ArtifactError(f"{folder} is no folder")
    return folder
