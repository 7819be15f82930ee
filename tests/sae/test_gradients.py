"""Every kind, activation and option: the gradients written by hand equal autograd of the dense loss, in float64."""

import itertools

import pytest
import torch

from sae import pairs, schedule
from sae.activations import JumpReLU
from sae.estimators import Gate, Jump
from sae.step import TrainingDictionary
from tests.sae.reference import dense_loss
from tests.sae.specs import ACTIVATIONS, KINDS, SITE_WIDTHS, make_rows, make_spec

OPTIONS = {
    "plain": {},
    "matryoshka": {"matryoshka": {"prefixes": (0.2, 0.5)}},
    "sampled": {"matryoshka": {"prefixes": (0.1, 0.4, 0.7), "sampled": True}},
    "auxk": {"auxk": {"latents": 4}, "dead_after_rows": 500},
    "preactivation": {"preactivation": {"coefficient": 0.5}, "dead_after_rows": 500},
    "all": {
        "matryoshka": {},
        "auxk": {"latents": 4},
        "preactivation": {"coefficient": 0.5},
        "resampling": {},
        "dead_after_rows": 500,
    },
}
PENALTIES = {
    "jumprelu": [
        {"penalty": "quadratic", "frequency_coefficient": 3.0, "frequency_limit": 0.1},
        {"penalty": "linear", "coefficient": 0.1},
        {"penalty": "tanh", "coefficient": 0.1, "tanh_scale": 5.0},
    ],
    "l1": [{}, {"p_end": 0.3}],
}


def started(spec) -> TrainingDictionary:
    """A float64 dictionary some steps on, so that no parameter is special any more, a third of it held to be dead."""
    torch.set_num_threads(1)
    dictionary = TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"), dtype=torch.float64)
    for step in range(4):
        dictionary.step(*(rows.double() for rows in make_rows(spec, step)), progress=0.5)
    dictionary.idle.rows_F[::3] = 10_000
    return dictionary


def assert_gradients_equal_autograd(spec) -> None:
    dictionary = started(spec)
    x, y = (rows.double() for rows in make_rows(spec, seed=99))
    dead, parameters = dictionary.idle.dead, {k: v.clone().requires_grad_() for k, v in dictionary.learned.items()}
    now = schedule.now(spec, progress=0.5, step=int(dictionary.steps_done) + 1)
    dictionary.set_gradients(x, y, progress=0.5)
    dense_loss(dictionary, parameters, x, y, dead, now).backward()
    for name, value in dictionary.learned.items():
        expected = parameters[name].grad
        if name.startswith("w_dec"):
            expected = expected - (expected * value).sum(1, keepdim=True) * value
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(value.grad, expected, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(params=[2.0, 0.0], ids=["sparse", "dense"], autouse=True)
def products(request, monkeypatch) -> None:
    """Both ways of computing the products over pairs."""
    monkeypatch.setattr(pairs, "DENSE_SHARE", request.param)


@pytest.mark.parametrize(("kind", "activation", "options"), [*itertools.product(KINDS, ACTIVATIONS, OPTIONS)])
def test_gradients__every_kind_activation_and_option(kind: str, activation: str, options: str) -> None:
    training = {
        "jumprelu": {"bandwidth": 0.1},
        "l0_start": 2,
        "l0_decay_fraction": 0.8,
        "sparsity_warmup_fraction": 0.7,
    }
    assert_gradients_equal_autograd(make_spec(kind, activation, training=training, **OPTIONS[options]))


@pytest.mark.parametrize("settings", PENALTIES["jumprelu"], ids=lambda settings: settings["penalty"])
@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_gradients__every_penalty_of_jumprelu(kind: str, settings: dict) -> None:
    training = {"jumprelu": {"bandwidth": 0.2} | settings, "encoder_init_scale": 1}
    assert_gradients_equal_autograd(make_spec(kind, "jumprelu", training=training, **OPTIONS["matryoshka"]))


@pytest.mark.parametrize("settings", PENALTIES["l1"], ids=["l1", "p-anneal"])
@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_gradients__l1_and_p_anneal(activation: str, settings: dict) -> None:
    assert_gradients_equal_autograd(make_spec("sae", activation, training={"l1": settings}))


@pytest.mark.parametrize(
    ("z", "jump", "gate"),
    [
        (0.52, -0.5 / 0.1, -1 / 0.1),  # above θ, within ε/2
        (0.48, -0.5 / 0.1, -1 / 0.1),  # below θ, within ε/2
        (0.56, 0.0, 0.0),
        (0.44, 0.0, 0.0),
    ],
)
def test_estimators__published_formulas_by_hand(z: float, jump: float, gate: float) -> None:
    """θ = 0.5, ε = 0.1: ∂(z·H)/∂θ = −θ/ε and ∂H/∂θ = −1/ε inside the kernel, 0 outside; as functions and by hand."""
    for function, expected in {Jump: jump, Gate: gate}.items():
        theta = torch.tensor([0.5], requires_grad=True)
        function.apply(torch.tensor([[z]]), theta, 0.1).sum().backward()
        assert theta.grad.item() == pytest.approx(expected)
    settings = {"bandwidth": 0.1, "penalty": "linear", "coefficient": 1.0}
    training = {"jumprelu": settings, "l0_control": 0}
    activation = JumpReLU(make_spec(width=7, training=training), torch.device("cpu"), torch.float64)
    activation.state["threshold"].fill_(0.5)
    now = schedule.now(activation.spec, progress=1.0, step=1)
    pre = torch.zeros(1, 7, dtype=torch.float64)
    pre[0, 0] = z
    active = activation.select(pre, 1, now)
    activation.backward(active, torch.ones(len(active.pre_P), dtype=torch.float64), n_rows=1, now=now)
    assert activation.gradients["threshold"][0].item() == pytest.approx(jump + gate)
