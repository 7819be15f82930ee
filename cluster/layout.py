"""Layout: which ranks hold which dictionaries.

The ranks are cut into teams of one size, and each team holds some dictionaries. In a team of more than one rank each
dictionary is cut in two ways (`sae.team`): its latents over *shards*, the rows of its batches over *replicas*.
"""

from typing import NamedTuple

from sae.shape import Shape
from sae.sites import Site
from sae.spec import DictionarySpec


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
        return sites_of(self.specs)

    def keys(self, team: int) -> list[str]:
        """Site keys that a team's dictionaries read and write."""
        return [site.key for site in sites_of(self.teams[team])]

    def parameters(self, spec: DictionarySpec) -> int:
        return Shape.of(spec, self.widths).parameter_count(spec.options.affine)


def sites_of(specs: list[DictionarySpec]) -> list[Site]:
    """Each once, by depth."""
    return sorted({site for spec in specs for site in spec.sites}, key=lambda site: site.depth)


def span(spec: DictionarySpec) -> str:
    """What a dictionary reads and writes, in a word: resid_post.9, transcoder.9, clt.0-17."""
    layers = spec.layers
    across = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
    return f"{spec.site if spec.kind == 'sae' else spec.kind}.{across}"
