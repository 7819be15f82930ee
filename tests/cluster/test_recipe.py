"""Every shipped recipe parses; the grid expands to stable, distinct ids; the plan is balanced."""

import sys
from pathlib import Path

import pytest
import torch

from cluster import gemma
from cluster.errors import UserError
from cluster.memory import memory
from cluster.planner import lay_out, table
from cluster.recipe_file import load, parse
from cluster.run_folder import results_of
from jobs import sweep as job
from sae.presets import GEMMA_SCOPE_2
from sae.sites import HOOK_POINTS
from sae.spec import AuxK, Matryoshka, Options, Preactivation, Resampling, Training

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_parse_expand_and_plan(path: Path) -> None:
    recipe = load(str(path))
    # The instruction-tuned 270M is on Hugging Face only, and of the packaged one's shape.
    assert recipe.model.name in ("package:gemma-3-270m", "google/gemma-3-270m-it")
    config = gemma.text_config(recipe.model.model_copy(update={"name": "package:gemma-3-270m"}))
    layout = lay_out(recipe, config)
    assert layout.specs == recipe.specs()
    planned = memory(recipe, layout, config)
    assert planned.total(recipe) > 0
    assert len(table(recipe, layout, planned).splitlines()) < 100


def test_demo__is_twelve_dictionaries_at_three_layers() -> None:
    specs = load(str(ROOT / "jobs/recipes/demo.yaml")).specs()
    assert len({spec.id for spec in specs}) == 12
    assert {(spec.site, spec.layers) for spec in specs} == {("resid_post", (layer,)) for layer in (5, 9, 12)}
    assert {spec.width for spec in specs} == {4096}


def test_ids__change_with_what_changes_the_result_and_with_nothing_else(tiny_recipe: dict) -> None:
    def first_id(**changes) -> str:
        return parse(tiny_recipe | changes).specs()[0].id

    same, fit = first_id(), tiny_recipe["fit"]
    assert first_id(output="elsewhere", fit=fit | {"workers": 3}, evaluation={"loss_tokens": 64}) == same
    assert first_id(fit=fit | {"products": "bfloat16"}) != same
    assert first_id(seed=1) != same
    assert first_id(training={"learning_rate": 0.01}) != same
    assert first_id(corpus=tiny_recipe["corpus"] | {"train_tokens": 32_768}) != same
    assert first_id(harvest={"sequences": 16}) != same


def first_of(recipe: dict, **grid):
    """The first dictionary and its suite, of a recipe with one grid."""
    common = {"layers": [1], "activations": ["jumprelu"], "widths": [64], "l0s": [8]}
    return parse(recipe | {"sweep": [common | grid]}).cells()[0]


KINDS = {
    "sae": ([("resid_post", 1)], [("resid_post", 1)]),
    "transcoder": ([("mlp_in", 1)], [("mlp_out", 1)]),
    "crosscoder": ([("resid_post", 1), ("resid_post", 3)],) * 2,
    "clt": ([("mlp_in", 1), ("mlp_in", 3)], [("mlp_out", 1), ("mlp_out", 3)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds__read_and_write_their_sites(tiny_recipe: dict, kind: str) -> None:
    layers = [3, 1] if kind in ("crosscoder", "clt") else [1]
    spec = first_of(tiny_recipe, kind=kind, layers=layers).spec
    reads, writes = KINDS[kind]
    assert [(site.name, site.layer) for site in spec.reads] == reads
    assert [(site.name, site.layer) for site in spec.writes] == writes
    recipe = parse(tiny_recipe | {"sweep": [spec_grid(kind, layers)], "fit": {"workers": 1}})
    layout = lay_out(recipe, gemma.text_config(recipe.model))
    assert sorted(layout.keys(0)) == sorted({f"{name}.{layer}" for name, layer in [*reads, *writes]})


def spec_grid(kind: str, layers: list[int]) -> dict:
    return {"kind": kind, "layers": layers, "activations": ["topk"], "widths": [64], "l0s": [8]}


OPTIONS = {
    "matryoshka": ({"prefixes": [0.25, 0.5], "sampled": True}, Matryoshka(prefixes=(0.25, 0.5), sampled=True)),
    "auxk": ({"latents": 7}, AuxK(latents=7)),
    "preactivation": ({}, Preactivation()),
    "resampling": ({"at": [0.5]}, Resampling(at=(0.5,))),
    "dead_after_rows": (9, 9),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options__reach_the_dictionary_and_name_its_suite(tiny_recipe: dict, name: str) -> None:
    given, expected = OPTIONS[name]
    spec, suite = first_of(tiny_recipe, options={name: given})
    assert spec.options == Options(**{name: expected})
    assert suite == ("jumprelu" if name == "dead_after_rows" else f"jumprelu-{name}")


def test_options__causal_and_affine(tiny_recipe: dict) -> None:
    acausal, suite = first_of(tiny_recipe, kind="crosscoder", layers=[0, 2], options={"causal": False})
    assert (acausal.options, suite) == (Options(causal=False), "jumprelu-acausal")
    recipe = parse(tiny_recipe | {"sweep": [spec_grid("clt", [0, 1]) | {"affine": [False, True]}]})
    assert [spec.options.affine for spec in recipe.specs()] == [False, True]
    assert [spec.folder for spec in recipe.specs()] == [
        "clt/layer_0_1_width_64_l0_8",
        "clt/layer_0_1_width_64_l0_8_affine",
    ]


@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk", "jumprelu", "gated"])
def test_activations__each_can_be_named(tiny_recipe: dict, activation: str) -> None:
    spec, suite = first_of(tiny_recipe, activations=[activation])
    assert spec.activation == suite == activation


def test_seeds__draw_anew_on_the_same_rows_in_folders_of_their_own(tiny_recipe: dict) -> None:
    grid = tiny_recipe["sweep"][0] | {"layers": [0], "seeds": [0, 1]}
    specs = parse(tiny_recipe | {"seed": 5, "sweep": [grid]}).specs()
    assert [(spec.seed, spec.folder) for spec in specs] == [
        (5, "resid_post/layer_0_width_64_l0_8"),
        (6, "resid_post/layer_0_width_64_l0_8_seed_1"),
    ]


def test_training__preset_overrides_and_a_grids_own(tiny_recipe: dict) -> None:
    def training(of_recipe, of_grid=None) -> Training:
        return first_of(tiny_recipe | {"training": of_recipe}, training=of_grid).spec.training

    assert training({}) == Training()
    assert training("gemma_scope_2") == GEMMA_SCOPE_2
    mixed = training({"base": "gemma_scope_2", "warmup_steps": 5, "jumprelu": {"coefficient": 0.5}})
    jumprelu = GEMMA_SCOPE_2.jumprelu.model_copy(update={"coefficient": 0.5})
    assert mixed == GEMMA_SCOPE_2.model_copy(update={"warmup_steps": 5, "jumprelu": jumprelu})
    assert training("gemma_scope_2", {"learning_rate": 0.5}) == Training(learning_rate=0.5)


def test_suite__keeps_apart_what_differs_in_training_only(tiny_recipe: dict) -> None:
    grid = spec_grid("sae", [0])
    cells = parse(tiny_recipe | {"sweep": [grid, grid | {"training": "gemma_scope_2", "suite": "published"}]}).cells()
    assert [cell.suite for cell in cells] == ["topk", "topk-published"]
    assert len({cell.spec.id for cell in cells}) == 2


def test_plan__prints_and_starts_nothing(tiny_recipe: dict, tmp_path: Path, monkeypatch, capfd) -> None:
    recipe = parse(tiny_recipe | {"corpus": tiny_recipe["corpus"] | {"paths": ["/nowhere/*.jsonl"]}})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(tmp_path / "recipe.yaml"), "--plan"])
    assert job.main() == 0
    printed = capfd.readouterr().out
    assert all(spec.id in printed for spec in recipe.specs())
    assert "memory" in printed
    assert not Path(tiny_recipe["output"]).exists()


@pytest.mark.parametrize("path", [*RECIPES, None], ids=lambda path: path.name if path else "tiny")
def test_resolved_recipe__parses_to_itself(path: Path | None, tiny_recipe: dict, tmp_path: Path) -> None:
    recipe = load(str(path)) if path else parse(tiny_recipe)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    again = load(str(tmp_path / "resolved.yaml"))
    assert again == recipe
    assert again.cells() == recipe.cells()


@pytest.mark.parametrize("site", HOOK_POINTS)
def test_every_site_can_be_named_in_a_recipe(tiny_recipe: dict, site: str) -> None:
    grid = tiny_recipe["sweep"][0] | {"sites": [site]}
    assert {spec.site for spec in parse(tiny_recipe | {"sweep": [grid]}).specs()} == {site}


@pytest.mark.parametrize(
    ("capability", "gpus", "asked", "dtype"),
    [
        ("AVX2", 0, {}, "float32"),
        ("AVX512", 0, {}, "bfloat16"),
        ("AVX2", 1, {}, "bfloat16"),
        ("AVX2", 1, {"dtype": "float32"}, "float32"),
        ("AVX2", 0, {"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_dtype__is_by_default_what_the_devices_are_fast_at(
    monkeypatch, tiny_recipe: dict, capability: str, gpus: int, asked: dict, dtype: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = {"name": tiny_recipe["model"]["name"]} | asked
    content = tiny_recipe | {"model": model, "harvest": tiny_recipe["harvest"] | {"gpus": gpus}}
    assert parse(content).model.dtype == dtype


def test_products__are_by_default_what_the_devices_are_fast_at(monkeypatch, tiny_recipe) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    fit = {key: value for key, value in tiny_recipe["fit"].items() if key != "products"}
    narrow, by_default, on_gpus = (
        parse(tiny_recipe | {"fit": fit | more}) for more in ({"products": "bfloat16"}, {}, {"gpu": True})
    )
    assert [recipe.fit.products for recipe in (narrow, by_default, on_gpus)] == ["bfloat16", "float32", "bfloat16"]
    kept = [results_of(recipe.model_dump(mode="json")) for recipe in (narrow, by_default)]
    assert kept[0] != kept[1]  # a run in the one does not go on in the other
    with pytest.raises(UserError, match="products is float32: on GPUs it is bfloat16"):
        parse(tiny_recipe | {"fit": fit | {"gpu": True, "products": "float32"}})
