"""Random dictionaries of every kind, with their specs and rows: what the tests of file formats publish and read."""

import torch

from sae import artifact
from sae.dictionary import Dictionary
from sae.shape import Shape, size
from sae.spec import DictionarySpec, Options

MODEL, N_LAYERS = "google/gemma-3-270m", 18
KINDS: dict[str, dict] = {
    "sae": {"kind": "sae", "layers": (9,), "folder": "resid_post/layer_9_width_24_l0_4"},
    "attn_sae": {"kind": "sae", "layers": (9,), "site": "attn_out", "folder": "attn_out/layer_9_width_24_l0_4"},
    "transcoder": {"kind": "transcoder", "layers": (9,), "folder": "transcoder/layer_9_width_24_l0_4"},
    "skip_transcoder": {
        "kind": "transcoder", "layers": (9,), "affine": True, "folder": "transcoder/layer_9_width_24_l0_4_affine",
    },
    "crosscoder": {
        "kind": "crosscoder", "layers": (5, 9, 12), "folder": "crosscoder/layer_5_9_12_width_24_l0_4",
    },
    "acausal_crosscoder": {
        "kind": "crosscoder", "layers": (5, 9, 12), "causal": False,
        "folder": "crosscoder/layer_5_9_12_width_24_l0_4_acausal",
    },
    "clt": {"kind": "clt", "layers": (0, 1, 2), "folder": "clt/width_24_l0_4"},
    "skip_clt": {"kind": "clt", "layers": (0, 1, 2), "affine": True, "folder": "clt/width_24_l0_4_affine"},
}  # fmt: skip


def make_spec(name: str, width: int = 24) -> DictionarySpec:
    fields = dict(KINDS[name])
    options = Options(affine=fields.pop("affine", False), causal=fields.pop("causal", True))
    defaults = {"id": "x", "site": "resid_post", "activation": "jumprelu", "width": width, "l0": 4, "seed": 0}
    return DictionarySpec(options=options, **defaults | fields)


def make_dictionary(spec: DictionarySpec, d: int = 10, seed: int = 1) -> Dictionary:
    """About a third of its latents are active on `make_rows`; nothing in it is symmetric or equal across layers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / d**0.5

    shape = Shape.of(spec, {site.key: d for site in spec.sites})
    return Dictionary(
        shape,
        [random(size(group.reads), group.width) for group in shape.groups],
        random(shape.width),
        random(shape.width).abs(),
        [random(group.width, size(group.writes)) for group in shape.groups],
        random(shape.d_out),
        [random(d, d) for _ in spec.layers] if spec.options.affine else [],
    )


def make_rows(dictionary: Dictionary, n_rows: int = 64) -> torch.Tensor:
    """[n_rows, d_in]"""
    return torch.randn(n_rows, dictionary.shape.d_in, generator=torch.Generator().manual_seed(2))


def make_config(spec: DictionarySpec, model: str = MODEL, n_layers: int = N_LAYERS) -> artifact.Config:
    return artifact.config(spec, model, n_layers)


def tensors(dictionary: Dictionary) -> list[torch.Tensor]:
    """Every weight, in one order."""
    vectors = [dictionary.b_enc_F, dictionary.threshold_F, dictionary.b_dec_D]
    return [*dictionary.w_enc, *dictionary.w_dec, *dictionary.w_skip, *vectors]
