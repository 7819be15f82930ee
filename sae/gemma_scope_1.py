"""Gemma Scope 1's dictionaries: one params.npz each, float32 arrays without pickles, and no config.

    W_enc [D read, F], b_enc [F], threshold [F], W_dec [F, D written], b_dec [D written]

Rows are raw. Its transcoders read the RMSNorm's output without the gain, where Gemma Scope 2's read it with; its
embedding SAEs read rows times √D (see SAELens, `gemma_2_sae_huggingface_loader`): feed them what they were trained on.
"""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from sae import strict
from sae.dictionary import Dictionary
from sae.shape import Shape
from sae.strict import ArtifactError

NAMES = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
COMPRESSION_LIMIT = 16  # declared bytes a byte of the file: weights hardly compress, and thresholds are a small part
SMALL = 1 << 20  # bytes that may be declared however well they compress


class Array(NamedTuple):
    """What an npy header says, and where it ends."""

    shape: tuple[int, ...]
    dtype: np.dtype
    header_bytes: int


def read(path: Path) -> Dictionary:
    """The dictionary in a params.npz; ArtifactError for anything else. Shapes are compared before any array is read."""
    _check_end(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _check_shapes(path, _headers(path, archive))
            arrays = {name: _array(path, archive, name) for name in NAMES}
    except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"{path}: {error}") from error
    width, d_in, d_out = len(arrays["b_enc"]), len(arrays["W_enc"]), len(arrays["b_dec"])
    w_enc, b_enc_F, threshold_F, w_dec, b_dec_D = (arrays[name] for name in NAMES)
    return Dictionary(Shape.layered(width, [d_in], [d_out], 1), [w_enc], b_enc_F, threshold_F, [w_dec], b_dec_D)


def _check_end(path: Path) -> None:
    """The file ends as numpy ends it: Python's zipfile would read past what has been appended."""
    if strict.size(path) >= 22:
        with path.open("rb") as file:
            file.seek(-22, 2)
            if file.read(4) == b"PK\x05\x06":
                return
    raise ArtifactError(f"{path}: not an npz archive, or cut short, or something is appended")


def _headers(path: Path, archive: zipfile.ZipFile) -> dict[str, Array]:
    """Exactly the five arrays, each as long as its header says."""
    found = [entry.filename for entry in archive.infolist()]
    if sorted(found) != sorted(f"{name}.npy" for name in NAMES):
        raise ArtifactError(f"{path}: holds {found}, expected {', '.join(NAMES)} once each")
    declared = sum(entry.file_size for entry in archive.infolist())
    if declared > max(SMALL, COMPRESSION_LIMIT * strict.size(path)):
        raise ArtifactError(f"{path}: {declared} bytes are declared in {strict.size(path)}: a compression bomb")
    headers = {}
    for name in NAMES:
        with archive.open(f"{name}.npy") as file:
            header = headers[name] = _header(file)
        if header.dtype != np.dtype("<f4"):
            raise ArtifactError(f"{path}: {name} is {header.dtype}, expected float32")
        nbytes = header.header_bytes + 4 * math.prod(header.shape)
        if archive.getinfo(f"{name}.npy").file_size != nbytes:
            raise ArtifactError(f"{path}: {name} has not the {nbytes} bytes of its shape {header.shape}")
    return headers


def _header(file: IO[bytes]) -> Array:
    version = npy.read_magic(file)
    reader = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"npy version {version} is unknown")
    shape, _, dtype = reader(file)
    return Array(shape, dtype, file.tell())


def _check_shapes(path: Path, headers: dict[str, Array]) -> None:
    shapes = {name: header.shape for name, header in headers.items()}
    if len(shapes["W_enc"]) == len(shapes["W_dec"]) == 2:
        d_in, width = shapes["W_enc"]
        d_out = shapes["W_dec"][1]
        vectors = {"b_enc": (width,), "threshold": (width,), "b_dec": (d_out,)}
        expected = {"W_enc": (d_in, width), "W_dec": (width, d_out)} | vectors
        if shapes == expected and min(d_in, width, d_out) > 0:
            return
    raise ArtifactError(f"{path}: shapes {shapes} are not those of one dictionary")


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> Tensor:
    """Column order, which numpy may write, becomes row order."""
    with archive.open(f"{name}.npy") as file:
        array = npy.read_array(file, allow_pickle=False)
    return strict.finite(path, name, torch.from_numpy(np.ascontiguousarray(array)))
