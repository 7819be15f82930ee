"""How latents become sparse in training: which pairs of a batch are active, and how gradients pass through.

Each activation offers the same four things: `start` from the first batch, `select` the pairs, `backward`
from gradients of values to gradients of pre-activations, and the `threshold` that ships (every dictionary
ships as JumpReLU, as Gemma Scope 2 does). Its tensors are in `state`, so a checkpoint cannot forget one.
"""

import math

import torch
from torch import Tensor

from sae.pairs import Pairs
from sae.spec import DictionarySpec

THRESHOLD_MEMORY = 0.9  # of the running mean of BatchTopK's batch thresholds; measured here


def _pairs_where(mask_BF: Tensor, pre_BF: Tensor) -> Pairs:
    flat_P = mask_BF.flatten().nonzero()[:, 0]
    pre_P = pre_BF.flatten()[flat_P]
    width = mask_BF.shape[1]
    return Pairs(flat_P // width, flat_P % width, pre_P, pre_P)


def _kth_largest(pre_BF: Tensor, k: int, guess: float = -math.inf) -> Tensor:
    """The k-th largest entry, as a 0-d tensor. A `guess` below it only saves time: the search then
    reads the entries above the guess alone (5 ms in place of 44 for 1,024 x 4,096 on one core)."""
    flat = pre_BF.flatten()
    likely = flat[flat > guess]
    among = likely if len(likely) >= k else flat
    return among.kthvalue(len(among) - k + 1).values


class BatchTopK:
    """The B·l0 largest positive pre-activations of the batch are active (Bussmann et al. 2024, BatchTopK SAEs)."""

    def __init__(self, spec: DictionarySpec, device: torch.device):
        self.l0 = spec.l0
        self.state = {"threshold": torch.zeros((), device=device)}
        self.learned: dict[str, Tensor] = {}

    def start(self, pre_BF: Tensor) -> None:
        self.state["threshold"].copy_(_kth_largest(pre_BF, self.l0 * len(pre_BF)).clamp_min(0))

    def select(self, pre_BF: Tensor) -> Pairs:
        guess = 0.9 * self.state["threshold"].item()
        cut = _kth_largest(pre_BF, self.l0 * len(pre_BF), guess).clamp_min(0)
        self.state["threshold"].lerp_(cut, 1 - THRESHOLD_MEMORY)
        return _pairs_where((pre_BF >= cut) & (pre_BF > 0), pre_BF)

    def backward(self, pairs: Pairs, grad_values_P: Tensor, n_rows: int, warmup: float) -> Tensor:
        """The selection is held constant, so gradients pass to the active pre-activations unchanged."""
        return grad_values_P

    def threshold(self, width: int) -> Tensor:
        """One threshold for all latents: the running mean of the batches' smallest active value. [F]"""
        return self.state["threshold"].expand(width).clone()


class JumpReLU:
    """f = z·H(z − θ) with a threshold a latent (Rajamanoharan et al. 2024, JumpReLU SAEs, equations 4 and 11-12).

    Penalty *published* (Gemma Scope 2, technical paper 2.2): λ·(2/L0*)·(L0 − L0*)², with L0 the batch mean
    (*assumed*; the paper does not say whether it is per token). Straight-through estimators with the rectangle
    kernel K on (−½, ½): ∂f/∂θ ≈ −(θ/ε)·K((z−θ)/ε) and ∂H(z−θ)/∂θ ≈ −(1/ε)·K((z−θ)/ε). θ stays float32 and is
    never log-parametrised: Adam freezes a log threshold.
    """

    def __init__(self, spec: DictionarySpec, device: torch.device):
        self.l0, self.bandwidth = spec.l0, spec.training.jumprelu_bandwidth
        self.coefficient = spec.training.sparsity_coefficient
        self.state = {"threshold": torch.zeros(spec.width, device=device)}
        self.learned = self.state

    def start(self, pre_BF: Tensor) -> None:
        """One threshold for all at which the first batch has the target L0 (*measured here*: the published
        0.001 needs far more steps than a small run has)."""
        self.state["threshold"].fill_(_kth_largest(pre_BF, self.l0 * len(pre_BF)).clamp_min(0))

    def select(self, pre_BF: Tensor) -> Pairs:
        """Active pairs, and those below their threshold by less than half the bandwidth, with value 0."""
        threshold_F = self.state["threshold"].clamp_(min=0)
        pairs = _pairs_where(pre_BF > (threshold_F - self.bandwidth / 2).clamp_min(0), pre_BF)
        active_P = pairs.pre_P > threshold_F[pairs.latents_P]
        return pairs._replace(values_P=pairs.pre_P * active_P)

    def backward(self, pairs: Pairs, grad_values_P: Tensor, n_rows: int, warmup: float) -> Tensor:
        threshold_P = self.state["threshold"][pairs.latents_P]
        active_P = pairs.pre_P > threshold_P
        in_band_P = (pairs.pre_P - threshold_P).abs() < self.bandwidth / 2
        l0 = active_P.sum() / n_rows
        penalty_slope = self.coefficient * warmup * (4 / self.l0) * (l0 - self.l0)
        step_P = threshold_P * grad_values_P + penalty_slope / n_rows
        gradient_F = torch.zeros_like(self.state["threshold"])
        gradient_F.index_add_(0, pairs.latents_P, -(in_band_P / self.bandwidth) * step_P)
        self.state["threshold"].grad = gradient_F
        return grad_values_P * active_P

    def threshold(self, width: int) -> Tensor:
        return self.state["threshold"].clamp_min(0).clone()


ACTIVATIONS: dict[str, type[BatchTopK] | type[JumpReLU]] = {"batch_topk": BatchTopK, "jumprelu": JumpReLU}
