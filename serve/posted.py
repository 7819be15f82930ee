"""Posted numbers, whatever format they came in, and the rules that all formats share."""

from typing import Any, NamedTuple

import numpy as np

from serve.catalog import Entry
from serve.compute import Features, Operation
from serve.limits import Limits
from serve.problems import Problem


class Posted(NamedTuple):
    """What one request brought."""

    x: np.ndarray | None = None
    """float32 [B, d_in]"""
    y: np.ndarray | None = None
    """float32 [B, d_out]"""
    features: Features | None = None

    @property
    def n_rows(self) -> int:
        if self.features is not None:
            return self.features.n_rows
        assert self.x is not None
        return len(self.x)

    @staticmethod
    def sparse(latents_BF: np.ndarray) -> Features:
        rows, indices = latents_BF.nonzero()
        offsets = np.searchsorted(rows, np.arange(len(latents_BF) + 1))
        return Features(offsets.astype(np.int64), indices.astype(np.int32), latents_BF[rows, indices])


def matrix(field: str, rows: list[list[float]], width: int) -> np.ndarray:
    """float32 [B, width]; Problem if a row is of another width."""
    for n, row in enumerate(rows):
        if len(row) != width:
            raise Problem(422, f"{field}: row {n} has {len(row)} columns, and {width} are read")
    with np.errstate(over="ignore"):
        return np.array(rows, dtype=np.float64).astype(np.float32)


def check(entry: Entry, operation: Operation, posted: Posted, limits: Limits) -> None:
    """Problem unless the numbers are few, finite and about this dictionary."""
    if posted.n_rows == 0:
        raise Problem(422, "there are no rows")
    if posted.n_rows > limits.rows:
        raise Problem(413, f"a request has at most {limits.rows} rows, and this one has {posted.n_rows}")
    if operation != "encode" and posted.n_rows * entry.d_out > limits.numbers:
        raise Problem(413, f"an answer has at most {limits.numbers} numbers: send {limits.numbers // entry.d_out} rows")
    for field, part in (("rows", posted.x), ("targets", posted.y)):
        if part is not None and len(part) != posted.n_rows:
            raise Problem(422, f"{field}: there are {len(part)}, and {posted.n_rows} of the others")
        _refuse_infinite(field, part)
    if operation == "decode":
        _check_features(entry, posted.features, limits)
        if (posted.x is not None) != entry.affine:
            needs = "needs the rows that were encoded, too" if entry.affine else "is decoded from features alone"
            raise Problem(422, f"rows: this dictionary {needs}")


def _check_features(entry: Entry, features: Features | None, limits: Limits) -> None:
    assert features is not None
    offsets, indices, values = features
    if len(indices) > limits.numbers:
        raise Problem(413, f"a request has at most {limits.numbers} features, and this one has {len(indices)}")
    if len(indices) != len(values) or offsets[0] != 0 or offsets[-1] != len(indices) or (np.diff(offsets) < 0).any():
        raise Problem(422, "features: offsets, indices and values do not belong together")
    if len(indices) and (indices.min() < 0 or indices.max() >= entry.width):
        raise Problem(422, f"features: this dictionary has the latents 0 to {entry.width - 1}")
    rows = np.repeat(np.arange(features.n_rows, dtype=np.int64), np.diff(offsets))
    if len(np.unique(rows * entry.width + indices)) < len(indices):
        raise Problem(422, "features: a row names a latent twice")
    _refuse_infinite("features", values)


def _refuse_infinite(field: str, part: Any) -> None:
    if part is not None and not np.isfinite(part).all():
        raise Problem(422, f"{field}: holds NaN, an infinity, or a number beyond float32")
