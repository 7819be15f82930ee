"""Schedules: pure functions of how much of the run is done and of the number of the step."""

import math
from typing import NamedTuple

from sae.spec import DictionarySpec, Training


class Now(NamedTuple):
    """What the schedules say at one step."""

    learning_rate: float
    sparsity: float
    """Multiplies every sparsity penalty's coefficient."""
    l0: float
    """The target."""
    exponent: float
    """p of the L1 penalty's Σ f^p."""


def now(spec: DictionarySpec, progress: float, step: int, l0_start: float | None = None) -> Now:
    """`progress` runs over (0, 1], `step` from 1; `l0_start` is where the L0 target decays from, by default the
    recipe's multiple of `l0`."""
    first = spec.l0 * spec.training.l0_start if l0_start is None else l0_start
    training = spec.training
    fall = 1.0 if training.decay_fraction == 0 else min(1.0, (1.0 - progress) / training.decay_fraction)
    decayed = _share(training.l0_decay_fraction, training.l0_decay_steps, progress, step)
    annealed = min(1.0, max(0.0, (progress - 0.2) / 0.6))
    return Now(
        learning_rate=training.learning_rate * _warmup(training, progress, step) * fall,
        sparsity=_share(training.sparsity_warmup_fraction, training.sparsity_warmup_steps, progress, step),
        l0=first + (spec.l0 - first) * decayed,
        exponent=1 + (training.l1.p_end - 1) * annealed,
    )


def _warmup(training: Training, progress: float, step: int) -> float:
    share = _share(training.warmup_fraction, training.warmup_steps, progress, step)
    return share if training.warmup_shape == "linear" else 0.1 + 0.9 * (1 - math.cos(math.pi * share)) / 2


def _share(fraction: float, steps: int | None, progress: float, step: int) -> float:
    """How much is done of a phase that begins with the run, in [0, 1]."""
    if steps is not None:
        return min(1.0, step / steps)
    return 1.0 if progress >= fraction else progress / fraction
