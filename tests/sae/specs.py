"""Small dictionaries of every kind, for the tests of sae/."""

import torch

from sae.spec import DictionarySpec, Options, Training

SITE_WIDTHS = {f"{name}.{layer}": 6 + layer for name in ("resid_post", "mlp_in", "mlp_out") for layer in range(3)}
KINDS = {
    "sae": {"kind": "sae", "layers": (1,)},
    "transcoder": {"kind": "transcoder", "layers": (1,)},
    "skip_transcoder": {"kind": "transcoder", "layers": (1,), "affine": True},
    "acausal_crosscoder": {"kind": "crosscoder", "layers": (0, 1, 2), "causal": False},
    "causal_crosscoder": {"kind": "crosscoder", "layers": (0, 1, 2)},
    "clt": {"kind": "clt", "layers": (0, 1, 2)},
    "skip_clt": {"kind": "clt", "layers": (0, 2), "affine": True},
}
ACTIVATIONS = ("relu", "topk", "batch_topk", "jumprelu", "gated")


def make_spec(
    kind: str = "sae", activation: str = "batch_topk", width: int = 48, l0: int = 6, **more
) -> DictionarySpec:
    """`more` are fields of Options and, in `training`, of Training."""
    shape = dict(KINDS[kind])
    switches = {name: shape.pop(name) for name in ("affine", "causal") if name in shape}
    training = Training(**more.pop("training", {}))
    return DictionarySpec(
        id="x", site="resid_post", activation=activation, width=width, l0=l0, seed=3, folder="x",
        options=Options(**switches, **more), training=training, **shape,
    )  # fmt: skip


def make_rows(spec: DictionarySpec, seed: int, n_rows: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y, each site's rows of unit mean square norm; y depends on x."""
    generator = torch.Generator().manual_seed(seed)
    widths = [SITE_WIDTHS[site.key] for site in spec.reads]
    x = torch.randn(n_rows, sum(widths), generator=generator)
    y = x if spec.autoencodes else torch.tanh(x.flip(1) + 0.3 * torch.randn(x.shape, generator=generator))
    parts = ([part / part.square().sum(1).mean().sqrt() for part in t.split(widths, dim=1)] for t in (x, y))
    x, y = (torch.cat(part, dim=1) for part in parts)
    return x, (x if spec.autoencodes else y)
