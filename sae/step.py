"""One dictionary in training: parameters, optimiser and the step that fits them to a batch of rows."""

import torch
from torch import Tensor

from sae import schedule
from sae.activations import ACTIVATIONS
from sae.dictionary import Dictionary, fold
from sae.metrics import FitSums
from sae.pairs import Pairs, decode, per_latent_sums, value_gradients
from sae.spec import DictionarySpec


class TrainingDictionary:
    """Fits x̂ = f·W_dec + b_dec, f = activation((x − b_dec)·W_encᵀ + b_enc), to rows x of unit mean square norm.

    Both matrices are stored a latent a row [F, D], so that every sparse product reads whole rows. W_dec starts
    with random unit rows and W_enc at a multiple of it (1 is *published*: Gemma Scope 1, 3.2; 0.7 *measured here*);
    b_dec starts at the mean of the first batch (*measured here*: most of Gemma 3's few huge dimensions is their mean).
    """

    def __init__(self, spec: DictionarySpec, d: int, device: torch.device):
        self.spec, self.device = spec, device
        generator = torch.Generator().manual_seed(spec.seed)
        directions_FD = torch.randn(spec.width, d, generator=generator)
        directions_FD /= directions_FD.norm(dim=1, keepdim=True)
        self.parameters = {
            "w_enc_FD": (spec.training.encoder_init_scale * directions_FD).to(device),
            "b_enc_F": torch.zeros(spec.width, device=device),
            "w_dec_FD": directions_FD.to(device, copy=True),
            "b_dec_D": torch.zeros(d, device=device),
        }
        self.activation = ACTIVATIONS[spec.activation](spec, device)
        self.learned = self.parameters | self.activation.learned
        self.optimiser = torch.optim.Adam(self.learned.values(), betas=spec.training.adam_betas, fused=True)
        self.steps_done = torch.zeros((), dtype=torch.int64)
        self.sums = FitSums(device)
        self.pre_buffer = torch.empty(0, device=device)  # reused: a fresh one a step costs page faults

    @torch.no_grad()
    def step(self, x_BD: Tensor, progress: float) -> None:
        """One Adam step on rows of unit mean square norm; `progress` in (0, 1] drives the schedules.

        The loss is the squared error summed over D and averaged over B, plus the activation's own penalty.
        """
        if self.steps_done == 0:
            self.parameters["b_dec_D"].copy_(x_BD.mean(0))
            self.activation.start(self._pre_activations(x_BD - self.parameters["b_dec_D"]))
        centred_BD = x_BD - self.parameters["b_dec_D"]
        pairs = self.activation.select(self._pre_activations(centred_BD))
        error_BD = decode(pairs, len(x_BD), self.parameters["w_dec_FD"]) + self.parameters["b_dec_D"] - x_BD
        self._set_gradients(centred_BD, error_BD, pairs, schedule.warmup(self.spec.training, progress))
        for group in self.optimiser.param_groups:
            group["lr"] = schedule.learning_rate(self.spec.training, progress)
        self.optimiser.step()
        self.parameters["w_dec_FD"] /= self.parameters["w_dec_FD"].norm(dim=1, keepdim=True)
        self.steps_done += 1
        self.sums.add(x_BD, error_BD, pairs.values_P)

    def folded(self, scale: float) -> Dictionary:
        """The dictionary as it ships, on raw rows; `scale` is what rows were divided by in training."""
        return fold(self.parameters, self.activation.threshold(self.spec.width), scale)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name; `load` is the inverse."""
        state = self.parameters | {f"activation.{name}": value for name, value in self.activation.state.items()}
        for name, parameter in self.learned.items():
            for moment, value in self.optimiser.state[parameter].items():
                state[f"adam.{name}.{moment}"] = value
        return state | {"steps_done": self.steps_done}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over a `state()`, on this dictionary's device."""
        for name, target in (self.parameters | {"steps_done": self.steps_done}).items():
            target.copy_(state[name])
        for name, target in self.activation.state.items():
            target.copy_(state[f"activation.{name}"])
        for name, parameter in self.learned.items():
            prefix = f"adam.{name}."
            moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self.optimiser.state[parameter] = {key: value.to(self.device, copy=True) for key, value in moments.items()}

    def _pre_activations(self, centred_BD: Tensor) -> Tensor:
        if len(self.pre_buffer) != len(centred_BD):
            self.pre_buffer = torch.empty(len(centred_BD), self.spec.width, device=self.device)
        return torch.addmm(self.parameters["b_enc_F"], centred_BD, self.parameters["w_enc_FD"].T, out=self.pre_buffer)

    def _set_gradients(self, centred_BD: Tensor, error_BD: Tensor, pairs: Pairs, warmup: float) -> None:
        w_enc_FD, b_enc_F, w_dec_FD, b_dec_D = self.parameters.values()
        grad_BD = error_BD * (2 / len(error_BD))
        grad_values_P = value_gradients(pairs, grad_BD, w_dec_FD)
        grad_pre_P = self.activation.backward(pairs, grad_values_P, len(error_BD), warmup)
        w_dec_FD.grad, w_enc_FD.grad = per_latent_sums(
            pairs, self.spec.width, (pairs.values_P, grad_BD), (grad_pre_P, centred_BD)
        )
        # The part of the gradient along a unit row would only be undone by the normalisation after the step.
        w_dec_FD.grad -= (w_dec_FD.grad * w_dec_FD).sum(1, keepdim=True) * w_dec_FD
        b_enc_F.grad = torch.zeros_like(b_enc_F).index_add_(0, pairs.latents_P, grad_pre_P)
        b_dec_D.grad = grad_BD.sum(0) - b_enc_F.grad @ w_enc_FD
