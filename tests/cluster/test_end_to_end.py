"""Finetuning with the model in the loop, on the tiny Gemma, without Ray."""

from pathlib import Path

import pytest
import torch

from cluster import recipe_file
from cluster.calibrate import measure
from cluster.end_to_end import Loop
from cluster.gemma import load
from cluster.tokens import Span
from sae import artifact
from sae.hooks import capture
from sae.step import TrainingDictionary

SWEEPS = {
    "sae": {"layers": [1]},
    "clt": {"kind": "clt", "layers": [0, 1, 2], "affine": [True]},
}


@pytest.fixture(params=SWEEPS)
def loop(request, tiny_recipe: dict, tmp_path: Path) -> Loop:
    """A dictionary that has seen a few batches, published, and its loop."""
    torch.set_num_threads(1)
    grid = SWEEPS[request.param] | {"activations": ["jumprelu"], "widths": [96], "l0s": [12]}
    more = {"sweep": [grid], "end_to_end": {"tokens": 4096, "learning_rate": 3e-3}}
    recipe = recipe_file.parse(tiny_recipe | more | {"model": tiny_recipe["model"] | {"dtype": "float32"}})
    (spec,) = recipe.specs()
    model = load(recipe.model, torch.device("cpu"))
    tokens = torch.randint(4, 200, (16, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 2
    captured = capture(model, tokens, spec.sites)
    scales = measure(tokens != 2, captured, 10)
    rows = {site: captured[site][:, 1:].flatten(0, 1).float() / scales[site.key].scale for site in spec.sites}
    x, y = (torch.cat([rows[site] for site in sites], dim=1) for sites in (spec.reads, spec.writes))
    dictionary = TrainingDictionary(spec, {site.key: 32 for site in spec.sites}, torch.device("cpu"))
    for step in range(60):
        dictionary.step(x, x if spec.autoencodes else y, (step + 1) / 60)
    artifact.write(
        tmp_path / "x",
        dictionary.folded({key: scale.scale for key, scale in scales.items()}),
        artifact.config(spec, "tiny", 4),
    )
    artifact.seal(tmp_path / "x")
    loop = Loop(recipe, recipe.end_to_end, spec, tmp_path / "x", scales)
    loop.tokens = Span.of_text(tokens, 2)
    return loop


def test_loop__the_models_output_comes_nearer_to_its_own(loop: Loop) -> None:
    divergences = [loop.step(loop.tokens) for _ in range(60)]
    assert divergences[0] > 0
    assert sum(divergences[-5:]) < 0.8 * sum(divergences[:5])


def test_loop__the_divergence_has_its_gradient_through_the_model(loop: Loop) -> None:
    """Along a random direction of the first decoder's weights, which moves no latent over its threshold."""
    weights = loop.dictionary.weights.w_dec[0]
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(loop.forward(loop.tokens)[1], weights)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weights += sign * 1e-3 * direction
            values.append(loop.forward(loop.tokens)[1].item())
            weights -= sign * 1e-3 * direction
    numeric = (values[0] - values[1]) / 2e-3
    assert numeric == pytest.approx((gradient * direction).sum().item(), rel=0.05)
    assert abs(numeric) > 1e-4


def test_loop__a_perfect_dictionary_would_diverge_by_nothing(loop: Loop) -> None:
    clean = loop._hidden(loop.tokens).detach()
    assert loop._divergence(clean, clean).item() == pytest.approx(0, abs=1e-6)
    assert loop._divergence(clean, clean.roll(1, dims=0)).item() > 1e-3
