"""Schedules: pure functions of how much of the run is done."""

from sae.spec import Training


def warmup(training: Training, progress: float) -> float:
    """Linear rise from 0 to 1 over the first `warmup_fraction`; `progress` runs over (0, 1]."""
    return 1.0 if progress >= training.warmup_fraction else progress / training.warmup_fraction


def learning_rate(training: Training, progress: float) -> float:
    """Warm-up, plateau, linear fall to 0 over the last `decay_fraction`."""
    fall = 1.0 if training.decay_fraction == 0 else min(1.0, (1.0 - progress) / training.decay_fraction)
    return training.learning_rate * warmup(training, progress) * fall
