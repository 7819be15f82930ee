"""Changing chosen latents while the model runs: what is written at a site moves along their decoder rows.

Of a latent with activation f at a position, each site that it writes gets (f' − f)·w_dec added, with f' by the change:
f + value (add), value (clamp) or 0 (ablate). What the dictionary does not explain stays as it is.
B positions, D columns of the sites written.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae.dictionary import Dictionary
from sae.hooks import Edit
from sae.sites import Site
from serve.problems import Problem


class Change(NamedTuple):
    """What a request wants of one latent."""

    digest: str
    latent: int
    kind: Literal["add", "clamp", "ablate"]
    value: float = 0.0


class Latent:
    """A latent to be changed, and where in the model it is read and written."""

    def __init__(self, change: Change, dictionary: Dictionary, reads: list[Site], writes: list[Site]):
        """Problem if its activation is not known yet where it is written."""
        self.change, self.dictionary, shape = change, dictionary, dictionary.shape
        self.number = shape.group_of(change.latent)
        group = shape.groups[self.number]
        self.row = change.latent - group.latents.start
        # Of a TopK dictionary, whether a latent is active depends on all others.
        first, last = (0, shape.d_in) if dictionary.k is not None else (group.reads.start, group.reads.stop)
        columns = zip(reads, shape.read_columns, strict=True)
        self.inputs = [site for site, at in columns if first <= at.start and at.stop <= last]
        rows = zip(writes, dictionary.decoder_rows(change.latent), strict=True)
        self.directions = {site: row_D for site, row_D in rows if row_D is not None}
        """By site written: [D]"""
        self.known_at = max(self.inputs, key=lambda site: site.depth)
        if change.kind != "add" and any(site.depth < self.known_at.depth for site in self.directions):
            raise Problem(422, f"changes: latent {change.latent} is written before all that it reads: only add works")

    def move(self, rows: dict[Site, Tensor], like: Tensor) -> Tensor:
        """f' − f of each position. [B]"""
        if self.change.kind == "add":
            return torch.full((len(like),), self.change.value, device=like.device)
        wanted = self.change.value if self.change.kind == "clamp" else 0.0
        return wanted - self._activation(torch.cat([rows[site] for site in self.inputs], dim=1))

    def _activation(self, x_BD: Tensor) -> Tensor:
        number = self.change.latent
        if self.dictionary.k is not None:
            return self.dictionary.encode(x_BD)[:, number]
        pre_B = x_BD @ self.dictionary.w_enc[self.number][:, self.row] + self.dictionary.b_enc_F[number]
        return pre_B.clamp_min(0) * (pre_B > self.dictionary.threshold_F[number])


class Steering:
    """All changes of one request."""

    def __init__(self, latents: list[Latent]):
        self.latents = latents

    def edits(self, masked_T: Tensor) -> dict[Site, Edit]:
        """For one forward pass over two sequences, of which the first is steered, where it is not masked."""
        rows: dict[Site, Tensor] = {}
        moves: dict[int, Tensor] = {}
        kept_T = ~masked_T

        def edit_at(site: Site) -> Edit:
            def edit(tensor: Tensor) -> Tensor | None:
                rows[site] = tensor[0, kept_T.to(tensor.device)].float()
                written = [(n, latent) for n, latent in enumerate(self.latents) if site in latent.directions]
                for n, latent in enumerate(self.latents):
                    # One that is written before it is read can be added only, which needs no activation.
                    if n not in moves and (site == latent.known_at or site in latent.directions):
                        moves[n] = latent.move(rows, rows[site])
                if not written:
                    return None
                edited = tensor.clone()
                changed = rows[site] + sum(moves[n].outer(latent.directions[site]) for n, latent in written)
                edited[0, kept_T.to(tensor.device)] = changed.to(tensor.dtype)
                return edited

            return edit

        sites = {site for latent in self.latents for site in [*latent.inputs, *latent.directions]}
        return {site: edit_at(site) for site in sites}
