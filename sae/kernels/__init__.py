"""The operations that a training step is made of, behind one interface for every device.

Only the encoder product is dense; the rest touches the active pairs. `reference` does all of it by plain dense
formulas and is what the others are held against.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from sae.kernels.entries import ByLatent, Encoder, Entries, Matrix, More
from sae.pairs import Pairs

Result = TypeVar("Result")


class TooDense(Exception):
    """So many pairs have a gradient that dense products are faster; nothing was changed."""


class Kernels(ABC):
    """B rows, D columns, F latents, P active pairs in CSR order, G rows or segments of rows.

    Products are accumulated in float32 at least, and the same call on the same machine and number of threads gives the
    same bits. Pairs of value 0 may be among the others, so that P is known without a host read.
    """

    def centre(
        self, x_BD: Tensor, y_BD: Tensor, centre_D: Tensor, b_dec_D: Tensor, centred_BD: Tensor, rest_BD: Tensor
    ) -> Tensor:
        """Puts x − centre in `centred_BD`, of any type, and b_dec − y in `rest_BD`; Σ over y of its squared distance to
        the mean of its column. [0-d]"""
        torch.sub(x_BD, centre_D, out=centred_BD)
        torch.sub(b_dec_D, y_BD, out=rest_BD)
        return y_BD.var(0, correction=0).sum() * len(y_BD)

    @abstractmethod
    def select_topk(
        self, x_BD: Tensor, encoder: Encoder, count: int, per: Literal["row", "batch"], pre_BF: Tensor | None = None
    ) -> Pairs:
        """The pairs with the `count` largest pre-activations of each row, or of the batch, that are positive.

        Of those equal to the smallest, a row keeps as many as fit (which, is free), a batch those or all. All
        pre-activations are left in `pre_BF`, if given.
        """

    def dense_topk(self, x_BD: Tensor, encoder: Encoder, count: int) -> Tensor:
        """The `count` largest positive pre-activations of each row in their places, of equal ones any, and 0 in the
        others; in the products' type. For counts so large that pairs would not pay. [B, F]"""
        pairs = self.select_topk(x_BD, encoder, count, "row")
        f_BF = pairs.values_P.new_zeros(len(x_BD), encoder.width, dtype=encoder.weights[0].dtype)
        f_BF[pairs.rows_P, pairs.latents_P] = pairs.values_P.to(f_BF.dtype)
        return f_BF

    def gate(self, grad_BF: Tensor, f_BF: Tensor) -> Tensor:
        """Puts 0 in the gradients of what is 0; the sums of columns. [F]"""
        grad_BF *= f_BF > 0
        return grad_BF.sum(0, dtype=torch.promote_types(grad_BF.dtype, torch.float32))

    @abstractmethod
    def select_threshold(
        self, x_BD: Tensor, encoder: Encoder, threshold_F: Tensor, pre_BF: Tensor | None = None,
        most: int | None = None,
    ) -> Pairs:  # fmt: skip
        """The pairs whose pre-activation is above their latent's threshold, [F], or 0-d: one for all. TooDense if there
        are more than `most`."""

    @abstractmethod
    def decode(self, entries: Entries, values_P: Tensor, w_FD: Tensor) -> Tensor:
        """Σ values[p]·w[latent of p] over each row's pairs. [G, D]"""

    def rebuild(
        self, entries: Entries, values_P: Tensor, w_FD: Tensor, rest_GD: Tensor, scale: float, grad_GD: Tensor
    ) -> Tensor:
        """Adds what `decode` gives to `rest_GD`, and puts `scale` times the sum in `grad_GD`, of any type; the sum of
        the squares of `rest_GD` then. [0-d]"""
        rest_GD += self.decode(entries, values_P, w_FD)
        torch.mul(rest_GD, scale, out=grad_GD)
        return torch.linalg.vector_norm(rest_GD).square()

    @abstractmethod
    def value_gradients(self, entries: Entries, grad_GD: Tensor, w_FD: Tensor) -> Tensor:
        """grad[row of p]·w[latent of p]. [P]"""

    @abstractmethod
    def table_gradient(self, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor) -> Tensor:
        """Σ weights[p]·table[rows[p]] over each latent's pairs, which is 0 for one that has none. [F, D]

        The gradient of W_dec from activations and errors, that of W_enc from pre-activations' gradients and inputs.
        """

    @abstractmethod
    def fit_rows(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        along_F: Tensor | None, more: More | None = None,
    ) -> None:  # fmt: skip
        """A step of Adam with the gradient that `table_gradient` gives, which need not be written, and `more`.

        `rates` are `adam_rates`, on the device. If `along_F` is given, gradient · row of each, the gradient's part
        along a row is left out and rows have norm 1 after the step.
        """

    def by_latent(self, entries: Entries) -> ByLatent:
        return entries.by_latent

    def fit_decoder(
        self, matrix: Matrix, entries: Entries, by_latent: ByLatent, values_P: Tensor, grad_GD: Tensor, rates: Tensor,
        more: More | None = None,
    ) -> Tensor:  # fmt: skip
        """`value_gradients`, and `fit_rows` of the decoder: both need the same rows of `grad_GD`. [P]"""
        grad_values_P = self.value_gradients(entries, grad_GD, matrix.copy)
        along_F = self.latent_sums(by_latent, values_P * grad_values_P)
        if more:
            along_F[more.latents_X] += (more.rows_XD * matrix.weights[more.latents_X]).sum(1)
        self.fit_rows(matrix, by_latent, values_P, entries.rows_P, grad_GD, rates, along_F, more)
        return grad_values_P

    def fit_encoder(
        self, matrix: Matrix, by_latent: ByLatent, weights_P: Tensor, rows_P: Tensor, table_GD: Tensor, rates: Tensor,
        more: More | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`fit_rows`; `latent_sums`, which is the bias' gradient [F], and that times the matrix as it was. [D]"""
        sums_F = self.latent_sums(by_latent, weights_P)
        if more:
            sums_F[more.latents_X] += more.sums_X
        back_D = sums_F.to(matrix.copy.dtype) @ matrix.copy
        self.fit_rows(matrix, by_latent, weights_P, rows_P, table_GD, rates, None, more)
        return sums_F, back_D

    @abstractmethod
    def latent_sums(self, by_latent: ByLatent, weights_P: Tensor) -> Tensor:
        """Σ weights[p] over each latent's pairs. [F]"""

    def beside(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Launches some work that may run beside what is launched after it, up to the call that takes its result."""
        result = work()
        return lambda: result

    def recorded(self, function: Callable[[int], Result]) -> Callable[[int], Result]:
        """The function, which reads nothing back and uses the same tensors each time, perhaps launched at once."""
        return function


def for_device(device: torch.device) -> Kernels:
    """The fastest that there is for a device."""
    if device.type == "cuda":
        from sae.kernels.gpu import Gpu  # Triton comes with torch's CUDA build alone

        return Gpu()
    if device.type == "cpu":
        from sae.kernels.cpu import Cpu  # with a GPU, numba is not needed

        return Cpu()
    from sae.kernels.reference import Reference

    return Reference()
