"""A dictionary as it ships: sparse latents on raw activations, scales and thresholds folded in; any kind."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sae import rows
from sae.shape import Shape


@dataclass(frozen=True)
class Dictionary:
    """f = z·[z > θ] with z = relu(x·w_enc + b_enc); y = f·w_dec + b_dec (+ x·w_skip). Float32, on raw (unscaled) rows.

    On the CPU a row's latents and its rebuilt row have the same bits alone and among any others (`sae.rows`).

    `x` [B, d_in] and `y` [B, d_out] are the rows of the sites read and written, concatenated by layer. The weights are
    lists by group of latents (`sae.shape`), the skips by layer.
    """

    shape: Shape
    w_enc: list[Tensor]
    """By group [columns read, F of the group]."""
    b_enc_F: Tensor
    threshold_F: Tensor
    w_dec: list[Tensor]
    """By group [F of the group, columns written]."""
    b_dec_D: Tensor
    w_skip: list[Tensor] = field(default_factory=list)
    """By layer [D read, D written]; empty without an affine skip."""
    k: int | None = None
    """If given, only the k largest latents of a row are active: foreign TopK dictionaries, which have no threshold."""

    def encode(self, x_BD: Tensor) -> Tensor:
        """Latent activations of raw rows. [B, F]"""
        return self.latents(self.pre_activations(x_BD))

    def pre_activations(self, x_BD: Tensor) -> Tensor:
        """x·w_enc + b_enc of raw rows. [B, F]"""
        parts = [
            rows.product(x_BD[:, group.reads], w, self.b_enc_F[group.latents])
            for group, w in zip(self.shape.groups, self.w_enc, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def latents(self, pre_BF: Tensor) -> Tensor:
        """Latent activations, of pre-activations. [B, F]"""
        latents_BF = pre_BF.clamp_min(0) * (pre_BF > self.threshold_F)
        if self.k is None:
            return latents_BF
        kept = latents_BF.topk(self.k, dim=1)
        return torch.zeros_like(latents_BF).scatter_(1, kept.indices, kept.values)

    def decode(self, latents_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        """Raw rows rebuilt from latent activations; an affine skip needs `x_BD`, the rows encoded. [B, d_out]"""
        y_BD = self.b_dec_D.expand(len(latents_BF), -1).clone()
        for group, w in zip(self.shape.groups, self.w_dec, strict=True):
            y_BD[:, group.writes] += rows.weighted_sum(latents_BF[:, group.latents], w)
        if self.w_skip:
            if x_BD is None:
                raise ValueError("decode: x_BD is None, and this dictionary has an affine skip: pass the rows encoded")
            for reads, writes, w in zip(self.shape.read_columns, self.shape.write_columns, self.w_skip, strict=True):
                y_BD[:, writes] += rows.product(x_BD[:, reads], w)
        return y_BD

    def decoder_rows(self, latent: int) -> list[Tensor | None]:
        """What one latent adds to each site for an activation of 1: [D] by site; None where it does not write."""
        number, columns = self.shape.group_of(latent), self.shape.write_columns
        group = self.shape.groups[number]
        row, start = self.w_dec[number][latent - group.latents.start], group.writes.start
        return [row[at.start - start : at.stop - start] if at.start >= start else None for at in columns]

    def packed(self) -> "Dictionary":
        """The same, to be used many times: encoders and skips laid out for the CPU's kernel, and not to be saved."""
        w_enc, w_skip = ([rows.packed(w) for w in part] for part in (self.w_enc, self.w_skip))
        return replace(self, w_enc=w_enc, w_skip=w_skip)

    def to(self, device: torch.device) -> "Dictionary":
        """The same on another device."""

        def move(part: list[Tensor]) -> list[Tensor]:
            return [tensor.to(device) for tensor in part]

        vectors = (tensor.to(device) for tensor in (self.b_enc_F, self.threshold_F, self.b_dec_D))
        b_enc_F, threshold_F, b_dec_D = vectors
        return Dictionary(
            self.shape, move(self.w_enc), b_enc_F, threshold_F, move(self.w_dec), b_dec_D, move(self.w_skip), self.k
        )
