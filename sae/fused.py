"""The step of TopK, BatchTopK and, on a CPU, JumpReLU dictionaries of one group, on a CPU with AuxK too.

On a GPU nothing is read back by the host; gradients of matrices go straight into Adam, a row at a time, without ever
being written, nor are all of a batch's pre-activations. Products may be of bfloat16, with float32 sums; weights, biases
and moments are float32. `sae.objective` has the same loss for every kind, activation and option;
tests/sae/test_fused.py holds the two equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.activations import THRESHOLD_MEMORY, JumpReLU
from sae.dead import auxk_gradient
from sae.kernels import Kernels
from sae.kernels.entries import ByLatent, Encoder, Entries, Matrix, More
from sae.kernels.rates import ADAM_EPS, adam_rates
from sae.pairs import DENSE_SHARE, Pairs
from sae.schedule import Now
from sae.spec import DictionarySpec
from sae.team import Team

if TYPE_CHECKING:
    from sae.step import TrainingDictionary

MATRICES = ("w_enc.0", "w_dec.0")


def covers(spec: DictionarySpec, team: Team, device: torch.device) -> bool:
    """Whether a dictionary can be stepped here."""
    options = spec.options
    one_group = spec.kind in ("sae", "transcoder") or (spec.kind == "crosscoder" and not options.causal)
    plain = options.matryoshka is None and options.preactivation is None
    # Its pairs, or the dead latents, which the host must not read from a GPU.
    counted = spec.activation == "jumprelu" or options.auxk is not None
    here = spec.activation in STEPS and (device.type == "cpu" or not counted)
    return here and one_group and plain and team.alone


def fused_step(dictionary: TrainingDictionary, kernels: Kernels, product_type: torch.dtype) -> FusedStep:
    return STEPS[dictionary.spec.activation](dictionary, kernels, product_type)


class FusedStep:
    """The steps of one dictionary, here of a TopK, with copies of its matrices in the type of the products.

    All steps use the same tensors, so that they can be recorded.
    """

    def __init__(self, dictionary: TrainingDictionary, kernels: Kernels, product_type: torch.dtype):
        self.dictionary, self.kernels, self.product_type = dictionary, kernels, product_type
        self.parameters, self.betas = dictionary.learned, dictionary.spec.training.adam_betas
        self.rates = self.parameters["b_dec"].new_zeros(5)
        self.rate = self.rates.new_zeros(())
        columns = zip(dictionary.shape.read_columns, dictionary.shape.write_columns, strict=True)
        self.skips = [
            (f"w_skip.{n}", *pair) for n, pair in enumerate(columns) if f"w_skip.{n}" in dictionary.parameters
        ]
        moments = {name: self._moments(parameter) for name, parameter in self.parameters.items()}
        self.w_enc, self.w_dec = (
            Matrix(self.parameters[name], moments[name], self.parameters[name].to(product_type)) for name in MATRICES
        )
        self.versions = self._versions()
        self.n_rows = 0

    def step(self, x_BD: Tensor, y_BD: Tensor, now: Now) -> None:
        """One step of Adam, or TooDense. Then `error_BD` is ŷ − y [B, d_out], `squared_error` its squares' sum,
        `variance` that of y's squared distances to its mean, `values_P` the activations."""
        mine, number = self.dictionary, int(self.dictionary.steps_done) + 1
        if len(x_BD) != self.n_rows:
            self._allocate(len(x_BD))
        if self.versions != self._versions():  # by anyone else, as when latents are resampled
            for matrix in (self.w_enc, self.w_dec):
                matrix.copy.copy_(matrix.weights)
        self.variance = self.kernels.centre(
            x_BD, y_BD, mine.centre(), self.parameters["b_dec"], self.centred_BD, self.error_BD
        )
        rates = self.rates.new_tensor(adam_rates(number, now.learning_rate, self.betas), device="cpu")
        self.rates.copy_(rates.pin_memory() if x_BD.is_cuda else rates, non_blocking=True)
        self.rate.fill_(now.learning_rate)
        self.values_P, self.squared_error = self._run(now, number)
        self.versions = self._versions()

    def _run(self, now: Now, number: int) -> tuple[Tensor, Tensor]:
        return self.body(round(now.l0))

    def _body(self, count: int) -> tuple[Tensor, Tensor]:
        """All that is launched between the inputs of a batch and its error; the activations [P], and the error's sum of
        squares."""
        pairs = self._select(count)
        dead = self.dictionary.idle.dead if self.dictionary.spec.options.auxk else None
        entries = Entries(pairs.rows_P, pairs.latents_P, self.n_rows, self.dictionary.shape.width)
        by_latent = self.kernels.beside(lambda: self._in_order(entries, pairs))  # small launches
        for name, reads, writes in self.skips:
            self.error_BD[:, writes] += self.centred_BD[:, reads] @ self.parameters[name].to(self.product_type)
        squared_error = self.kernels.rebuild(
            entries, pairs.values_P, self.w_dec.copy, self.error_BD, 2 / self.n_rows, self.grad_BD
        )
        more = self._revived(dead) if dead is not None and len(dead) else (None, None)
        self._learn(entries, by_latent(), pairs, *more)
        return pairs.values_P, squared_error

    def _revived(self, dead: Tensor) -> tuple[More, More]:
        """What AuxK adds to the gradients of decoder and encoder, by products with the dead latents alone."""
        options, (group,) = self.dictionary.spec.options.auxk, self.dictionary.shape.groups
        assert options is not None
        encoder = Encoder(
            [self.w_enc.copy[dead]], self.parameters["b_enc"][dead], [group._replace(latents=slice(0, len(dead)))]
        )
        count = min(options.latents or self.dictionary.shape.d_out // 2, len(dead))
        f_BX, w_XD = self.kernels.dense_topk(self.centred_BD, encoder, count), self.w_dec.copy[dead]
        rebuilt_BD = (f_BX @ w_XD).to(self.error_BD.dtype)
        grad_BD = auxk_gradient(options, rebuilt_BD, self.error_BD, self.dictionary.team.rows).to(f_BX.dtype)
        slopes_BX = grad_BD @ w_XD.T
        sums_X = self.kernels.gate(slopes_BX, f_BX)
        return (
            More(dead, f_BX.T @ grad_BD, self.rate.new_empty(0)),
            More(dead, slopes_BX.T @ self.centred_BD, sums_X.to(self.rate.dtype)),
        )

    def _select(self, count: int) -> Pairs:
        return self.kernels.select_topk(self.centred_BD, self._encoder(), count, "row")

    def _largest_of_batch(self, count: int) -> tuple[Pairs, Tensor]:
        """And the smallest of them."""
        pairs = self.kernels.select_topk(self.centred_BD, self._encoder(), count, "batch")
        enough = len(pairs.values_P) >= count  # else all positive ones are active
        return pairs, pairs.values_P.min() if enough else pairs.values_P.new_zeros(())

    def _encoder(self) -> Encoder:
        return Encoder([self.w_enc.copy], self.parameters["b_enc"], self.dictionary.shape.groups)

    def _in_order(self, entries: Entries, pairs: Pairs) -> ByLatent:
        self.dictionary.idle.update(pairs, self.n_rows)
        return self.kernels.by_latent(entries)

    def _backward(self, pairs: Pairs, grad_values_P: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the pre-activations [P], and of what the activation learns."""
        return grad_values_P * (pairs.values_P > 0), {}

    def _learn(
        self, entries: Entries, by_latent: ByLatent, pairs: Pairs, of_decoder: More | None, of_encoder: More | None
    ) -> None:
        grad_values_P = self.kernels.fit_decoder(
            self.w_dec, entries, by_latent, pairs.values_P, self.grad_BD, self.rates, of_decoder
        )
        grad_pre_P, learned = self._backward(pairs, grad_values_P)
        b_enc, back_D = self.kernels.fit_encoder(
            self.w_enc, by_latent, grad_pre_P, entries.rows_P, self.centred_BD, self.rates, of_encoder
        )
        b_dec = 2 / self.n_rows * self.error_BD.sum(0)
        if self.dictionary.spec.autoencodes:  # b_dec is also what is subtracted from the input
            b_dec -= back_D
        skips = {name: self.centred_BD[:, reads].T @ self.grad_BD[:, writes] for name, reads, writes in self.skips}
        self._step_others({"b_enc": b_enc, "b_dec": b_dec} | skips | learned)

    def _step_others(self, gradients: dict[str, Tensor]) -> None:
        """Adam on all but the matrices; the number of steps of every parameter."""
        states = {name: self.dictionary.optimiser.state[self.parameters[name]] for name in self.parameters}
        torch._foreach_add_([state["step"] for state in states.values()], 1)
        of = [states[name] for name in gradients]
        torch._fused_adam_(
            [self.parameters[name] for name in gradients],
            [gradient.to(self.rates.dtype) for gradient in gradients.values()],
            [state["exp_avg"] for state in of],
            [state["exp_avg_sq"] for state in of],
            [],
            [state["step"] for state in of],
            lr=self.rate, beta1=self.betas[0], beta2=self.betas[1], weight_decay=0, eps=ADAM_EPS,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the dictionary's optimiser, begun here if it has made no step."""
        state = self.dictionary.optimiser.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return state["exp_avg"], state["exp_avg_sq"]

    def _allocate(self, n_rows: int) -> None:
        shape = self.dictionary.shape
        self.n_rows, self.body = n_rows, self.kernels.recorded(self._body)
        self.centred_BD = self.rates.new_empty(n_rows, shape.d_in, dtype=self.product_type)
        self.grad_BD = self.rates.new_empty(n_rows, shape.d_out, dtype=self.product_type)
        self.error_BD = self.rates.new_empty(n_rows, shape.d_out)

    def _versions(self) -> list[int]:
        return [matrix.weights._version for matrix in (self.w_enc, self.w_dec)]


class FusedBatchTopK(FusedStep):
    """The steps of a BatchTopK."""

    cut: Tensor
    """The smallest activation of a batch."""

    def _run(self, now: Now, number: int) -> tuple[Tensor, Tensor]:
        done = self.body(round(now.l0 * self.n_rows))
        if number == 1 and not self.dictionary.taken_over:
            self.dictionary.activation.state["threshold"].copy_(self.cut)
        return done

    def _select(self, count: int) -> Pairs:
        pairs, self.cut = self._largest_of_batch(count)
        self.dictionary.activation.state["threshold"].lerp_(self.cut, 1 - THRESHOLD_MEMORY)
        return pairs


class FusedJumpReLU(FusedStep):
    """The steps of a JumpReLU, while few of its pairs have gradients."""

    now: Now

    def _run(self, now: Now, number: int) -> tuple[Tensor, Tensor]:
        self.now = now
        if number == 1 and not self.dictionary.taken_over:
            activation = self._activation()
            published = activation.settings.threshold_start
            start = self._largest_of_batch(round(now.l0 * self.n_rows))[1] if published is None else published
            activation.state["threshold"].fill_(start)
        return self.body(0)

    def _select(self, count: int) -> Pairs:
        activation = self._activation()
        most, floor_F = int(DENSE_SHARE * self.n_rows * self.dictionary.shape.width), activation.floor()
        rounding = torch.finfo(self.product_type).eps if self.product_type != self.rates.dtype else 0.0
        pairs = self.kernels.select_threshold(self.centred_BD, self._encoder(), floor_F * (1 - rounding), most=most)
        if rounding:
            self._sharpen(pairs, rounding)
        return activation.among(pairs, self.n_rows, self.now)

    def _sharpen(self, pairs: Pairs, rounding: float) -> None:
        """Puts pre-activations about their thresholds and the ends of their bands where they are: rounded, those of
        latents with large thresholds would all be in a band or all beside it."""
        activation = self._activation()
        threshold_P = activation.state["threshold"].index_select(0, pairs.latents_P)
        away_P, error_P = (pairs.pre_P - threshold_P).abs(), rounding * threshold_P
        near = ((away_P <= error_P) | ((away_P - activation.settings.bandwidth / 2).abs() <= error_P)).nonzero()[:, 0]
        latents_P = pairs.latents_P[near]
        entries = Entries(pairs.rows_P[near], latents_P, self.n_rows, self.dictionary.shape.width)
        products_P = self.kernels.value_gradients(entries, self.centred_BD, self.w_enc.copy)
        pairs.pre_P[near] = products_P + self.parameters["b_enc"].index_select(0, latents_P)

    def _backward(self, pairs: Pairs, grad_values_P: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        activation = self._activation()
        grad_pre_P = activation.backward(pairs, grad_values_P, self.n_rows, self.now)
        return grad_pre_P, activation.gradients

    def _activation(self) -> JumpReLU:
        assert isinstance(self.dictionary.activation, JumpReLU)
        return self.dictionary.activation


STEPS = {"topk": FusedStep, "batch_topk": FusedBatchTopK, "jumprelu": FusedJumpReLU}
