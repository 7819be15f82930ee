"""Every shipped recipe parses; the grid expands to stable, distinct ids; the plan is balanced."""

from pathlib import Path

import pytest

from cluster import gemma
from cluster.layout import lay_out, memory
from cluster.recipe import load, parse
from sae.sites import HOOK_POINTS

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_parse_expand_and_plan(path: Path) -> None:
    recipe = load(str(path))
    config = gemma.text_config(recipe.model)
    layout = lay_out(recipe, config)
    assert [spec for rank in layout.ranks for spec in rank] == recipe.specs()
    assert memory(recipe, layout, gemma.parameters(config)).total(recipe) > 0


def test_demo__is_twelve_dictionaries_at_three_layers() -> None:
    specs = load(str(ROOT / "jobs/recipes/demo.yaml")).specs()
    assert len({spec.id for spec in specs}) == 12
    assert {(spec.site, spec.layer) for spec in specs} == {("resid_post", layer) for layer in (5, 9, 12)}
    assert {spec.width for spec in specs} == {4096}


def test_ids__change_with_what_changes_the_result_and_with_nothing_else(tiny_recipe: dict) -> None:
    def first_id(**changes) -> str:
        return parse(tiny_recipe | changes).specs()[0].id

    same = first_id()
    assert first_id(output="elsewhere", fit={"workers": 3}, evaluation={"loss_tokens": 64}) == same
    assert first_id(seed=1) != same
    assert first_id(training={"learning_rate": 0.01}) != same
    assert first_id(corpus=tiny_recipe["corpus"] | {"train_tokens": 32_768}) != same
    assert first_id(harvest={"sequences": 16}) != same


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6])
def test_lay_out__every_rank_holds_a_fair_run_of_the_dictionaries(tiny_recipe: dict, workers: int) -> None:
    recipe = parse(tiny_recipe | {"fit": {"workers": workers}})
    layout = lay_out(recipe, gemma.text_config(recipe.model))
    assert [spec for rank in layout.ranks for spec in rank] == recipe.specs()
    sizes = [len(rank) for rank in layout.ranks]
    assert len(sizes) == workers
    assert max(sizes) - min(sizes) <= 1


def test_resolved_recipe__parses_to_itself(tiny_recipe: dict, tmp_path: Path) -> None:
    recipe = parse(tiny_recipe)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load(str(tmp_path / "resolved.yaml")) == recipe


@pytest.mark.parametrize("site", HOOK_POINTS)
def test_every_site_can_be_named_in_a_recipe(tiny_recipe: dict, site: str) -> None:
    grid = tiny_recipe["sweep"][0] | {"sites": [site]}
    assert {spec.site for spec in parse(tiny_recipe | {"sweep": [grid]}).specs()} == {site}
