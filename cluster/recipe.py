"""The recipe: one YAML file, one frozen model, and the grid of dictionaries that it expands to."""

import difflib
import hashlib
import itertools
import json
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError, model_validator

from cluster.errors import UserError
from sae import artifact
from sae.spec import DictionarySpec, Strict, Training

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Model(Strict):
    """The Gemma 3 whose activations are read."""

    name: str
    """A Hugging Face name, a local folder, or `package:` and a name of cluster/packages.py."""
    published_name: str | None = None
    """`model_name` in the published config.json; by default `name`, or what the package says."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class Corpus(Strict):
    """The text."""

    paths: list[str] = Field(min_length=1)
    """Files or globs of one format (.jsonl, .txt, .parquet), local or s3://, or `package:` and a name."""
    text_column: str = "text"
    context: int = Field(1024, ge=2)
    """Tokens of a sequence, its leading BOS included."""
    train_tokens: PositiveInt
    heldout_tokens: PositiveInt


class Harvest(Strict):
    """How the model runs."""

    actors: PositiveInt = 1
    cpus: float = Field(1, gt=0)
    """Cores of one actor."""
    gpus: int = Field(0, ge=0, le=1)
    """GPUs of one actor."""
    sequences: PositiveInt = 8
    """Sequences of one forward pass. It changes bits (matrix products of other shapes round otherwise)."""
    calibration_sequences: PositiveInt = 16
    """The first training sequences, from which each site's scale and median norm are taken."""
    outlier_norm: float = Field(10, gt=1)
    """Rows whose norm exceeds this multiple of the calibration median, at any site, are dropped."""


class Stream(Strict):
    """How rows become batches."""

    window_sequences: PositiveInt = 64
    """Rows are shuffled within windows of this many sequences."""
    batch_rows: PositiveInt = 1024
    """A window is cut into batches of nearly this size, none of its rows left over."""


class Grid(Strict):
    """A grid of dictionaries: every combination of its lists."""

    kind: Literal["sae"] = "sae"
    sites: list[Literal["attn_out", "mlp_in", "mlp_out", "resid_post"]] = Field(["resid_post"], min_length=1)
    layers: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    activations: list[Literal["batch_topk", "jumprelu"]] = Field(min_length=1)
    widths: list[PositiveInt] = Field(min_length=1)
    l0s: list[PositiveInt] = Field(min_length=1)

    @model_validator(mode="after")
    def _sparse(self) -> "Grid":
        if max(self.l0s) >= min(self.widths):
            raise ValueError(f"l0 {max(self.l0s)} is not below width {min(self.widths)}: lower l0s or raise widths")
        return self


class Fit(Strict):
    """The Ray Train job."""

    workers: PositiveInt = 2
    cpus_per_worker: float = Field(1, gt=0)
    gpu: bool = False
    """One GPU a worker, rows exchanged by nccl; else CPU and gloo."""
    report_every_steps: PositiveInt = 4
    checkpoint_every_steps: PositiveInt = 50
    max_failures: int = Field(5, ge=0)
    """How often the worker group is restarted from its last checkpoint before the sweep fails."""


class Evaluation(Strict):
    """What is measured on the held-out text."""

    loss_tokens: PositiveInt = 8192
    """Tokens on which reconstructions are spliced into the model; FVU, L0 and dead latents use all held-out ones."""


class Recipe(Strict):
    """A whole sweep."""

    name: Name
    output: str
    """Run folder, seen by every node. A relative one is below SCOPEWORKS_HOME or the current folder."""
    seed: int = Field(0, ge=0)
    model: Model
    corpus: Corpus
    harvest: Harvest = Harvest()
    stream: Stream = Stream()
    sweep: list[Grid] = Field(min_length=1)
    training: Training = Training()
    fit: Fit = Fit()
    evaluation: Evaluation = Evaluation()

    def specs(self) -> list[DictionarySpec]:
        """The dictionaries of the sweep, by site and layer; UserError if two would publish to one folder."""
        specs = [
            self._spec(site=site, layer=layer, kind=grid.kind, activation=activation, width=width, l0=l0)
            for grid in self.sweep
            for site, layer, activation, width, l0 in itertools.product(
                grid.sites, grid.layers, grid.activations, grid.widths, grid.l0s
            )
        ]
        seen: dict[str, str] = {}
        for spec in specs:
            place = f"{spec.activation}/{artifact.folder_name(spec)}"
            if place in seen:
                raise UserError("sweep", f"{seen[place]} and {spec.id} would both publish to {place}: drop one of them")
            seen[place] = spec.id
        return sorted(specs, key=lambda spec: spec.reads.depth)

    def _spec(self, **cell: typing.Any) -> DictionarySpec:
        shared = self.model_dump(include={"seed", "model", "corpus", "stream", "training"})
        harvest = self.harvest.model_dump(include={"sequences", "calibration_sequences", "outlier_norm"})
        identity = json.dumps([shared, harvest, cell], sort_keys=True).encode()
        name = "{site}-{layer}-{activation}-{width}-l0-{l0}".format(
            **cell | {"width": artifact.width_label(cell["width"])}
        )
        id = f"{name}-{hashlib.sha256(identity).hexdigest()[:8]}"
        return DictionarySpec(id=id, seed=self.seed, training=self.training, **cell)

    @property
    def train_sequences(self) -> int:
        return self.corpus.train_tokens // self.corpus.context

    @property
    def heldout_sequences(self) -> int:
        return self.corpus.heldout_tokens // self.corpus.context

    def folder(self) -> Path:
        """The run folder, absolute. A submitted job's own folder is temporary, so there the default is the home."""
        submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        base = os.environ.get("SCOPEWORKS_HOME") or (Path.home() / "scopeworks" if submitted else Path.cwd())
        return Path(base, self.output).absolute()

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(path: str) -> Recipe:
    """The recipe in a YAML file; UserError names the first wrong key or value and what would be right."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "recipe", f"cannot read {path} ({error}): name a YAML file such as jobs/recipes/demo.yaml"
        ) from error
    except yaml.YAMLError as error:
        raise UserError("recipe", f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError("recipe", f"{path} is not a mapping of keys: start from jobs/recipes/demo.yaml")
    return parse(content)


def parse(content: dict[str, typing.Any]) -> Recipe:
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(error) from error
    if recipe.train_sequences == 0 or recipe.heldout_sequences == 0:
        raise UserError(
            "corpus.context",
            f"{recipe.corpus.context} tokens do not fit into train_tokens and heldout_tokens: lower it",
        )
    if recipe.stream.window_sequences % recipe.harvest.sequences:
        raise UserError(
            "stream.window_sequences",
            f"{recipe.stream.window_sequences} is no multiple of harvest.sequences "
            f"({recipe.harvest.sequences}): a window holds whole forward passes",
        )
    recipe.specs()
    return recipe


def _explain(error: ValidationError) -> UserError:
    """The first fault, an unknown key before all else: it is often the cause of the others."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault, location = faults[0], faults[0]["loc"]
    field = ".".join(str(part) for part in location) or "recipe"
    if fault["type"] == "extra_forbidden":
        valid = _keys_at(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.4)
        remedy = f"did you mean {nearest[0]}?" if nearest else f"valid keys are {', '.join(valid)}"
        return UserError(field, f"unknown key; {remedy}")
    if fault["type"] == "missing":
        return UserError(field, "is missing: give it a value")
    return UserError(field, f"{fault['msg'].removeprefix('Value error, ')} (it is {fault['input']!r:.80})")


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that lies at a place of the recipe."""
    model: typing.Any = Recipe
    for part in location:
        model = model.model_fields[part].annotation if isinstance(part, str) else typing.get_args(model)[0]
        if isinstance(model, types.UnionType):
            model = typing.get_args(model)[0]
    return list(model.model_fields)
