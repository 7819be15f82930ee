"""Capture and splice at every site, of text-only and multimodal checkpoints, loaded whole or as far as needed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3TextModel

from cluster import gemma, memory, planner, recipe_file
from cluster.errors import UserError
from cluster.harvest import Harvester
from cluster.recipe import Model
from sae import hooks
from sae.sites import HOOK_POINTS, Site
from tests.conftest import tiny_config, write_tokenizer

TOKENS = torch.randint(4, 200, (3, 20), generator=torch.Generator().manual_seed(0))
REAL = torch.ones_like(TOKENS, dtype=torch.bool)
STACK = "language_model.model."  # where the multimodal checkpoint keeps its decoder stack
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


def rename(folder: Path, source: Path, prefix: str) -> Path:
    """A copy of a multimodal checkpoint's decoder stack under another prefix."""
    weights = load_file(source / "model.safetensors")
    stack = {name: tensor for name, tensor in weights.items() if name.startswith(STACK)}
    rest = {} if prefix == "model." else {name: tensor for name, tensor in weights.items() if name not in stack}
    renamed = {prefix + name.removeprefix(STACK): tensor for name, tensor in stack.items()}
    folder.mkdir()
    save_file(renamed | rest, folder / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(source)
    (config.get_text_config() if prefix == "model." else config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(params=["text", "multimodal"])
def loaded(request, tiny_gemma: Path, multimodal_gemma: Path) -> torch.nn.Module:
    folder = tiny_gemma if request.param == "text" else multimodal_gemma
    return gemma.load(Model(name=str(folder), dtype="float32"), torch.device("cpu"))


def reference(model: torch.nn.Module) -> dict[Site, torch.Tensor]:
    """Each site by its hook string in Gemma Scope 2's config, read off a full forward pass."""
    layers, captured, handles = hooks.trunk(model).layers, {}, []
    for site in SITES:
        place = site.hook_point.removeprefix(f"model.layers.{site.layer}.")
        path, _, end = place.rpartition(".")

        def keep(module, inputs, output, site=site, end=end):
            captured[site] = inputs[0].clone() if end == "input" else output.clone()

        handles.append(layers[site.layer].get_submodule(path).register_forward_hook(keep))
    hooks.trunk(model)(TOKENS)
    for handle in handles:
        handle.remove()
    return captured


@torch.no_grad()
def test_capture__gives_the_tensors_that_the_hook_strings_name(loaded) -> None:
    captured, expected = hooks.capture(loaded, TOKENS, SITES), reference(loaded)
    config = hooks.trunk(loaded).config
    for site in SITES:
        assert captured[site].shape == (3, 20, gemma.site_width(config, site)), site
        assert torch.equal(captured[site], expected[site]), site


def test_capture__stops_after_the_last_site(loaded) -> None:
    reached = []
    handle = hooks.trunk(loaded).layers[3].register_forward_hook(lambda *_: reached.append(3))
    hooks.capture(loaded, TOKENS, [Site(2, "resid_post")])
    assert not reached
    hooks.capture(loaded, TOKENS, [Site(3, "mlp_out")])
    handle.remove()
    assert not reached  # the last layer's MLP is needed, its output is not


@torch.no_grad()
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.key)
def test_hooked__a_returned_tensor_takes_the_sites_place(loaded, site: Site) -> None:
    clean = gemma.loss(loaded, TOKENS, REAL)
    with hooks.hooked(loaded, {site: lambda tensor: tensor.clone()}):
        assert gemma.loss(loaded, TOKENS, REAL) == clean
    with hooks.hooked(loaded, {site: torch.zeros_like}):
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


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_load_trunk__gives_the_same_bits_for_equal_text_weights(multimodal_gemma: Path, tmp_path, prefix: str) -> None:
    """Text-only, multimodal as transformers 5 names its weights, and as Google published them."""
    whole = gemma.load(Model(name=str(multimodal_gemma), dtype="float32"), torch.device("cpu"))
    expected = hooks.capture(whole, TOKENS, SITES)
    folder = rename(tmp_path / "renamed", multimodal_gemma, prefix)
    stack = gemma.load_trunk(Model(name=str(folder), dtype="float32"), SITES, torch.device("cpu"))
    assert type(stack) is Gemma3TextModel  # no vision tower
    found = hooks.capture(stack, TOKENS, SITES)
    assert list(found) == list(expected)
    for site in SITES:
        assert torch.equal(found[site], expected[site]), site


def test_harvester__holds_no_parameter_beyond_the_last_site(tiny_recipe: dict, tmp_path: Path) -> None:
    tiny_recipe["sweep"] = [{"layers": [0, 2], "activations": ["topk"], "widths": [64], "l0s": [8]}]
    parsed = recipe_file.parse(tiny_recipe)
    config = gemma.text_config(parsed.model)
    np.save(tmp_path / "tokens.npy", TOKENS.int().numpy())
    planned = planner.lay_out(parsed, config)
    held = dict(Harvester(parsed, planned.sites, {}, tmp_path / "tokens.npy", None).model.model.named_parameters())
    whole = dict(hooks.trunk(gemma.load(parsed.model, torch.device("cpu"))).named_parameters())
    assert held.keys() == {name for name in whole if not name.startswith(("layers.3.", "norm."))}
    counted = sum(parameter.numel() for parameter in held.values())
    assert counted == gemma.trunk_parameters(config, planned.sites) < gemma.parameters(config)
    # The planner counts these bytes, and no others of the model.
    deeper = planner.lay_out(
        recipe_file.parse(tiny_recipe | {"sweep": [tiny_recipe["sweep"][0] | {"layers": [0, 3]}]}), config
    )
    beyond = sum(parameter.numel() for name, parameter in whole.items() if name.startswith("layers.3."))
    sizes = [memory.memory(parsed, it, config).harvest for it in (planned, deeper)]
    assert sizes[1] - sizes[0] == 2 * beyond


def test_load_trunk__refuses_a_checkpoint_that_lacks_weights(tiny_gemma: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_gemma / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_gemma / "config.json").read_text())
    write_tokenizer(tmp_path)
    model = Model(name=str(tmp_path))
    gemma.load_trunk(model, [Site(0, "resid_post")], torch.device("cpu"))  # not needed, not missed
    with pytest.raises(UserError, match=r"no layers\.1\.mlp\.up_proj"):
        gemma.load_trunk(model, [Site(1, "resid_post")], torch.device("cpu"))
