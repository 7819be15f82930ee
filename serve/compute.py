"""What a dictionary makes of posted rows and features, of several requests at once.

Rows of all requests are encoded together, a tile at a time; a row's bits do not depend on its company (`sae.rows`).
B rows, F latents, P active pairs; features are sparse, by row.
"""

import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sae.dictionary import Dictionary
from sae.kernels.found import above
from serve.problems import Problem

Operation = Literal["encode", "decode", "reconstruct", "describe"]
TILE = 2**22  # latents of rows that are dense in memory at once; 16 MiB
# What another process sent is read-only, and nothing here writes to it.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class Features(NamedTuple):
    """Active latents of some rows."""

    offsets: np.ndarray
    """int64 [B + 1]"""
    indices: np.ndarray
    """int32 [P]"""
    values: np.ndarray
    """float32 [P]"""

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1


class Selection(NamedTuple):
    """Which active latents a request wants."""

    top_k: int | None = None
    threshold: float = 0.0
    """Latents above it."""
    only: tuple[int, ...] = ()
    """Latents by number, ascending; all if empty."""
    limit: int = 2**22
    """Pairs, beyond which the request is refused."""


class Rebuilt(NamedTuple):
    """Rows of the sites that are written."""

    y: np.ndarray
    """float32 [B, d_out]"""
    fvu: np.ndarray | None = None
    """float32 [B]: a row's squared error over its squared distance to b_dec, averaged over sites; NaN for 0/0."""


class Described(NamedTuple):
    """One latent."""

    threshold: float
    bias: float
    norms: list[float | None]
    """Of its decoder row, by site; None for one that it does not write."""


class Work(NamedTuple):
    """The numbers of one request."""

    operation: Operation
    n_rows: int
    x: np.ndarray | None = None
    """float32 [B, d_in]"""
    y: np.ndarray | None = None
    """float32 [B, d_out], what is to be rebuilt."""
    features: Features | None = None
    selection: Selection = Selection()


Answer = Features | Rebuilt | Described | Problem


class Engine(Protocol):
    """Where dictionaries are held."""

    async def run(self, digest: str, work: Work) -> Answer:
        """Problem, raised or returned, if it cannot."""

    async def ready(self) -> bool: ...


def compute(dictionary: Dictionary, works: list[Work]) -> list[Answer]:
    """Of each its answer, or why there is none."""
    with torch.inference_mode():
        parts: list[list[Answer]] = [[] for _ in works]
        encoded = [n for n, work in enumerate(works) if work.operation in ("encode", "reconstruct")]
        for n, at, pre_BF in _encoded(dictionary, [(n, _rows(works[n].x)) for n in encoded]):
            parts[n].append(_part(dictionary, works[n], at, pre_BF))
        for n, work in enumerate(works):
            if work.operation == "decode":
                parts[n] = [_rebuilt(dictionary, work, at, f_BF) for at, f_BF in _dense(dictionary, work)]
            elif work.operation == "describe":
                parts[n] = [_described(dictionary, *work.selection.only)]
        return [_joined(part, works[n].selection.limit) for n, part in enumerate(parts)]


def tile_rows(dictionary: Dictionary) -> int:
    return max(2, TILE // dictionary.shape.width)


def _encoded(dictionary: Dictionary, posted: list[tuple[int, Tensor]]) -> Iterator[tuple[int, slice, Tensor]]:
    """(request, its rows, their pre-activations) for all rows, tile by tile."""
    if not posted:
        return
    together = torch.cat([x for _, x in posted]) if len(posted) > 1 else posted[0][1]
    size = tile_rows(dictionary)
    for first in range(0, len(together), size):
        pre_BF = dictionary.pre_activations(together[first : first + size])
        start = 0
        for n, x in posted:
            low, high = max(start, first), min(start + len(x), first + len(pre_BF))
            if low < high:
                yield n, slice(low - start, high - start), pre_BF[low - first : high - first]
            start += len(x)


def _dense(dictionary: Dictionary, work: Work) -> Iterator[tuple[slice, Tensor]]:
    """(rows, latents) of posted features, tile by tile."""
    assert work.features is not None
    offsets, indices, values = work.features
    size = tile_rows(dictionary)
    for first in range(0, work.n_rows, size):
        last = min(first + size, work.n_rows)
        pairs = slice(offsets[first], offsets[last])
        rows = np.repeat(np.arange(last - first), np.diff(offsets[first : last + 1]))
        f_BF = torch.zeros(last - first, dictionary.shape.width)
        f_BF[torch.from_numpy(rows), torch.from_numpy(indices[pairs]).long()] = torch.from_numpy(values[pairs])
        yield slice(first, last), f_BF


def _part(dictionary: Dictionary, work: Work, at: slice, pre_BF: Tensor) -> Answer:
    if work.operation == "encode":
        return select(dictionary, pre_BF, work.selection)
    return _rebuilt(dictionary, work, at, dictionary.latents(pre_BF))


def _rebuilt(dictionary: Dictionary, work: Work, at: slice, f_BF: Tensor) -> Rebuilt:
    y_BD = dictionary.decode(f_BF, None if work.x is None else _rows(work.x[at]))
    return Rebuilt(y_BD.numpy(), None if work.y is None else _fvu(dictionary, work.y[at], y_BD.numpy()))


def _described(dictionary: Dictionary, latent: int) -> Described:
    norms = [None if row_D is None else float(row_D.norm()) for row_D in dictionary.decoder_rows(latent)]
    return Described(float(dictionary.threshold_F[latent]), float(dictionary.b_enc_F[latent]), norms)


def _fvu(dictionary: Dictionary, y_BD: np.ndarray, rebuilt_BD: np.ndarray) -> np.ndarray:
    error_BD = (y_BD.astype(np.float64) - rebuilt_BD) ** 2
    spread_BD = (y_BD.astype(np.float64) - dictionary.b_dec_D.numpy()) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [error_BD[:, part].sum(1) / spread_BD[:, part].sum(1) for part in dictionary.shape.write_columns]
    return np.mean(ratios, axis=0).astype(np.float32)


def select(dictionary: Dictionary, pre_BF: Tensor, selection: Selection) -> Features | Problem:
    """The pairs that are wanted of some rows' latents, of their pre-activations: of latents no matrix is written."""
    if dictionary.k is not None:
        pre_BF = dictionary.latents(pre_BF)  # 0 but for the k largest
    above_F = dictionary.threshold_F.clamp_min(selection.threshold)
    if selection.only:
        chosen = torch.tensor(selection.only)
        pre_BF, above_F = pre_BF[:, chosen], above_F[chosen]
    offsets, latents_P, values_P = above(pre_BF, above_F)
    if selection.top_k is not None and int(offsets.diff().max()) > selection.top_k:
        offsets, latents_P, values_P = _largest(offsets, latents_P, values_P, selection.top_k)
    if len(values_P) > selection.limit:
        return _too_many(selection.limit)
    if selection.only:
        latents_P = chosen[latents_P].int()
    return Features(offsets.numpy(), latents_P.numpy(), values_P.numpy())


def _largest(offsets: Tensor, latents_P: Tensor, values_P: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs that are among the `count` largest of their row."""
    counts_B = offsets.diff()
    rows_P = torch.arange(len(counts_B)).repeat_interleave(counts_B)
    places_P = torch.arange(len(rows_P)) - offsets[rows_P]
    values_BX = torch.zeros(len(counts_B), int(counts_B.max())).index_put((rows_P, places_P), values_P)  # all positive
    largest = values_BX.topk(count, dim=1, sorted=False).indices
    kept_P = torch.zeros_like(values_BX, dtype=torch.bool).scatter_(1, largest, True)[rows_P, places_P]
    kept = functional.pad(counts_B.clamp_max(count).cumsum(0), (1, 0))
    return kept, latents_P[kept_P], values_P[kept_P]


def _too_many(limit: int) -> Problem:
    return Problem(413, f"an answer has at most {limit} features: set top_k or threshold, or send fewer rows")


def _joined(parts: list[Answer], limit: int) -> Answer:
    """The answer to one request, from those to its rows in several tiles."""
    for part in parts:
        if isinstance(part, Problem):
            return part
    if isinstance(parts[0], Described):
        return parts[0]
    rebuilt = [part for part in parts if isinstance(part, Rebuilt)]
    if rebuilt:
        fvus = [part.fvu for part in rebuilt if part.fvu is not None]
        return Rebuilt(np.concatenate([part.y for part in rebuilt]), np.concatenate(fvus) if fvus else None)
    features = [part for part in parts if isinstance(part, Features)]
    counts = np.concatenate([np.diff(part.offsets) for part in features])
    if counts.sum() > limit:
        return _too_many(limit)
    indices, values = (np.concatenate(arrays) for arrays in list(zip(*features, strict=True))[1:])
    return Features(np.concatenate([[0], counts.cumsum()]), indices, values)


def _rows(x: np.ndarray | None) -> Tensor:
    assert x is not None
    return torch.from_numpy(x)
