"""The CPU's kernels against the dense reference: shapes, K up to F, ties, rows of zeros, types, threads, strides."""

import pytest
import torch

from sae.kernels import TooDense, search
from sae.kernels.cpu import Cpu
from sae.kernels.entries import Entries, Matrix
from sae.kernels.found import above
from sae.kernels.rates import adam_rates
from sae.kernels.reference import Reference
from sae.pairs import Pairs
from tests.sae.kernels.cases import Case, entries_of, make_case, matrix_of, spread

REFERENCE, CPU = Reference(), Cpu()
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
SHAPES = [(1, 3, 1), (3, 5, 2), (20, 7, 24), (65, 33, 130), (40, 16, 300), (129, 64, 515)]  # B, D, F


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n} threads", autouse=True)
def threads(request, monkeypatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)  # over so many the loops are cut
    monkeypatch.setattr(search, "PART_BYTES", 4096)
    monkeypatch.setattr(search, "LEAST_LATENTS", 7)


def assert_same(found: Pairs, expected: Pairs, case: Case) -> None:
    width = case.encoder.width
    assert ((found.rows_P * width + found.latents_P).diff() > 0).all()
    assert torch.equal(found.rows_P, expected.rows_P)
    torch.testing.assert_close(
        spread(found, case).sort(dim=1).values, spread(expected, case).sort(dim=1).values, **CLOSE[case.x_BD.dtype]
    )  # of equal values, either


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_rows", "columns", "width"), SHAPES)
def test_select__of_rows_batch_and_thresholds(n_rows: int, columns: int, width: int, dtype: torch.dtype) -> None:
    for seed, n_groups in enumerate({1, 2 - width % 2}):
        case = make_case(n_rows, columns, width, seed, n_groups, dtype)
        pre_BF = torch.empty(n_rows, width, dtype=dtype)
        arguments = case.x_BD, case.encoder
        everything = REFERENCE.select_threshold(*arguments, torch.tensor(-torch.inf), pre_BF)
        for k in {1, min(3, width), width // 2 or 1, width}:
            assert_same(CPU.select_topk(*arguments, k, "row"), REFERENCE.select_topk(*arguments, k, "row"), case)
        for count in {1, n_rows, 2 * n_rows, n_rows * width}:
            expected = REFERENCE.select_topk(*arguments, count, "batch")
            for CPU.search.cut in (0.0, 0.3, 100.0):  # of the batch before
                assert_same(CPU.select_topk(*arguments, count, "batch"), expected, case)
        threshold_F = torch.linspace(-1, 2, width, dtype=dtype)
        found_BF = torch.empty_like(pre_BF)
        found = CPU.select_threshold(*arguments, threshold_F, found_BF)
        assert_same(found, REFERENCE.select_threshold(*arguments, threshold_F), case)
        torch.testing.assert_close(found_BF, pre_BF, **CLOSE[dtype])
        torch.testing.assert_close(spread(CPU.select_threshold(*arguments, torch.tensor(-torch.inf)), case), pre_BF)
        assert len(everything.rows_P) == n_rows * width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n_rows", "columns", "width"), SHAPES)
def test_dense_topk__and_their_gradients(n_rows: int, columns: int, width: int, dtype: torch.dtype) -> None:
    sums = torch.promote_types(dtype, torch.float32)
    case = make_case(n_rows, columns, width, dtype=sums)
    encoder = case.encoder._replace(weights=[w_FD.to(dtype) for w_FD in case.encoder.weights])
    for k in {1, min(3, width), width // 2 or 1, width}:
        found_BF = CPU.dense_topk(case.x_BD.to(dtype), encoder, k)
        expected_BF = REFERENCE.dense_topk(case.x_BD.to(dtype), encoder, k)
        assert found_BF.dtype == dtype
        assert ((found_BF > 0).sum(1) <= k).all()
        if dtype != torch.bfloat16:  # where a product may round to either side of 0
            assert torch.equal((found_BF > 0).sum(1), (expected_BF > 0).sum(1))
        close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else CLOSE[dtype]
        torch.testing.assert_close(found_BF.sort(dim=1).values, expected_BF.sort(dim=1).values, **close)
        grad_BF = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(k)).to(dtype)
        expected = (grad_BF * (found_BF > 0)).to(sums).sum(0)
        torch.testing.assert_close(CPU.gate(grad_BF, found_BF), expected, **CLOSE[sums])
        assert (grad_BF[found_BF == 0] == 0).all()
        assert (grad_BF[found_BF > 0] != 0).any() or not (found_BF > 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_rows", "columns", "width"), SHAPES)
def test_products__equal_dense_ones(n_rows: int, columns: int, width: int, dtype: torch.dtype) -> None:
    case = make_case(n_rows, columns, width, dtype=dtype)
    strided_BD = torch.stack([case.error_BD, case.x_BD], dim=2)[..., 0]
    for k in {1, 5, width}:
        pairs = REFERENCE.select_topk(case.x_BD, case.encoder, min(k, width), "row")
        entries, weights_P = entries_of(pairs, case), torch.stack([pairs.values_P] * 2, dim=1)[:, 1]
        for found, expected in (
            (CPU.decode(entries, weights_P, case.w_dec_FD), REFERENCE.decode(entries, pairs.values_P, case.w_dec_FD)),
            (
                CPU.value_gradients(entries, strided_BD, case.w_dec_FD),
                REFERENCE.value_gradients(entries, case.error_BD, case.w_dec_FD),
            ),
            (
                CPU.table_gradient(entries.by_latent, weights_P, pairs.rows_P, strided_BD),
                REFERENCE.table_gradient(entries.by_latent, pairs.values_P, pairs.rows_P, case.error_BD),
            ),
            (
                CPU.latent_sums(entries.by_latent, weights_P),
                REFERENCE.latent_sums(entries.by_latent, pairs.values_P),
            ),
        ):
            rounding = CLOSE[dtype]["rtol"] * expected.abs().max().item() if len(expected) else 0.0
            torch.testing.assert_close(found, expected, rtol=CLOSE[dtype]["rtol"], atol=rounding)


def test_products__of_no_pairs_are_zero() -> None:
    none = torch.empty(0, dtype=torch.int64)
    entries, table = Entries(none, none, 4, 6), torch.randn(6, 5)
    assert not CPU.decode(entries, torch.empty(0), table).any()
    assert CPU.value_gradients(entries, torch.randn(4, 5), table).shape == (0,)
    assert not CPU.table_gradient(entries.by_latent, torch.empty(0), none, table).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_ten_steps_of_adam__equal_the_references(unit_rows: bool, dtype: torch.dtype) -> None:
    case = make_case(20, 37, 24, seed=4, dtype=dtype)
    pairs = REFERENCE.select_topk(case.x_BD, case.encoder, 5, "row")
    by_latent = entries_of(pairs, case).by_latent
    start = torch.nn.functional.normalize(case.w_dec_FD)
    matrices = [matrix_of(start) for _ in range(2)]
    for step in range(1, 11):
        table_GD = torch.randn(case.error_BD.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        rates = torch.tensor(adam_rates(step, 0.01, (0.9, 0.999)), dtype=dtype)
        gradient = REFERENCE.table_gradient(by_latent, pairs.values_P, pairs.rows_P, table_GD)
        for kernels, matrix in zip((REFERENCE, CPU), matrices, strict=True):
            along_F = (gradient * matrix.weights).sum(1) if unit_rows else None
            kernels.fit_rows(matrix, by_latent, pairs.values_P, pairs.rows_P, table_GD, rates, along_F)
    expected, found = matrices
    torch.testing.assert_close(found.weights, expected.weights, **CLOSE[dtype])
    assert (found.weights - start).abs().max() > 0.01
    for mine, theirs in zip(found.moments, expected.moments, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE[dtype])
    assert torch.equal(found.copy, found.weights.bfloat16())


def test_products_in_bf16__select_by_narrow_products_and_keep_wide_values() -> None:
    case = make_case(65, 33, 130)
    narrow = case.encoder._replace(weights=[w_FD.bfloat16() for w_FD in case.encoder.weights])
    found, pre_BF = CPU.select_topk(case.x_BD, narrow, 6, "row"), torch.empty(65, 130)
    REFERENCE.select_threshold(case.x_BD, case.encoder, torch.tensor(0.0), pre_BF)
    assert found.values_P.dtype == torch.float32
    torch.testing.assert_close(found.values_P, pre_BF[found.rows_P, found.latents_P], rtol=0.02, atol=0.1)
    assert not torch.equal(found.values_P, pre_BF[found.rows_P, found.latents_P])


@pytest.mark.parametrize(("n_rows", "columns", "width"), SHAPES)
def test_products_in_bf16__select_what_the_reference_does_where_nothing_is_rounded(
    n_rows: int, columns: int, width: int
) -> None:
    """Of integers, whose products bfloat16 has; biases and thresholds are of float32, and fall between."""
    drawn = torch.Generator().manual_seed(width)
    x_BD = torch.randint(-1, 2, (n_rows, columns), generator=drawn).float()
    w_FD = torch.randint(-1, 2, (width, columns), generator=drawn).bfloat16()
    plain = make_case(n_rows, columns, width)
    case = plain._replace(x_BD=x_BD, encoder=plain.encoder._replace(weights=[w_FD]))
    for k in {1, min(3, width), width}:
        expected = REFERENCE.select_topk(x_BD, case.encoder, k, "row")
        assert_same(CPU.select_topk(x_BD, case.encoder, k, "row"), expected, case)
    expected = REFERENCE.select_topk(x_BD, case.encoder, 2 * n_rows, "batch")
    for CPU.search.cut in (0.0, 0.3, 100.0):
        assert_same(CPU.select_topk(x_BD, case.encoder, 2 * n_rows, "batch"), expected, case)
    for threshold_F in (torch.linspace(-4, 4, width), torch.tensor(-torch.inf)):
        found = CPU.select_threshold(x_BD, case.encoder, threshold_F)
        assert_same(found, REFERENCE.select_threshold(x_BD, case.encoder, threshold_F), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [30.0, -30.0])
def test_select__rows_whose_guess_fails_are_done_again(shift: float, dtype: torch.dtype) -> None:
    """The latents that come first are the largest of all, or the smallest."""
    plain = make_case(65, 33, 130)
    weights, bias_F = [plain.encoder.weights[0].to(dtype)], plain.encoder.bias_F.clone()
    bias_F[:20] += shift
    case = plain._replace(encoder=plain.encoder._replace(weights=weights, bias_F=bias_F))
    for k in (15, 40, 130):
        found, expected = (kernels.select_topk(case.x_BD, case.encoder, k, "row") for kernels in (CPU, REFERENCE))
        assert torch.equal(found.rows_P.bincount(), expected.rows_P.bincount())
        torch.testing.assert_close(
            spread(found, case).sort(dim=1).values, spread(expected, case).sort(dim=1).values, rtol=0.01, atol=0.1
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_select__has_the_same_bits_whatever_the_batch_before_was(dtype: torch.dtype) -> None:
    """A run that goes on from a checkpoint knows nothing of that batch."""
    plain = make_case(129, 640, 515)
    encoder = plain.encoder._replace(weights=[plain.encoder.weights[0].to(dtype)])
    found = []
    for CPU.search.room, CPU.search.cut in ((1, 0.0), (10_000, 30.0), (90, 50.0)):
        pairs = [
            CPU.select_topk(plain.x_BD, encoder, 129 * 40, "batch"),
            CPU.select_threshold(plain.x_BD, encoder, torch.tensor(1.0)),
        ]
        found.append([tensor for one in pairs for tensor in one])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_threshold__that_too_many_pairs_are_above_is_told() -> None:
    case = make_case(20, 7, 24)
    for kernels in (CPU, REFERENCE):
        there = len(kernels.select_threshold(case.x_BD, case.encoder, torch.tensor(0.0), most=20 * 24).rows_P)
        kernels.select_threshold(case.x_BD, case.encoder, torch.tensor(0.0), most=there)
        with pytest.raises(TooDense):
            kernels.select_threshold(case.x_BD, case.encoder, torch.tensor(0.0), most=there - 1)


@pytest.mark.parametrize(("n_rows", "columns", "width"), SHAPES)
def test_sums_of_bf16_rows__equal_those_of_the_same_numbers(n_rows: int, columns: int, width: int) -> None:
    case = make_case(n_rows, columns, width)
    pairs = REFERENCE.select_topk(case.x_BD, case.encoder, min(5, width), "row")
    pairs.values_P[::3] = 0  # as of pairs whose thresholds alone have a gradient
    entries, w_FD, error_BD = entries_of(pairs, case), case.w_dec_FD.bfloat16(), case.error_BD.bfloat16()
    ours, theirs = (
        (kernels, w, error, torch.randn(case.error_BD.shape, generator=torch.Generator().manual_seed(1)))
        for kernels, w, error in ((CPU, w_FD, error_BD), (REFERENCE, w_FD.float(), error_BD.float()))
    )
    grads = torch.empty_like(error_BD), torch.empty_like(case.error_BD)
    found, expected = (
        [
            kernels.value_gradients(entries, error, w),
            kernels.table_gradient(entries.by_latent, pairs.values_P, pairs.rows_P, error),
            kernels.rebuild(entries, pairs.values_P, w, rest, 0.5, grad),
            rest,
            grad.float(),
        ]
        for (kernels, w, error, rest), grad in zip((ours, theirs), grads, strict=True)
    )
    for mine, other in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
    assert torch.equal(grads[0], (0.5 * ours[3]).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_matrices__are_fitted_as_by_the_reference(dtype: torch.dtype) -> None:
    case = make_case(20, 37, 24, seed=4, dtype=dtype)
    pairs = REFERENCE.select_topk(case.x_BD, case.encoder, 5, "row")
    entries, rates = entries_of(pairs, case), torch.tensor(adam_rates(1, 0.01, (0.9, 0.999)), dtype=dtype)
    assert all(map(torch.equal, CPU.by_latent(entries), REFERENCE.by_latent(entries)))
    start, found = torch.nn.functional.normalize(case.w_dec_FD), []
    for kernels in (CPU, REFERENCE):
        by_latent, (encoder, decoder) = entries.by_latent, (plain_matrix_of(start) for _ in range(2))
        slopes_P = kernels.fit_decoder(decoder, entries, by_latent, pairs.values_P, case.error_BD, rates)
        sums = kernels.fit_encoder(encoder, by_latent, slopes_P, pairs.rows_P, case.x_BD, rates)
        found.append([slopes_P, *sums, encoder.weights, decoder.weights, *encoder.moments, *decoder.moments])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE[dtype])


def plain_matrix_of(w_FD: torch.Tensor) -> Matrix:
    """Whose copy, as products are of its type, is the matrix itself."""
    w_FD = w_FD.clone()
    return Matrix(w_FD, (torch.zeros_like(w_FD), torch.zeros_like(w_FD)), w_FD)


def test_centre__takes_rows_and_their_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BD, y_BD = torch.randn(50, 9, generator=generator), 30 + torch.randn(50, 7, generator=generator)
    centre_D, b_dec_D = torch.randn(9, generator=generator), torch.randn(7, generator=generator)
    found = []
    for kernels in (CPU, REFERENCE):
        centred_BD, rest_BD = torch.empty(50, 9, dtype=torch.bfloat16), torch.empty(50, 7)
        variance = kernels.centre(x_BD, y_BD, centre_D, b_dec_D, centred_BD, rest_BD)
        found.append([centred_BD, rest_BD, variance])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_rows", "width"), [(1, 1), (3, 7), (20, 64), (5, 1001)])
@pytest.mark.parametrize("level", [-10.0, 0.0, 1.5, 10.0])
def test_above__finds_what_a_comparison_does(n_rows: int, width: int, level: float) -> None:
    pre_BF, threshold_F = torch.randn(n_rows, width), torch.full((width,), level) + torch.rand(width)
    pre_BF[0, 0], pre_BF[-1, -1] = threshold_F[0], torch.nan  # no more than it, and no number
    mask_BF = pre_BF > threshold_F
    starts, latents_P, values_P = above(pre_BF, threshold_F)
    assert starts.tolist() == [0, *mask_BF.sum(1).cumsum(0).tolist()]
    assert latents_P.dtype == torch.int32
    torch.testing.assert_close(latents_P.long(), mask_BF.nonzero()[:, 1])
    assert torch.equal(values_P, pre_BF[mask_BF])
