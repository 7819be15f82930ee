"""A dictionary on a mesh of ranks trains as it does on one, for every kind, activation and option, in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from sae import step
from sae.largest import kth_largest, largest_of_rows
from sae.shards import join_shards
from sae.start import finetune
from sae.step import TrainingDictionary
from sae.team import ALONE, Team
from tests.sae.mesh import on_mesh
from tests.sae.specs import ACTIVATIONS, KINDS, SITE_WIDTHS, make_rows, make_spec

MESHES = {"2 shards": (2, 1), "3 replicas": (1, 3), "2 shards x 2 replicas": (2, 2)}
OPTIONS = {
    "plain": {},
    "matryoshka": {"matryoshka": {"prefixes": (0.2, 0.5), "sampled": True}},
    "auxk": {"auxk": {"latents": 4}, "dead_after_rows": 200},
    "preactivation": {"preactivation": {"coefficient": 0.5}, "dead_after_rows": 200},
    "resampling": {"resampling": {"at": (0.3, 0.6)}, "dead_after_rows": 200},
}
PENALTIES = {
    "quadratic and frequency": {"jumprelu": {"frequency_coefficient": 3.0, "frequency_limit": 0.1, "bandwidth": 0.1}},
    "linear": {"jumprelu": {"penalty": "linear", "coefficient": 0.1, "bandwidth": 0.1}},
    "tanh": {"jumprelu": {"penalty": "tanh", "coefficient": 0.1, "bandwidth": 0.1}},
}


def train(spec, team: Team, first: int = 0, last: int = 6, state: dict[str, Tensor] | None = None):
    """State and figures after some steps, on this replica's rows of each batch."""
    torch.set_num_threads(1)
    dictionary = TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"), torch.float64, team)
    if state is not None:
        dictionary.load(state)
    hold_dead(dictionary, team.mine(torch.arange(spec.width) % 3 == 0))
    for number in range(first, last):
        x, y = (
            rows.double().tensor_split(team.rows.count)[team.rows.index] for rows in make_rows(spec, number, n_rows=97)
        )
        dictionary.step(x, y, progress=(number + 1) / 8)
    return dictionary.state(), dictionary.sums.take()


def hold_dead(dictionary: TrainingDictionary, latents_F: Tensor) -> None:
    """Makes some latents count as dead in each step and after it, so that they are revived."""
    update = dictionary.idle.update

    def held(*arguments) -> None:
        update(*arguments)
        dictionary.idle.rows_F[latents_F] = 10_000

    dictionary.idle.rows_F[latents_F] = 10_000
    dictionary.idle.update = held


def joined(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: join_shards(name, [state[name] for state in states]) for name in states[0]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def assert_mesh_equals_one_rank(spec, mesh: str) -> None:
    expected, figures = train(spec, ALONE)
    shards, replicas = MESHES[mesh]
    for shard_results in on_mesh(shards, replicas, lambda team: train(spec, team)):
        assert_same(joined([state for state, _ in shard_results]), expected)
        for _, found in shard_results:
            assert found["l0"] == pytest.approx(figures["l0"], rel=1e-12)
            assert found["fvu"] == pytest.approx(figures["fvu"], rel=0.05)  # a replica's variance is about its own mean


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("kind", "activation"), [*itertools.product(KINDS, ACTIVATIONS)])
def test_mesh__every_kind_and_activation_trains_as_on_one_rank(kind: str, activation: str, mesh: str) -> None:
    training = {"jumprelu": {"bandwidth": 0.1}, "l0_start": 2, "l0_decay_fraction": 0.8}
    assert_mesh_equals_one_rank(make_spec(kind, activation, training=training), mesh)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("activation", "options"), [*itertools.product(ACTIVATIONS, OPTIONS)])
def test_mesh__every_option_trains_as_on_one_rank(activation: str, options: str, mesh: str) -> None:
    assert_mesh_equals_one_rank(make_spec("causal_crosscoder", activation, **OPTIONS[options]), mesh)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_mesh__every_penalty_of_jumprelu_trains_as_on_one_rank(penalty: str, mesh: str) -> None:
    assert_mesh_equals_one_rank(make_spec("sae", "jumprelu", training=PENALTIES[penalty]), mesh)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_mesh__p_anneal_trains_as_on_one_rank(activation: str, mesh: str) -> None:
    assert_mesh_equals_one_rank(make_spec("sae", activation, training={"l1": {"p_end": 0.3}}), mesh)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mesh__a_run_goes_on_from_one_mesh_on_another(activation: str) -> None:
    spec = make_spec("clt", activation, auxk={"latents": 4}, dead_after_rows=200)
    expected, _ = train(spec, ALONE)
    two = joined([state for state, _ in on_mesh(2, 1, lambda team: train(spec, team, last=2))[0]])
    four = joined([state for state, _ in on_mesh(4, 1, lambda team: train(spec, team, 2, 4, two))[0]])
    alone, _ = train(spec, ALONE, 4, 6, four)
    assert_same(alone, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mesh__a_published_dictionary_is_taken_over_by_its_shards(activation: str) -> None:
    spec = make_spec("transcoder", activation)
    source = TrainingDictionary(make_spec("transcoder", "jumprelu"), SITE_WIDTHS, torch.device("cpu"))
    source.step(*make_rows(spec, 5), progress=0.5)
    scales = {site.key: 2.0 for site in spec.sites}
    published = source.folded(scales)

    def start(team: Team) -> dict[str, Tensor]:
        dictionary = TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"), torch.float64, team)
        dictionary.take_over(finetune(published, source.shape, dictionary._scales(scales), False))
        dictionary.step(*(rows.double() for rows in make_rows(spec, 6)), progress=0.5)
        return dictionary.state()

    assert_same(joined(on_mesh(3, 1, start)[0]), start(ALONE))


@pytest.mark.parametrize("kind", ["transcoder", "clt"])
def test_start__shards_draw_their_rows_of_the_whole_in_parts(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(step, "DRAWN_ROWS", 7)  # neither a shard's width nor a multiple of their number

    def start(team: Team) -> dict[str, Tensor]:
        return TrainingDictionary(make_spec(kind), SITE_WIDTHS, torch.device("cpu"), team=team).state()

    whole, shards = start(ALONE), joined(on_mesh(2, 1, start)[0])
    assert all(torch.equal(whole[name], value) for name, value in shards.items())


@pytest.mark.parametrize("guess", [-torch.inf, 0.5, 3.0])
def test_largest__is_found_exactly_across_ranks(guess: float) -> None:
    pre_BF = torch.randn(30, 48, generator=torch.Generator().manual_seed(0))

    def find(team: Team) -> tuple[Tensor, Tensor]:
        mine = team.mine(pre_BF.T).T.tensor_split(team.rows.count)[team.rows.index]
        return kth_largest(mine, 200, team, guess), largest_of_rows(mine, 20, team.latents)

    kth, mask_BF = pre_BF.flatten().topk(200).values[-1], torch.zeros(30, 48, dtype=torch.bool)
    mask_BF.scatter_(1, pre_BF.topk(20, dim=1).indices, True)
    for replica, results in enumerate(on_mesh(3, 2, find)):
        for shard, (found, mask) in enumerate(results):
            assert found == kth
            assert torch.equal(mask, mask_BF[replica * 15 : (replica + 1) * 15, shard::3])
