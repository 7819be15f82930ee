"""Layout: which ranks hold which dictionaries, and what memory a sweep needs, before it starts.

The ranks are cut into teams of one size, and each team holds some dictionaries. In a team of more than one rank each
dictionary is cut in two ways (`sae.team`): its latents over *shards*, the rows of its batches over *replicas*.
"""

import contextlib
import math
from itertools import groupby
from typing import Any, NamedTuple

from cluster import gemma
from cluster.errors import UserError
from cluster.recipe import Recipe
from sae.shape import Shape
from sae.sites import Site
from sae.spec import DictionarySpec

GIB, MIB = 2**30, 2**20
PROCESS_BYTES = GIB // 2  # one Ray worker with torch and transformers loaded; measured here
RAY_BYTES = 5 * GIB // 2  # the driver, the Train controller and Ray's own processes; measured here
PORTION_BYTES = 8 * GIB  # of dictionaries' weights that an evaluator holds at once
LISTED = 32  # dictionaries; the table of a larger sweep has a line a rank


class Place(NamedTuple):
    """Where a rank stands."""

    team: int
    replica: int
    shard: int


class Layout(NamedTuple):
    """A sweep laid over ranks: team after team, in each replica after replica, in each shard after shard."""

    teams: list[list[DictionarySpec]]
    widths: dict[str, int]
    """D of every site key."""
    model_layers: int
    replicas: int = 1
    shards: int = 1

    @property
    def n_ranks(self) -> int:
        return len(self.teams) * self.replicas * self.shards

    def place(self, rank: int) -> Place:
        team, member = divmod(rank, self.replicas * self.shards)
        return Place(team, *divmod(member, self.shards))

    def rank(self, place: Place) -> int:
        return (place.team * self.replicas + place.replica) * self.shards + place.shard

    @property
    def specs(self) -> list[DictionarySpec]:
        return [spec for team in self.teams for spec in team]

    @property
    def sites(self) -> list[Site]:
        return _sites(self.specs)

    def keys(self, team: int) -> list[str]:
        """Site keys that a team's dictionaries read and write."""
        return [site.key for site in _sites(self.teams[team])]

    def parameters(self, spec: DictionarySpec) -> int:
        return Shape.of(spec, self.widths).parameter_count(spec.options.affine)


def _sites(specs: list[DictionarySpec]) -> list[Site]:
    """Each once, by depth."""
    return sorted({site for spec in specs for site in spec.sites}, key=lambda site: site.depth)


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
    widths = {site.key: gemma.site_width(config, site) for site in _sites(specs)}
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
    resampled = next((spec.id for spec in specs if spec.options.resampling is not None), None)
    if resampled:
        found = [(replicas, shards) for replicas, shards in found if replicas == shards == 1]
    if found:
        return found
    if resampled:
        raise UserError(
            "fit.workers",
            f"{fit.workers} workers for {len(specs)} dictionaries cut some over several, but resampling, which "
            f"{resampled} has, needs a dictionary whole: at most {len(specs)} workers without fit.shards and "
            "fit.replicas, or auxk in place of resampling",
        )
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
    return UserError(
        "fit.memory_gib",
        f"{recipe.fit.memory_gib:g} GiB, but the leanest layout of {recipe.fit.workers} workers needs {least:.2f} "
        f"each: {remedy}, or train fewer or narrower dictionaries",
    )


def wire(recipe: Recipe, layout: Layout) -> int:
    """Bytes that a step brings to the busiest rank: rows of its sites, partial sums of shards, replicas' gradients."""
    rows = math.ceil(recipe.stream.batch_rows / layout.replicas)
    over_shards, over_replicas = (2 * (n - 1) / n for n in (layout.shards, layout.replicas))  # a ring's all-reduce

    def of(team: int) -> float:
        arriving = rows * _row_bytes(layout, layout.keys(team)) * (layout.n_ranks - 1) / layout.n_ranks
        outputs = sum(segments(spec) * Shape.of(spec, layout.widths).d_out for spec in layout.teams[team])
        gradients = sum(map(layout.parameters, layout.teams[team])) / layout.shards
        return arriving + 4 * (over_shards * rows * outputs + over_replicas * gradients)

    return round(max(map(of, range(len(layout.teams)))))


def segments(spec: DictionarySpec) -> int:
    """Parts in which a batch is decoded."""
    return 1 + len(spec.options.matryoshka.prefixes) if spec.options.matryoshka else 1


class Memory(NamedTuple):
    """Planned peak bytes of one process of each role."""

    harvest: int
    """Of an actor, its ranks included."""
    rank: int
    """Of a rank of a harvest actor that shares its model; 0 if none does."""
    workers: list[int]
    evaluator: int

    def total(self, recipe: Recipe) -> int:
        """Bytes of the whole sweep without the object store, while it fits or while it evaluates."""
        fitting = recipe.harvest.actors * self.harvest + sum(self.workers)
        return RAY_BYTES + max(fitting, recipe.evaluators * self.evaluator)


def memory(recipe: Recipe, layout: Layout, config: Any) -> Memory:
    """The peak of a worker; of a harvest actor, which loads the model up to the last site's layer, or whose ranks do;
    and of an evaluator, which loads it whole. `config` is the text model's."""
    item = 2 if recipe.model.dtype == "bfloat16" else 4
    block_rows = recipe.harvest.sequences * recipe.corpus.context
    running = PROCESS_BYTES + 4 * block_rows * _row_bytes(layout, list(layout.widths))
    trunk, embedding = gemma.trunk_parameters(config, layout.sites), config.vocab_size * config.hidden_size
    rank = _rank_bytes(recipe, item * trunk, item * embedding)
    harvest = running + (rank * recipe.harvest.ranks if recipe.harvest.sharded else item * trunk)
    logits = 3 * 4 * recipe.corpus.context * config.vocab_size
    evaluator = running + item * gemma.parameters(config) + logits + _portion_bytes(layout)
    return Memory(harvest, rank, workers_bytes(recipe, layout), evaluator)


def workers_bytes(recipe: Recipe, layout: Layout) -> list[int]:
    """Planned peak of each rank."""
    teams = range(len(layout.teams))
    # A row goes to each shard of one replica of every team.
    sent = layout.shards * sum(_row_bytes(layout, layout.keys(team)) for team in teams)
    pulled = _row_bytes(layout, list(layout.widths)) + sent
    by_team = [
        PROCESS_BYTES
        + _bank_bytes(recipe, layout, team)
        + _window_bytes(recipe, pulled, math.ceil(_row_bytes(layout, layout.keys(team)) / layout.replicas))
        for team in teams
    ]
    return [by_team[layout.place(rank).team] for rank in range(layout.n_ranks)]


def _rank_bytes(recipe: Recipe, trunk: int, embedding: int) -> int:
    """The peak of a rank is while it loads: it reads the whole trunk, of which tensor parallelism then keeps a share.
    ZeRO-3 builds its share meanwhile, and gathers the embedding, the largest of all parameters."""
    if not recipe.harvest.sharded:
        return 0
    return PROCESS_BYTES + trunk + (trunk // recipe.harvest.zero3 + embedding if recipe.harvest.zero3 else 0)


def _portion_bytes(layout: Layout) -> int:
    """Weights of the dictionaries that an evaluator holds at once."""
    sizes = [4 * layout.parameters(spec) for spec in layout.specs]
    return min(sum(sizes), PORTION_BYTES + max(sizes))


def _bank_bytes(recipe: Recipe, layout: Layout, team: int) -> int:
    """Parameters, gradients and Adam's two moments of its parts of all the team's dictionaries, the copy of all but the
    gradients that a checkpoint is written from, and the dense pre-activations that each keeps; of the one that takes
    most, what a step needs besides; its rows of one batch of all its sites in float32."""
    specs, rows = layout.teams[team], math.ceil(recipe.stream.batch_rows / layout.replicas)
    kept = sum((16 + 12) * layout.parameters(spec) + 4 * rows * spec.width for spec in specs) // layout.shards
    passing = max(_step_bytes(spec, layout, rows) for spec in specs)
    # A site's rows, and at most two concatenations of sites that several dictionaries share.
    return kept + passing + 3 * 4 * rows * sum(layout.widths[key] for key in layout.keys(team))


def _step_bytes(spec: DictionarySpec, layout: Layout, rows: int) -> int:
    """Errors, gradients and one group's part of them, for each Matryoshka segment; a mask and a copy of the
    pre-activations where the active ones are chosen."""
    chosen = (1 + 4) * rows * spec.width // layout.shards
    return 3 * 4 * rows * segments(spec) * Shape.of(spec, layout.widths).d_out + chosen


def _window_bytes(recipe: Recipe, pulled_row: int, own_row: int) -> int:
    """A rank's share of a window's rows with all sites, and again as they are sent, `pulled_row` bytes a row; and three
    copies of all rows of its own sites, `own_row` bytes each: received, taken apart by site, and sorted."""
    blocks = math.ceil(recipe.stream.window_sequences / recipe.harvest.sequences)
    pulled = (math.ceil(blocks / recipe.fit.workers) + 1) * recipe.harvest.sequences  # a block is prefetched
    return recipe.corpus.context * (pulled * pulled_row + 3 * recipe.stream.window_sequences * own_row)


def _row_bytes(layout: Layout, keys: list[str]) -> int:
    """One row of some sites in bf16."""
    return 2 * sum(layout.widths[key] for key in keys)


def span(spec: DictionarySpec) -> str:
    """What a dictionary reads and writes, in a word: resid_post.9, transcoder.9, clt.0-17."""
    layers = spec.layers
    across = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
    return f"{spec.site if spec.kind == 'sae' else spec.kind}.{across}"


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
