"""The fused step, with the dense reference's kernels and the CPU's, against the step of `sae.objective`."""

import pytest
import torch

from sae.fused import covers, fused_step
from sae.kernels import Kernels
from sae.kernels.cpu import Cpu
from sae.kernels.reference import Reference
from sae.spec import Resampling
from sae.step import TrainingDictionary
from sae.team import ALONE
from tests.sae.specs import ACTIVATIONS, KINDS, SITE_WIDTHS, make_rows, make_spec

COVERED = ("sae", "transcoder", "skip_transcoder", "acausal_crosscoder")


@pytest.fixture(params=[Reference, Cpu])
def kernels(request) -> Kernels:
    return request.param()


def pair_of_dictionaries(spec, kernels: Kernels) -> tuple[TrainingDictionary, TrainingDictionary]:
    torch.set_num_threads(1)  # on a shared machine more only wait for each other
    plain, fused = (TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"), torch.float64) for _ in range(2))
    plain.fused, fused.fused = None, fused_step(fused, kernels, torch.float64)
    return plain, fused


def assert_same(plain: TrainingDictionary, fused: TrainingDictionary) -> None:
    state = fused.state()
    for name, expected in plain.state().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-9, atol=1e-12, msg=name, check_dtype=False)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("kind", COVERED)
def test_fused_steps__equal_those_of_the_objective(kind: str, activation: str, kernels: Kernels) -> None:
    spec = make_spec(kind, activation, dead_after_rows=100, resampling=Resampling(at=(0.45,)))
    plain, fused = pair_of_dictionaries(spec, kernels)
    for step in range(10):
        x, y = (rows.double() for rows in make_rows(spec, step, n_rows=90 if step == 9 else 96))
        for dictionary in (plain, fused):
            dictionary.step(x, y, progress=(step + 1) / 10)
    assert_same(plain, fused)
    assert fused.sums.take() == pytest.approx(plain.sums.take())


@pytest.mark.parametrize("latents", [None, 3])
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("kind", COVERED)
def test_auxk__revives_as_in_the_objective(
    kind: str, activation: str, latents: int | None, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all dead latents, and of three a row."""
    spec = make_spec(kind, activation, l0=1, dead_after_rows=90, auxk={"latents": latents, "coefficient": 1})
    plain, fused = pair_of_dictionaries(spec, kernels)
    revived, revive = [], fused.fused._revived
    monkeypatch.setattr(fused.fused, "_revived", lambda dead: revived.append(len(dead)) or revive(dead))
    for step in range(10):
        x, y = (rows.double() for rows in make_rows(spec, step))
        for dictionary in (plain, fused):
            dictionary.step(x, y, progress=(step + 1) / 10)
    assert_same(plain, fused)
    assert max(revived) > 3


@pytest.mark.parametrize("penalty", ["linear", "quadratic", "tanh"])
def test_jumprelu__that_starts_dense_becomes_sparse_like_the_objective(
    penalty: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published threshold lets half of all latents be active at first, which is stepped by dense products."""
    start = {"jumprelu": {"threshold_start": 0.0, "penalty": penalty}, "learning_rate": 0.02}
    plain, fused = pair_of_dictionaries(make_spec("sae", "jumprelu", training=start), kernels)
    dense, step_plain = [], fused._step_plain
    monkeypatch.setattr(fused, "_step_plain", lambda *given: dense.append(given[2]) or step_plain(*given))
    for step in range(40):
        x, y = (rows.double() for rows in make_rows(make_spec("sae"), step))
        for dictionary in (plain, fused):
            dictionary.step(x, y, progress=(step + 1) / 40)
    assert_same(plain, fused)
    assert dense[0] == 1 / 40
    assert dense[-1] < 1


def test_jumprelu__products_in_bfloat16_leave_its_band_where_it_is() -> None:
    """Thresholds of 2, where numbers of bfloat16 lie further apart than the band is wide."""
    spec = make_spec("sae", "jumprelu", training={"jumprelu": {"bandwidth": 0.01, "threshold_start": 2.0}})
    dictionary = TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"), products=torch.bfloat16)
    dictionary.parameters["w_enc.0"].mul_(3)
    dictionary.fused = dictionary._fused()
    x, y = make_rows(spec, 0, n_rows=2000)
    dictionary.step(x, y, progress=0.01)
    fused = dictionary.fused
    activation, w_FD = fused._activation(), fused.w_enc.copy
    pairs = fused.kernels.select_threshold(fused.centred_BD, fused._encoder(), activation.floor() * 0.99)
    rounded_P = pairs.pre_P.clone()
    fused._sharpen(pairs, torch.finfo(torch.bfloat16).eps)
    exact_P = (fused.centred_BD[pairs.rows_P].float() * w_FD[pairs.latents_P].float()).sum(1)
    exact_P += dictionary.parameters["b_enc"][pairs.latents_P]
    in_band_P = (exact_P - activation.threshold()[pairs.latents_P]).abs() < 0.005
    assert in_band_P.sum() > 10
    torch.testing.assert_close(pairs.pre_P[in_band_P], exact_P[in_band_P], rtol=1e-5, atol=1e-5)
    assert (rounded_P - exact_P)[in_band_P].abs().max() > 1e-3


def test_fused_steps__go_on_from_a_state(kernels: Kernels) -> None:
    spec = make_spec("sae", "batch_topk")
    plain, fused = pair_of_dictionaries(spec, kernels)
    rows = [tuple(part.double() for part in make_rows(spec, step)) for step in range(6)]
    for step in range(3):
        plain.step(*rows[step], progress=0.5)
    fused.load(plain.state())
    fused.fused = fused_step(fused, kernels, torch.float64)
    for step in range(3, 6):
        plain.step(*rows[step], progress=0.5)
        fused.step(*rows[step], progress=0.5)
    assert_same(plain, fused)


def test_covers__what_is_tested_here_and_nothing_else() -> None:
    for kind in KINDS:
        for activation in ACTIVATIONS:
            spec, fused = make_spec(kind, activation), ("topk", "batch_topk", "jumprelu")
            assert covers(spec, ALONE, torch.device("cpu")) == (kind in COVERED and activation in fused)
            assert covers(spec, ALONE, torch.device("cuda")) == (kind in COVERED and activation in fused[:2])
    for option in ("auxk", "matryoshka", "preactivation"):
        spec = make_spec("sae", "topk", **{option: {}})
        assert covers(spec, ALONE, torch.device("cpu")) == (option == "auxk")
        assert not covers(spec, ALONE, torch.device("cuda"))
