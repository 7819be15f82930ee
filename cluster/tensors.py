"""Safetensors files in a store, of which only the tensors that are wanted are fetched.

The header has the sha256 of each tensor beside what its writer tells of the file: none is handed out that differs.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from cluster.store import STAGED, Store

HEAD_BYTES = 2**16  # fetched first: all of the header, but where there are hundreds of tensors
HEADER_LIMIT = 10**8  # bytes, as in the format's own reader
GAP_BYTES = 2**20  # two tensors that lie closer are fetched as one: a request takes longer than these bytes
DTYPES: dict[str, Any] = {"I16": np.dtype(np.int16), "I64": np.dtype(np.int64), "F32": np.dtype(np.float32)}


class Damaged(Exception):
    """Not a file that was written here, or not all of it."""


def write(store: Store, name: str, tensors: Mapping[str, np.ndarray], told: Mapping[str, str]) -> None:
    """Appears whole, in the place of what had the name. Names of tensors and of what is told must differ."""
    digests = {key: _digest(tensor) for key, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(prefix=STAGED, dir=store.scratch) as scratch:
        path = Path(scratch, "tensors")
        save_file(dict(tensors), path, metadata={**told, **digests})
        os.chmod(path, 0o644)  # safetensors writes 0600, unreadable for another user
        store.put_file(name, path)


def read(store: Store, name: str, wanted: Iterable[str], told: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Some tensors of a file, which cannot be written to. Missing if there is none, Damaged if any of these, or what
    its writer told, is not as expected."""
    start, header = _header(store, name)
    try:
        written = header["__metadata__"]
        if any(written[key] != value for key, value in told.items()):
            raise Damaged(f"{name}: is of something else")
        places = {key: tuple(start + offset for offset in header[key]["data_offsets"]) for key in wanted}
        parts = {span: memoryview(store.read_range(name, *span)) for span in _spans(places.values())}
        found = {}
        for key, (first, end) in places.items():
            span = next(span for span in parts if span[0] <= first and end <= span[1])
            content = parts[span][first - span[0] : end - span[0]]
            found[key] = np.frombuffer(content, DTYPES[header[key]["dtype"]]).reshape(header[key]["shape"])
            if written[key] != _digest(found[key]):
                raise Damaged(f"{name}: {key} has another sha256")
        return found
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Damaged(f"{name}: {error}") from error


def _header(store: Store, name: str) -> tuple[int, Any]:
    """Where the tensors begin, and what the header says."""
    head = store.read_range(name, 0, HEAD_BYTES)
    end = 8 + int.from_bytes(head[:8], "little")
    if len(head) < 8 or end > HEADER_LIMIT:
        raise Damaged(f"{name}: has no header")
    if end > len(head):
        head += store.read_range(name, len(head), end)
    try:
        return end, json.loads(head[8:end])
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name}: {error}") from error


def _spans(places: Iterable[tuple[int, ...]]) -> list[tuple[int, int]]:
    """What to fetch for tensors at these places, [first, end)."""
    spans: list[tuple[int, int]] = []
    for first, end in sorted(places):
        if spans and first - spans[-1][1] < GAP_BYTES:
            first, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((first, end))
    return spans


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
