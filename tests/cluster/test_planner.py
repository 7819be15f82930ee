"""The planner: every dictionary lies somewhere, teams are balanced, what does not fit is cut or refused."""

import re
from types import SimpleNamespace

import pytest

from cluster import gemma, session
from cluster.errors import UserError
from cluster.layout import Layout, Place
from cluster.memory import GIB, memory, wire, workers_bytes
from cluster.planner import lay_out, table
from cluster.recipe import Recipe
from cluster.recipe_file import parse
from sae.shape import Shape


def plan(recipe: dict, **fit) -> tuple[Recipe, Layout]:
    parsed = parse(recipe | {"fit": fit})
    return parsed, lay_out(parsed, gemma.text_config(parsed.model))


@pytest.fixture
def one(tiny_recipe: dict) -> dict:
    """A recipe of one dictionary, wide enough for its parameters to be most of a worker's memory."""
    grid = {"layers": [0], "activations": ["batch_topk"], "widths": [65536], "l0s": [8]}
    return tiny_recipe | {"sweep": [grid]}


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6])
def test_lay_out__every_team_holds_a_fair_run_of_the_dictionaries(tiny_recipe: dict, workers: int) -> None:
    recipe, layout = plan(tiny_recipe, workers=workers)
    assert layout.specs == recipe.specs()
    assert (len(layout.teams), layout.replicas, layout.shards) == (workers, 1, 1)
    sizes = [len(team) for team in layout.teams]
    assert max(sizes) - min(sizes) <= 1


def test_lay_out__uneven_costs_are_balanced(tiny_recipe: dict) -> None:
    grids = [
        {"layers": [0], "activations": ["topk"], "widths": [64, 128, 256, 512], "l0s": [8]},
        {"layers": [1], "activations": ["topk"], "widths": [1024], "l0s": [8]},
    ]
    _, layout = plan(tiny_recipe | {"sweep": grids}, workers=2)
    assert [[spec.width for spec in team] for team in layout.teams] == [[64, 128, 256, 512], [1024]]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (3, 1, 1), (2, 3, 1), (2, 1, 4), (2, 3, 4)])
def test_place__names_every_rank_once(mesh: tuple[int, int, int]) -> None:
    teams, replicas, shards = mesh
    layout = Layout([[]] * teams, {}, 1, replicas, shards)
    places = [layout.place(rank) for rank in range(layout.n_ranks)]
    assert set(places) == {Place(t, r, s) for t in range(teams) for r in range(replicas) for s in range(shards)}
    assert [layout.rank(place) for place in places] == list(range(teams * replicas * shards))


def test_more_workers_than_dictionaries__cut_each_the_way_that_sends_less(one: dict) -> None:
    """A step sends partial reconstructions over shards, parameters over replicas."""
    _, wide = plan(one, workers=2)
    assert (wide.replicas, wide.shards) == (1, 2)
    narrow = one | {"sweep": [one["sweep"][0] | {"widths": [16]}], "stream": one["stream"] | {"batch_rows": 2048}}
    _, small = plan(narrow, workers=2)
    assert (small.replicas, small.shards) == (2, 1)


def test_memory__dictionaries_are_cut_until_they_fit(one: dict) -> None:
    recipe, whole = plan(one, workers=1)
    needed = workers_bytes(recipe, whole)[0] / GIB
    recipe, layout = plan(one, workers=4, replicas=1, memory_gib=needed * 0.75)
    assert layout.shards == 4
    assert max(workers_bytes(recipe, layout)) <= needed * 0.75 * GIB
    (group,) = Shape.of(recipe.specs()[0], layout.widths).shard(4).groups
    assert group.width == 65536 // 4


def test_memory__what_cannot_fit_is_refused_with_the_smallest_change(one: dict) -> None:
    with pytest.raises(UserError, match=r"fit\.memory_gib: 0\.54 GiB, but .* 2 workers needs") as refused:
        plan(one, workers=2, memory_gib=0.54)
    found = re.search(r"raise fit.memory_gib to ([\d.]+) or fit.workers to (\d+)", str(refused.value))
    assert found, refused.value
    enough, workers = float(found[1]), int(found[2])
    assert plan(one, workers=2, memory_gib=enough)
    assert plan(one, workers=workers, memory_gib=0.54)
    factor, widest = narrowing(refused)
    assert widest == 65536 // factor

    def narrow(width: int) -> dict:
        return one | {"sweep": [one["sweep"][0] | {"widths": [width]}]}

    assert plan(narrow(widest), workers=2, memory_gib=0.54)
    for recipe, too_little in (
        (one, {"workers": 2, "memory_gib": enough - 0.1}),
        (one, {"workers": workers // 2, "memory_gib": 0.54}),
        (narrow(2 * widest), {"workers": 2, "memory_gib": 0.54}),
    ):
        with pytest.raises(UserError):
            plan(recipe, **too_little)


def narrowing(refused: pytest.ExceptionInfo) -> tuple[int, int]:
    """What the refusal tells to do about widths."""
    found = re.search(r"divide widths by (\d+) \(the widest is then ([\d,]+)\)", str(refused.value))
    assert found, refused.value
    return int(found[1]), int(found[2].replace(",", ""))


def test_machine__what_it_cannot_hold_is_refused_with_the_widths_that_it_can(one: dict, monkeypatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=6 * GIB))

    def check(width: int) -> None:
        recipe, layout = plan(one | {"sweep": [one["sweep"][0] | {"widths": [width]}]})
        session.check_machine(recipe, layout, gemma.text_config(recipe.model))

    with pytest.raises(UserError, match=r"sweep: needs .* this machine has 6.0 GiB free") as refused:
        check(2**22)
    factor, widest = narrowing(refused)
    assert widest == 2**22 // factor
    check(widest)
    with pytest.raises(UserError):
        check(2 * widest)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=GIB))
    with pytest.raises(UserError, match="no width would fit"):
        check(64)


@pytest.mark.parametrize(
    ("fit", "told"),
    [
        ({"workers": 3, "shards": 2}, "fit.workers: 3 workers cannot be cut"),
        ({"workers": 3, "shards": 3}, "multiples of 65536 latents"),
        ({"workers": 2, "shards": 1, "replicas": 1}, "2 workers cannot be cut"),
    ],
)
def test_meshes__that_cannot_be_are_refused(one: dict, fit: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(one, **fit)


def test_table__says_who_holds_what_and_how_it_is_cut(one: dict) -> None:
    recipe, layout = plan(one, workers=4, shards=2, replicas=2)
    text = table(recipe, layout, memory(recipe, layout, gemma.text_config(recipe.model)))
    assert "0-3 " in text
    assert "each dictionary's latents over 2 and rows over 2" in text
    assert f"{wire(recipe, layout) / 2**20:,.1f} MiB a step" in text
