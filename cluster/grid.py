"""One grid of a recipe, and the dictionaries that it expands to."""

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from cluster import suite
from cluster.errors import UserError
from cluster.suite import L0Label, LayersLabel, WidthLabel
from sae.presets import PRESETS
from sae.spec import ActivationName, DictionarySpec, Kind, Options, Start, Strict, Training

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
JOINT = ("crosscoder", "clt")  # kinds of which a grid's layers make one dictionary
WITH_SKIP = ("transcoder", "clt")


def _from_preset(value: Any) -> Any:
    """The mapping that a preset's name, or `base` and what differs from it, stand for."""
    if isinstance(value, str):
        value = {"base": value}
    if not isinstance(value, dict) or "base" not in value:
        return value
    name = value["base"]
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; {nearest(str(name), list(PRESETS))}")
    return _merged(PRESETS[name].model_dump(), {key: part for key, part in value.items() if key != "base"})


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, key by key down to the single values."""
    both = {key: (base.get(key), part) for key, part in changes.items()}
    return base | {
        key: _merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
        for key, (old, new) in both.items()
    }


def nearest(word: str, valid: list[str]) -> str:
    """The remedy for a word that is none of `valid`."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else f"valid are {', '.join(valid)}"


FromPreset = BeforeValidator(_from_preset)


class Grid(Strict):
    """A grid of dictionaries: every combination of its lists."""

    kind: Kind = "sae"
    suite: Name | None = None
    """Last part of the suite folder's name, after model and activation; by default the options that are on."""
    sites: list[Literal["attn_out", "mlp_in", "mlp_out", "resid_post"]] | None = Field(None, min_length=1)
    """Of saes, and the one site of a crosscoder; resid_post if none is named. Transcoders and CLTs have theirs."""
    layers: list[NonNegativeInt] | LayersLabel
    """Numbers, `all`, or `subset`, the four of Gemma Scope 2. Those of a crosscoder or CLT make one dictionary."""
    activations: list[ActivationName] = Field(min_length=1)
    widths: list[PositiveInt | WidthLabel]
    """Latents F, over all layers for crosscoders and CLTs; numbers, or Gemma Scope 2's labels."""
    l0s: list[PositiveInt | L0Label]
    """Numbers, or Gemma Scope 2's labels, whose target rises with depth."""
    seeds: list[NonNegativeInt] = Field([0], min_length=1)
    """Added to the recipe's seed for what a dictionary draws; the rows and their order stay the same."""
    affine: list[bool] = Field([False], min_length=1)
    """Transcoders and CLTs: without and with a skip from input to output."""
    options: Options = Options()
    training: Annotated[Training | None, FromPreset] = None
    """In place of the recipe's."""
    start_from: str | None = None
    """Folder of the published dictionary to start from, `{folder}` and `{layer}` standing for each dictionary's own;
    a crosscoder or CLT with `{layer}` in it starts from one single-layer dictionary a layer."""

    @field_validator("layers", "widths", "l0s", mode="before")
    @classmethod
    def _numbers_or_labels(cls, value: Any, info: ValidationInfo) -> Any:
        """Says in one line what pydantic says once for each type that an entry could have had."""
        if info.field_name == "layers":
            if value in get_args(LayersLabel):
                return value
            labels, least, words = [], 0, f", or {' or '.join(get_args(LayersLabel))}"
        else:
            labels, least = list(get_args(WidthLabel if info.field_name == "widths" else L0Label)), 1
            words = f" and labels ({', '.join(labels)})"
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"give a list of numbers{words}")
        for entry in value:
            if (type(entry) is not int or entry < least) and not (isinstance(entry, str) and entry in labels):
                hint = f" and no label; {nearest(str(entry), labels)}" if labels else f" from {least}"
                raise ValueError(f"{entry!r} is no whole number{hint}")
        return value


class Context(NamedTuple):
    """What a grid's dictionaries depend on besides the grid."""

    model_name: str
    model_layers: int | None
    """None if the model's name does not tell."""
    seed: int
    training: Training
    stream: dict[str, Any]
    """Every field of the recipe that decides which rows come in which order."""


class Cell(NamedTuple):
    """One dictionary and the suite that it is published in."""

    spec: DictionarySpec
    suite: str
    """Name of the suite's folder without the model."""


def expand(grid: Grid, field: str, context: Context) -> Iterator[Cell]:
    """The dictionaries of the grid at `field` of the recipe; UserError if it makes no sense."""
    _check_kind(grid, field)
    layers, all_layers = _layers(grid, field, context), grid.layers == "all"
    if grid.kind in JOINT:
        if len(layers) < 2:
            raise UserError(f"{field}.layers", f"a {grid.kind} spans several layers: list two or more")
        spans = [tuple(sorted(layers))]
    else:
        spans = [(layer,) for layer in layers]
    sites = grid.sites or (["mlp_out"] if grid.kind in WITH_SKIP else ["resid_post"])
    cells = itertools.product(sites, spans, grid.activations, grid.widths, grid.l0s, grid.seeds, grid.affine)
    for site, span, activation, width_name, l0_name, seed, affine in cells:
        width = _width(grid, f"{field}.widths", width_name, len(span))
        l0 = _l0(grid, f"{field}.l0s", l0_name, span, context)
        if l0 >= width:
            raise UserError(field, f"l0 {l0} is not below width {width}: lower l0s or raise widths")
        folder = suite.folder(grid.kind, site, span, width, l0_name, all_layers=all_layers, seed=seed, affine=affine)
        spec = _spec(
            context,
            [*_suite_suffix(grid), *(["affine"] if affine else []), *([f"seed-{seed}"] if seed else [])],
            kind=grid.kind,
            site=site,
            layers=span,
            activation=activation,
            width=width,
            l0=l0,
            seed=context.seed + seed,
            options=grid.options.model_copy(update={"affine": affine}),
            training=grid.training or context.training,
            start=_start(grid, f"{field}.start_from", span, folder),
            folder=folder,
        )
        yield Cell(spec, "-".join([activation, *_suite_suffix(grid)]))


def _spec(context: Context, words: list[str], **fields: Any) -> DictionarySpec:
    """With an id: a readable name, and a hash of what the result depends on and of where it is published (Gemma
    Scope 2's suites of all and of some layers both hold some dictionaries)."""
    unnamed = DictionarySpec(id="", **fields)
    identity = json.dumps([context.stream, unnamed.model_dump(mode="json")], sort_keys=True)
    layers = unnamed.layers
    span = "-".join(map(str, layers)) if len(layers) < 6 else f"{layers[0]}to{layers[-1]}"
    what = unnamed.site if unnamed.kind == "sae" else unnamed.kind
    size = f"{suite.width_label(unnamed.width)}-l0-{unnamed.l0}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return unnamed.model_copy(update={"id": "-".join([what, span, unnamed.activation, size, *words, digest])})


def _start(grid: Grid, field: str, layers: tuple[int, ...], folder: str) -> Start | None:
    if grid.start_from is None:
        return None
    per_layer = "{layer}" in grid.start_from
    try:
        folders = [
            grid.start_from.format(layer=layer, folder=folder) for layer in (layers if per_layer else layers[:1])
        ]
    except (LookupError, ValueError) as error:
        raise UserError(
            field, f"{grid.start_from!r} has braces other than {{layer}} and {{folder}} ({error})"
        ) from error
    if per_layer and grid.kind == "crosscoder" and not grid.options.causal:
        raise UserError(field, "an acausal crosscoder has no latents of single layers: drop {layer}")
    return Start(folders=tuple(folders))


def _suite_suffix(grid: Grid) -> list[str]:
    if grid.suite:
        return [grid.suite]
    on = [name for name in ("matryoshka", "auxk", "preactivation", "resampling") if getattr(grid.options, name)]
    return on + ([] if grid.options.causal else ["acausal"])


def _check_kind(grid: Grid, field: str) -> None:
    """UserError for a key that this kind of dictionary does not have."""
    options = f"{field}.options"
    if grid.kind in WITH_SKIP and grid.sites:
        raise UserError(f"{field}.sites", f"a {grid.kind} reads mlp_in and writes mlp_out: drop sites")
    if grid.kind == "crosscoder" and grid.sites and len(grid.sites) > 1:
        raise UserError(f"{field}.sites", "a crosscoder has one site: make a grid for each")
    if grid.options.affine:
        raise UserError(f"{options}.affine", "the skip is a list of the grid: write affine: [true] beside options")
    if grid.kind not in WITH_SKIP and any(grid.affine):
        raise UserError(f"{field}.affine", f"a {grid.kind} has no skip, transcoders and clts have: drop affine")
    if grid.kind != "crosscoder" and not grid.options.causal:
        raise UserError(f"{options}.causal", f"is of crosscoders, this is a {grid.kind}: drop causal")


def _layers(grid: Grid, field: str, context: Context) -> list[int]:
    if isinstance(grid.layers, str):
        known = _model_layers(f"{field}.layers", grid.layers, context)
        return list(range(known)) if grid.layers == "all" else suite.subset_layers(known)
    repeated = [layer for layer in grid.layers if grid.layers.count(layer) > 1]
    if repeated:
        raise UserError(f"{field}.layers", f"layer {repeated[0]} is listed twice: drop one")
    return grid.layers


def _model_layers(field: str, label: str, context: Context) -> int:
    if context.model_layers is None:
        raise UserError(
            field,
            f"{label} needs the number of the model's layers, which {context.model_name!r} does not tell: give "
            "numbers, or model.published_name if it is one of Google's Gemma 3",
        )
    return context.model_layers


def _width(grid: Grid, field: str, width: int | WidthLabel, n_layers: int) -> int:
    if isinstance(width, str):
        return suite.joint_width(width, n_layers) if grid.kind in JOINT else suite.WIDTHS[width]
    if grid.kind in JOINT and width % n_layers:
        close = n_layers * max(1, round(width / n_layers))
        raise UserError(
            field, f"{width} latents do not divide among {n_layers} layers: the nearest that do are {close}"
        )
    return width


def _l0(grid: Grid, field: str, l0: int | L0Label, layers: tuple[int, ...], context: Context) -> int:
    if not isinstance(l0, str):
        return l0
    if grid.kind in JOINT:
        target, published, what = suite.JOINT_L0S.get(l0), list(suite.JOINT_L0S), f"{grid.kind}s"
    else:
        model_layers, all_layers = _model_layers(field, l0, context), grid.layers == "all"
        target = suite.l0_target(l0, layers[0], model_layers, all_layers=all_layers)
        published, what = list(suite.ALL_LAYERS_RAMPS), f"{grid.kind}s at all layers"
    if target is None:
        raise UserError(field, f"Gemma Scope 2 has no {l0} of {what}: name {' or '.join(published)}, or a number")
    return target
