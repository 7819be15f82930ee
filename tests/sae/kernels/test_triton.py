"""The Triton kernels against the dense reference: on a GPU where there is one, else in Triton's interpreter.

Triton is no dependency: it comes with the CUDA build of torch, and can be installed beside the CPU's.
"""

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="comes with the CUDA build of torch")

from sae.kernels.entries import Encoder  # noqa: E402
from sae.kernels.gpu import Gpu  # noqa: E402
from sae.kernels.rates import adam_rates  # noqa: E402
from sae.kernels.reference import Reference  # noqa: E402
from sae.pairs import Pairs  # noqa: E402
from tests.sae.kernels.cases import Case, entries_of, make_case, matrix_of, spread  # noqa: E402

REFERENCE, GPU = Reference(), Gpu()
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def there(value):
    """A case's tensors, on the device of the kernels."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, Encoder):
        return Encoder([w.to(DEVICE) for w in value.weights], value.bias_F.to(DEVICE), value.groups)
    return type(value)(*map(there, value)) if isinstance(value, Case) else value


def selected(case: Case, count: int, per: str, pre_BF: torch.Tensor | None = None) -> Pairs:
    at = there(case)
    return GPU.select_topk(at.x_BD, at.encoder, count, per, pre_BF=pre_BF)


def in_order(pairs: Pairs, width: int) -> bool:
    return bool(((pairs.rows_P * width + pairs.latents_P).diff() > 0).all())


@pytest.mark.parametrize(
    ("n_rows", "width", "k", "n_groups"), [(10, 48, 6, 1), (10, 48, 6, 3), (6, 30, 30, 1), (5, 70, 1, 1)]
)
def test_select_of_rows__has_the_largest_values_in_order(n_rows: int, width: int, k: int, n_groups: int) -> None:
    case = make_case(n_rows, 7, width, n_groups=n_groups)
    pre_BF = torch.empty(n_rows, width, device=DEVICE)
    pairs = selected(case, k, "row", pre_BF)
    expected = REFERENCE.select_topk(case.x_BD, case.encoder, k, "row")
    assert len(pairs.rows_P) == n_rows * k
    assert in_order(pairs, width)
    torch.testing.assert_close(
        spread(pairs, case).sort(dim=1).values, spread(expected, case).sort(dim=1).values, **TOLERANCE
    )  # of equal values, either
    values_P = pre_BF[pairs.rows_P, pairs.latents_P].clamp_min(0)
    torch.testing.assert_close(pairs.values_P, values_P, **TOLERANCE)


@pytest.mark.parametrize(("n_rows", "width", "count"), [(10, 48, 61), (7, 30, 210), (7, 30, 1), (150, 32, 100)])
def test_select_of_a_batch__has_the_largest_values_in_order(n_rows: int, width: int, count: int) -> None:
    case = make_case(n_rows, 7, width, seed=1)
    pairs = selected(case, count, "batch")
    expected = REFERENCE.select_topk(case.x_BD, case.encoder, count, "batch").values_P
    assert len(pairs.rows_P) == count
    assert in_order(pairs, width)
    largest = expected.sort(descending=True).values[:count]
    found = pairs.values_P.sort(descending=True).values.cpu()
    torch.testing.assert_close(found[: len(largest)], largest, **TOLERANCE)
    assert not found[len(largest) :].any()  # appended, where fewer are positive


def test_select__equals_by_set_where_nothing_ties() -> None:
    case = make_case(12, 7, 60, seed=2)
    case = case._replace(x_BD=torch.randn(12, 7), encoder=case.encoder._replace(weights=[torch.randn(60, 7)]))
    for count, per in ((5, "row"), (60, "batch")):
        expected = REFERENCE.select_topk(case.x_BD, case.encoder, count, per)
        torch.testing.assert_close(spread(selected(case, count, per), case), spread(expected, case), **TOLERANCE)
    threshold_F = torch.linspace(0, 1, 60)
    at = there(case)
    above = GPU.select_threshold(at.x_BD, at.encoder, threshold_F.to(DEVICE))
    expected = REFERENCE.select_threshold(case.x_BD, case.encoder, threshold_F)
    torch.testing.assert_close(spread(above, case), spread(expected, case), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products__equal_the_reference(dtype: torch.dtype) -> None:
    case = make_case(10, 7, 24, seed=3)
    w_FD, error_BD = case.w_dec_FD.to(dtype), case.error_BD.to(dtype)
    pairs = selected(case, 40, "batch")
    entries, on_cpu = entries_of(pairs, case), Pairs(*(part.cpu() for part in pairs))
    expected, at = entries_of(on_cpu, case), (w_FD.to(DEVICE), error_BD.to(DEVICE))
    torch.testing.assert_close(
        GPU.decode(entries, pairs.values_P, at[0]).cpu(),
        REFERENCE.decode(expected, on_cpu.values_P, w_FD.float()),
        **TOLERANCE,
    )
    torch.testing.assert_close(
        GPU.value_gradients(entries, at[1], at[0]).cpu(),
        REFERENCE.value_gradients(expected, error_BD.float(), w_FD.float()),
        **TOLERANCE,
    )
    torch.testing.assert_close(
        GPU.table_gradient(entries.by_latent, pairs.values_P, pairs.rows_P, at[1]).cpu(),
        REFERENCE.table_gradient(expected.by_latent, on_cpu.values_P, on_cpu.rows_P, error_BD.float()),
        **TOLERANCE,
    )
    torch.testing.assert_close(
        GPU.latent_sums(entries.by_latent, pairs.values_P).cpu(),
        REFERENCE.latent_sums(expected.by_latent, on_cpu.values_P),
        **TOLERANCE,
    )


@pytest.mark.parametrize("shape", [(10, 7), (131, 300)])
def test_centred_rows__equal_the_reference(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(5)
    x_BD, y_BD = torch.randn(2, *shape, generator=draw)
    y_BD += 3  # a mean that is not 0
    centre_D, b_dec_D = torch.randn(2, shape[1], generator=draw)
    results = []
    for kernels, device in ((REFERENCE, torch.device("cpu")), (GPU, DEVICE)):
        outputs = torch.full((2, *shape), float("nan"), device=device)
        inputs = [part.to(device) for part in (x_BD, y_BD, centre_D, b_dec_D)]
        results.append([kernels.centre(*inputs, *outputs).cpu(), *outputs.cpu()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_rebuilt_rows__are_what_is_left_and_its_squares_are_summed() -> None:
    case = make_case(10, 300, 24, seed=3)
    pairs = selected(case, 40, "batch")
    on_cpu = Pairs(*(part.cpu() for part in pairs))
    results = []
    for kernels, device, mine in ((REFERENCE, torch.device("cpu"), on_cpu), (GPU, DEVICE, pairs)):
        rest_GD = case.error_BD.to(device, copy=True)
        grad_GD = torch.empty_like(rest_GD)
        entries, w_FD = entries_of(mine, case), case.w_dec_FD.to(device)
        squares = kernels.rebuild(entries, mine.values_P, w_FD, rest_GD, 0.5, grad_GD)
        results.append([squares.cpu(), rest_GD.cpu(), grad_GD.cpu()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("n_columns", [2, 3, 5, 40])
def test_a_decoders_step__at_every_split_of_its_rows(n_columns: int) -> None:
    case = make_case(6, n_columns, 12, seed=4)
    pairs = selected(case, 19, "batch")
    on_cpu, start = Pairs(*(part.cpu() for part in pairs)), torch.nn.functional.normalize(case.w_dec_FD)
    rates = torch.tensor(adam_rates(1, 0.01, (0.9, 0.999)))
    results = []
    for kernels, device, mine in ((REFERENCE, torch.device("cpu"), on_cpu), (GPU, DEVICE, pairs)):
        weights = start.to(device, copy=True)
        matrix, entries = matrix_of(weights)._replace(copy=weights.clone()), entries_of(mine, case)
        inputs = mine.values_P, case.error_BD.to(device), rates.to(device)
        results.append([kernels.fit_decoder(matrix, entries, entries.by_latent, *inputs).cpu(), matrix.weights.cpu()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_ten_steps_of_adam__equal_the_references(unit_rows: bool) -> None:
    case = make_case(6, 5, 12, seed=4)
    pairs = selected(case, 19, "batch")
    entries = entries_of(pairs, case)
    by_latent = entries.by_latent
    start = torch.nn.functional.normalize(case.w_dec_FD)
    expected, by_rows, by_decoder = (matrix_of(start.to(device, copy=True)) for device in ("cpu", DEVICE, DEVICE))
    on_cpu = Pairs(*(part.cpu() for part in pairs))
    places = entries_of(on_cpu, case).by_latent
    for step in range(1, 11):
        table_GD = torch.randn(case.error_BD.shape, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        gradient = GPU.table_gradient(by_latent, pairs.values_P, pairs.rows_P, table_GD)
        rates = torch.tensor(adam_rates(step, 0.01, (0.9, 0.999)))
        along_F = (gradient.cpu() * expected.weights).sum(1) if unit_rows else None
        REFERENCE.fit_rows(expected, places, on_cpu.values_P, on_cpu.rows_P, table_GD.cpu(), rates, along_F)
        along_F = (gradient * by_rows.weights).sum(1) if unit_rows else None
        GPU.fit_rows(by_rows, by_latent, pairs.values_P, pairs.rows_P, table_GD, rates.to(DEVICE), along_F)
        if unit_rows:
            w_FD = by_decoder.weights.clone()
            products_P = GPU.fit_decoder(
                by_decoder, entries, entries.by_latent, pairs.values_P, table_GD, rates.to(DEVICE)
            )
            torch.testing.assert_close(products_P, (table_GD @ w_FD.T)[pairs.rows_P, pairs.latents_P], **TOLERANCE)
    for found in (by_rows, by_decoder) if unit_rows else (by_rows,):
        torch.testing.assert_close(found.weights.cpu(), expected.weights, **TOLERANCE)
        assert (found.weights.cpu() - start).abs().max() > 0.01
        for mine, theirs in zip(found.moments, expected.moments, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, **TOLERANCE)
        torch.testing.assert_close(found.copy.float(), found.weights, rtol=2**-7, atol=0)  # the interpreter rounds down
