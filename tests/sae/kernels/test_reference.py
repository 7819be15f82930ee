"""The oracle itself, against loops and torch's own optimiser."""

import pytest
import torch

from sae.kernels.entries import Entries
from sae.kernels.rates import adam_rates
from sae.kernels.reference import Reference
from tests.sae.kernels.cases import entries_of, make_case, matrix_of, some_pairs, spread

REFERENCE = Reference()


@pytest.mark.parametrize("n_groups", [1, 3])
def test_select__by_row_batch_and_threshold(n_groups: int) -> None:
    case = make_case(20, 7, 24, n_groups=n_groups, dtype=torch.float64)
    pre_BF = torch.empty(20, 24, dtype=torch.float64)
    pairs = REFERENCE.select_topk(case.x_BD, case.encoder, 5, "row", pre_BF=pre_BF)
    for row in range(20):
        for group, w_FD in zip(case.encoder.groups, case.encoder.weights, strict=True):
            for n, latent in enumerate(range(group.latents.start, group.latents.stop)):
                expected = case.x_BD[row, group.reads] @ w_FD[n] + case.encoder.bias_F[latent]
                assert pre_BF[row, latent] == pytest.approx(expected.item())
        largest = [value for value in sorted(pre_BF[row].tolist(), reverse=True)[:5] if value > 0]
        assert sorted(pairs.values_P[pairs.rows_P == row].tolist(), reverse=True) == largest
    batch = REFERENCE.select_topk(case.x_BD, case.encoder, 60, "batch")
    cut = sorted(pre_BF.flatten().tolist(), reverse=True)[59]
    assert torch.equal(spread(batch, case), pre_BF * (pre_BF >= cut))
    threshold_F = torch.linspace(0, 1, 24, dtype=torch.float64)
    above = REFERENCE.select_threshold(case.x_BD, case.encoder, threshold_F)
    assert torch.equal(spread(above, case), pre_BF * (pre_BF > threshold_F))


def test_products__equal_autograd() -> None:
    case = make_case(20, 7, 24, dtype=torch.float64)
    pairs = some_pairs(REFERENCE, case, 5)
    entries, values_BF = entries_of(pairs, case), spread(pairs, case).requires_grad_()
    w_FD = case.w_dec_FD.clone().requires_grad_()
    rebuilt_BD = values_BF @ w_FD
    rebuilt_BD.backward(case.error_BD)
    torch.testing.assert_close(REFERENCE.decode(entries, pairs.values_P, case.w_dec_FD), rebuilt_BD.detach())
    by_value = REFERENCE.value_gradients(entries, case.error_BD, case.w_dec_FD)
    torch.testing.assert_close(by_value, values_BF.grad[pairs.rows_P, pairs.latents_P])
    by_table = REFERENCE.table_gradient(entries.by_latent, pairs.values_P, pairs.rows_P, case.error_BD)
    torch.testing.assert_close(by_table, w_FD.grad)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_adam__equals_torchs_between_projections(unit_rows: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(12, 5, generator=generator, dtype=torch.float64))
    ours, theirs = matrix_of(start), start.clone()
    optimiser = torch.optim.Adam([theirs], lr=0.01, betas=(0.5, 0.9))
    each = torch.arange(12)  # a pair a latent: the gradient is the table
    by_latent, ones = Entries(each, each, 12, 12).by_latent, torch.ones(12, dtype=torch.float64)
    for step in range(1, 8):
        gradient = torch.randn(12, 5, generator=generator, dtype=torch.float64)
        along_F = (gradient * ours.weights).sum(1) if unit_rows else None
        rates = torch.tensor(adam_rates(step, 0.01, (0.5, 0.9)), dtype=torch.float64)
        REFERENCE.fit_rows(ours, by_latent, ones, each, gradient, rates, along_F)
        tangent = gradient - (gradient * theirs).sum(1, keepdim=True) * theirs
        theirs.grad = tangent if unit_rows else gradient
        optimiser.step()
        if unit_rows:
            theirs /= theirs.norm(dim=1, keepdim=True)
        torch.testing.assert_close(ours.weights, theirs)
        assert torch.equal(ours.copy, theirs.bfloat16())
