"""Planner: lays a recipe's dictionaries over its ranks under a memory budget, and tells it in a table."""

import contextlib
import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

from cluster import gemma
from cluster.errors import UserError
from cluster.layout import Layout, Place, sites_of, span
from cluster.memory import GIB, MIB, Memory, wire, workers_bytes
from cluster.recipe import Recipe
from sae.shape import Shape
from sae.spec import DictionarySpec

LISTED = 32  # dictionaries; the table of a larger sweep has a line a rank


def lay_out(recipe: Recipe, config: Any) -> Layout:
    """Cuts the dictionaries, in the order of their first sites, into runs of nearly equal cost, one a team.

    Runs that follow the sites' order send few sites to two teams. Of the meshes that `fit.memory_gib` allows, the one
    with the smallest teams, and of these the one that sends least. `config` is the text model's. UserError if a layer
    does not exist or nothing fits.
    """
    specs, layers = recipe.specs(), config.num_hidden_layers
    for spec in specs:
        if spec.layers[-1] >= layers:
            raise UserError(
                "sweep.layers",
                f"layer {spec.layers[-1]}, but {recipe.model.name} has layers 0 to {layers - 1}: name one of these",
            )
    widths = {site.key: gemma.site_width(config, site) for site in sites_of(specs)}
    whole = Layout([specs], widths, layers)
    candidates = [_cut(whole, recipe.fit.workers, *mesh) for mesh in _meshes(recipe, whole)]
    candidates.sort(key=lambda layout: (layout.replicas * layout.shards, wire(recipe, layout)))
    for layout in candidates:
        if _fits(recipe, layout):
            return layout
    raise _nothing_fits(recipe, whole, candidates)


def _meshes(recipe: Recipe, whole: Layout) -> list[tuple[int, int]]:
    """Replicas and shards of every mesh that the recipe leaves open; UserError if there are none."""
    fit, specs = recipe.fit, whole.specs
    smallest = math.gcd(*(group.width for spec in specs for group in Shape.of(spec, whole.widths).groups))
    divisors = [n for n in range(1, fit.workers + 1) if fit.workers % n == 0]
    found = [
        (replicas, shards)
        for shards in divisors
        for replicas in divisors
        if fit.workers % (shards * replicas) == 0
        and fit.workers // (shards * replicas) <= len(specs)
        and smallest % shards == 0
        and fit.shards in (None, shards)
        and fit.replicas in (None, replicas)
    ]
    if found:
        return found
    raise UserError(
        "fit.workers",
        f"{fit.workers} workers cannot be cut into teams of {fit.replicas or 'any'} replicas x {fit.shards or 'any'} "
        f"shards for {len(specs)} dictionaries whose layers have multiples of {smallest} latents: shards must divide "
        "that, and the product the workers",
    )


def _cut(whole: Layout, workers: int, replicas: int, shards: int) -> Layout:
    """The dictionaries in runs of nearly equal cost, one a team."""
    # All of a step but its dense encoder product grows as the parameters do.
    specs, costs = whole.specs, [whole.parameters(spec) for spec in whole.specs]
    teams, first = [], 0
    for remaining in range(workers // (replicas * shards), 0, -1):
        share, end = sum(costs[first:]) / remaining, first + 1
        while len(specs) - end >= remaining and sum(costs[first:end]) + costs[end] / 2 <= share:
            end += 1
        teams.append(specs[first:end])
        first = end
    return whole._replace(teams=teams, replicas=replicas, shards=shards)


def _fits(recipe: Recipe, layout: Layout) -> bool:
    budget = recipe.fit.memory_gib
    return budget is None or max(workers_bytes(recipe, layout)) <= budget * GIB


def _nothing_fits(recipe: Recipe, whole: Layout, candidates: list[Layout]) -> UserError:
    """Names the least that would have to change: memory, or workers, tried in doubling numbers."""
    least = min(max(workers_bytes(recipe, layout)) for layout in candidates) / GIB
    enough = math.ceil(least * 10) / 10
    remedy = f"raise fit.memory_gib to {enough:g}"
    for factor in (2, 4, 8, 16, 32, 64):
        workers = factor * recipe.fit.workers
        more = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"workers": workers})})
        with contextlib.suppress(UserError):
            if any(_fits(more, _cut(whole, workers, *mesh)) for mesh in _meshes(more, whole)):
                remedy += f" or fit.workers to {workers}"
                break
    meshes = [(layout.replicas, layout.shards) for layout in candidates]
    widths = narrower(
        whole, lambda layout: any(_fits(recipe, _cut(layout, recipe.fit.workers, *mesh)) for mesh in meshes)
    )
    return UserError(
        "fit.memory_gib",
        f"{recipe.fit.memory_gib:g} GiB, but the leanest layout of {recipe.fit.workers} workers needs {least:.2f} "
        f"each: {remedy}, train fewer dictionaries, or {widths}",
    )


def narrower(layout: Layout, fits: Callable[[Layout], bool]) -> str:
    """What to do about widths that do not fit: all are halved until they do."""
    widest = max(spec.width for spec in layout.specs)

    def cut(spec: DictionarySpec, factor: int) -> DictionarySpec:
        return spec.model_copy(update={"width": max(1, spec.width // factor)})

    for factor in (2**n for n in range(1, widest.bit_length())):
        teams = [[cut(spec, factor) for spec in team] for team in layout.teams]
        if fits(layout._replace(teams=teams)):
            return f"divide widths by {factor} (the widest is then {widest // factor:,})"
    return "take a smaller model, window or batch: no width would fit"


def table(recipe: Recipe, layout: Layout, planned: Memory) -> str:
    """The plan: who holds what, and why it fits."""
    lines = _dictionary_lines(layout) if len(layout.specs) <= LISTED else _summary_lines(layout, planned)
    sizes = [f"{size / GIB:.1f}" for size in planned.workers]
    workers = ", ".join(sizes) if len(sizes) <= 4 else f"{len(sizes)}, the largest {max(planned.workers) / GIB:.1f}"
    lines.append(
        f"memory   {planned.total(recipe) / GIB:,.1f} GiB: workers {workers}; "
        f"{recipe.harvest.actors} harvest x {planned.harvest / GIB:.1f}{_shared(recipe, planned)}; "
        f"then {recipe.evaluators} evaluation x {planned.evaluator / GIB:.1f}; the rest Ray and the driver"
    )
    lines.append(f"wire     {wire(recipe, layout) / MIB:,.1f} MiB a step to the busiest worker")
    return "\n".join(lines)


def _shared(recipe: Recipe, planned: Memory) -> str:
    """How a harvest actor's memory is shared."""
    return f" ({recipe.harvest.ranks} ranks x {planned.rank / GIB:.1f})" if planned.rank else ""


def _dictionary_lines(layout: Layout) -> list[str]:
    lines = [f"{'ranks':<7} {'dictionary':<52} {'of':<22} {'parameters':>14}{_how_cut(layout)}"]
    for team, specs in enumerate(layout.teams):
        ranks = _ranks(layout, team)
        lines += [f"{ranks:<7} {spec.id:<52} {span(spec):<22} {layout.parameters(spec):>14,}" for spec in specs]
    return lines


def _ranks(layout: Layout, team: int) -> str:
    """The ranks of a team: 3, or 4-7."""
    size = layout.replicas * layout.shards
    return str(team) if size == 1 else f"{team * size}-{(team + 1) * size - 1}"


def _how_cut(layout: Layout) -> str:
    """What the head of the table says of a mesh."""
    cuts = {"latents": layout.shards, "rows": layout.replicas}
    told = " and ".join(f"{name} over {count}" for name, count in cuts.items() if count > 1)
    return f"   each dictionary's {told}" if told else ""


def _summary_lines(layout: Layout, planned: Memory) -> list[str]:
    """A line a directory of the suites, and a line a rank."""
    lines = [f"{'directory':<22} {'dictionaries':>12} {'parameters':>18}"]
    specs = sorted(layout.specs, key=lambda spec: spec.folder)
    for directory, part in groupby(specs, key=lambda spec: spec.folder.partition("/")[0]):
        counts = [layout.parameters(spec) for spec in part]
        lines.append(f"{directory:<22} {len(counts):>12} {sum(counts):>18,}")
    head = f"{'ranks':<7} {'dictionaries':>12} {'parameters':>18} {'GiB each':>9}  first and last"
    lines += ["", head + _how_cut(layout)]
    for team, held in enumerate(layout.teams):
        count, size = sum(map(layout.parameters, held)), planned.workers[layout.rank(Place(team, 0, 0))] / GIB
        first_and_last = " … ".join(dict.fromkeys((span(held[0]), span(held[-1]))))
        lines.append(f"{_ranks(layout, team):<7} {len(held):>12} {count:>18,} {size:>9.1f}  {first_and_last}")
    return lines
