"""Layout: which rank holds which dictionaries, and what memory a sweep needs, before it starts."""

from typing import Any, NamedTuple

from cluster import gemma
from cluster.errors import UserError
from cluster.recipe import Recipe
from sae.dictionary import parameter_count
from sae.sites import Site
from sae.spec import DictionarySpec

GIB = 2**30
PROCESS_BYTES = GIB // 2  # one Ray worker with torch and transformers loaded; measured here
RAY_BYTES = 5 * GIB // 2  # the driver, the Train controller and Ray's own processes; measured here


class Layout(NamedTuple):
    """A sweep laid over ranks."""

    ranks: list[list[DictionarySpec]]
    widths: dict[str, int]
    """D of every site key."""

    @property
    def sites(self) -> list[Site]:
        return sorted({spec.reads for rank in self.ranks for spec in rank}, key=lambda site: site.depth)

    @property
    def keys_by_rank(self) -> list[list[str]]:
        """Site keys that each rank's dictionaries read."""
        return [list(dict.fromkeys(spec.reads.key for spec in rank)) for rank in self.ranks]


def lay_out(recipe: Recipe, config: Any) -> Layout:
    """Cuts the dictionaries, in the order of their sites, into runs of nearly equal cost, one a rank.

    Runs that follow the sites' order send at most one site to two neighbouring ranks. `config` is the text model's.
    UserError if a layer does not exist or a rank would be idle.
    """
    specs, layers = recipe.specs(), config.num_hidden_layers
    for spec in specs:
        if spec.layer >= layers:
            raise UserError(
                "sweep.layers",
                f"layer {spec.layer}, but {recipe.model.name} has layers 0 to {layers - 1}: name one of these",
            )
    if recipe.fit.workers > len(specs):
        raise UserError("fit.workers", f"{recipe.fit.workers} workers for {len(specs)} dictionaries: at most one each")
    widths = {spec.reads.key: gemma.site_width(config, spec.reads) for spec in specs}
    ranks: list[list[DictionarySpec]] = []
    rest = list(specs)
    for remaining in range(recipe.fit.workers, 0, -1):
        share = sum(_cost(spec, widths) for spec in rest) / remaining
        taken = [rest.pop(0)]
        while len(rest) >= remaining and sum(_cost(s, widths) for s in taken) + _cost(rest[0], widths) / 2 <= share:
            taken.append(rest.pop(0))
        ranks.append(taken)
    return Layout(ranks, widths)


def _cost(spec: DictionarySpec, widths: dict[str, int]) -> int:
    """A step's cost is all but that of its dense encoder product, which grows as F·D."""
    return spec.width * widths[spec.reads.key]


class Memory(NamedTuple):
    """Planned peak bytes of one process of each role."""

    harvest: int
    workers: list[int]

    def total(self, recipe: Recipe) -> int:
        """Bytes of the whole sweep, without the object store."""
        return RAY_BYTES + recipe.harvest.actors * self.harvest + sum(self.workers)


def memory(recipe: Recipe, layout: Layout, model_parameters: int) -> Memory:
    """Parameters, gradients and Adam's two moments of a rank's dictionaries; three copies of its window in bf16
    (held, sent, received); a batch's dense pre-activations; on the harvest side the weights and a block's rows."""
    item = 2 if recipe.model.dtype == "bfloat16" else 4
    window_rows = recipe.stream.window_sequences * recipe.corpus.context
    block_rows = recipe.harvest.sequences * recipe.corpus.context
    row_bytes = 2 * sum(layout.widths.values())
    workers = [
        PROCESS_BYTES
        + sum(16 * parameter_count(spec, layout.widths[spec.reads.key]) for spec in specs)
        + 3 * window_rows * row_bytes
        + sum(4 * recipe.stream.batch_rows * spec.width for spec in specs)
        for specs in layout.ranks
    ]
    return Memory(PROCESS_BYTES + model_parameters * item + 4 * block_rows * row_bytes, workers)


def table(recipe: Recipe, layout: Layout, planned: Memory) -> str:
    """The plan: who holds what, and why it fits."""
    lines = [f"{'rank':<5} {'dictionary':<52} {'reads':<22} {'parameters':>12}"]
    for rank, specs in enumerate(layout.ranks):
        for spec in specs:
            count = parameter_count(spec, layout.widths[spec.reads.key])
            lines.append(f"{rank:<5} {spec.id:<52} {spec.reads.key:<22} {count:>12,}")
    workers = ", ".join(f"{size / GIB:.1f}" for size in planned.workers)
    lines.append(
        f"memory   {planned.total(recipe) / GIB:.1f} GiB: workers {workers}; "
        f"{recipe.harvest.actors} harvest x {planned.harvest / GIB:.1f}; the rest Ray and the driver"
    )
    return "\n".join(lines)
