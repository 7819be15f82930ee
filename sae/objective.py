"""The loss of one batch and its gradients, written out by hand over the active pairs.

Reconstruction (of every Matryoshka prefix), the activation's penalty, Gated's frozen reconstruction, AuxK and the
pre-activation loss each add to the same gradients. tests/sae/reference.py has the same loss densely, and
tests/sae/test_gradients.py holds the two equal in float64 for every kind, activation and option.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.dead import auxk_gradient, auxk_pairs, preactivation_gradients
from sae.matryoshka import prefix_ends, prefix_errors, segment_gradients
from sae.pairs import Active, Pairs
from sae.schedule import Now
from sae.spec import AuxK, Preactivation

if TYPE_CHECKING:
    from sae.step import TrainingDictionary


class Objective:
    """One batch: what is active, the error, and the gradients by name of everything learned."""

    def __init__(
        self,
        dictionary: TrainingDictionary,
        centred_BD: Tensor,
        y_BD: Tensor,
        pre_BF: Tensor,
        n_rows: int,
        now: Now,
    ):
        """The rows are some of the batch's `n_rows`, if the dictionary has replicas."""
        self.spec, self.shape, self.activation = dictionary.spec, dictionary.shape, dictionary.activation
        self.team, self.n_rows = dictionary.team, n_rows
        self.parameters, self.idle = dictionary.parameters, dictionary.idle
        self.centred_BD, self.y_BD, self.pre_BF, self.now = centred_BD, y_BD, pre_BF, now
        self.groups = self.shape.groups
        self.w_enc, self.w_dec, self.w_skip = (dictionary.weights(name) for name in ("w_enc", "w_dec", "w_skip"))
        self.pairs = self.activation.select(pre_BF, n_rows, now)
        step = int(dictionary.steps_done) + 1
        self.actives = self._actives(
            self.pairs, [prefix_ends(self.spec, group, step, self.team.latents) for group in self.groups]
        )
        self.gradients: dict[str, Tensor] = {}
        self.error_BD = self._reconstruct()
        self._revive()
        self._through_the_centre()
        for gradient in self.gradients.values():
            self.team.rows.sum(gradient)
        self._without_parallel_part()

    def _reconstruct(self) -> Tensor:
        """Gradients of the squared errors and of the activation's penalty; the whole dictionary's error ŷ − y."""
        rest_BD = self.parameters["b_dec"] - self.y_BD
        for n, (reads, writes) in enumerate(self._skip_columns()):
            rest_BD[:, writes] += self.centred_BD[:, reads] @ self.w_skip[n]
        error_BnD = prefix_errors(self._decode(self.actives, self.pairs.values_P), rest_BD)
        grad_BnD = segment_gradients(error_BnD, self.n_rows)
        grad_values_P = self._value_gradients(self.actives, grad_BnD)
        grad_pre_P = self.activation.backward(self.pairs, grad_values_P, self.n_rows, self.now)
        if self.activation.rebuilds_frozen:
            frozen_BnD = prefix_errors(self._decode(self.actives, self.pairs.pre_P), rest_BD)
            grad_pre_P = grad_pre_P + self._value_gradients(self.actives, segment_gradients(frozen_BnD, self.n_rows))

        self.gradients["b_enc"] = torch.zeros_like(self.parameters["b_enc"])
        self._add(self.actives, self.pairs, grad_BnD, grad_pre_P)
        # All prefixes hold the first segment, and all hold bias and skip: their gradients are the same.
        self.gradients["b_dec"] = grad_BnD[:, 0].sum(0)
        for n, (reads, writes) in enumerate(self._skip_columns()):
            self.gradients[f"w_skip.{n}"] = self.centred_BD[:, reads].T @ grad_BnD[:, 0, writes]
        self.gradients |= self.activation.gradients
        return error_BnD[:, -1]

    def _revive(self) -> None:
        """What AuxK and the pre-activation loss ask of the dead latents."""
        options = self.spec.options
        if options.auxk is None and options.preactivation is None:
            return
        dead = self.idle.dead
        if options.auxk is not None:
            all_dead = self.team.latents.total(len(dead), dead.device)
            if all_dead:
                self._rebuild_what_is_left(options.auxk, dead, all_dead)
        if options.preactivation is not None and len(dead):
            self._draw_up(options.preactivation, dead)

    def _rebuild_what_is_left(self, options: AuxK, dead: Tensor, all_dead: int) -> None:
        count = min(options.latents or self.shape.d_out // 2, all_dead)
        pairs = auxk_pairs(count, self.pre_BF, dead, self.team.latents)
        actives = self._actives(pairs, [[group.width] for group in self.groups])
        rebuilt_BD = self._decode(actives, pairs.values_P)[:, 0]
        grad_BnD = auxk_gradient(options, rebuilt_BD, self.error_BD, self.team.rows)[:, None]
        self._add(actives, pairs, grad_BnD, self._value_gradients(actives, grad_BnD))

    def _draw_up(self, options: Preactivation, dead: Tensor) -> None:
        by = preactivation_gradients(options, self.pre_BF, dead, self.activation.threshold(), self.n_rows)
        for n, group in enumerate(self.groups):
            here = (dead >= group.latents.start) & (dead < group.latents.stop)
            rows = by.pre_BX[:, here].T @ self.centred_BD[:, group.reads]
            self.gradients[f"w_enc.{n}"].index_add_(0, dead[here] - group.latents.start, rows)
        self.gradients["b_enc"].index_add_(0, dead, by.pre_BX.sum(0))
        if "threshold" in self.activation.learned:
            self.gradients["threshold"].index_add_(0, dead, by.threshold_X)

    def _through_the_centre(self) -> None:
        """b_dec is also what is subtracted from the input, if a dictionary writes what it reads."""
        if self.spec.autoencodes:
            pulled_D = torch.zeros_like(self.gradients["b_dec"])
            for group, w_enc in zip(self.groups, self.w_enc, strict=True):
                pulled_D[group.reads] += self.gradients["b_enc"][group.latents] @ w_enc
            self.gradients["b_dec"] -= self.team.latents.sum(pulled_D)

    def _without_parallel_part(self) -> None:
        """The part of a gradient along a unit row would only be undone by the normalisation after the step."""
        for n, w_dec in enumerate(self.w_dec):
            gradient = self.gradients[f"w_dec.{n}"]
            gradient -= (gradient * w_dec).sum(1, keepdim=True) * w_dec

    def _add(self, actives: list[Active], pairs: Pairs, grad_BnD: Tensor, grad_pre_P: Tensor) -> None:
        """Adds what some pairs give to the gradients of encoders, their biases and decoders."""
        for n, (active, group) in enumerate(zip(actives, self.groups, strict=True)):
            found = {
                f"w_dec.{n}": active.decoder_gradient(pairs.values_P[active.chosen], grad_BnD[..., group.writes]),
                f"w_enc.{n}": active.encoder_gradient(grad_pre_P[active.chosen], self.centred_BD[:, group.reads]),
            }
            for name, gradient in found.items():
                self.gradients[name] = self.gradients[name].add_(gradient) if name in self.gradients else gradient
        self.gradients["b_enc"].index_add_(0, pairs.latents_P, grad_pre_P)

    def _actives(self, pairs: Pairs, ends: list[list[int]]) -> list[Active]:
        chosen: list[Tensor | slice] = [slice(None)]
        if len(self.groups) > 1:
            lasts = torch.tensor([group.latents.stop for group in self.groups[:-1]], device=pairs.latents_P.device)
            group_P = torch.bucketize(pairs.latents_P, lasts, right=True)
            chosen = [(group_P == n).nonzero()[:, 0] for n in range(len(self.groups))]
        return [
            Active(pairs, mine, group, len(self.y_BD), group_ends)
            for mine, group, group_ends in zip(chosen, self.groups, ends, strict=True)
        ]

    def _decode(self, actives: list[Active], values_P: Tensor) -> Tensor:
        """What each segment adds to the output, over all groups and shards. [B, segments, d_out]"""
        parts = [active.decode(values_P[active.chosen], w) for active, w in zip(actives, self.w_dec, strict=True)]
        total_BnD = parts[0]  # the first group writes every column
        for part, group in zip(parts[1:], self.groups[1:], strict=True):
            total_BnD[..., group.writes] += part
        return self.team.latents.sum(total_BnD)

    def _value_gradients(self, actives: list[Active], grad_BnD: Tensor) -> Tensor:
        """∂/∂values of all pairs, given that by what each segment adds. [P]"""
        grad_P = grad_BnD.new_empty(sum(len(active.rows_P) for active in actives))
        for active, group, w in zip(actives, self.groups, self.w_dec, strict=True):
            grad_P[active.chosen] = active.value_gradients(grad_BnD[..., group.writes], w)
        return grad_P

    def _skip_columns(self) -> list[tuple[slice, slice]]:
        columns = zip(self.shape.read_columns, self.shape.write_columns, strict=True)
        return list(columns) if self.w_skip else []
