"""The recipe: one YAML file, one frozen model, and the grid of dictionaries that it expands to."""

import math
import os
import typing
from pathlib import Path
from typing import Annotated, Literal

import torch
import yaml
from pydantic import Field, PositiveInt, model_validator

from cluster import suite
from cluster.errors import UserError
from cluster.grid import Cell, Context, FromPreset, Grid, Name, expand
from cluster.packages import PREFIX, PUBLISHED_NAMES
from sae.spec import DictionarySpec, Strict, Training

LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"  # Kubernetes' syntax of a label's value, and of the name in its key
LabelKey = Annotated[str, Field(pattern=rf"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?{LABEL}$")]
LabelSelector = dict[LabelKey, Annotated[str, Field(pattern=rf"^{LABEL}$")]]
"""Labels that a Ray node must have, such as {ray-subcluster: harvest}; without any, every node will do."""
S3 = "s3://"
WINDOW_ROWS = 2**17  # of a window by default, at most: 0.7 GB a site of Gemma 3 4B


def fast_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 if this machine's CPU is fast at it: others take a hundred times as long for a product as in float32
    (*measured here*, AVX2)."""
    return "bfloat16" if torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE")) else "float32"


class Model(Strict):
    """The Gemma 3 whose activations are read."""

    name: str
    """A Hugging Face name, a local folder, or `package:` and a name of cluster/packages.py."""
    published_name: str | None = None
    """`model_name` in the published config.json; by default `name`, or what the package says."""
    dtype: Literal["bfloat16", "float32"] = Field(default_factory=fast_dtype)
    """By default bfloat16 where harvest.gpus is set, else what this machine's CPU is fast at."""

    @property
    def public_name(self) -> str:
        """`model_name` of the published config.json."""
        known = self.published_name or PUBLISHED_NAMES.get(self.name.removeprefix(PREFIX))
        return known or (Path(self.name).name if Path(self.name).is_dir() else self.name)


class Rollouts(Strict):
    """How the model answers a chat corpus' prompts. The defaults of sampling are Gemma 3's own (*published*)."""

    max_new_tokens: PositiveInt
    """Of an answer; prompts that leave less than this of `context` are passed over."""
    temperature: float = Field(1.0, ge=0)
    """0 takes the likeliest token each time."""
    top_k: int = Field(64, ge=0)
    """Tokens to sample from; 0 is all."""
    top_p: float = Field(0.95, gt=0, le=1)


class Corpus(Strict):
    """The text."""

    kind: Literal["text", "chat"] = "text"
    """Documents, or conversations rendered with the model's chat template (cluster/chat.py)."""
    paths: list[str] = Field(min_length=1)
    """Files or globs of one format (.jsonl, .txt, .parquet; a chat is not .txt), local or s3://, or `package:` and a
    name."""
    text_column: str = "text"
    messages_column: str = "messages"
    """Of a chat: a list of {role, content} with roles system, user and assistant; or a string, one user's turn."""
    context: int = Field(1024, ge=2)
    """Tokens of a sequence, its leading BOS and a chat's padding included."""
    train_tokens: PositiveInt
    heldout_tokens: PositiveInt
    roles: list[Literal["user", "assistant"]] = Field(["user", "assistant"], min_length=1)
    """Of a chat: the roles on whose tokens dictionaries are trained and evaluated; the template puts a system text into
    the user's turn."""
    rollouts: Rollouts | None = None
    """Of a chat: the model's own answer follows the last user's turn, in place of one that is there."""


class Harvest(Strict):
    """How the model runs."""

    actors: PositiveInt = 1
    cpus: float = Field(1, gt=0)
    """Cores of one actor, or of each of its ranks."""
    gpus: int = Field(0, ge=0, le=1)
    """GPUs of one actor, or of each of its ranks."""
    label_selector: LabelSelector = Field({})
    """Of the nodes that run the model: all but the fit's ranks."""
    tensor_parallel: PositiveInt = 1
    """Ranks of one actor that share every layer of the model, for one that is larger than a device. Changes bits."""
    zero3: int = Field(0, ge=0)
    """Ranks of one actor that keep the model in host memory between them, for one that is larger than its devices: each
    layer is gathered when it is needed. Slower, and bit for bit what one rank computes. 0: the model stays whole."""
    block_seconds: float = Field(600, gt=0)
    """Ranks that take longer for a forward pass are killed, and new ones try it again."""
    sequences: PositiveInt = 8
    """Sequences of one forward pass. It changes bits (matrix products of other shapes round otherwise)."""
    calibration_sequences: PositiveInt = 16
    """The first training sequences, from which each site's scale and median norm are taken."""
    outlier_norm: float = Field(10, gt=1)
    """Rows whose norm exceeds this multiple of the calibration median, at any site, are dropped."""
    cache: str | None = None
    """A folder that all nodes see, or s3://bucket/prefix: rows are kept there, and read by later epochs and sweeps of
    the same model, text and `sequences` at these or fewer sites, in place of running the model. About 2·D bytes a row
    and site."""

    @property
    def ranks(self) -> int:
        """Processes that run one actor's model."""
        return max(self.tensor_parallel, self.zero3)

    @property
    def sharded(self) -> bool:
        return self.tensor_parallel > 1 or self.zero3 > 0

    @property
    def gpus_for_whole(self) -> int:
        """GPUs of a process that runs the model whole, to evaluate or finetune: one that is sharded fits into none."""
        return 0 if self.sharded else self.gpus


class Stream(Strict):
    """How rows become batches."""

    window_sequences: PositiveInt | None = None
    """Rows are shuffled within windows of this many sequences. A batch has as many times more pairs of rows of one
    sequence than in a shuffle of the whole text as the text has windows (*measured here*), and a worker's memory for
    rows grows with a window. By default half of the text, which is twice a full shuffle's, but at most WINDOW_ROWS."""
    epochs: PositiveInt = 1
    """Passes over the text; each shuffles the windows' rows anew, and a row comes once in each."""
    batch_rows: PositiveInt = 1024
    """A window is cut into batches of nearly this size, none of its rows left over."""


class Fit(Strict):
    """The Ray Train job."""

    workers: PositiveInt = 2
    cpus_per_worker: float = Field(1, gt=0)
    gpu: bool = False
    """One GPU a worker, rows exchanged by nccl; else CPU and gloo."""
    products: Literal["bfloat16", "float32"] = Field(default_factory=fast_dtype)
    """What dictionaries that no other rank shares are multiplied in (`sae.fused`); sums, weights and moments are
    float32. By default what this machine's CPU is fast at; on GPUs it is bfloat16."""
    shards: PositiveInt | None = None
    """Workers over which each dictionary's latents are cut; by default as few as the others allow."""
    replicas: PositiveInt | None = None
    """Workers over which the rows of each dictionary's batches are cut; by default as few as the others allow."""
    memory_gib: float | None = Field(None, gt=0)
    """Of a worker (its device's, with gpu): dictionaries are cut until each worker's plan fits. By default no limit."""
    label_selector: LabelSelector = Field({})
    """Of the nodes that run the ranks."""
    report_every_steps: PositiveInt = 4
    checkpoint_every_steps: PositiveInt = 50
    """One that falls due while the one before is still being written is left out."""
    keep_checkpoints: PositiveInt = 2
    """The newest, so that there is one to go back to if a file of the last is damaged."""
    max_failures: int = Field(5, ge=0)
    """How often the worker group is restarted from its last checkpoint before the sweep fails."""

    @model_validator(mode="before")
    @classmethod
    def _gpus_multiply_in_bfloat16(cls, content: typing.Any) -> typing.Any:
        return {"products": "bfloat16"} | content if isinstance(content, dict) and content.get("gpu") else content

    @model_validator(mode="after")
    def _no_other_products_on_gpus(self) -> "Fit":
        if self.gpu and self.products != "bfloat16":
            raise ValueError(f"products is {self.products}: on GPUs it is bfloat16, drop products")
        return self


class Evaluation(Strict):
    """What is measured on the held-out text."""

    loss_tokens: PositiveInt = 8192
    """Tokens on which reconstructions are spliced into the model; FVU, L0 and dead latents use all held-out ones."""


class EndToEnd(Strict):
    """Finetuning with the model in the loop, after the fit: L = (MSE + αβ·KL)/(1 + β), Gemma Scope 2's."""

    tokens: PositiveInt
    """Of the training text, from its start."""
    beta: float = Field(1.0, gt=0)
    """Weight of the KL term against the squared error (*assumed*: not public)."""
    learning_rate: float = Field(1e-4, gt=0)
    """(*assumed*: not public.)"""
    sequences: PositiveInt = 2
    """A step."""


class Publication(Strict):
    """What is written beside Gemma Scope 2's folders."""

    saelens: bool = False
    """SAEs and transcoders in SAELens' own format too, in a suite folder of their own."""


class Recipe(Strict):
    """A whole sweep."""

    name: Name
    output: str
    """Run folder, seen by every node. A relative one is below SCOPEWORKS_HOME or the current folder."""
    storage: str | None = None
    """s3://bucket/prefix, in which all that must outlive this machine is kept; else the run folder is all there is."""
    seed: int = Field(0, ge=0)
    model: Model
    corpus: Corpus
    harvest: Harvest = Harvest()
    stream: Stream = Stream()
    sweep: list[Grid] = Field(min_length=1)
    training: Annotated[Training, FromPreset] = Training()
    """Fields of `Training`, the name of a preset of sae/presets.py, or `base: NAME` and the fields that differ."""
    fit: Fit = Fit()
    end_to_end: EndToEnd | None = None
    evaluation: Evaluation = Evaluation()
    publication: Publication = Publication()

    @model_validator(mode="before")
    @classmethod
    def _gpus_are_fast_at_bfloat16(cls, content: typing.Any) -> typing.Any:
        match content:
            case {"model": dict() as model, "harvest": {"gpus": int(gpus)}} if gpus > 0:
                return content | {"model": {"dtype": "bfloat16"} | model}
        return content

    def cells(self) -> list[Cell]:
        """The dictionaries of the sweep, by the depth of their first sites; UserError if two have one folder."""
        shared = self.model_dump(include={"seed", "model", "corpus", "stream"})
        changing_bits = {"sequences", "calibration_sequences", "outlier_norm", "tensor_parallel"}
        harvest = self.harvest.model_dump(include=changing_bits)
        layers = suite.model_layers(self.model.public_name)
        fit = self.fit.model_dump(include={"products"})
        context = Context(self.model.name, layers, self.seed, self.training, shared | {"harvest": harvest, "fit": fit})
        cells = [cell for n, grid in enumerate(self.sweep) for cell in expand(grid, f"sweep.{n}", context)]
        seen: dict[str, str] = {}
        for cell in cells:
            place = f"{cell.suite}/{cell.spec.folder}"
            if place in seen:
                raise UserError(
                    "sweep",
                    f"{seen[place]} and {cell.spec.id} would both publish to {place}: drop one of them, or give the "
                    "grid of one a suite",
                )
            seen[place] = cell.spec.id
        return sorted(cells, key=lambda cell: cell.spec.sites[0].depth)

    def specs(self) -> list[DictionarySpec]:
        return [cell.spec for cell in self.cells()]

    @property
    def train_sequences(self) -> int:
        return self.corpus.train_tokens // self.corpus.context

    @property
    def window_sequences(self) -> int:
        if self.stream.window_sequences is not None:
            return self.stream.window_sequences
        most = min(math.ceil(self.train_sequences / 2), WINDOW_ROWS // self.corpus.context)
        return max(1, math.ceil(most / self.harvest.sequences)) * self.harvest.sequences

    @property
    def heldout_sequences(self) -> int:
        return self.corpus.heldout_tokens // self.corpus.context

    @property
    def evaluators(self) -> int:
        """Actors of the evaluation, by which time the fit's cores are free."""
        return max(self.harvest.actors, 1 if self.harvest.gpus_for_whole else self.fit.workers)

    def folder(self) -> Path:
        """The run folder, absolute."""
        return below_home(self.output)

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def below_home(path: str) -> Path:
    """An absolute path; a relative one lies below SCOPEWORKS_HOME, or the current folder. A submitted job's own folder
    is temporary, so there the default is the home."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    base = os.environ.get("SCOPEWORKS_HOME") or (Path.home() / "scopeworks" if submitted else Path.cwd())
    return Path(base, path).absolute()
