"""Layout: which rank holds which dictionaries, and what memory a sweep needs, before it starts."""

import math
from itertools import groupby
from typing import Any, NamedTuple

from cluster import gemma
from cluster.errors import UserError
from cluster.recipe import Recipe
from sae.shape import Shape
from sae.sites import Site
from sae.spec import DictionarySpec

GIB = 2**30
PROCESS_BYTES = GIB // 2  # one Ray worker with torch and transformers loaded; measured here
RAY_BYTES = 5 * GIB // 2  # the driver, the Train controller and Ray's own processes; measured here
PORTION_BYTES = 8 * GIB  # of dictionaries' weights that an evaluator holds at once
LISTED = 32  # dictionaries; the table of a larger sweep has a line a rank


class Layout(NamedTuple):
    """A sweep laid over ranks."""

    ranks: list[list[DictionarySpec]]
    widths: dict[str, int]
    """D of every site key."""
    model_layers: int

    @property
    def sites(self) -> list[Site]:
        return _sites([spec for rank in self.ranks for spec in rank])

    @property
    def keys_by_rank(self) -> list[list[str]]:
        """Site keys that each rank's dictionaries read and write."""
        return [[site.key for site in _sites(specs)] for specs in self.ranks]

    def parameters(self, spec: DictionarySpec) -> int:
        return Shape.of(spec, self.widths).parameter_count(spec.options.affine)


def _sites(specs: list[DictionarySpec]) -> list[Site]:
    """Each once, by depth."""
    return sorted({site for spec in specs for site in spec.sites}, key=lambda site: site.depth)


def lay_out(recipe: Recipe, config: Any) -> Layout:
    """Cuts the dictionaries, in the order of their first sites, into runs of nearly equal cost, one a rank.

    Runs that follow the sites' order send few sites to two ranks. `config` is the text model's. UserError if a layer
    does not exist or a rank would be idle.
    """
    specs, layers = recipe.specs(), config.num_hidden_layers
    for spec in specs:
        if spec.layers[-1] >= layers:
            raise UserError(
                "sweep.layers",
                f"layer {spec.layers[-1]}, but {recipe.model.name} has layers 0 to {layers - 1}: name one of these",
            )
    if recipe.fit.workers > len(specs):
        raise UserError("fit.workers", f"{recipe.fit.workers} workers for {len(specs)} dictionaries: at most one each")
    widths = {site.key: gemma.site_width(config, site) for site in _sites(specs)}
    whole = Layout([specs], widths, layers)
    # All of a step but its dense encoder product grows as the parameters do.
    costs = [whole.parameters(spec) for spec in specs]
    ranks, first = [], 0
    for remaining in range(recipe.fit.workers, 0, -1):
        share, end = sum(costs[first:]) / remaining, first + 1
        while len(specs) - end >= remaining and sum(costs[first:end]) + costs[end] / 2 <= share:
            end += 1
        ranks.append(specs[first:end])
        first = end
    return whole._replace(ranks=ranks)


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
    all_keys, keys_by_rank = list(layout.widths), layout.keys_by_rank
    sent = sum(_row_bytes(layout, keys) for keys in keys_by_rank)
    workers = [
        PROCESS_BYTES
        + _bank_bytes(recipe, layout, specs, keys)
        + _window_bytes(recipe, _row_bytes(layout, all_keys) + sent, _row_bytes(layout, keys))
        for specs, keys in zip(layout.ranks, keys_by_rank, strict=True)
    ]
    running = PROCESS_BYTES + 4 * block_rows * _row_bytes(layout, all_keys)
    trunk, embedding = gemma.trunk_parameters(config, layout.sites), config.vocab_size * config.hidden_size
    rank = _rank_bytes(recipe, item * trunk, item * embedding)
    harvest = running + (rank * recipe.harvest.ranks if recipe.harvest.sharded else item * trunk)
    logits = 3 * 4 * recipe.corpus.context * config.vocab_size
    evaluator = running + item * gemma.parameters(config) + logits + _portion_bytes(layout)
    return Memory(harvest, rank, workers, evaluator)


def _rank_bytes(recipe: Recipe, trunk: int, embedding: int) -> int:
    """The peak of a rank is while it loads: it reads the whole trunk, of which tensor parallelism then keeps a share.
    ZeRO-3 builds its share meanwhile, and gathers the embedding, the largest of all parameters."""
    if not recipe.harvest.sharded:
        return 0
    return PROCESS_BYTES + trunk + (trunk // recipe.harvest.zero3 + embedding if recipe.harvest.zero3 else 0)


def _portion_bytes(layout: Layout) -> int:
    """Weights of the dictionaries that an evaluator holds at once."""
    sizes = [4 * layout.parameters(spec) for specs in layout.ranks for spec in specs]
    return min(sum(sizes), PORTION_BYTES + max(sizes))


def _bank_bytes(recipe: Recipe, layout: Layout, specs: list[DictionarySpec], keys: list[str]) -> int:
    """Parameters, gradients and Adam's two moments of all its dictionaries, and the dense pre-activations that each
    keeps; of the one that takes most, what a step needs besides; one batch of all its sites in float32."""
    batch = recipe.stream.batch_rows
    kept = sum(16 * layout.parameters(spec) + 4 * batch * spec.width for spec in specs)
    passing = max(_step_bytes(spec, layout, batch) for spec in specs)
    # A site's rows, and at most two concatenations of sites that several dictionaries share.
    return kept + passing + 3 * 4 * batch * sum(layout.widths[key] for key in keys)


def _step_bytes(spec: DictionarySpec, layout: Layout, batch: int) -> int:
    """Errors, gradients and one group's part of them, for each Matryoshka segment; a mask and a copy of the
    pre-activations where the active ones are chosen."""
    segments = 1 + len(spec.options.matryoshka.prefixes) if spec.options.matryoshka else 1
    return 3 * 4 * batch * segments * Shape.of(spec, layout.widths).d_out + (1 + 4) * batch * spec.width


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
    specs = [spec for rank in layout.ranks for spec in rank]
    lines = _dictionary_lines(layout) if len(specs) <= LISTED else _summary_lines(layout, planned)
    sizes = [f"{size / GIB:.1f}" for size in planned.workers]
    workers = ", ".join(sizes) if len(sizes) <= 4 else f"{len(sizes)}, the largest {max(planned.workers) / GIB:.1f}"
    lines.append(
        f"memory   {planned.total(recipe) / GIB:,.1f} GiB: workers {workers}; "
        f"{recipe.harvest.actors} harvest x {planned.harvest / GIB:.1f}{_ranks(recipe, planned)}; "
        f"then {recipe.evaluators} evaluation x {planned.evaluator / GIB:.1f}; the rest Ray and the driver"
    )
    return "\n".join(lines)


def _ranks(recipe: Recipe, planned: Memory) -> str:
    """How a harvest actor's memory is shared."""
    return f" ({recipe.harvest.ranks} ranks x {planned.rank / GIB:.1f})" if planned.rank else ""


def _dictionary_lines(layout: Layout) -> list[str]:
    lines = [f"{'rank':<5} {'dictionary':<52} {'of':<22} {'parameters':>14}"]
    for rank, specs in enumerate(layout.ranks):
        lines += [f"{rank:<5} {spec.id:<52} {span(spec):<22} {layout.parameters(spec):>14,}" for spec in specs]
    return lines


def _summary_lines(layout: Layout, planned: Memory) -> list[str]:
    """A line a directory of the suites, and a line a rank."""
    lines = [f"{'directory':<22} {'dictionaries':>12} {'parameters':>18}"]
    specs = sorted((spec for rank in layout.ranks for spec in rank), key=lambda spec: spec.folder)
    for directory, part in groupby(specs, key=lambda spec: spec.folder.partition("/")[0]):
        counts = [layout.parameters(spec) for spec in part]
        lines.append(f"{directory:<22} {len(counts):>12} {sum(counts):>18,}")
    lines += ["", f"{'rank':<5} {'dictionaries':>12} {'parameters':>18} {'GiB':>7}  first and last"]
    for rank, held in enumerate(layout.ranks):
        count, size = sum(map(layout.parameters, held)), planned.workers[rank] / GIB
        first_and_last = " … ".join(dict.fromkeys((span(held[0]), span(held[-1]))))
        lines.append(f"{rank:<5} {len(held):>12} {count:>18,} {size:>7.1f}  {first_and_last}")
    return lines
