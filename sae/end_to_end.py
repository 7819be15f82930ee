"""End-to-end finetuning: a published dictionary, differentiable, and the loss with the model's own output in it.

*Published* (Gemma Scope 2, technical paper 2.4): L = (MSE + αβ·KL(p ‖ p̂))/(1 + β), α = MSE/(KL + 1e-8) held constant,
where p̂ is the model's next-token distribution with reconstructions in place. Which dictionaries, β and steps are not
public. That the quadratic L0 penalty goes on is *assumed*: without it finetuning buys fidelity with more active
latents. Decoder rows are no longer held to unit norm.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionary import Dictionary
from sae.estimators import Gate, Jump
from sae.fold import Scales, by_column, fold, unfold
from sae.spec import JumpReLUSettings


class Output(NamedTuple):
    """What a dictionary in finetuning makes of some rows."""

    rebuilt_BD: Tensor
    """Raw rows of what is written."""
    squared_error: Tensor
    """Mean over rows of ‖ŷ − y‖², on rows of unit mean square norm."""
    l0: Tensor
    """Mean active latents a row, with the estimator's gradient to the thresholds."""


class Finetuned:
    """A JumpReLU dictionary whose weights, on scaled rows, take gradients from autograd."""

    def __init__(self, dictionary: Dictionary, scales: Scales, autoencodes: bool, settings: JumpReLUSettings):
        self.shape, self.scales, self.settings = dictionary.shape, scales, settings
        self.weights = unfold(dictionary, scales, centred=autoencodes)
        if autoencodes:
            self.weights = self.weights._replace(centre_D=self.weights.b_dec_D)
        for tensor in self.learned():
            tensor.requires_grad_()
        self.read_D, self.write_D = by_column(self.shape, scales, dictionary.b_dec_D)

    def learned(self) -> list[Tensor]:
        """What an optimiser is to move."""
        w = self.weights
        return [*w.w_enc, *w.w_dec, *w.w_skip, w.b_enc_F, w.threshold_F, w.b_dec_D]

    def __call__(self, x_BD: Tensor, y_BD: Tensor) -> Output:
        """Rebuilds raw rows x [B, d_in] and compares with raw rows y [B, d_out]."""
        w, shape = self.weights, self.shape
        centred_BD = x_BD / self.read_D - w.centre_D
        pairs = zip(shape.groups, w.w_enc, strict=True)
        z_BF = torch.cat([centred_BD[:, group.reads] @ w_FD.T for group, w_FD in pairs], dim=1) + w.b_enc_F
        latents_BF = Jump.apply(torch.relu(z_BF), w.threshold_F, self.settings.bandwidth)
        l0 = Gate.apply(z_BF, w.threshold_F, self.settings.bandwidth).sum(1).mean()
        parts = [
            torch.nn.functional.pad(latents_BF[:, group.latents] @ w_FD, (group.writes.start, 0))
            for group, w_FD in zip(shape.groups, w.w_dec, strict=True)
        ]
        rebuilt_BD = torch.stack(parts).sum(0) + w.b_dec_D
        if w.w_skip:
            columns = zip(shape.read_columns, w.w_skip, strict=True)
            rebuilt_BD = rebuilt_BD + torch.cat([centred_BD[:, reads] @ skip for reads, skip in columns], dim=1)
        error = (rebuilt_BD - y_BD / self.write_D).square().sum(1).mean()
        return Output(rebuilt_BD * self.write_D, error, l0)

    def published(self) -> Dictionary:
        """The published form again."""
        w = self.weights
        detached = w._replace(
            w_enc=[tensor.detach() for tensor in w.w_enc],
            w_dec=[tensor.detach() for tensor in w.w_dec],
            w_skip=[tensor.detach() for tensor in w.w_skip],
            b_enc_F=w.b_enc_F.detach(),
            threshold_F=w.threshold_F.detach(),
            b_dec_D=w.b_dec_D.detach(),
            centre_D=w.centre_D.detach(),
        )
        return fold(self.shape, detached, self.scales)


def loss(output: Output, kl: Tensor, beta: float, l0_target: float, settings: JumpReLUSettings) -> Tensor:
    """The loss of one batch; `kl` is the mean over tokens of KL(p ‖ p̂) in nats."""
    alpha = (output.squared_error / (kl + 1e-8)).detach()
    fidelity = (output.squared_error + alpha * beta * kl) / (1 + beta)
    return fidelity + settings.coefficient * (2 / l0_target) * (output.l0 - l0_target).square()
