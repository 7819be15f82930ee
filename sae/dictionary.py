"""A dictionary as it ships: a JumpReLU autoencoder on raw activations, scale and threshold folded in."""

from typing import NamedTuple

from torch import Tensor

from sae.spec import DictionarySpec


class Dictionary(NamedTuple):
    """f = z·[z > θ] with z = relu(x·w_enc + b_enc); x̂ = f·w_dec + b_dec. All float32, on raw (unscaled) rows."""

    w_enc_DF: Tensor
    b_enc_F: Tensor
    threshold_F: Tensor
    w_dec_FD: Tensor
    b_dec_D: Tensor

    def encode(self, x_BD: Tensor) -> Tensor:
        """Latent activations of raw rows. [B, F]"""
        pre_BF = x_BD @ self.w_enc_DF + self.b_enc_F
        return pre_BF.clamp_min(0) * (pre_BF > self.threshold_F)

    def decode(self, latents_BF: Tensor) -> Tensor:
        """Raw rows rebuilt from latent activations. [B, D]"""
        return latents_BF @ self.w_dec_FD + self.b_dec_D


def fold(parameters: dict[str, Tensor], threshold_F: Tensor, scale: float) -> Dictionary:
    """The shipped form of a dictionary trained on x/scale with a pre-encoder bias x/scale − b_dec.

    Gemma Scope 1, appendix B (*published*): W unchanged, b_enc' = C·(b_enc − W_enc·b_dec), b_dec' = C·b_dec, θ' = C·θ.
    """
    w_enc_DF = parameters["w_enc_FD"].T.contiguous()
    return Dictionary(
        w_enc_DF=w_enc_DF,
        b_enc_F=scale * (parameters["b_enc_F"] - parameters["b_dec_D"] @ w_enc_DF),
        threshold_F=scale * threshold_F,
        w_dec_FD=parameters["w_dec_FD"].clone(),
        b_dec_D=scale * parameters["b_dec_D"],
    )


def parameter_count(spec: DictionarySpec, d: int) -> int:
    """Parameters of a dictionary on a site of width `d`: two matrices, two biases, one threshold a latent."""
    return 2 * spec.width * d + 2 * spec.width + d
