"""The sparse step against autograd through the dense formulas, in the same precision."""

import pytest
import torch

from sae.dictionary import Dictionary
from sae.metrics import HeldoutSums
from sae.pairs import decode, grouped_sum
from sae.schedule import learning_rate
from sae.spec import DictionarySpec, Training
from sae.step import TrainingDictionary

B, D, F = 96, 12, 40


def spec(activation: str, **training) -> DictionarySpec:
    return DictionarySpec(
        id="x", site="resid_post", layer=0, kind="sae", activation=activation, width=F, l0=5, seed=3,
        training=Training(**training),
    )  # fmt: skip


def rows(seed: int) -> torch.Tensor:
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(seed))
    return x / x.square().sum(-1).mean().sqrt()


def started(activation: str, **training) -> TrainingDictionary:
    """A dictionary some steps on, so that no parameter is special any more."""
    torch.set_num_threads(1)
    dictionary = TrainingDictionary(spec(activation, **training), D, torch.device("cpu"))
    for step in range(5):
        dictionary.step(rows(step), 0.5)
    return dictionary


class Rectangle(torch.autograd.Function):
    """H(z − θ) with the straight-through gradient −(1/ε)·K((z−θ)/ε) for θ alone."""

    @staticmethod
    def forward(ctx, z, theta, width):
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        in_band = ((z - theta).abs() < ctx.width / 2).to(z.dtype)
        return None, (-(in_band / ctx.width) * grad).sum(0), None


def dense_loss(dictionary: TrainingDictionary, x: torch.Tensor, p: dict[str, torch.Tensor], warmup: float):
    """The training loss by dense formulas, differentiable in every parameter."""
    pre = (x - p["b_dec_D"]) @ p["w_enc_FD"].T + p["b_enc_F"]
    if dictionary.spec.activation == "batch_topk":
        cut = pre.flatten().topk(dictionary.spec.l0 * len(x)).values[-1].detach()
        latents = pre * ((pre >= cut) & (pre > 0))
        penalty = 0.0
    else:
        gate = Rectangle.apply(pre, p["threshold"], dictionary.spec.training.jumprelu_bandwidth)
        # ∂f/∂θ is −(θ/ε)·K and not −(z/ε)·K: the pre-activation counts as the threshold within the kernel.
        latents = pre * gate.detach() + p["threshold"] * (gate - gate.detach())
        target = dictionary.spec.l0
        l0 = gate.sum() / len(x)
        penalty = dictionary.spec.training.sparsity_coefficient * warmup * (2 / target) * (l0 - target) ** 2
    error = latents @ p["w_dec_FD"] + p["b_dec_D"] - x
    return error.square().sum(-1).mean() + penalty


@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu"])
def test_step__gradients_equal_dense_autograd(activation: str) -> None:
    dictionary = started(activation, jumprelu_bandwidth=0.05, warmup_fraction=0.2)
    x = rows(99)
    parameters = {name: value.clone().requires_grad_() for name, value in dictionary.learned.items()}
    dense_loss(dictionary, x, parameters, warmup=0.5).backward()
    w_dec = dictionary.parameters["w_dec_FD"].clone()
    dictionary.step(x, progress=0.1)  # half way through the warm-up
    for name, value in dictionary.learned.items():
        expected = parameters[name].grad
        if name == "w_dec_FD":
            expected = expected - (expected * w_dec).sum(1, keepdim=True) * w_dec
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(value.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu"])
def test_folded__encodes_and_decodes_raw_rows_as_training_does(activation: str) -> None:
    dictionary, scale = started(activation), 250.0
    x = rows(7)
    p = dictionary.parameters
    pre = (x - p["b_dec_D"]) @ p["w_enc_FD"].T + p["b_enc_F"]
    latents = pre * (pre > dictionary.activation.threshold(F)) * (pre > 0)
    folded = dictionary.folded(scale)
    torch.testing.assert_close(folded.encode(x * scale), latents * scale, rtol=1e-4, atol=1e-3)
    expected = scale * (latents @ p["w_dec_FD"] + p["b_dec_D"])
    torch.testing.assert_close(folded.decode(folded.encode(x * scale)), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu"])
def test_state__a_loaded_dictionary_goes_on_bit_for_bit(activation: str) -> None:
    one = started(activation)
    other = TrainingDictionary(spec(activation), D, torch.device("cpu"))
    other.load({name: value.clone() for name, value in one.state().items()})
    for step in range(3):
        one.step(rows(50 + step), 0.7)
        other.step(rows(50 + step), 0.7)
    assert one.state().keys() == other.state().keys()
    for name, value in one.state().items():
        assert torch.equal(value, other.state()[name]), name


def test_start__encoder_is_a_multiple_of_unit_decoder_rows_and_b_dec_the_first_batchs_mean() -> None:
    dictionary = TrainingDictionary(spec("batch_topk", encoder_init_scale=0.25), D, torch.device("cpu"))
    w_dec = dictionary.parameters["w_dec_FD"].clone()
    torch.testing.assert_close(w_dec.norm(dim=1), torch.ones(F))
    assert torch.equal(dictionary.parameters["w_enc_FD"], 0.25 * w_dec)
    x = rows(0) + 0.1
    dictionary.step(x, progress=1e-9)  # so early in the warm-up that nothing moves
    torch.testing.assert_close(dictionary.parameters["b_dec_D"], x.mean(0))


def test_batch_topk__keeps_exactly_the_batch_budget() -> None:
    dictionary = started("batch_topk")
    pairs = dictionary.activation.select(torch.randn(B, F, generator=torch.Generator().manual_seed(1)))
    assert len(pairs.rows_P) == 5 * B


def test_jumprelu__drives_l0_to_its_target() -> None:
    dictionary = TrainingDictionary(
        spec("jumprelu", jumprelu_bandwidth=0.05, sparsity_coefficient=1.0), D, torch.device("cpu")
    )
    for step in range(600):
        dictionary.step(rows(step), (step + 1) / 600)
        if step == 499:
            dictionary.sums.take()
    assert dictionary.sums.take()["l0"] == pytest.approx(5, rel=0.1)


def test_step__decoder_rows_stay_unit_and_error_falls() -> None:
    dictionary = TrainingDictionary(spec("batch_topk"), D, torch.device("cpu"))
    basis = torch.randn(8, D, generator=torch.Generator().manual_seed(5))
    figures = []
    for step in range(300):
        codes = torch.relu(torch.randn(B, 8, generator=torch.Generator().manual_seed(step)) - 0.8)
        x = codes @ basis
        dictionary.step(x / 3, (step + 1) / 300)
        if step % 100 == 99:
            figures.append(dictionary.sums.take()["fvu"])
    torch.testing.assert_close(dictionary.parameters["w_dec_FD"].norm(dim=1), torch.ones(F))
    assert figures[-1] < 0.5 * figures[0]


def test_grouped_sum__groups_without_pairs_are_zero() -> None:
    table = torch.eye(3)
    groups, indices = torch.tensor([1, 1, 3]), torch.tensor([0, 2, 1])
    out = grouped_sum(groups, 5, indices, torch.tensor([2.0, 3.0, 4.0]), table)
    assert out.tolist() == [[0, 0, 0], [2, 0, 3], [0, 0, 0], [0, 4, 0], [0, 0, 0]]


def test_heldout_sums__add_up_to_the_figures_of_all_rows() -> None:
    dictionary = Dictionary(torch.randn(D, F), torch.zeros(F), torch.full((F,), 0.5), torch.randn(F, D), torch.zeros(D))
    x = torch.randn(B, D) + 3
    latents = dictionary.encode(x)
    rebuilt = dictionary.decode(latents)
    whole = HeldoutSums.of(x, rebuilt, latents)
    parts = HeldoutSums.of(x[:40], rebuilt[:40], latents[:40]).plus(HeldoutSums.of(x[40:], rebuilt[40:], latents[40:]))
    expected = (rebuilt - x).square().sum() / (x - x.mean(0)).square().sum()
    for sums in (whole, parts):
        assert sums.fvu == pytest.approx(expected.item(), rel=1e-5)
        assert sums.l0 == pytest.approx((latents > 0).sum().item() / B)
        assert sums.dead_fraction == pytest.approx(((latents > 0).sum(0) == 0).float().mean().item())


def test_learning_rate__rises_holds_and_falls_to_zero() -> None:
    training = Training(learning_rate=2.0, warmup_fraction=0.1, decay_fraction=0.5)
    assert [learning_rate(training, p) for p in (0.05, 0.1, 0.4, 0.75, 1.0)] == pytest.approx([1, 2, 2, 1, 0])


def test_decode__equals_the_dense_product() -> None:
    dictionary = started("batch_topk")
    pre = torch.randn(B, F, generator=torch.Generator().manual_seed(2))
    pairs = dictionary.activation.select(pre)
    dense = torch.zeros(B, F)
    dense[pairs.rows_P, pairs.latents_P] = pairs.values_P
    w_dec = dictionary.parameters["w_dec_FD"]
    torch.testing.assert_close(decode(pairs, B, w_dec), dense @ w_dec)
