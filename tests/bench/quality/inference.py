"""The form in which every trainer's dictionary is scored: a JumpReLU autoencoder on raw, unscaled rows."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Inference(NamedTuple):
    """f = z·[z > θ] with z = relu(x·w_enc + b_enc); x̂ = f·w_dec + b_dec."""

    w_enc_DF: Tensor
    b_enc_F: Tensor
    threshold_F: Tensor
    w_dec_FD: Tensor
    b_dec_D: Tensor

    def pre_activations(self, x_BD: Tensor) -> Tensor:
        return torch.addmm(self.b_enc_F, x_BD, self.w_enc_DF).clamp_min_(0)

    def reconstruct(self, x_BD: Tensor) -> Tensor:
        pre_BF = self.pre_activations(x_BD)
        return torch.addmm(self.b_dec_D, pre_BF * (pre_BF > self.threshold_F), self.w_dec_FD)

    def save(self, path: Path) -> None:
        staged = path.with_suffix(".staged")
        save_file({name: tensor.detach().float().contiguous() for name, tensor in self._asdict().items()}, staged)
        os.replace(staged, path)

    @classmethod
    def load(cls, path: Path) -> "Inference":
        return cls(**load_file(path))

    @torch.no_grad()
    def difference(self, own: Callable[[Tensor], Tensor], x_BD: Tensor) -> float:
        """Largest difference to the trainer's own reconstruction of raw rows, in units of the rows' rms entry.

        In float64 throughout: rounding flips latents at their threshold, and one flip is no small difference.
        """
        x_BD = x_BD.double()
        ours = Inference(*(tensor.detach().double() for tensor in self)).reconstruct(x_BD)
        return ((ours - own(x_BD)).abs().max() / x_BD.square().mean().sqrt()).item()
