"""Memory and wire: what a layout needs, before anything is started."""

import math
from typing import Any, NamedTuple

from cluster import gemma
from cluster.layout import Layout
from cluster.recipe import Recipe
from sae.shape import Shape
from sae.spec import DictionarySpec

GIB, MIB = 2**30, 2**20
PROCESS_BYTES = GIB // 2  # one Ray worker with torch and transformers loaded; measured here
RAY_BYTES = 5 * GIB // 2  # the driver, the Train controller and Ray's own processes; measured here
PORTION_BYTES = 8 * GIB  # of dictionaries' weights that an evaluator holds at once


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
    blocks = math.ceil(recipe.window_sequences / recipe.harvest.sequences)
    pulled = (math.ceil(blocks / recipe.fit.workers) + 1) * recipe.harvest.sequences  # a block is prefetched
    return recipe.corpus.context * (pulled * pulled_row + 3 * recipe.window_sequences * own_row)


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


def _row_bytes(layout: Layout, keys: list[str]) -> int:
    """One row of some sites in bf16."""
    return 2 * sum(layout.widths[key] for key in keys)
