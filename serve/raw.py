"""application/octet-stream: little-endian numbers, one array after the other, with headers that say how many.

rows       X-Shape: B,d_in   X-Dtype: float32 or bfloat16      [B, d_in], sites side by side in the listed order
           of a reconstruction, then the targets [B, d_out], if X-Targets: 1
features   X-Shape: B,F      X-Layout: dense (the default)     [B, F]
           X-Shape: B,F      X-Layout: csr   X-Pairs: P        int64 [B + 1], int32 [P], float32 [P]
           then the rows [B, d_in] for a dictionary with a skip
answers    are float32 and have the same headers; of a reconstruction, X-Fvu: 1 tells that fvu [B] follows
"""

from typing import Any

import numpy as np
import torch

from serve.catalog import Entry
from serve.compute import Features, Operation, Rebuilt
from serve.posted import Posted
from serve.problems import Problem

BYTES = {"float32": 4, "bfloat16": 2}


class Reader:
    """Takes arrays off a body."""

    def __init__(self, body: bytes, dtype: str):
        self.body, self.dtype, self.at = body, dtype, 0

    def rows(self, n_rows: int, width: int) -> np.ndarray:
        """As float32. [n_rows, width]"""
        part = self._take(n_rows * width * BYTES[self.dtype])
        if self.dtype == "float32":
            flat = np.frombuffer(part, dtype="<f4")
        else:
            halves = np.frombuffer(part, dtype="<u2").astype(np.uint32) << 16  # the upper half of a float32
            flat = halves.view(np.float32)
        return flat.reshape(n_rows, width)

    def array(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self._take(count * np.dtype(dtype).itemsize), dtype=dtype)

    def _take(self, size: int) -> bytes:
        part = self.body[self.at : self.at + size]
        if len(part) < size:
            raise Problem(422, f"the body has {len(self.body)} bytes, and its headers say more")
        self.at += size
        return part

    def finish(self) -> None:
        if self.at != len(self.body):
            raise Problem(422, f"the body has {len(self.body)} bytes, and its headers say {self.at}")


def read(entry: Entry, operation: Operation, headers: Any, body: bytes) -> Posted:
    dtype = headers.get("x-dtype", "float32")
    if dtype not in BYTES:
        raise Problem(415, f"X-Dtype can be {' or '.join(BYTES)}")
    reader = Reader(body, dtype)
    if operation == "decode":
        n_rows = _shape(headers, entry.width)
        features = _features(reader, headers, n_rows, entry.width)
        posted = Posted(x=reader.rows(n_rows, entry.d_in) if entry.affine else None, features=features)
    else:
        n_rows = _shape(headers, entry.d_in)
        x = reader.rows(n_rows, entry.d_in)
        targets = operation == "reconstruct" and headers.get("x-targets") == "1"
        posted = Posted(x=x, y=reader.rows(n_rows, entry.d_out) if targets else None)
    reader.finish()
    return posted


def _features(reader: Reader, headers: Any, n_rows: int, width: int) -> Features:
    layout = headers.get("x-layout", "dense")
    if layout == "dense":
        return Posted.sparse(reader.rows(n_rows, width))
    if layout != "csr":
        raise Problem(415, "X-Layout can be dense or csr")
    n_pairs = _number("X-Pairs", headers.get("x-pairs", ""))
    return Features(reader.array("<i8", n_rows + 1), reader.array("<i4", n_pairs), reader.array("<f4", n_pairs))


def _shape(headers: Any, width: int) -> int:
    """Rows, of X-Shape."""
    rows, comma, columns = headers.get("x-shape", "").partition(",")
    if not comma:
        raise Problem(422, f"X-Shape: say rows,columns of the body, such as 256,{width}")
    n_columns = _number("X-Shape", columns)
    if n_columns != width:
        raise Problem(422, f"X-Shape: has {n_columns} columns, and {width} are read")
    return _number("X-Shape", rows)


def _number(field: str, text: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Problem(422, f"{field}: has something else than numbers from 0 on")
    return int(text)


def write(entry: Entry, answer: Features | Rebuilt) -> tuple[bytes, dict[str, str]]:
    if isinstance(answer, Features):
        shape = {"X-Shape": f"{answer.n_rows},{entry.width}", "X-Layout": "csr", "X-Pairs": str(len(answer.indices))}
        arrays = (answer.offsets.astype("<i8"), answer.indices.astype("<i4"), answer.values.astype("<f4"))
        return b"".join(array.tobytes() for array in arrays), shape | {"X-Dtype": "float32"}
    sites = ",".join(f"{part.site}:{part.width}" for part in entry.writes)
    shape = {"X-Shape": f"{len(answer.y)},{entry.d_out}", "X-Dtype": "float32", "X-Sites": sites}
    body = answer.y.astype("<f4").tobytes()
    if answer.fvu is None:
        return body, shape
    return body + answer.fvu.astype("<f4").tobytes(), shape | {"X-Fvu": "1"}


def rows_to_bytes(rows: torch.Tensor) -> tuple[bytes, dict[str, str]]:
    """A body of rows, bfloat16 as it is and anything else as float32, with its headers."""
    rows = rows.detach().cpu().contiguous()
    names = {"X-Shape": f"{rows.shape[0]},{rows.shape[1]}"}
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().tobytes(), names | {"X-Dtype": "bfloat16"}
    return rows.float().numpy().tobytes(), names | {"X-Dtype": "float32"}
