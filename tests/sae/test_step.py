"""Training dictionaries of every kind: start, folding, state, dead latents, schedules."""

import itertools

import pytest
import torch

from sae import objective, schedule
from sae.activations import DEAD_THRESHOLD_DECAY
from sae.dead import auxk_pairs, badly_rebuilt_rows
from sae.fold import Scales, fold, unfold
from sae.matryoshka import prefix_ends
from sae.spec import DictionarySpec, Matryoshka, Training
from sae.step import TrainingDictionary
from sae.team import ALONE
from tests.sae.specs import ACTIVATIONS, KINDS, SITE_WIDTHS, make_rows, make_spec

SCALES = {key: 50.0 * (n + 1) for n, key in enumerate(SITE_WIDTHS)}


def started(spec: DictionarySpec, steps: int = 5) -> TrainingDictionary:
    torch.set_num_threads(1)
    dictionary = TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"))
    for step in range(steps):
        dictionary.step(*make_rows(spec, step), progress=0.5)
    return dictionary


def raw(spec: DictionarySpec, rows: torch.Tensor, sites: list) -> torch.Tensor:
    parts = rows.split([SITE_WIDTHS[site.key] for site in sites], dim=1)
    return torch.cat([part * SCALES[site.key] for part, site in zip(parts, sites, strict=True)], dim=1)


def trained_output(dictionary: TrainingDictionary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and reconstruction of scaled rows, by the training form's own dense formulas."""
    t, shape = dictionary.trained(), dictionary.shape
    centred = x - t.centre_D
    z = torch.cat([centred[:, g.reads] @ w.T for g, w in zip(shape.groups, t.w_enc, strict=True)], dim=1) + t.b_enc_F
    pre = t.gain_F * z + t.shift_F
    latents = torch.relu(pre) * (pre > t.threshold_F)
    if t.k is not None:
        latents = latents * (latents >= latents.topk(t.k, dim=1).values[:, -1:])
    y = t.b_dec_D.repeat(len(x), 1)
    for group, w in zip(shape.groups, t.w_dec, strict=True):
        y[:, group.writes] += latents[:, group.latents] @ w
    for reads, writes, w in zip(shape.read_columns, shape.write_columns, t.w_skip, strict=False):
        y[:, writes] += centred[:, reads] @ w
    return latents, y


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_folded__equals_the_training_form_on_raw_rows(kind: str, activation: str) -> None:
    dictionary = started(make_spec(kind, activation))
    spec = dictionary.spec
    x, _ = make_rows(spec, seed=7)
    latents, y = trained_output(dictionary, x)
    folded, raw_x = dictionary.folded(SCALES), raw(spec, x, spec.reads)
    assert 0 < (latents > 0).sum() < latents.numel()
    unit = SCALES[spec.writes[0].key]
    torch.testing.assert_close(folded.encode(raw_x), latents * unit, rtol=1e-4, atol=1e-2)
    decoded = folded.decode(folded.encode(raw_x), raw_x)
    torch.testing.assert_close(decoded, raw(spec, y, spec.writes), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "gated"])
def test_trained__ships_what_training_selects(activation: str) -> None:
    dictionary = started(make_spec("sae", activation))
    x, _ = make_rows(dictionary.spec, seed=7)
    latents, _ = trained_output(dictionary, x)
    now = schedule.now(dictionary.spec, 0.5, 6)
    pairs = dictionary.activation.select(dictionary._pre_activations(x - dictionary.parameters["b_dec"]), len(x), now)
    values = torch.zeros_like(latents)
    values[pairs.rows_P, pairs.latents_P] = pairs.values_P
    torch.testing.assert_close(values, latents)


@pytest.mark.parametrize("kind", KINDS)
def test_unfold__is_the_inverse_of_fold(kind: str) -> None:
    dictionary = started(make_spec(kind, "jumprelu"))
    spec = dictionary.spec
    scales = Scales([SCALES[s.key] for s in spec.reads], [SCALES[s.key] for s in spec.writes])
    once = fold(dictionary.shape, dictionary.trained(), scales)
    again = fold(dictionary.shape, unfold(once, scales, centred=spec.autoencodes), scales)
    for name in ("w_enc", "w_dec", "w_skip"):
        for one, other in zip(getattr(once, name), getattr(again, name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    for name in ("b_enc_F", "threshold_F", "b_dec_D"):
        torch.testing.assert_close(getattr(once, name), getattr(again, name), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["sae", "skip_clt"])
def test_state__a_loaded_dictionary_goes_on_bit_for_bit(kind: str, activation: str) -> None:
    options = {"matryoshka": {"sampled": True}, "auxk": {}, "resampling": {"at": (0.6,)}, "dead_after_rows": 96}
    spec = make_spec(kind, activation, **options)
    one, other = started(spec), TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"))
    other.load({name: value.clone() for name, value in one.state().items()})
    for step in range(3):
        for dictionary in (one, other):
            dictionary.step(*make_rows(spec, 50 + step), progress=0.7)
    assert one.state().keys() == other.state().keys()
    for name, value in one.state().items():
        assert torch.equal(value, other.state()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_start__decoder_rows_are_unit_and_stay_so_and_the_encoder_is_tied_where_published(kind: str) -> None:
    spec = make_spec(kind, training={"encoder_init_scale": 0.25})
    dictionary = TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"))
    for group, w_enc, w_dec in zip(
        dictionary.shape.groups, dictionary.weights("w_enc"), dictionary.weights("w_dec"), strict=True
    ):
        own = w_dec[:, : w_enc.shape[1]]
        cosine = torch.nn.functional.cosine_similarity(w_enc, own).abs()
        assert (cosine > 0.999).all() if spec.autoencodes else cosine.mean() < 0.7
        torch.testing.assert_close(w_enc.norm(dim=1), torch.full((group.width,), 0.25))
    x, y = make_rows(spec, seed=0)
    dictionary.step(x + 0.1, y + 0.1, progress=1e-9)  # so early in the warm-up that nothing moves
    torch.testing.assert_close(dictionary.parameters["b_dec"], (y + 0.1).mean(0))
    for _ in range(3):
        dictionary.step(x, y, progress=0.5)
    for w_dec in dictionary.weights("w_dec"):
        torch.testing.assert_close(w_dec.norm(dim=1), torch.ones(len(w_dec)))


def test_clt__has_no_weights_to_earlier_layers() -> None:
    folded = started(make_spec("clt")).folded(SCALES)
    widths = folded.shape.write_widths
    latents = torch.zeros(1, folded.shape.width)
    for layer, group in enumerate(folded.shape.groups):
        one = latents.clone()
        one[:, group.latents] = 1
        change = folded.decode(one) - folded.decode(latents)
        assert (change[:, : sum(widths[:layer])] == 0).all()
        assert (change[:, sum(widths[:layer]) :] != 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_resampling__dead_latents_restart_along_rows_and_forget_their_moments(activation: str) -> None:
    spec = make_spec("sae", activation, resampling={"at": (0.6,)}, dead_after_rows=10_000)
    dictionary = started(spec)
    dead = torch.tensor([4, 17])
    dictionary.idle.rows_F[dead] = 20_000
    x, y = make_rows(spec, seed=9)
    dictionary.parameters["b_enc"][dead] = -100.0  # so that they are dead in this batch too
    living = torch.ones(spec.width, dtype=torch.bool).index_fill_(0, dead, False)
    dictionary.step(x, y, progress=0.61)
    w_enc, w_dec = dictionary.weights("w_enc")[0], dictionary.weights("w_dec")[0]
    targets = torch.nn.functional.normalize(y - dictionary.parameters["b_dec"])
    assert ((targets @ w_dec[dead].T).amax(0) > 0.999).all(), "decoder rows are unit rows of the batch"
    ratio = w_enc[dead].norm(dim=1) / w_enc[living].norm(dim=1).mean()
    torch.testing.assert_close(ratio, torch.full((2,), 0.2))
    assert (dictionary.parameters["b_enc"][dead] == 0).all()
    for name in ("w_enc.0", "w_dec.0", "b_enc", *dictionary.activation.learned):
        assert (dictionary.optimiser.state[dictionary.learned[name]]["exp_avg_sq"][dead] == 0).all(), name
    before = w_dec[dead].clone()
    dictionary.idle.rows_F[dead] = 20_000
    dictionary.step(x, y, progress=0.62)
    assert (w_dec[dead] * before).sum(1).min() > 0.9, "done once, not again after that share of the run"


def test_badly_rebuilt_rows__are_different_and_bad_ones_more_likely() -> None:
    loss = torch.ones(50)
    loss[7] = 1000
    drawn = [badly_rebuilt_rows(loss, 10, seed=0, step=step) for step in range(20)]
    assert all(len(set(rows.tolist())) == 10 and 7 in rows for rows in drawn)
    assert torch.equal(badly_rebuilt_rows(loss, 10, seed=0, step=3), drawn[3])


def test_auxk__takes_half_the_written_width_of_dead_latents_a_row(monkeypatch) -> None:
    pre, dead = torch.rand(5, 40) + 0.1, torch.arange(0, 40, 2)
    pairs = auxk_pairs(6, pre, dead, ALONE.latents)
    assert torch.bincount(pairs.rows_P).tolist() == [6] * 5
    for row in range(5):
        taken = pairs.latents_P[pairs.rows_P == row]
        assert set(taken.tolist()) == set(dead[pre[row, dead].topk(6).indices].tolist())

    counts = []
    monkeypatch.setattr(objective, "auxk_pairs", lambda count, *rest: counts.append(count) or auxk_pairs(count, *rest))
    dictionary = started(make_spec("sae", auxk={}))
    dictionary.fused = None  # which tests/sae/test_fused.py holds equal
    dictionary.idle.rows_F[:] = 10_000
    dictionary.step(*make_rows(dictionary.spec, seed=9), progress=0.5)
    assert counts[-1] == dictionary.shape.d_out // 2


@pytest.mark.parametrize("auxk", [None, {}])
def test_auxk__lowers_the_thresholds_of_dead_latents(auxk: dict | None) -> None:
    dictionary = started(make_spec("sae", "jumprelu", auxk=auxk, training={"jumprelu": {"bandwidth": 1e-6}}))
    dead = torch.tensor([4, 17])
    dictionary.idle.rows_F[dead] = 20_000
    dictionary.parameters["b_enc"][dead] = -100.0  # far from their thresholds, which therefore get no gradient
    before = dictionary.activation.state["threshold"].clone()
    dictionary.optimiser.state[dictionary.learned["threshold"]]["exp_avg"].zero_()
    dictionary.step(*make_rows(dictionary.spec, 9), progress=0.5)
    ratio = dictionary.activation.state["threshold"][dead] / before[dead]
    torch.testing.assert_close(ratio, torch.full((2,), 1.0 if auxk is None else 1 - DEAD_THRESHOLD_DECAY))


def test_control__eases_off_while_l0_is_on_its_way_down() -> None:
    activation = started(make_spec("sae", "relu"), steps=1).activation
    activation.state["excess"].zero_()
    now, coefficients = schedule.now(activation.spec, 1.0, 1), [activation.state["coefficient"].item()]
    for multiple in (2.0, 2.0, 1.8, 1.0):
        activation._control(torch.tensor(multiple * now.l0), now)
        coefficients.append(activation.state["coefficient"].item())
    rises = [after > before for before, after in itertools.pairwise(coefficients)]
    assert rises == [True, True, False, False]


def test_idle__counts_rows_since_each_latent_fired() -> None:
    dictionary = started(make_spec("sae", "batch_topk"), steps=1)
    before = dictionary.idle.rows_F.clone()
    assert set(before.tolist()) <= {0, 96}
    dictionary.parameters["b_enc"][0] = -100.0
    dictionary.step(*make_rows(dictionary.spec, 1), progress=0.5)
    assert dictionary.idle.rows_F[0] == before[0] + 96


def test_matryoshka__prefixes_are_the_recipes_or_drawn_anew_each_step() -> None:
    spec = make_spec("clt", width=300, matryoshka=Matryoshka(prefixes=(0.1, 0.5)))
    group = started(spec).shape.groups[1]
    assert prefix_ends(spec, group, step=1) == [10, 50, 100]
    sampled = make_spec("clt", width=300, matryoshka=Matryoshka(prefixes=(0.1, 0.5), sampled=True))
    draws = [prefix_ends(sampled, group, step) for step in range(50)]
    assert prefix_ends(sampled, group, step=7) == draws[7]
    assert len({tuple(draw) for draw in draws}) > 40
    assert all(10 <= draw[0] <= draw[1] <= draw[2] == 100 for draw in draws)


def test_gated__coefficient_moves_l0_to_its_target() -> None:
    spec = make_spec("sae", "gated", l0=8, training={"l0_control": 0.1})
    dictionary = TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"))
    for step in range(400):
        dictionary.step(*make_rows(spec, step), progress=(step + 1) / 400)
        if step == 300:
            dictionary.sums.take()
    assert dictionary.sums.take()["l0"] == pytest.approx(8, rel=0.1)


def test_schedule__warm_ups_decay_and_targets() -> None:
    spec = make_spec(training={"warmup_fraction": 0.1, "decay_fraction": 0.2, "l0_start": 3, "l0_decay_fraction": 0.5})
    rates = [schedule.now(spec, p, 1).learning_rate for p in (0.05, 0.1, 0.5, 0.9, 1.0)]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3, 0.0])
    assert [schedule.now(spec, p, 1).l0 for p in (1e-9, 0.25, 0.5, 1.0)] == pytest.approx([18, 12, 6, 6])
    published = make_spec(training={"warmup_shape": "cosine", "warmup_steps": 1000, "sparsity_warmup_steps": 50_000})
    assert schedule.now(published, 0.5, 500).learning_rate == pytest.approx(1e-3 * 0.55)
    assert schedule.now(published, 0.5, 1000).learning_rate == pytest.approx(1e-3)
    assert schedule.now(published, 0.5, 25_000).sparsity == pytest.approx(0.5)
    annealed = make_spec(training={"l1": {"p_end": 0.2}})
    assert [schedule.now(annealed, p, 1).exponent for p in (0.1, 0.5, 0.9)] == pytest.approx([1, 0.6, 0.2])


def test_training__phases_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the run"):
        Training(warmup_fraction=0.6, decay_fraction=0.6)
