"""The shape of a dictionary: which latents read and write which columns of its concatenated sites.

Every kind is a list of groups of latents. A group reads some columns of the concatenated input rows and writes the
concatenated output rows from some column on. An SAE, a transcoder and an acausal crosscoder have one group; a weakly
causal crosscoder and a CLT have one a layer, which reads that layer and writes it and all later ones.
"""

from typing import NamedTuple

from sae.spec import DictionarySpec


class Group(NamedTuple):
    """Latents that share what they read and write."""

    latents: slice
    """Of the F latents."""
    reads: slice
    """Columns of the input."""
    writes: slice
    """Columns of the output, always up to its end."""

    @property
    def width(self) -> int:
        return size(self.latents)


class Shape(NamedTuple):
    """Sizes of everything in a dictionary."""

    groups: list[Group]
    read_widths: list[int]
    """D of each site read."""
    write_widths: list[int]

    @property
    def width(self) -> int:
        """Latents F."""
        return self.groups[-1].latents.stop

    @property
    def d_in(self) -> int:
        return sum(self.read_widths)

    @property
    def d_out(self) -> int:
        return sum(self.write_widths)

    def group_of(self, latent: int) -> int:
        """The number of the group that a latent is in."""
        return next(n for n, group in enumerate(self.groups) if latent < group.latents.stop)

    @property
    def read_columns(self) -> list[slice]:
        return columns(self.read_widths)

    @property
    def write_columns(self) -> list[slice]:
        return columns(self.write_widths)

    @staticmethod
    def of(spec: DictionarySpec, site_widths: dict[str, int]) -> "Shape":
        """The shape of a spec, given D of each site key."""
        read_widths = [site_widths[site.key] for site in spec.reads]
        write_widths = [site_widths[site.key] for site in spec.writes]
        per_layer = spec.kind == "clt" or (spec.kind == "crosscoder" and spec.options.causal)
        return Shape.layered(spec.width, read_widths, write_widths, len(spec.layers) if per_layer else 1)

    @staticmethod
    def layered(width: int, read_widths: list[int], write_widths: list[int], n_groups: int) -> "Shape":
        """`n_groups` is 1, or the number of sites: then group g reads site g and writes sites g, g+1, …"""
        d_out, share = sum(write_widths), width // n_groups
        if n_groups == 1:
            return Shape(
                [Group(slice(0, width), slice(0, sum(read_widths)), slice(0, d_out))], read_widths, write_widths
            )
        groups = [
            Group(slice(n * share, (n + 1) * share), reads, slice(writes.start, d_out))
            for n, (reads, writes) in enumerate(zip(columns(read_widths), columns(write_widths), strict=True))
        ]
        return Shape(groups, read_widths, write_widths)

    def shard(self, count: int) -> "Shape":
        """What each of `count` shards of the latents holds: of every group as many, `count` dividing their widths."""
        groups = [
            group._replace(latents=slice(group.latents.start // count, group.latents.stop // count))
            for group in self.groups
        ]
        return self._replace(groups=groups)

    def parameter_count(self, affine: bool) -> int:
        """Weights, biases and one threshold a latent; with skips if `affine`."""
        weights = sum(group.width * (size(group.reads) + size(group.writes)) for group in self.groups)
        skips = sum(a * b for a, b in zip(self.read_widths, self.write_widths, strict=True)) if affine else 0
        return weights + skips + 2 * self.width + self.d_out


def columns(widths: list[int]) -> list[slice]:
    """Where each of some concatenated parts lies."""
    ends = [sum(widths[: n + 1]) for n in range(len(widths))]
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def size(part: slice) -> int:
    """Length of a slice with both ends."""
    return part.stop - part.start
