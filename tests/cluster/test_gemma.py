"""Capture and splice at every site, of text-only and multimodal checkpoints."""

from pathlib import Path

import pytest
import torch

from cluster import gemma
from cluster.recipe import Model
from sae.sites import HOOK_POINTS, Site
from tests.conftest import tiny_config, write_tokenizer

TOKENS = torch.randint(4, 200, (3, 20), generator=torch.Generator().manual_seed(0))
REAL = torch.ones_like(TOKENS, dtype=torch.bool)
SITES = [Site(layer, name) for layer in (0, 2) for name in HOOK_POINTS]


@pytest.fixture(scope="module")
def multimodal_gemma(tmp_path_factory) -> Path:
    """A tiny checkpoint of the 4B's kind: decoder layers below model.language_model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = tiny_config(vocab_size=300).to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299)
    folder = tmp_path_factory.mktemp("multimodal-gemma")
    torch.manual_seed(1)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(params=["text", "multimodal"])
def loaded(request, tiny_gemma: Path, multimodal_gemma: Path) -> torch.nn.Module:
    folder = tiny_gemma if request.param == "text" else multimodal_gemma
    return gemma.load(Model(name=str(folder), dtype="float32"), torch.device("cpu"))


def reference(model: torch.nn.Module) -> dict[Site, torch.Tensor]:
    """Each site by its hook string in Gemma Scope 2's config, read off a full forward pass."""
    layers, captured, handles = gemma.trunk(model).layers, {}, []
    for site in SITES:
        place = site.hook_point.removeprefix(f"model.layers.{site.layer}.")
        path, _, end = place.rpartition(".")

        def keep(module, inputs, output, site=site, end=end):
            captured[site] = inputs[0].clone() if end == "input" else output.clone()

        handles.append(layers[site.layer].get_submodule(path).register_forward_hook(keep))
    gemma.trunk(model)(TOKENS)
    for handle in handles:
        handle.remove()
    return captured


@torch.no_grad()
def test_capture__gives_the_tensors_that_the_hook_strings_name(loaded) -> None:
    captured, expected = gemma.capture(loaded, TOKENS, SITES), reference(loaded)
    config = gemma.trunk(loaded).config
    for site in SITES:
        assert captured[site].shape == (3, 20, gemma.site_width(config, site)), site
        assert torch.equal(captured[site], expected[site]), site


def test_capture__stops_after_the_last_site(loaded) -> None:
    reached = []
    handle = gemma.trunk(loaded).layers[3].register_forward_hook(lambda *_: reached.append(3))
    gemma.capture(loaded, TOKENS, [Site(2, "resid_post")])
    assert not reached
    gemma.capture(loaded, TOKENS, [Site(3, "mlp_out")])
    handle.remove()
    assert not reached  # the last layer's MLP is needed, its output is not


@torch.no_grad()
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.key)
def test_hooked__a_returned_tensor_takes_the_sites_place(loaded, site: Site) -> None:
    clean = gemma.loss(loaded, TOKENS, REAL)
    with gemma.hooked(loaded, {site: lambda tensor: tensor.clone()}):
        assert gemma.loss(loaded, TOKENS, REAL) == clean
    with gemma.hooked(loaded, {site: torch.zeros_like}):
        assert gemma.loss(loaded, TOKENS, REAL) != clean
    assert gemma.loss(loaded, TOKENS, REAL) == clean  # hooks are gone


@torch.no_grad()
def test_loss__is_the_models_own_cross_entropy(loaded) -> None:
    predicted = TOKENS[:, 1:].numel()
    expected = loaded(input_ids=TOKENS, labels=TOKENS).loss.item()
    assert gemma.loss(loaded, TOKENS, REAL) / predicted == pytest.approx(expected, rel=1e-5)


def test_parameters__counts_the_text_model(tiny_gemma: Path) -> None:
    model = Model(name=str(tiny_gemma))
    counted = gemma.parameters(gemma.text_config(model))
    assert counted == sum(p.numel() for p in gemma.load(model, torch.device("cpu")).parameters())
