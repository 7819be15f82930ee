"""Products each row of which has the bits that it has alone, whatever rows are computed with it.

A served answer must not depend on whose rows share its batch, nor differ from what a notebook computes. MKL's product
does both: it adds in another order for fewer than 4 rows. oneDNN's does so for a single row alone, which is therefore
computed twice; from 2 rows on it had the same bits in 2,400 products of 60 shapes, with 1 or 2 threads, packed or not
(*measured here*, AVX2; 640 → 4,096 on one thread: 1.1 ms a row where MKL takes 0.7, 1.9 for 8 rows and 6.6, 40 for 256
and 41). So it is used for float32 on the CPU where no gradient is wanted.
"""

import torch
from torch import Tensor
from torch.nn import functional

from sae.pairs import starts


def product(x_BD: Tensor, w: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x·w + bias for w [D, F], or w that is `packed`. [B, F]"""
    if w.layout == torch._mkldnn:  # type: ignore[attr-defined]
        return _linear(x_BD, w, bias_F)
    if _by_row(x_BD, w):
        return _linear(x_BD, w.T, bias_F)
    return x_BD @ w if bias_F is None else x_BD @ w + bias_F


def packed(w_DF: Tensor) -> Tensor:
    """For many products with one w: laid out once as the kernel reads it. [F, D], opaque"""
    return torch.ops.mkldnn._reorder_linear_weight(w_DF.T.contiguous(), None) if _by_row(w_DF, w_DF) else w_DF


def weighted_sum(values_BF: Tensor, w_FD: Tensor) -> Tensor:
    """values·w for values that are mostly 0, by each row's own others, in the order of the latents. [B, D]"""
    if not _by_row(values_BF, w_FD):
        return values_BF @ w_FD
    rows_P, latents_P = values_BF.nonzero(as_tuple=True)
    weights_P, starts_B = values_BF[rows_P, latents_P], starts(rows_P, len(values_BF))
    return functional.embedding_bag(latents_P, w_FD, starts_B, mode="sum", per_sample_weights=weights_P)


def _linear(x_BD: Tensor, w_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    at_least_two = x_BD.expand(2, -1) if len(x_BD) == 1 else x_BD
    return torch.ops.mkldnn._linear_pointwise(at_least_two.contiguous(), w_FD, bias_F, "none", [], "")[: len(x_BD)]


def _by_row(x: Tensor, w: Tensor) -> bool:
    differentiated = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return on_cpu and x.dtype == w.dtype == torch.float32 and not differentiated
