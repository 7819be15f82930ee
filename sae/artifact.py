"""Published dictionaries: Gemma Scope 2's files, names, shapes, dtypes and config keys.

{site}/layer_{l}_width_{w}_l0_{s}/ holds config.json and params.safetensors as Google's repositories do; the other
files beside them (metrics.json, recipe.yaml) are ours, and manifest.json, written last, lists them all.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae.dictionary import Dictionary
from sae.spec import DictionarySpec

TENSORS = ("w_enc", "b_enc", "threshold", "w_dec", "b_dec")  # in the order of Dictionary's fields
MANIFEST = "manifest.json"


class ArtifactError(Exception):
    """A folder that is not a whole, verified artifact."""


def width_label(width: int) -> str:
    """16384 → 16k, 65536 → 65k, 1048576 → 1m: Gemma Scope 2's folder names; below a thousand, the number."""
    if width >= 1_000_000:
        return f"{width // 1_000_000}m"
    return f"{width // 1000}k" if width >= 1000 else str(width)


def folder_name(spec: DictionarySpec) -> str:
    """Path of the dictionary within its suite."""
    return f"{spec.site}/layer_{spec.layer}_width_{width_label(spec.width)}_l0_{spec.l0}"


def config(spec: DictionarySpec, model_name: str) -> dict[str, str | int | bool]:
    """The complete config.json of Gemma Scope 2."""
    return {
        "hf_hook_point_in": spec.reads.hook_point,
        "hf_hook_point_out": spec.reads.hook_point,
        "width": spec.width,
        "model_name": model_name,
        "architecture": "jump_relu",
        "l0": spec.l0,
        "affine_connection": False,
        "type": spec.kind,
    }


def write(folder: Path, dictionary: Dictionary, config: dict[str, str | int | bool]) -> None:
    """Writes config.json and params.safetensors; `seal` makes the folder an artifact."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.float().contiguous().cpu() for name, tensor in zip(TENSORS, dictionary, strict=True)}
    save_file(tensors, folder / "params.safetensors")
    os.chmod(folder / "params.safetensors", 0o644)  # safetensors writes 0600, unreadable for another user


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Writes the manifest of every file in the folder; without it nothing reads the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    staged = folder / f"{MANIFEST}.staged"
    staged.write_text(json.dumps({"files": files}, indent=2) + "\n")
    staged.rename(folder / MANIFEST)


def verify(folder: Path) -> None:
    """Raises ArtifactError unless the manifest is there and every file is what it says."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}: no readable {MANIFEST} ({error})") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            raise ArtifactError(f"{path}: not the file that {MANIFEST} lists")


def read(folder: Path) -> tuple[Dictionary, dict[str, str | int | bool]]:
    """The dictionary and config of a verified artifact; ArtifactError for anything else."""
    verify(folder)
    try:
        tensors = load_file(folder / "params.safetensors")
        dictionary = Dictionary(*(tensors[name] for name in TENSORS))
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: {error}") from error
    width, d = settings["width"], len(dictionary.b_dec_D)
    shapes = [(d, width), (width,), (width,), (width, d), (d,)]
    for name, tensor, shape in zip(TENSORS, dictionary, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ArtifactError(f"{folder}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected float32 {shape}")
    return dictionary, settings
