"""The one evaluator: held-out FVU, L0 and dead share of an inference-form dictionary."""

from collections.abc import Iterator
from pathlib import Path

import stream
import torch
from inference import Inference
from torch import Tensor


@torch.no_grad()
def score(dictionary: Inference, rows: Iterator[Tensor]) -> dict[str, float]:
    """fvu: squared error over squared distance to the rows' mean, both summed over rows and D; l0: mean number of
    active latents a row; dead: share of latents active on no row. float32 products, float64 sums."""
    n, squared_error, active, square_sum, row_sum_D = 0, 0.0, 0, 0.0, 0.0
    fired_F = torch.zeros_like(dictionary.b_enc_F, dtype=torch.bool)
    for x_BD in rows:
        pre_BF = dictionary.pre_activations(x_BD)
        active_BF = pre_BF > dictionary.threshold_F
        reconstruction_BD = torch.addmm(dictionary.b_dec_D, pre_BF * active_BF, dictionary.w_dec_FD)
        x = x_BD.double()
        n += len(x)
        squared_error += (reconstruction_BD.double() - x).square().sum().item()
        active += int(active_BF.sum())
        square_sum += x.square().sum().item()
        row_sum_D = row_sum_D + x.sum(0)
        fired_F |= active_BF.any(0)
    variance = square_sum - row_sum_D.square().sum().item() / n
    return {"fvu": squared_error / variance, "l0": active / n, "dead": 1 - fired_F.double().mean().item()}


@torch.no_grad()
def at_l0(dictionary: Inference, folder: Path, l0: int) -> Inference:
    """The dictionary with the one threshold at which its held-out L0 is exactly `l0`.

    Only for BatchTopK: trainers follow their batches' cut at different speeds, and so ship at different L0s.
    """
    low = 0.5 * dictionary.threshold_F.min().item()
    n, values = 0, []
    for x_BD in stream.heldout(folder):
        pre_BF = dictionary.pre_activations(x_BD)
        values.append(pre_BF[pre_BF > low])
        n += len(x_BD)
    values_P = torch.cat(values)
    cut = values_P.kthvalue(max(1, len(values_P) - l0 * n)).values
    return dictionary._replace(threshold_F=cut.expand_as(dictionary.threshold_F))


def scores(path: Path, folder: Path, activation: str, l0: int) -> dict[str, float]:
    """The figures of a saved dictionary; for BatchTopK also `fvu_at_l0` …, at the exact target L0."""
    dictionary = Inference.load(path)
    figures = score(dictionary, stream.heldout(folder))
    if activation == "batch_topk":
        exact = score(at_l0(dictionary, folder, l0), stream.heldout(folder))
        figures |= {f"{name}_at_l0": value for name, value in exact.items()}
    return figures
