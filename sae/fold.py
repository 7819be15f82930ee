"""Folding: the trained form, on rows divided by their site's scale, becomes the published form, on raw rows; and back.

Trained: f = activation(gain·((x/C − c)·W_enc + b_enc) + shift), y/C' = f·W_dec + b_dec + (x/C − c)·W_skip, where C
and C' are the scales of the sites read and written and c is the pre-encoder bias. Published for an SAE (Gemma Scope 1,
appendix B): W unchanged, b_enc' = C·(b_enc − c·W_enc), b_dec' = C·b_dec, θ' = C·θ. In general all latents are
multiplied by one scale s, here that of the first site written, which gives the published case exactly. One for all
groups, since TopK compares latents across them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionary import Dictionary
from sae.shape import Shape


class Trained(NamedTuple):
    """The weights of a dictionary in training, on scaled rows."""

    w_enc: list[Tensor]
    """By group [F of the group, columns read]."""
    b_enc_F: Tensor
    gain_F: Tensor
    shift_F: Tensor
    threshold_F: Tensor
    w_dec: list[Tensor]
    """By group [F of the group, columns written]."""
    b_dec_D: Tensor
    centre_D: Tensor
    """c over the columns read."""
    w_skip: list[Tensor]
    k: int | None = None


class Scales(NamedTuple):
    """What the rows of each site read and written were divided by."""

    reads: list[float]
    writes: list[float]


def fold(shape: Shape, trained: Trained, scales: Scales) -> Dictionary:
    """The published form. Exact but for float32 rounding."""
    read_D, write_D = by_column(shape, scales, trained.b_dec_D)
    s = write_D[0]
    w_enc, w_dec, b_enc_F = [], [], trained.b_enc_F.clone()
    for group, encoder_FD, decoder_FD in zip(shape.groups, trained.w_enc, trained.w_dec, strict=True):
        latents = group.latents
        gain_F, shift_F = trained.gain_F[latents], trained.shift_F[latents]
        w_enc.append(((encoder_FD * gain_F[:, None]) * (s / read_D[group.reads])).T.contiguous())
        pre_bias_F = b_enc_F[latents] - encoder_FD @ trained.centre_D[group.reads]
        b_enc_F[latents] = s * (gain_F * pre_bias_F + shift_F)
        w_dec.append(decoder_FD * (write_D[group.writes] / s))
    b_dec_D, w_skip = trained.b_dec_D.clone(), []
    for n, skip in enumerate(trained.w_skip):
        reads, writes = shape.read_columns[n], shape.write_columns[n]
        b_dec_D[writes] -= trained.centre_D[reads] @ skip
        w_skip.append(skip * (scales.writes[n] / scales.reads[n]))
    return Dictionary(shape, w_enc, b_enc_F, trained.threshold_F * s, w_dec, b_dec_D * write_D, w_skip, trained.k)


def unfold(dictionary: Dictionary, scales: Scales, centred: bool) -> Trained:
    """The trained form again, with gain 1 and shift 0: where finetuning starts.

    `centred` puts the decoder bias back as the pre-encoder bias, as dictionaries that write what they read have it.
    """
    shape = dictionary.shape
    read_D, write_D = by_column(shape, scales, dictionary.b_dec_D)
    b_dec_D = dictionary.b_dec_D / write_D
    centre_D = b_dec_D.clone() if centred else b_dec_D.new_zeros(shape.d_in)
    s = write_D[0]
    w_enc, w_dec, b_enc_F = [], [], dictionary.b_enc_F / s
    for group, encoder_DF, decoder_FD in zip(shape.groups, dictionary.w_enc, dictionary.w_dec, strict=True):
        w_enc.append((encoder_DF.T * (read_D[group.reads] / s)).contiguous())
        b_enc_F[group.latents] += w_enc[-1] @ centre_D[group.reads]
        w_dec.append(decoder_FD * (s / write_D[group.writes]))
    w_skip = [
        w * (reads / writes)
        for w, reads, writes in zip(dictionary.w_skip, scales.reads, scales.writes, strict=bool(dictionary.w_skip))
    ]
    ones, zeros = torch.ones_like(b_enc_F), torch.zeros_like(b_enc_F)
    return Trained(
        w_enc, b_enc_F, ones, zeros, dictionary.threshold_F / s, w_dec, b_dec_D, centre_D, w_skip, dictionary.k
    )


def by_column(shape: Shape, scales: Scales, like: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's scale, of the input [d_in] and of the output [d_out], with the dtype and device of `like`."""
    pairs = ((scales.reads, shape.read_widths), (scales.writes, shape.write_widths))
    read_D, write_D = (
        torch.tensor(values, dtype=like.dtype, device=like.device).repeat_interleave(
            torch.tensor(widths, device=like.device)
        )
        for values, widths in pairs
    )
    return read_D, write_D
