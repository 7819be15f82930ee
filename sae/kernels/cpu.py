"""The operations on a CPU: selection by `sae.kernels.search`, the rest by compiled loops.

Where products are of bfloat16, whatever rows are read from is too: half the bytes. All sums are of float32.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sae.kernels import Kernels, loops, search
from sae.kernels.entries import ByLatent, Encoder, Entries, Matrix, More
from sae.kernels.threads import spread
from sae.pairs import Pairs


class Cpu(Kernels):
    """`sae.kernels.Kernels` for float32 and float64, and products of bfloat16, on torch's number of threads."""

    def __init__(self) -> None:
        self.search = search.Search()

    def centre(
        self, x_BD: Tensor, y_BD: Tensor, centre_D: Tensor, b_dec_D: Tensor, centred_BD: Tensor, rest_BD: Tensor
    ) -> Tensor:
        spread(loops.centre_rows, len(x_BD), x_BD, centre_D, centred_BD)
        n_rows, n_columns = y_BD.shape
        sums_D, squares_D = torch.empty(2, n_columns, dtype=torch.float64)
        spread(loops.centre_columns, n_columns, y_BD, b_dec_D, rest_BD, sums_D, squares_D)
        return (squares_D - sums_D.square() / n_rows).sum().to(y_BD.dtype)

    def select_topk(
        self, x_BD: Tensor, encoder: Encoder, count: int, per: Literal["row", "batch"], pre_BF: Tensor | None = None
    ) -> Pairs:
        if per == "row":
            return search.largest_of_rows(x_BD, encoder, min(count, encoder.width), pre_BF)
        return self.search.largest_of_batch(x_BD, encoder, count, pre_BF)

    def dense_topk(self, x_BD: Tensor, encoder: Encoder, count: int) -> Tensor:
        return search.dense_topk(x_BD, encoder, count)

    def gate(self, grad_BF: Tensor, f_BF: Tensor) -> Tensor:
        n_rows, width = grad_BF.shape
        sums = torch.zeros(
            min(torch.get_num_threads(), n_rows), width, dtype=torch.promote_types(grad_BF.dtype, torch.float32)
        )
        spread(loops.gate, n_rows, grad_BF, f_BF.contiguous(), sums)
        return sums.sum(0)

    def select_threshold(
        self, x_BD: Tensor, encoder: Encoder, threshold_F: Tensor, pre_BF: Tensor | None = None,
        most: int | None = None,
    ) -> Pairs:  # fmt: skip
        return self.search.above(x_BD, encoder, threshold_F, pre_BF, most)

    def decode(self, entries: Entries, values_P: Tensor, w_FD: Tensor) -> Tensor:
        order_P = torch.arange(len(values_P))
        return _sums(entries.starts_G, order_P, entries.latents_P, values_P, w_FD)

    def rebuild(
        self, entries: Entries, values_P: Tensor, w_FD: Tensor, rest_GD: Tensor, scale: float, grad_GD: Tensor
    ) -> Tensor:
        squares_G = rest_GD.new_empty(len(rest_GD))
        starts, (scale,) = _with_end(entries.starts_G, len(values_P)), _numbers(rest_GD.dtype, [scale])
        spread(
            loops.rebuild, len(rest_GD), starts, torch.arange(len(values_P)), entries.latents_P, values_P.contiguous(),
            w_FD, rest_GD, scale, grad_GD, squares_G,
        )  # fmt: skip
        return squares_G.sum()

    def value_gradients(self, entries: Entries, grad_GD: Tensor, w_FD: Tensor) -> Tensor:
        out_P = torch.empty(len(entries.rows_P), dtype=torch.promote_types(w_FD.dtype, torch.float32))
        spread(loops.multiply_rows, len(out_P), entries.rows_P, entries.latents_P, grad_GD.contiguous(), w_FD, out_P)
        return out_P

    def table_gradient(self, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor) -> Tensor:
        return _sums(by_latent.starts_F, by_latent.order_P, rows_P, weights_P, table_GD)

    def fit_rows(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        along_F: Tensor | None, more: More | None = None,
    ) -> None:  # fmt: skip
        self._fit(matrix, by_latent, weights_P, rows_P, table_GD, rates, along_F, more)

    def fit_encoder(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        more: More | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self._fit(matrix, by_latent, weights_P, rows_P, table_GD, rates, None, more)

    def _fit(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        along_F: Tensor | None, more: More | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        w_FD, moments, copy = matrix
        sums_F = w_FD.new_empty(len(w_FD))
        backs = w_FD.new_zeros(min(torch.get_num_threads(), len(w_FD)), w_FD.shape[1])
        spread(
            loops.fit_rows, len(w_FD), w_FD, *_in_order(by_latent, rows_P, weights_P), table_GD.contiguous(), *moments,
            copy, copy.dtype != w_FD.dtype, *_placed(more, w_FD),
            w_FD.new_zeros(1) if along_F is None else along_F, along_F is not None,
            sums_F, backs, *_numbers(w_FD.dtype, rates.tolist()),
        )  # fmt: skip
        return sums_F, backs.sum(0)

    def by_latent(self, entries: Entries) -> ByLatent:
        starts, order_P = torch.empty(entries.width + 1, dtype=torch.int64), torch.empty_like(entries.latents_P)
        loops.sort_by_latent(entries.latents_P.contiguous().numpy(), starts.numpy(), order_P.numpy())
        return ByLatent(order_P, starts[:-1])

    def fit_decoder(
        self, matrix: Matrix, entries: Entries, by_latent: ByLatent, values_P: Tensor, grad_GD: Tensor, rates: Tensor,
        more: More | None = None,
    ) -> Tensor:  # fmt: skip
        w_FD, moments, copy = matrix
        grad_values_P = torch.empty_like(values_P)
        spread(
            loops.fit_decoder, len(w_FD), w_FD, *_in_order(by_latent, entries.rows_P, values_P),
            grad_GD.contiguous(), *moments, copy, copy.dtype != w_FD.dtype, *_placed(more, w_FD)[:2], grad_values_P,
            *_numbers(w_FD.dtype, rates.tolist()),
        )  # fmt: skip
        return grad_values_P

    def latent_sums(self, by_latent: ByLatent, weights_P: Tensor) -> Tensor:
        starts = _with_end(by_latent.starts_F, len(weights_P))
        return torch.segment_reduce(weights_P[by_latent.order_P], "sum", offsets=starts, initial=0)


def _sums(starts: Tensor, order_P: Tensor, rows_P: Tensor, weights_P: Tensor, table: Tensor) -> Tensor:
    out = weights_P.new_empty(len(starts), table.shape[1])
    starts = _with_end(starts, len(order_P))
    spread(loops.sum_rows, len(out), starts, order_P, rows_P, weights_P.contiguous(), table.contiguous(), out)
    return out


def _in_order(by_latent: ByLatent, rows_P: Tensor, weights_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _with_end(by_latent.starts_F, len(rows_P)), by_latent.order_P, rows_P, weights_P.contiguous()


def _placed(more: More | None, w_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each latent which of `more` is its, or -1; nothing if there is none. Their rows and sums."""
    if more is None:
        return torch.empty(0, dtype=torch.int64), w_FD.new_empty(0, w_FD.shape[1]), w_FD.new_empty(0)
    place_F = torch.full((len(w_FD),), -1)
    place_F[more.latents_X] = torch.arange(len(more.latents_X))
    return place_F, more.rows_XD.to(w_FD.dtype).contiguous(), more.sums_X.to(w_FD.dtype)


def _with_end(starts: Tensor, end: int) -> Tensor:
    return torch.cat([starts, starts.new_tensor([end])])


def _numbers(dtype: torch.dtype, rates: list[float]) -> list[Any]:
    """Of the parameter's type: others would widen the loops' arithmetic."""
    number = np.float64 if dtype == torch.float64 else np.float32
    return [number(rate) for rate in rates]
