"""JumpReLU and its step as autograd functions, with the published straight-through gradients.

For losses that need autograd (`sae.end_to_end`, the tests' dense reference); the fit writes the same out by hand.
"""

from typing import Any

import torch
from torch import Tensor


class Gate(torch.autograd.Function):
    """H(z − θ), z [B, F], θ [F]; ∂/∂θ ≈ −(1/ε)·K((z−θ)/ε), ∂/∂z = 0 (Rajamanoharan et al. 2024, equation 12)."""

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, theta_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_BF, theta_F)
        ctx.bandwidth = bandwidth
        return (z_BF > theta_F).to(z_BF.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[None, Tensor, None]:
        z_BF, theta_F = ctx.saved_tensors
        return None, (-(_in_band(z_BF, theta_F, ctx.bandwidth) / ctx.bandwidth) * grad_BF).sum(0), None


class Jump(torch.autograd.Function):
    """z·H(z − θ), z [B, F], θ [F]; ∂/∂θ ≈ −(θ/ε)·K((z−θ)/ε), ∂/∂z = H (equation 11)."""

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, theta_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_BF, theta_F)
        ctx.bandwidth = bandwidth
        return z_BF * (z_BF > theta_F)

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Tensor, Tensor, None]:
        z_BF, theta_F = ctx.saved_tensors
        grad_F = (-(theta_F / ctx.bandwidth) * _in_band(z_BF, theta_F, ctx.bandwidth) * grad_BF).sum(0)
        return grad_BF * (z_BF > theta_F), grad_F, None


def _in_band(z_BF: Tensor, theta_F: Tensor, bandwidth: float) -> Tensor:
    return ((z_BF - theta_F).abs() < bandwidth / 2).to(z_BF.dtype)
