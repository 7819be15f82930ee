"""What changes from step to step in Adam, as numbers that its kernels take."""

ADAM_EPS = 1e-8


def adam_rates(step: int, learning_rate: float, betas: tuple[float, float]) -> list[float]:
    """The rate corrected for the mean's start at 0; the shares of the new in both moments; what corrects the root of
    the second for its start; ε. `step` counts from 1."""
    mean, square = betas
    return [learning_rate / (1 - mean**step), 1 - mean, 1 - square, (1 - square**step) ** -0.5, ADAM_EPS]
