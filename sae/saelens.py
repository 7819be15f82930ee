"""SAELens' own folders, cfg.json and sae_weights.safetensors, written and read (sae-lens 6.54.12).

What SAELens computes, with f its latents and a = b_dec where `apply_b_dec_to_input`, else 0:

    standard, transcoder          f = relu((x − a)·W_enc + b_enc)
    jumprelu                      f = z·[z > threshold], z as above
    gated                         f = relu((x − a)·W_enc·e^r_mag + b_mag)·[(x − a)·W_enc + b_gate > 0]
    topk                          the k largest of z, where `rescale_acts_by_decoder_norm` times W_dec's row norms
    skip                          y = f·W_dec + b_dec + x·W_skipᵀ: W_skip is [D written, D read]

With `reshape_activations: hook_z` it flattens heads itself; our rows are flat already, in the same order.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, PositiveInt
from torch import Tensor

from sae import artifact, strict
from sae.dictionary import Dictionary
from sae.shape import Shape
from sae.sites import HOOK_POINTS
from sae.strict import ArtifactError

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
VERSION = "6.54.12"  # whose format is written
HOOKS = {
    "attn_out": "blocks.{layer}.attn.hook_z",
    "mlp_in": "blocks.{layer}.hook_mlp_in",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "resid_post": "blocks.{layer}.hook_resid_post",
}  # where SAELens' loader of Gemma Scope 2 puts our sites
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
REMEDIES = {
    "expected_average_only_in": "its factor is not in the weights: sae.fold_activation_norm_scaling_factor(factor)",
    "covariance_whitening": "its matrix is not in the weights: sae.fold_activation_whitening(...)",
}  # what to call in SAELens before saving again


class Settings(BaseModel):
    """What reading needs of a cfg.json; defaults are SAELens'."""

    architecture: Literal[
        "standard", "jumprelu", "gated", "topk",
        "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder",
    ]  # fmt: skip
    d_in: PositiveInt
    d_sae: PositiveInt
    d_out: PositiveInt | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    k: PositiveInt | None = None
    rescale_acts_by_decoder_norm: bool = False

    @property
    def written(self) -> int:
        """D written."""
        return self.d_out if "transcoder" in self.architecture and self.d_out else self.d_in


def write(folder: Path, dictionary: Dictionary, config: artifact.Config) -> None:
    """A folder that `SAE.load_from_disk` reads; `config` is the artifact's. SAEs and transcoders only."""
    if config["type"] not in ("sae", "transcoder"):
        raise ValueError(f"{folder}: SAELens has no {config['type']}: publish it in Gemma Scope 2's layout")
    if dictionary.k is not None and (config["type"] == "transcoder" or dictionary.threshold_F.any()):
        raise ValueError(f"{folder}: SAELens has no TopK transcoder, and no TopK with thresholds")
    tensors = {
        "W_enc": dictionary.w_enc[0],
        "b_enc": dictionary.b_enc_F,
        "W_dec": dictionary.w_dec[0],
        "b_dec": dictionary.b_dec_D,
    }
    if dictionary.k is None:
        tensors["threshold"] = dictionary.threshold_F
    if dictionary.w_skip:
        tensors["W_skip"] = dictionary.w_skip[0].T
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(_config(dictionary, config), indent=2) + "\n")
    artifact.save(folder / WEIGHTS, tensors)


def read(folder: Path) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary and cfg.json of a folder that SAELens saved; ArtifactError for what cannot be expressed.

    Equal to SAELens in float32; of half-precision folders the weights are widened, and SAELens itself rounds more.
    """
    content = strict.read_json(folder / CONFIG)
    settings = _settings(folder / CONFIG, content)
    part = strict.load(folder / WEIGHTS, _shapes(settings), DTYPES[settings.dtype])
    w_enc, b_enc_F, threshold_F = _encoder(settings, part)
    w_dec = part["W_dec"]
    topk = settings.architecture == "topk"
    if topk and settings.rescale_acts_by_decoder_norm:
        norm_F = w_dec.norm(dim=1)
        w_enc, b_enc_F, w_dec = w_enc * norm_F, b_enc_F * norm_F, w_dec / norm_F.clamp_min(1e-8)[:, None]
    shape = Shape.layered(settings.d_sae, [settings.d_in], [settings.written], 1)
    skips = [part["W_skip"].T.contiguous()] if "W_skip" in part else []
    k = settings.k if topk else None
    return Dictionary(shape, [w_enc], b_enc_F, threshold_F, [w_dec], part["b_dec"], skips, k), content


def _config(dictionary: Dictionary, config: artifact.Config) -> dict[str, Any]:
    transcodes = config["type"] == "transcoder"
    architecture = "jumprelu" if dictionary.k is None else "topk"
    if transcodes:
        architecture = "jumprelu_skip_transcoder" if dictionary.w_skip else "jumprelu_transcoder"
    hook_in, hook_out = str(config["hf_hook_point_in"]), str(config["hf_hook_point_out"])
    hooks = {"hook_name": _hook_name(hook_in), "hf_hook_name": hook_in}
    hooks_out = {"hook_name_out": _hook_name(hook_out), "hf_hook_name_out": hook_out} if transcodes else {}
    return {
        "architecture": architecture,
        "d_in": dictionary.shape.d_in,
        "d_sae": dictionary.shape.width,
        **({"d_out": dictionary.shape.d_out} if transcodes else {}),
        **({} if dictionary.k is None else {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": config["model_name"],
            **hooks,
            **hooks_out,
            "prepend_bos": True,
        },
    }


def _hook_name(hook_point: str) -> str:
    """TransformerLens' name of a hook string of `sae.sites`."""
    layer = re.sub(r"\D", "", hook_point)
    names = {HOOK_POINTS[site].format(layer=layer): hook.format(layer=layer) for site, hook in HOOKS.items()}
    if hook_point not in names:
        raise ValueError(f"{hook_point} is none of {', '.join(HOOK_POINTS.values())}")
    return names[hook_point]


def _settings(path: Path, content: dict[str, Any]) -> Settings:
    """The part of cfg.json that matters, refusing what would be read as something else."""
    metadata = content.get("metadata")
    major = str(metadata.get("sae_lens_version") if isinstance(metadata, dict) else None).split(".")[0]
    if not major.isdecimal() or int(major) < 6:
        raise ArtifactError(f"{path}: saved before SAELens 6: load it in SAELens and save it again")
    if "batchtopk" in str(content.get("architecture")):
        raise ArtifactError(f"{path}: a training checkpoint of BatchTopK: save it with save_inference_model")
    try:
        settings = Settings.model_validate(content)
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from error
    normalises = settings.normalize_activations
    if normalises != "none":
        remedy = REMEDIES.get(normalises, "it scales each row by its own values, which no fixed weights do")
        raise ArtifactError(f"{path}: normalize_activations is {normalises}: {remedy}")
    if settings.architecture == "topk" and (settings.k is None or settings.k > settings.d_sae):
        raise ArtifactError(f"{path}: topk with k={settings.k} of {settings.d_sae} latents")
    if "transcoder" in settings.architecture and (settings.apply_b_dec_to_input or settings.d_out is None):
        raise ArtifactError(f"{path}: a transcoder needs d_out, and apply_b_dec_to_input false")
    return settings


def _shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    kind, d_in, width, d_out = settings.architecture, settings.d_in, settings.d_sae, settings.written
    vectors = ["b_gate", "b_mag", "r_mag"] if kind == "gated" else ["b_enc"]
    if kind.startswith("jumprelu"):
        vectors.append("threshold")
    skip: dict[str, tuple[int, ...]] = {"W_skip": (d_out, d_in)} if "skip" in kind else {}
    matrices: dict[str, tuple[int, ...]] = {"W_enc": (d_in, width), "W_dec": (width, d_out), "b_dec": (d_out,)}
    return matrices | skip | dict.fromkeys(vectors, (width,))


def _encoder(settings: Settings, part: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc, b_enc and threshold of the JumpReLU that it is, on rows as they come.

    Gated: with z = x·W_enc + b_gate, its magnitude is m = e^r·z + c, c = b_mag − e^r·b_gate, so that z > 0 where m > c.
    """
    w_enc = part["W_enc"]
    shift_F = part["b_dec"] @ w_enc if settings.apply_b_dec_to_input else w_enc.new_zeros(settings.d_sae)
    if settings.architecture == "gated":
        gain_F = part["r_mag"].exp()
        threshold_F = (part["b_mag"] - gain_F * part["b_gate"]).clamp_min(0)  # m ≤ 0 is inactive in any case
        return w_enc * gain_F, part["b_mag"] - gain_F * shift_F, threshold_F
    return w_enc, part["b_enc"] - shift_F, part.get("threshold", torch.zeros(settings.d_sae))
