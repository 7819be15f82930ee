"""Steps on a GPU: near those on a CPU, the same bits each time, recorded or not, and nothing read back."""

import pytest
import torch

from sae.fused import FusedStep
from sae.spec import DictionarySpec
from sae.step import TrainingDictionary
from tests.gpu.rows import SITE, make_rows, make_spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def trained(spec: DictionarySpec, device: torch.device, steps: int, recorded: bool = True) -> TrainingDictionary:
    """On a CPU, by the objective."""
    dictionary = TrainingDictionary(spec, SITE, device)
    assert isinstance(dictionary.fused, FusedStep)
    if device == CPU:
        dictionary.fused = None
    if not recorded:
        dictionary.fused.kernels.recorded = lambda function: function
    for step in range(steps):
        x = make_rows(step, 1024).to(device)
        dictionary.step(x, x, progress=0.5)
    return dictionary


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_steps__are_near_those_in_float32_on_a_cpu(activation: str) -> None:
    spec = make_spec(activation)
    ours, expected = (trained(spec, device, steps=40).sums.take() for device in (GPU, CPU))
    assert ours["fvu"] == pytest.approx(expected["fvu"], rel=0.005)
    assert ours["l0"] == pytest.approx(expected["l0"], rel=0.001)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_steps__give_the_same_bits_again_recorded_or_not(activation: str) -> None:
    spec = make_spec(activation)
    first, second, unrecorded = (trained(spec, GPU, steps=8, recorded=recorded) for recorded in (True, True, False))
    for other in (second, unrecorded):
        for name, value in first.state().items():
            assert torch.equal(other.state()[name].cpu(), value.cpu()), name


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_a_step__reads_nothing_back(activation: str) -> None:
    dictionary = trained(make_spec(activation), GPU, steps=3)
    x = make_rows(3, 1024).to(GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            dictionary.step(x, x, progress=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_state__goes_on_on_another_device() -> None:
    spec = make_spec("batch_topk")
    there = trained(spec, GPU, steps=4)
    back = TrainingDictionary(spec, SITE, CPU)
    back.load({name: value.cpu() for name, value in there.state().items()})
    again = TrainingDictionary(spec, SITE, GPU)
    again.load(back.state())
    x = make_rows(4, 1024)
    for dictionary, device in ((there, GPU), (back, CPU), (again, GPU)):
        dictionary.step(x.to(device), x.to(device), progress=0.5)
    for name, value in there.state().items():
        assert torch.equal(again.state()[name].cpu(), value.cpu()), name
        if name.startswith("w_"):
            assert (back.state()[name] - value.cpu()).norm() < 0.01 * value.norm(), name
