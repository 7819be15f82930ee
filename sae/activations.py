"""How latents become sparse in training: which pairs of a batch are active, and how gradients pass through.

Each activation offers the same: `start` from the first batch, `select` the pairs, `backward` from gradients of values
to gradients of pre-activations (its own penalty included), and what `ships` (all but TopK as JumpReLU, as Gemma Scope 2
does). Its tensors are in `state`, so a checkpoint cannot forget one; the `learned` ones get gradients.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae.largest import kth_largest, largest_of_rows
from sae.pairs import Pairs
from sae.schedule import Now
from sae.spec import DictionarySpec
from sae.team import ALONE, Team

THRESHOLD_MEMORY = 0.9  # of the running mean of batch thresholds; measured here
CONTROL_DAMPING = 30  # steps over which a change of L0 counts as much as an excess; measured here
DEAD_THRESHOLD_DECAY = 0.02  # a step, beside AuxK; measured here: 4 % dead in place of 52 %, FVU no worse
LP_FLOOR = 1e-3  # added to f in f^p, whose slope is infinite at 0; assumed


class Ships(NamedTuple):
    """The JumpReLU that an activation is at the end: active where gain·z + shift > threshold, with that value. [F]"""

    gain_F: Tensor
    shift_F: Tensor
    threshold_F: Tensor
    k: int | None = None
    """If given, at most so many latents a row, the largest."""


class Activation:
    """What all have in common; the gradient passes to the active pre-activations unchanged."""

    rebuilds_frozen = False
    """Whether relu(z) must rebuild the rows too, through a decoder held constant (Gated)."""

    def __init__(self, spec: DictionarySpec, device: torch.device, dtype: torch.dtype, team: Team = ALONE):
        self.spec, self.team, self.width = spec, team, spec.width // team.latents.count
        self.device, self.dtype = device, dtype
        self.state: dict[str, Tensor] = {}
        self.learned: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def start(self, pre_BF: Tensor, n_rows: int, now: Now) -> float:
        """Takes its first values from the first batch; what is to be added to b_enc.

        Here as below `pre_BF` are some of the batch's `n_rows` rows, if it has replicas.
        """
        return 0.0

    def select(self, pre_BF: Tensor, n_rows: int, now: Now) -> Pairs:
        raise NotImplementedError

    def backward(self, pairs: Pairs, grad_values_P: Tensor, n_rows: int, now: Now) -> Tensor:
        """Gradients of the pre-activations [P]; puts those of `learned` into `gradients`."""
        return grad_values_P

    def ships(self) -> Ships:
        return Ships(torch.ones_like(self._zeros()), self._zeros(), self.threshold())

    def threshold(self) -> Tensor:
        """The pre-activation above which each latent is active. [F]"""
        return self._zeros()

    def restart(self, latents: Tensor) -> None:
        """Puts what belongs to some latents where a fresh one starts."""

    def relax(self, latents: Tensor) -> None:
        """Lets dead latents that AuxK is teaching become active more easily."""

    def take_over(self, threshold_F: Tensor) -> Tensor:
        """Starts from a published JumpReLU's thresholds, as nearly as the activation can; what is to be added to
        b_enc. [F]"""
        return self._zeros()

    def _at_l0(self, pre_BF: Tensor, n_rows: int, now: Now, guess: float = -math.inf) -> Tensor:
        """The threshold at which a batch has the target L0, at least 0."""
        return kth_largest(pre_BF, round(now.l0 * n_rows), self.team, guess).clamp_min(0)

    def _active(self, values_P: Tensor) -> Tensor:
        """How many of all pairs of the batch are active, as a 0-d tensor."""
        return self.team.sum((values_P > 0).sum().to(self.dtype))

    def _zeros(self) -> Tensor:
        return torch.zeros(self.width, device=self.device, dtype=self.dtype)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device, dtype=self.dtype)

    def _control(self, l0: Tensor, now: Now) -> None:
        """Moves the penalty's coefficient towards where L0 meets its target: a penalty alone does not know it.

        The change of the excess counts too: L0 answers late, and a controller of the excess alone swings.
        """
        excess = torch.log(l0.clamp_min(1e-3) / now.l0).clamp(-1, 1)
        change = excess - self.state["excess"]
        self.state["coefficient"] *= torch.exp(self.spec.training.l0_control * (excess + CONTROL_DAMPING * change))
        self.state["excess"].copy_(excess)


class TopK(Activation):
    """The l0 largest positive pre-activations of each row are active (Gao et al. 2024).

    The one activation that ships as itself: no threshold gives rows of ten times the median norm as few latents as
    others (*measured here*: FVU 4.3 with the threshold of mean L0 32, in place of 0.3).
    """

    def select(self, pre_BF: Tensor, n_rows: int, now: Now) -> Pairs:
        mask_BF = largest_of_rows(pre_BF, round(now.l0), self.team.latents)
        return Pairs.where(mask_BF & (pre_BF > 0), pre_BF)

    def ships(self) -> Ships:
        return super().ships()._replace(k=self.spec.l0)


class BatchTopK(Activation):
    """The B·l0 largest positive pre-activations of the batch are active (Bussmann et al. 2024).

    It ships with the running mean of the batches' smallest active pre-activations as every latent's threshold.
    """

    def __init__(self, spec: DictionarySpec, device: torch.device, dtype: torch.dtype, team: Team = ALONE):
        super().__init__(spec, device, dtype, team)
        self.state = {"threshold": self._scalar(0.0)}

    def start(self, pre_BF: Tensor, n_rows: int, now: Now) -> float:
        self.state["threshold"].copy_(self._at_l0(pre_BF, n_rows, now))
        return 0.0

    def select(self, pre_BF: Tensor, n_rows: int, now: Now) -> Pairs:
        cut = self._at_l0(pre_BF, n_rows, now, guess=0.9 * self.state["threshold"].item())
        self.state["threshold"].lerp_(cut, 1 - THRESHOLD_MEMORY)
        return Pairs.where((pre_BF >= cut) & (pre_BF > 0), pre_BF)

    def take_over(self, threshold_F: Tensor) -> Tensor:
        self.state["threshold"].copy_(self.team.latents.gather(threshold_F).median())
        return self._zeros()

    def threshold(self) -> Tensor:
        return self.state["threshold"].expand(self.width).clone()


class ReLU(Activation):
    """f = relu(z) with the penalty λ·Σ f^p (Bricken et al. 2023; p-anneal: Karvonen et al. 2024)."""

    def __init__(self, spec: DictionarySpec, device: torch.device, dtype: torch.dtype, team: Team = ALONE):
        super().__init__(spec, device, dtype, team)
        self.state = {"coefficient": self._scalar(spec.training.l1.coefficient), "excess": self._scalar(0.0)}

    def start(self, pre_BF: Tensor, n_rows: int, now: Now) -> float:
        return -self._between_l0(pre_BF, n_rows, now)

    def _between_l0(self, pre_BF: Tensor, n_rows: int, now: Now) -> float:
        """Midway between the last active and the first inactive pre-activation at the target L0: were one put at 0 by
        a bias, it would be left to rounding whether it is active."""
        active = round(now.l0 * n_rows)
        pair = [kth_largest(pre_BF, k, self.team).clamp_min(0).item() for k in (active, active + 1)]
        return sum(pair) / 2

    def select(self, pre_BF: Tensor, n_rows: int, now: Now) -> Pairs:
        pairs = Pairs.where(pre_BF > 0, pre_BF)
        self._control(self._active(pairs.values_P) / n_rows, now)
        return pairs

    def backward(self, pairs: Pairs, grad_values_P: Tensor, n_rows: int, now: Now) -> Tensor:
        return grad_values_P + self._penalty_slope(pairs.pre_P, now) / n_rows

    def take_over(self, threshold_F: Tensor) -> Tensor:
        """The same latents are active; their values shrink by the thresholds."""
        return -threshold_F

    def _penalty_slope(self, z_P: Tensor, now: Now) -> Tensor:
        """∂(λ·Σ f^p)/∂f, λ rescaled so that the penalty is as large as with p = 1. [P]"""
        strength, p = self.state["coefficient"] * now.sparsity, now.exponent
        if p == 1:
            return strength.expand(len(z_P))
        raised_P = z_P + LP_FLOOR
        linear, powers = self.team.sum(torch.stack([raised_P.sum(), raised_P.pow(p).sum()]))
        return strength * (linear / powers) * p * raised_P.pow(p - 1)


class Gated(ReLU):
    """Whether a latent is active, z > 0, and how strongly, relu(e^r·z + c), are learned apart (Rajamanoharan et al.
    2024, Improving dictionary learning with gated SAEs: the tied form; its b_mag is our e^r·b_enc + c).

    The penalty is on relu(z), and relu(z) must rebuild the rows through a decoder held constant. Such a dictionary is
    a JumpReLU with pre-activation e^r·z + c and threshold c.
    """

    rebuilds_frozen = True

    def __init__(self, spec: DictionarySpec, device: torch.device, dtype: torch.dtype, team: Team = ALONE):
        super().__init__(spec, device, dtype, team)
        self.learned = {"log_gain": self._zeros(), "shift": self._zeros()}
        self.state |= self.learned

    def start(self, pre_BF: Tensor, n_rows: int, now: Now) -> float:
        """As JumpReLU starts: active above a threshold, with the value that the pre-activation had before."""
        cut = self._between_l0(pre_BF, n_rows, now)
        self.state["shift"].fill_(cut)
        return -cut

    def select(self, pre_BF: Tensor, n_rows: int, now: Now) -> Pairs:
        pairs = super().select(pre_BF, n_rows, now)
        return pairs._replace(values_P=self._magnitude(pairs).clamp_min(0))

    def backward(self, pairs: Pairs, grad_values_P: Tensor, n_rows: int, now: Now) -> Tensor:
        gain_P = self.state["log_gain"].exp()[pairs.latents_P]
        grad_magnitude_P = grad_values_P * (pairs.values_P > 0)
        slopes = {"log_gain": grad_magnitude_P * gain_P * pairs.pre_P, "shift": grad_magnitude_P}
        for name, slope_P in slopes.items():
            self.gradients[name] = self._zeros().index_add_(0, pairs.latents_P, slope_P)
        return grad_magnitude_P * gain_P + self._penalty_slope(pairs.pre_P, now) / n_rows

    def take_over(self, threshold_F: Tensor) -> Tensor:
        self.state["shift"].copy_(threshold_F)
        return -threshold_F

    def ships(self) -> Ships:
        shift_F = self.state["shift"]
        return Ships(self.state["log_gain"].exp(), shift_F.clone(), shift_F.clamp_min(0))

    def restart(self, latents: Tensor) -> None:
        for tensor in self.learned.values():
            tensor[latents] = 0

    def _magnitude(self, pairs: Pairs) -> Tensor:
        return self.state["log_gain"].exp()[pairs.latents_P] * pairs.pre_P + self.state["shift"][pairs.latents_P]


class JumpReLU(Activation):
    """f = z·H(z − θ) with a threshold a latent (Rajamanoharan et al. 2024, JumpReLU SAEs, equations 4 and 11-12).

    Straight-through estimators with the rectangle kernel K on (−½, ½): ∂f/∂θ ≈ −(θ/ε)·K((z−θ)/ε) and
    ∂H(z−θ)/∂θ ≈ −(1/ε)·K((z−θ)/ε). θ stays float32 and is never log-parametrised: Adam freezes a log threshold.
    Penalties: `JumpReLUSettings`. L0 is the batch mean (*assumed*: Gemma Scope 2 does not say whether per token).
    """

    def __init__(self, spec: DictionarySpec, device: torch.device, dtype: torch.dtype, team: Team = ALONE):
        super().__init__(spec, device, dtype, team)
        self.settings = spec.training.jumprelu
        self.learned = {"threshold": self._zeros()}
        self.state = self.learned | {
            "coefficient": self._scalar(self.settings.coefficient),
            "excess": self._scalar(0.0),
        }

    def start(self, pre_BF: Tensor, n_rows: int, now: Now) -> float:
        published = self.settings.threshold_start
        self.state["threshold"].fill_(self._at_l0(pre_BF, n_rows, now) if published is None else published)
        return 0.0

    def select(self, pre_BF: Tensor, n_rows: int, now: Now) -> Pairs:
        return self.among(Pairs.where(pre_BF > self.floor(), pre_BF), n_rows, now)

    def floor(self) -> Tensor:
        """The pre-activation above which a pair has a gradient; puts thresholds that Adam left below 0 at 0. [F]"""
        return (self.state["threshold"].clamp_(min=0) - self.settings.bandwidth / 2).clamp_min(0)

    def among(self, pairs: Pairs, n_rows: int, now: Now) -> Pairs:
        """The same pairs, all above `floor`; those that are not above their threshold have value 0."""
        active_P = pairs.pre_P > self.state["threshold"][pairs.latents_P]
        if self.settings.penalty != "quadratic":
            self._control(self._active(pairs.pre_P * active_P) / n_rows, now)
        return pairs._replace(values_P=pairs.pre_P * active_P)

    def backward(self, pairs: Pairs, grad_values_P: Tensor, n_rows: int, now: Now) -> Tensor:
        settings, strength = self.settings, self.state["coefficient"] * now.sparsity
        threshold_P = self.state["threshold"][pairs.latents_P]
        active_P = pairs.pre_P > threshold_P
        if settings.penalty == "tanh":
            saturation_P = torch.tanh(settings.tanh_scale * pairs.values_P)
            grad_values_P = grad_values_P + strength * settings.tanh_scale * (1 - saturation_P.square()) / n_rows
        in_band_P = (pairs.pre_P - threshold_P).abs() < settings.bandwidth / 2
        step_P = threshold_P * grad_values_P + self._l0_slope(pairs, n_rows, strength, now) / n_rows
        gradient_F = self._per_latent(-(in_band_P / settings.bandwidth) * step_P, pairs)
        if settings.frequency_coefficient > 0:
            fired_F, excess_F = (
                self.team.rows.sum(self._per_latent(values_P, pairs)) / n_rows
                for values_P in (active_P, (pairs.pre_P - threshold_P) * active_P)
            )
            # Of replicas, whose gradients are summed, one adds what is the same at all.
            is_first = self.team.rows.index == 0
            gradient_F += is_first * self._frequency_gradient(fired_F, excess_F, now)
        self.gradients["threshold"] = gradient_F
        return grad_values_P * active_P

    def _l0_slope(self, pairs: Pairs, n_rows: int, strength: Tensor, now: Now) -> Tensor:
        """∂penalty/∂L0, a 0-d tensor."""
        if self.settings.penalty == "quadratic":
            return strength * (4 / now.l0) * (self._active(pairs.values_P) / n_rows - now.l0)
        return strength if self.settings.penalty == "linear" else torch.zeros_like(strength)

    def _frequency_gradient(self, fired_F: Tensor, excess_F: Tensor, now: Now) -> Tensor:
        """By θ, of the frequency penalty; `fired_F` and `excess_F` are means over rows of H(z − θ) and max(0, z − θ).
        [F]

        ∂p/∂θ ≈ −p/m, with m the mean of z − θ over the active pairs: exact where these are exponentially distributed,
        and not 0, as the rectangle's is, for a latent whose active pairs lie far above their threshold (*measured
        here*: 0.07 in place of 0.105 on layer 5, FVU 0.063 in place of 0.068).
        """
        over_F = (fired_F - self.settings.frequency_limit).clamp_min(0)
        slope_F = over_F * (2 * self.settings.frequency_coefficient * now.sparsity / self.settings.frequency_limit)
        return -slope_F * fired_F.square() / excess_F.clamp_min(torch.finfo(self.dtype).tiny)

    def _per_latent(self, values_P: Tensor, pairs: Pairs) -> Tensor:
        """Sum over each latent's pairs. [F]"""
        return self._zeros().index_add_(0, pairs.latents_P, values_P.to(self.dtype))

    def restart(self, latents: Tensor) -> None:
        self.state["threshold"][latents] = self.team.latents.gather(self.state["threshold"]).median()

    def relax(self, latents: Tensor) -> None:
        """AuxK has no gradient for thresholds, and what it teaches stays below those of latents that never fired."""
        self.state["threshold"][latents] *= 1 - DEAD_THRESHOLD_DECAY

    def take_over(self, threshold_F: Tensor) -> Tensor:
        self.state["threshold"].copy_(threshold_F)
        return self._zeros()

    def threshold(self) -> Tensor:
        return self.state["threshold"].clamp_min(0).clone()


ACTIVATIONS: dict[str, type[Activation]] = {
    "relu": ReLU,
    "topk": TopK,
    "batch_topk": BatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
}
