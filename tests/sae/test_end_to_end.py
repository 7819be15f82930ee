"""End-to-end finetuning: the same function at the start, the published loss, and weights that follow it."""

import pytest
import torch

from sae.end_to_end import Finetuned, Output, loss
from sae.spec import JumpReLUSettings
from tests.sae.specs import KINDS, make_rows, make_spec
from tests.sae.test_start import scales_of
from tests.sae.test_step import SCALES, raw, started

SETTINGS = JumpReLUSettings(bandwidth=0.1)


def raw_rows(spec, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = make_rows(spec, seed)
    return raw(spec, x, spec.reads), raw(spec, y, spec.writes)


@pytest.mark.parametrize("kind", KINDS)
def test_finetuned__is_the_published_dictionary_until_it_learns(kind: str) -> None:
    spec = make_spec(kind, "jumprelu")
    published = started(spec).folded(SCALES)
    tuned = Finetuned(published, scales_of(spec), spec.autoencodes, SETTINGS)
    x, y = raw_rows(spec, seed=7)
    output, latents = tuned(x, y), published.encode(x)
    torch.testing.assert_close(output.rebuilt_BD, published.decode(latents, x), rtol=1e-3, atol=0.05)
    assert output.l0.item() == pytest.approx((latents > 0).sum(1).float().mean().item())
    again = tuned.published()
    torch.testing.assert_close(again.decode(again.encode(x), x), output.rebuilt_BD.detach(), rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("kind", ["sae", "skip_clt"])
def test_finetuned__every_weight_learns_and_the_error_falls(kind: str) -> None:
    spec = make_spec(kind, "jumprelu")
    tuned = Finetuned(started(spec).folded(SCALES), scales_of(spec), spec.autoencodes, SETTINGS)
    before = [tensor.detach().clone() for tensor in tuned.learned()]
    optimiser = torch.optim.Adam(tuned.learned(), lr=3e-3)
    errors, target = [], None
    for step in range(60):
        output = tuned(*raw_rows(spec, seed=step))
        target = target or output.l0.item()
        optimiser.zero_grad()
        loss(output, torch.tensor(0.5), 1.0, target, SETTINGS).backward()
        optimiser.step()
        errors.append(output.squared_error.item())
    w = tuned.weights
    assert torch.equal(w.centre_D, w.b_dec_D) if spec.autoencodes else not w.centre_D.any()
    assert sum(errors[-10:]) < 0.9 * sum(errors[:10])
    assert all((tensor - old).abs().max() > 0 for tensor, old in zip(tuned.learned(), before, strict=True))


def test_loss__is_the_published_one() -> None:
    """MSE 0.2, KL 0.5, β 3, L0 on target: α = 0.4, so L = (0.2 + 0.4·3·0.5)/4 = 0.2, and ∂L/∂KL = 0.4·3/4."""
    kl = torch.tensor(0.5, requires_grad=True)
    output = Output(torch.zeros(1, 1), torch.tensor(0.2), torch.tensor(10.0))
    value = loss(output, kl, beta=3, l0_target=10, settings=SETTINGS)
    value.backward()
    assert value.item() == pytest.approx(0.2)
    assert kl.grad.item() == pytest.approx(0.3)
    more = output._replace(l0=torch.tensor(15.0))
    penalty = SETTINGS.coefficient * (2 / 10) * 25
    assert loss(more, kl, beta=3, l0_target=10, settings=SETTINGS).item() == pytest.approx(0.2 + penalty)
