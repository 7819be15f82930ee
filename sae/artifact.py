"""Published dictionaries: Gemma Scope 2's files, names, shapes, dtypes and config keys, read and written for all kinds.

    SAE, transcoder          config.json, params.safetensors
    crosscoder, CLT          config.json, params_layer_{0..L-1}.safetensors, for the layers that they span
    crosscoder, not causal   config.json, params.safetensors over all its sites concatenated: ours, Google has none

A TopK dictionary, which Google has not, says architecture "topk" and its k, and has no `threshold`: a reader that
knows JumpReLU alone then fails, and does not load something else. A CLT over some layers names them in its hook
strings as a crosscoder does, Google's own being over {all}. The other files beside them (metrics.json, recipe.yaml)
are ours, and manifest.json, written last, lists them all.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, TypeAdapter, model_validator
from safetensors.torch import save_file
from torch import Tensor

from sae import strict
from sae.dictionary import Dictionary
from sae.shape import Shape
from sae.sites import HOOK_POINTS, Site, named
from sae.spec import DictionarySpec, Kind
from sae.strict import ArtifactError

CONFIG = "config.json"
PARAMS = "params.safetensors"
MANIFEST = "manifest.json"
MULTI_LAYER = ("crosscoder", "clt")

Config = dict[str, str | int | bool]


class Settings(BaseModel):
    """What reading needs of a config.json."""

    model_config = ConfigDict(strict=True)

    hf_hook_point_in: str
    width: PositiveInt
    architecture: Literal["jump_relu", "topk"]
    k: PositiveInt | None = None
    affine_connection: bool
    type: Kind

    @model_validator(mode="after")
    def _k_of_topk(self) -> "Settings":
        if (self.architecture == "topk") != (self.k is not None):
            raise ValueError(f"architecture {self.architecture} with k {self.k}: topk, and only topk, has a k")
        return self


class Listed(BaseModel):
    """A file in a manifest."""

    bytes: int
    sha256: str


class Widths(NamedTuple):
    """Sizes of one params file."""

    d_in: int
    latents: int
    d_out: int


def config(spec: DictionarySpec, model_name: str, n_layers: int) -> Config:
    """The complete config.json of Gemma Scope 2; `n_layers` are the model's."""
    topk = spec.activation == "topk"
    settings: Config = {
        "hf_hook_point_in": _hook_point(spec, spec.reads, n_layers),
        "hf_hook_point_out": _hook_point(spec, spec.writes, n_layers),
        "width": spec.width,
        "model_name": model_name,
        "architecture": "topk" if topk else "jump_relu",
        "l0": spec.l0,
        "affine_connection": spec.options.affine,
        "type": spec.kind,
    }
    return settings | ({"k": spec.l0} if topk else {})


def write(folder: Path, dictionary: Dictionary, config: Config) -> None:
    """Writes config.json and the params files; `seal` makes the folder an artifact."""
    shape = dictionary.shape
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if config["type"] in MULTI_LAYER and len(shape.groups) == len(shape.read_widths):
        for layer in range(len(shape.groups)):
            save(folder / _params_layer(layer), _layer_tensors(dictionary, layer))
    else:
        save(folder / PARAMS, _single_tensors(dictionary))


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file of float32 tensors."""
    save_file({name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}, path)
    os.chmod(path, 0o644)  # safetensors writes 0600, unreadable for another user


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def manifest(files: dict[str, dict[str, Any]]) -> str:
    """The manifest of files that are `listed` by their names."""
    return json.dumps({"files": dict(sorted(files.items()))}, indent=2) + "\n"


def seal(folder: Path) -> None:
    """Writes the manifest of every file in the folder; without it nothing reads the folder."""
    files = {path.name: listed(path) for path in folder.iterdir() if path.name != MANIFEST}
    staged = folder / f"{MANIFEST}.staged"
    staged.write_text(manifest(files))
    staged.rename(folder / MANIFEST)


def verify(folder: Path) -> None:
    """Raises ArtifactError unless the manifest is there and every file is what it says."""
    for name, entry in listing(folder).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.bytes or sha256(path) != entry.sha256:
            raise ArtifactError(f"{path}: not the file that {MANIFEST} lists")


def read(folder: Path) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary and config of a verified artifact; ArtifactError for anything else."""
    verify(folder)
    unlisted = {CONFIG, *(path.name for path in folder.glob("params*"))} - listing(folder).keys()
    if unlisted:
        raise ArtifactError(f"{folder}: {MANIFEST} does not list {sorted(unlisted)}")
    return read_gemma_scope_2(folder)


def read_gemma_scope_2(folder: Path) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary and config of a folder in Gemma Scope 2's layout, Google's own too; nothing in it is trusted."""
    content, settings = _settings(folder)
    return (_read_single if _is_single(folder, settings) else _read_layers)(folder, settings), content


class Facts(NamedTuple):
    """What an artifact is, without its weights."""

    config: dict[str, Any]
    shape: Shape
    reads: list[Site]
    """By layer, as wide as `shape.read_widths`."""
    writes: list[Site]
    bytes: int
    """Of its weights."""


def facts(folder: Path) -> Facts:
    """Of a verified artifact, from its config and headers alone; ArtifactError as `read` has it."""
    verify(folder)
    content, settings = _settings(folder)
    n_sites, single = _n_sites(folder, settings), _is_single(folder, settings)
    paths = [folder / PARAMS] if single else [folder / _params_layer(n) for n in range(n_sites)]
    widths = _widths(paths[0], settings.width // len(paths))
    for path in paths:
        strict.check(path, _shapes(widths, settings, () if single else (n_sites,)))
    share = n_sites if single else 1
    read_widths, write_widths = ([width // share] * n_sites for width in (widths.d_in, widths.d_out))
    shape = Shape.layered(settings.width, read_widths, write_widths, len(paths))
    try:
        reads, writes = (named(str(content.get(f"hf_hook_point_{way}")), n_sites) for way in ("in", "out"))
    except ValueError as error:
        raise ArtifactError(f"{folder / CONFIG}: {error}") from error
    return Facts(content, shape, reads, writes, sum(strict.size(path) for path in paths))


def _settings(folder: Path) -> tuple[dict[str, Any], Settings]:
    if not (folder / CONFIG).exists():
        raise ArtifactError(f"{folder}: no {CONFIG}, as in some of Google's folders: write one (sae.artifact.config)")
    content = strict.read_json(folder / CONFIG)
    try:
        return content, Settings.model_validate(content)
    except ValueError as error:
        raise ArtifactError(f"{folder / CONFIG}: {error}") from error


def _is_single(folder: Path, settings: Settings) -> bool:
    """Whether its weights are in one file."""
    return settings.type not in MULTI_LAYER or (settings.type == "crosscoder" and (folder / PARAMS).exists())


def _hook_point(spec: DictionarySpec, sites: list[Site], n_layers: int) -> str:
    """A site's hook string, or with braces that of all the layers spanned."""
    if spec.kind not in MULTI_LAYER:
        return sites[0].hook_point
    whole = spec.kind == "clt" and len(sites) == n_layers
    layers = "all" if whole else ",".join(str(site.layer) for site in sites)
    return HOOK_POINTS[sites[0].name].format(layer=f"{{{layers}}}")


def _params_layer(layer: int) -> str:
    return f"params_layer_{layer}.safetensors"


def _single_tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    tensors = {
        "w_enc": dictionary.w_enc[0],
        "b_enc": dictionary.b_enc_F,
        **({"threshold": dictionary.threshold_F} if dictionary.k is None else {}),
        "w_dec": dictionary.w_dec[0],
        "b_dec": dictionary.b_dec_D,
    }
    return tensors | ({"affine_skip_connection": dictionary.w_skip[0]} if dictionary.w_skip else {})


def _layer_tensors(dictionary: Dictionary, n: int) -> dict[str, Tensor]:
    """Of the n-th layer; w_dec is dense [F of the layer, layers, D], 0 for the layers before the latents' own."""
    shape, group = dictionary.shape, dictionary.shape.groups[n]
    own_FLD = dictionary.w_dec[n].unflatten(1, (-1, shape.write_widths[n]))
    tensors = {
        "w_enc": dictionary.w_enc[n],
        "b_enc": dictionary.b_enc_F[group.latents],
        **({"threshold": dictionary.threshold_F[group.latents]} if dictionary.k is None else {}),
        "w_dec": torch.cat([own_FLD.new_zeros(group.width, n, own_FLD.shape[2]), own_FLD], dim=1),
        "b_dec": dictionary.b_dec_D[shape.write_columns[n]],
    }
    return tensors | ({"affine_skip_connection": dictionary.w_skip[n]} if dictionary.w_skip else {})


def _read_single(folder: Path, settings: Settings) -> Dictionary:
    path = folder / PARAMS
    n_sites = _n_sites(folder, settings) if settings.type == "crosscoder" else 1
    widths = _widths(path, settings.width)
    if widths.d_in % n_sites or (settings.type != "transcoder" and widths.d_in != widths.d_out):
        raise ArtifactError(f"{path}: reads {widths.d_in} and writes {widths.d_out} columns, of {n_sites} layers")
    part = strict.load(path, _shapes(widths, settings))
    reads, writes = ([width // n_sites] * n_sites for width in (widths.d_in, widths.d_out))
    shape = Shape.layered(settings.width, reads, writes, 1)
    skips = [part["affine_skip_connection"]] if settings.affine_connection else []
    b_enc_F, threshold_F = part["b_enc"], part.get("threshold", torch.zeros_like(part["b_enc"]))
    return Dictionary(shape, [part["w_enc"]], b_enc_F, threshold_F, [part["w_dec"]], part["b_dec"], skips, settings.k)


def _read_layers(folder: Path, settings: Settings) -> Dictionary:
    """One file a layer, whose decoders are cut to the layers that they may write."""
    n_layers, affine = _n_sites(folder, settings), settings.affine_connection
    paths = [folder / _params_layer(n) for n in range(n_layers)]
    if set(folder.glob("params_layer_*")) != set(paths) or settings.width % n_layers:
        raise ArtifactError(f"{folder}: its files and its width {settings.width} are not those of {n_layers} layers")
    widths = _widths(paths[0], settings.width // n_layers)
    shapes = _shapes(widths, settings, (n_layers,))
    for path in paths:  # all, before memory is taken for the first
        strict.check(path, shapes)
    parts, w_dec = [], []
    for n, path in enumerate(paths):
        part = strict.load(path, shapes)
        w_dec.append(_causal(path, part.pop("w_dec"), n))
        parts.append(part)
    b_enc_F, b_dec_D = (torch.cat([part[name] for part in parts]) for name in ("b_enc", "b_dec"))
    threshold_F = torch.cat([part.get("threshold", torch.zeros_like(part["b_enc"])) for part in parts])
    shape = Shape.layered(settings.width, [widths.d_in] * n_layers, [widths.d_out] * n_layers, n_layers)
    skips = [part["affine_skip_connection"] for part in parts] if affine else []
    w_enc = [part["w_enc"] for part in parts]
    return Dictionary(shape, w_enc, b_enc_F, threshold_F, w_dec, b_dec_D, skips, settings.k)


def _causal(path: Path, w_dec_FLD: Tensor, layer: int) -> Tensor:
    """The decoder from the latents' own layer on. [F, (L − layer)·D]

    Google saves decoders dense, and readers drop the earlier layers; that those are 0 is checked here and not believed.
    """
    if w_dec_FLD[:, :layer].count_nonzero():
        raise ArtifactError(f"{path}: w_dec writes layers before the one that it reads: not weakly causal")
    return w_dec_FLD[:, layer:].flatten(1).contiguous()


def _shapes(widths: Widths, settings: Settings, written: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Of a params file; `written` is (L,) where w_dec has an axis of layers."""
    d_in, latents, d_out = widths
    shapes: dict[str, tuple[int, ...]] = {
        "w_enc": (d_in, latents),
        "b_enc": (latents,),
        **({"threshold": (latents,)} if settings.k is None else {}),
        "w_dec": (latents, *written, d_out),
        "b_dec": (d_out,),
    }
    return shapes | ({"affine_skip_connection": (d_in, d_out)} if settings.affine_connection else {})


def _widths(path: Path, latents: int) -> Widths:
    """D read and written as the header has them: the config does not say, so they need only agree with one another."""
    entries = strict.header(path)
    try:
        return Widths(entries["w_enc"].shape[0], latents, entries["b_dec"].shape[0])
    except LookupError as error:
        raise ArtifactError(f"{path}: w_enc or b_dec is missing or has no shape") from error


def _n_sites(folder: Path, settings: Settings) -> int:
    """How many layers a hook string names; of {all}, there are as many as files."""
    braces = re.search(r"\{(.+)\}", settings.hf_hook_point_in)
    if braces is None:
        return 1
    return max(1, len([*folder.glob("params_layer_*")])) if braces[1] == "all" else len(braces[1].split(","))


def listing(folder: Path) -> dict[str, Listed]:
    """What the manifest lists, by file name; ArtifactError if it is not there or names anything outside the folder."""
    try:
        files = TypeAdapter(dict[str, Listed]).validate_python(strict.read_json(folder / MANIFEST)["files"])
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{folder}: no sound {MANIFEST} ({error})") from error
    for name in files:
        if not re.fullmatch(r"\w[\w.=+-]*", name):
            raise ArtifactError(f"{folder}: {MANIFEST} names {name!r}, which is no file of its folder")
    return files
