"""The operations on a GPU: cuBLAS for the encoder product, Triton for the rest, and no host read.

A selection of `count` always has as many pairs, so that their number is known: where fewer are positive, some have
value 0. Sums are in a fixed order: the same call gives the same bits.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
import triton
from torch import Tensor

from sae.kernels import Kernels, Result, TooDense, triton_adam, triton_products, triton_select
from sae.kernels.entries import ByLatent, Encoder, Entries, Matrix, More
from sae.kernels.recorded import Recorded
from sae.pairs import Pairs

KEYS = 4096  # a program looks at, at once
# How a program works, measured on an H100 (tests/bench/LOG.md): small ones, of which many run at once, hide how long
# rows take to come.
REBUILT = {"PAIRS": 8, "BLOCK": 256, "num_warps": 1}
SUMMED = {"PAIRS": 8, "BLOCK": 512, "num_warps": 2}
PRODUCTS = {"PAIRS": 2, "BLOCK": 512, "num_warps": 2}
DECODER = {"num_warps": 4}
CENTRED = {"ROWS": 16, "BLOCK": 256, "num_warps": 4}
WIDEST = 4096  # columns of a decoder's row that a program holds, with their moments


class Gpu(Kernels):
    """`sae.kernels.Kernels` in Triton."""

    def centre(
        self, x_BD: Tensor, y_BD: Tensor, centre_D: Tensor, b_dec_D: Tensor, centred_BD: Tensor, rest_BD: Tensor
    ) -> Tensor:
        n_rows, n_columns = y_BD.shape
        if x_BD.shape != y_BD.shape:
            return super().centre(x_BD, y_BD, centre_D, b_dec_D, centred_BD, rest_BD)
        grid = triton.cdiv(n_rows, CENTRED["ROWS"]), triton.cdiv(n_columns, CENTRED["BLOCK"])
        sums, squares = torch.empty(2, grid[0], n_columns, device=y_BD.device)
        triton_products.centred_rows[grid](
            x_BD.contiguous(), y_BD.contiguous(), centre_D, b_dec_D, centred_BD, rest_BD, sums, squares, n_rows,
            n_columns, **CENTRED,
        )  # fmt: skip
        return squares.sum() - sums.sum(0).square().sum() / n_rows

    def select_topk(
        self, x_BD: Tensor, encoder: Encoder, count: int, per: Literal["row", "batch"], pre_BF: Tensor | None = None
    ) -> Pairs:
        product_BF = _product(x_BD, encoder, pre_BF)
        n_rows, width = product_BF.shape
        count = min(count, width if per == "row" else n_rows * width)
        per_row = count if per == "row" else math.ceil(count / n_rows)
        size = 1 << max(0, int(math.log2(width / per_row) / 2))  # of a group: about as many groups as values in them
        n_groups, device = triton.cdiv(width, size), x_BD.device
        maxima = torch.empty(n_rows, n_groups, dtype=torch.int32, device=device)
        block = max(1, KEYS // size)
        triton_select.group_maxima[n_rows, triton.cdiv(n_groups, block)](
            product_BF, encoder.bias_F, maxima, width, n_groups, GROUP=size, BLOCK=block
        )
        find = _largest_of_rows if per == "row" else _largest_of_all
        lines = maxima if per == "row" else maxima.view(1, -1)
        groups, _ = find(lines, count)
        keys = torch.empty(len(lines), count * size, dtype=torch.int32, device=device)
        triton_select.candidates[len(lines), triton.cdiv(count * size, KEYS)](
            product_BF, encoder.bias_F, groups, keys, width, n_groups, count, GROUP=size, BLOCK=KEYS
        )
        places, chosen = find(keys, count)
        values_P = chosen.flatten().view(torch.float32)
        rows_P, latents_P = torch.empty(2, len(values_P), dtype=torch.int64, device=device)
        triton_select.pairs_at[(triton.cdiv(len(values_P), KEYS),)](
            places, groups, rows_P, latents_P, n_groups, count, len(values_P), GROUP=size, BLOCK=KEYS
        )
        return Pairs(rows_P, latents_P, values_P, values_P)

    def select_threshold(
        self, x_BD: Tensor, encoder: Encoder, threshold_F: Tensor, pre_BF: Tensor | None = None,
        most: int | None = None,
    ) -> Pairs:  # fmt: skip
        """Reads the number of pairs back: of all operations the only one."""
        pre_BF = torch.add(_product(x_BD, encoder, None), encoder.bias_F, out=pre_BF)
        pairs = Pairs.where(pre_BF > threshold_F, pre_BF)
        if most is not None and len(pairs.rows_P) > most:
            raise TooDense
        return pairs

    def decode(self, entries: Entries, values_P: Tensor, w_FD: Tensor) -> Tensor:
        out_GD = torch.zeros(entries.n_rows, w_FD.shape[1], device=w_FD.device)
        self.rebuild(entries, values_P, w_FD, out_GD, 1.0, torch.empty_like(out_GD))
        return out_GD

    def rebuild(
        self, entries: Entries, values_P: Tensor, w_FD: Tensor, rest_GD: Tensor, scale: float, grad_GD: Tensor
    ) -> Tensor:
        n_columns = w_FD.shape[1]
        grid = entries.n_rows, triton.cdiv(n_columns, REBUILT["BLOCK"])
        squares = torch.empty(grid, device=w_FD.device)
        triton_products.rebuilt[grid](
            entries.starts_G, entries.latents_P, values_P, w_FD, rest_GD, grad_GD, squares, scale, len(values_P),
            n_columns, **REBUILT,
        )  # fmt: skip
        return squares.sum()

    def value_gradients(self, entries: Entries, grad_GD: Tensor, w_FD: Tensor) -> Tensor:
        n_pairs = len(entries.rows_P)
        out_P = torch.empty(n_pairs, device=w_FD.device)
        triton_products.pair_products[(triton.cdiv(n_pairs, PRODUCTS["PAIRS"]),)](
            entries.rows_P, entries.latents_P, grad_GD.contiguous(), w_FD, out_P, n_pairs, w_FD.shape[1], **PRODUCTS
        )
        return out_P

    def table_gradient(self, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor) -> Tensor:
        n_latents, n_columns = len(by_latent.starts_F), table_GD.shape[1]
        out_FD = torch.empty(n_latents, n_columns, device=table_GD.device)
        triton_products.latent_rows[n_latents, triton.cdiv(n_columns, SUMMED["BLOCK"])](
            by_latent.starts_F, rows_P[by_latent.order_P], weights_P[by_latent.order_P], table_GD.contiguous(), out_FD,
            len(rows_P), n_columns, **SUMMED,
        )  # fmt: skip
        return out_FD

    def fit_rows(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        along_F: Tensor | None, more: More | None = None,
    ) -> None:  # fmt: skip
        assert more is None  # `sae.fused.covers`
        w_FD, moments, copy = matrix
        n_columns = w_FD.shape[1]
        unit = along_F is not None
        tiles = triton.cdiv(n_columns, SUMMED["BLOCK"])
        triton_adam.step_summed_rows[len(w_FD), 1 if unit else tiles](
            w_FD, by_latent.starts_F, rows_P[by_latent.order_P], weights_P[by_latent.order_P], table_GD, *moments,
            copy, along_F, len(rows_P), n_columns, rates, UNIT=unit, TILES=tiles if unit else 1, **SUMMED,
        )  # fmt: skip

    def fit_decoder(
        self, matrix: Matrix, entries: Entries, by_latent: ByLatent, values_P: Tensor, grad_GD: Tensor, rates: Tensor,
        more: More | None = None,
    ) -> Tensor:  # fmt: skip
        assert more is None  # `sae.fused.covers`
        w_FD, moments, copy = matrix
        (n_latents, n_columns), n_pairs = w_FD.shape, len(values_P)
        if n_columns > WIDEST:
            return super().fit_decoder(matrix, entries, by_latent, values_P, grad_GD, rates)
        order_P, starts_F = by_latent
        grad_values_P = torch.empty_like(values_P)
        head = max(1, triton.next_power_of_2(n_columns) // 2)
        tail = max(1, triton.next_power_of_2(n_columns - head))
        triton_adam.step_decoder_rows[(n_latents,)](
            w_FD, starts_F, order_P, entries.rows_P[order_P], values_P[order_P], grad_GD, grad_values_P, *moments,
            copy, n_pairs, n_columns, rates, HEAD=head, TAIL=tail, **DECODER,
        )  # fmt: skip
        return grad_values_P

    def latent_sums(self, by_latent: ByLatent, weights_P: Tensor) -> Tensor:
        n_latents = len(by_latent.starts_F)
        out_F = torch.empty(n_latents, device=weights_P.device)
        triton_products.latent_sums[(n_latents,)](
            by_latent.starts_F, by_latent.order_P, weights_P, out_F, len(weights_P), BLOCK=128, num_warps=1
        )
        return out_F

    @cached_property
    def side(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def beside(self, work: Callable[[], Result]) -> Callable[[], Result]:
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            result = work()

        def taken() -> Result:
            torch.cuda.current_stream().wait_stream(self.side)
            return result

        return taken

    def recorded(self, function: Callable[[int], Result]) -> Callable[[int], Result]:
        return Recorded(function)


def _product(x_BD: Tensor, encoder: Encoder, pre_BF: Tensor | None) -> Tensor:
    """x·Wᵀ, in the weights' type, and without the bias; with it in `pre_BF`. [B, F]"""
    product_BF = x_BD.new_empty(len(x_BD), encoder.width, dtype=encoder.weights[0].dtype)
    for group, w_FD in zip(encoder.groups, encoder.weights, strict=True):
        torch.mm(x_BD[:, group.reads].to(w_FD.dtype), w_FD.T, out=product_BF[:, group.latents])
    if pre_BF is not None:
        torch.add(product_BF, encoder.bias_F, out=pre_BF)
    return product_BF


def _largest_of_rows(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the `count` largest of each row lie, ascending, and they. [B, n] to [B, count]"""
    n_rows, n_keys = keys.shape
    places = torch.empty(n_rows, count, dtype=torch.int64, device=keys.device)
    chosen = torch.empty(n_rows, count, dtype=torch.int32, device=keys.device)
    block = triton.next_power_of_2(n_keys)
    triton_select.largest_of_rows[(n_rows,)](
        keys, places, chosen, n_keys, count, BLOCK=block, num_warps=min(16, max(1, block // 512))
    )
    return places, chosen


def _largest_of_all(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `_largest_of_rows`, of one row too long for one program. [1, n] to [1, count]"""
    device, n_keys = keys.device, keys.numel()
    blocks = (triton.cdiv(n_keys, KEYS),)
    counts = torch.zeros(4, 256, dtype=torch.int32, device=device)
    for level in range(4):
        triton_select.count_digits[blocks](keys, counts, n_keys, count, LEVEL=level, BLOCK=KEYS)
    taken = torch.empty(2, blocks[0], dtype=torch.int32, device=device)
    triton_select.count_taken[blocks](keys, counts, taken, n_keys, count, BLOCK=KEYS)
    places = torch.empty(1, count, dtype=torch.int64, device=device)
    chosen = torch.empty(1, count, dtype=torch.int32, device=device)
    triton_select.write_taken[blocks](
        keys, counts, taken.cumsum(1), places, chosen, n_keys, count, BLOCK=KEYS, num_warps=8
    )
    return places, chosen
