"""Starting from published dictionaries: finetuning one, or joining single-layer ones into a crosscoder or CLT.

Joining follows Gemma Scope 2 (technical paper 3.3 and 4.5): walk the layers from the earliest, take a prefix of the
latents of each, and strike from the later layers those most similar to what was taken, encoder against decoder. How
many are struck and what the decoders to later layers start at is not public: both are *assumed* here.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae.dictionary import Dictionary
from sae.fold import Scales, Trained, unfold
from sae.shape import Shape


class StartError(ValueError):
    """Published dictionaries that the wanted one cannot start from."""


def finetune(dictionary: Dictionary, shape: Shape, scales: Scales, autoencodes: bool) -> Trained:
    """The weights of a published dictionary of the same shape, on rows of the new scales."""
    if dictionary.shape != shape:
        raise StartError(f"it has shape {_sizes(dictionary.shape)}, the wanted dictionary {_sizes(shape)}")
    return unfold(dictionary, scales, centred=autoencodes)


def join(singles: list[Dictionary], shape: Shape, scales: Scales, autoencodes: bool) -> Trained:
    """A layered dictionary from one single-layer dictionary a layer, earliest first, each at least a group wide."""
    if len(singles) != len(shape.groups):
        raise StartError(f"{len(singles)} single-layer dictionaries for {len(shape.groups)} layers: give one a layer")
    for layer, (single, group) in enumerate(zip(singles, shape.groups, strict=True)):
        wanted = (shape.read_widths[layer], shape.write_widths[layer])
        if (single.shape.d_in, single.shape.d_out) != wanted or single.shape.width < group.width:
            raise StartError(
                f"the dictionary of layer {layer} of the set has shape {_sizes(single.shape)}: it must read and write "
                f"{wanted} columns with at least {group.width} latents"
            )
    parts = [
        unfold(single, Scales([reads], [writes]), centred=autoencodes)
        for single, reads, writes in zip(singles, scales.reads, scales.writes, strict=True)
    ]
    taken = choose([part.w_enc[0] for part in parts], [part.w_dec[0] for part in parts], shape.groups[0].width)
    chosen = [(part, latents) for part, latents in zip(parts, taken, strict=True)]
    b_enc_F = torch.cat([part.b_enc_F[latents] for part, latents in chosen])
    threshold_F = torch.cat([part.threshold_F[latents] for part, latents in chosen])
    return Trained(
        w_enc=[part.w_enc[0][latents] for part, latents in chosen],
        b_enc_F=b_enc_F,
        gain_F=torch.ones_like(b_enc_F),
        shift_F=torch.zeros_like(b_enc_F),
        threshold_F=threshold_F,
        w_dec=[_onwards(layer, parts, taken[layer]) for layer in range(len(parts))],
        b_dec_D=torch.cat([part.b_dec_D for part in parts]),
        centre_D=torch.cat([part.centre_D for part in parts]),
        w_skip=[part.w_skip[0] for part in parts if part.w_skip],
    )


def choose(encoders: list[Tensor], decoders: list[Tensor], width: int) -> list[Tensor]:
    """Indices of the latents taken from each layer, `width` of each, ascending; encoders and decoders are [F, D].

    A layer's surplus over `width` is what can be struck: the latents most similar to any taken at an earlier layer.
    """
    taken: list[Tensor] = []
    for encoder_FD in encoders:
        alive_F = torch.ones(len(encoder_FD), dtype=torch.bool)
        if taken:
            earlier = torch.cat([decoders[n][latents] for n, latents in enumerate(taken)])
            similarity_F = (normalize(encoder_FD) @ normalize(earlier).T).amax(1)
            struck = similarity_F.topk(len(encoder_FD) - width).indices
            alive_F[struck] = False
        taken.append(alive_F.nonzero()[:width, 0])
    return taken


def _onwards(layer: int, parts: list[Trained], latents: Tensor) -> Tensor:
    """Decoder rows of a layer's latents to that layer and all later ones.

    To a later layer a latent writes what the latent there that is most similar to it writes, times their similarity
    if that is positive. [width, columns written]
    """
    own = parts[layer].w_dec[0][latents]
    blocks = [own]
    for later in parts[layer + 1 :]:
        cosine_FG = normalize(own) @ normalize(later.w_enc[0]).T
        similarity_F, nearest_F = cosine_FG.max(1)
        blocks.append(later.w_dec[0][nearest_F] * similarity_F.clamp_min(0)[:, None])
    return torch.cat(blocks, dim=1)


def _sizes(shape: Shape) -> str:
    groups = f" in {len(shape.groups)} layers" if len(shape.groups) > 1 else ""
    return f"{shape.d_in} -> {shape.width} latents{groups} -> {shape.d_out}"
