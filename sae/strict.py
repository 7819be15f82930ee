"""Files of unknown origin: compared with what is expected before memory is taken for them, and refused if they differ.

Only safetensors and JSON are read here, neither of which can carry code; pickles are never opened.
"""

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

JSON_LIMIT = 1 << 24  # bytes; a config or header has about a thousand, a manifest 150 a file
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

Shapes = Mapping[str, tuple[int, ...]]


class ArtifactError(Exception):
    """A file or folder that is not a whole, sound dictionary."""


class Entry(BaseModel):
    """What a safetensors header says of one tensor."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["F32", "F16", "BF16"]
    shape: list[Annotated[int, Field(gt=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


def size(path: Path) -> int:
    """Bytes of a regular file, behind a link too: a Hugging Face cache is made of links."""
    try:
        status = path.stat()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path}: not a regular file")
    return status.st_size


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object."""
    if size(path) > JSON_LIMIT:
        raise ArtifactError(f"{path}: {size(path)} bytes are no config")
    return _parse(path, path.read_bytes())


def header(path: Path) -> dict[str, Entry]:
    """Each tensor of a safetensors file, whose bytes they must cover exactly; none is loaded."""
    total = size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(JSON_LIMIT, total - 8):
            raise ArtifactError(f"{path}: not a safetensors file of a dictionary, or cut short")
        content = _parse(path, file.read(length))
    content.pop("__metadata__", None)
    try:
        entries = TypeAdapter(dict[str, Entry]).validate_python(content)
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from error
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        nbytes = math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
        if entry.data_offsets != [end, end + nbytes]:
            raise ArtifactError(f"{path}: {name} lies at {entry.data_offsets}, expected {[end, end + nbytes]}")
        end += nbytes
    if 8 + length + end != total:
        raise ArtifactError(f"{path}: has {total} bytes, its header describes {8 + length + end}")
    return entries


def check(path: Path, shapes: Shapes, dtype: str = "F32") -> None:
    """Raises ArtifactError unless a safetensors file holds exactly these tensors; none is loaded."""
    found = header(path)
    missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or unknown:
        raise ArtifactError(f"{path}: lacks {missing}, has unexpected {unknown}")
    for name, entry in found.items():
        if (entry.dtype, tuple(entry.shape)) != (dtype, shapes[name]):
            raise ArtifactError(f"{path}: {name} is {entry.dtype} {entry.shape}, expected {dtype} {list(shapes[name])}")


def load(path: Path, shapes: Shapes, dtype: str = "F32") -> dict[str, Tensor]:
    """Exactly these tensors, as float32, all finite."""
    check(path, shapes, dtype)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    return {name: finite(path, name, tensor.float()) for name, tensor in tensors.items()}


def finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor itself, or ArtifactError; without a mask as large as a quarter of it."""
    low, high = tensor.aminmax()
    if not torch.isfinite(low) or not torch.isfinite(high):
        raise ArtifactError(f"{path}: {name} holds values that are not finite")
    return tensor


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: no sound JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ArtifactError(f"{path}: not a JSON object")
    return parsed


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)
