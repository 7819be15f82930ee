"""`make bench-gpu`: milliseconds of a step on this machine's GPU, beside the floor that the card sets, a compiled dense
step of the same dictionary, and sparsify's (Triton) if `pip install eai-sparsify` put it there. On random sums of
directions, made anew at each width.

The floor is the encoder's product at the rate of a large bfloat16 product, and the optimiser's bytes (weight, gradient
and two moments read; weight and moments written; float32) at the rate of a large copy.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sae.step import TrainingDictionary
from tests.gpu.rows import make_rows, make_spec

ROWS, COLUMNS, L0 = 4096, 2560, 64
WIDTHS = (16_384, 65_536, 262_144)
ADAM_BYTES = 7 * 4
TARGET = 2.0
REPEATS = 20
REPORT = Path("reports/bench-gpu.json")


def milliseconds(function: Callable[[], object], warm_up: int = 4, repeats: int = REPEATS) -> float:
    """Median, by the device's clock, each launched while the one before still runs."""
    for _ in range(warm_up):
        function()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def ceilings() -> tuple[float, float]:
    """Operations a second of a large bf16 product, bytes a second of a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    rate = 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return rate, 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source)) * 1e3


def ours(activation: str, width: int, x: Tensor) -> tuple[float, float]:
    """Milliseconds of a step, and peak GiB."""
    torch.cuda.reset_peak_memory_stats()
    dictionary = TrainingDictionary(make_spec(activation, width, L0), {"resid_post.1": COLUMNS}, torch.device("cuda"))
    step = milliseconds(lambda: dictionary.step(x, x, progress=0.5))
    return step, torch.cuda.max_memory_allocated() / 2**30


class Dense:
    """TopK with dense products of bfloat16 and autograd, as one would write it, compiled."""

    def __init__(self, width: int, x: Tensor):
        self.x = x
        w_FD = torch.nn.functional.normalize(torch.randn(width, COLUMNS, device="cuda"))
        self.w_enc, self.w_dec = w_FD.clone().requires_grad_(), w_FD.requires_grad_()
        self.b_enc = torch.zeros(width, device="cuda", requires_grad=True)
        self.b_dec = torch.zeros(COLUMNS, device="cuda", requires_grad=True)
        self.optimiser = torch.optim.Adam([self.w_enc, self.w_dec, self.b_enc, self.b_dec], fused=True)
        self.loss, self.normalise = torch.compile(self._loss), torch.compile(self._normalise)

    def step(self) -> None:
        self.loss().backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.normalise()

    def _loss(self) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            pre_BF = (self.x - self.b_dec) @ self.w_enc.T + self.b_enc
            largest = pre_BF.topk(L0, dim=1, sorted=False)
            latents_BF = torch.zeros_like(pre_BF).scatter(1, largest.indices, torch.relu(largest.values))
            rebuilt_BD = latents_BF @ self.w_dec
        return (rebuilt_BD.float() + self.b_dec - self.x).square().sum(1).mean()

    @torch.no_grad()
    def _normalise(self) -> None:
        self.w_dec /= self.w_dec.norm(dim=1, keepdim=True)


class Sparsify:
    """What sparsify's trainer does around a step, its own autocast to bfloat16 and kernels within, Adam fused."""

    def __init__(self, width: int, x: Tensor):
        from sparsify import SparseCoder, SparseCoderConfig

        self.x = x
        self.coder = SparseCoder(COLUMNS, SparseCoderConfig(num_latents=width, k=L0), "cuda")
        self.optimiser = torch.optim.Adam(self.coder.parameters(), lr=1e-3, fused=True)

    def step(self) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        self.coder(self.x).fvu.backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()


def other(made: type[Dense] | type[Sparsify], width: int, x: Tensor) -> tuple[float, float]:
    """Milliseconds of a step, and seconds until the first was made."""
    torch._dynamo.reset()
    began = time.monotonic()
    its = made(width, x)
    its.step()
    torch.cuda.synchronize()
    warm_up = time.monotonic() - began
    step = milliseconds(its.step, repeats=5)
    del its
    torch.cuda.empty_cache()
    return step, warm_up


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    arguments.add_argument("--alone", action="store_true", help="without the steps of others")
    arguments = arguments.parse_args()
    others = {} if arguments.alone else {"compiled dense topk": Dense}
    if others and importlib.util.find_spec("sparsify"):
        others["sparsify topk"] = Sparsify
    card, (rate, bandwidth) = torch.cuda.get_device_name(), ceilings()
    print(f"{card}: bf16 {rate / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s; torch {torch.__version__}")
    print(f"D {COLUMNS:,}, K {L0}, B {ROWS:,}; ms a step, median of {REPEATS}\n")
    rows = []
    for width in arguments.widths:
        x = make_rows(0, ROWS, COLUMNS).cuda()
        floor = 2e3 * ROWS * COLUMNS * width / rate + 2e3 * width * COLUMNS * ADAM_BYTES / bandwidth
        for activation in ("topk", "batch_topk"):
            step, peak = ours(activation, width, x)
            torch.cuda.empty_cache()
            ok = step <= TARGET * floor
            rows.append({"name": f"{activation} {width}", "value": step / floor, "unit": "floors", "target": TARGET,
                         "ok": ok, "ms": step, "floor_ms": floor, "peak_gib": peak})  # fmt: skip
            print(f"F {width:>7,} {activation:10} {step:7.2f}  floor {floor:6.2f}  {step / floor:.2f}x  "
                  f"peak {peak:.1f} GiB", flush=True)  # fmt: skip
        for name, made in others.items():
            step, warm_up = other(made, width, x)
            rows.append({"name": f"{name} {width}", "value": step, "unit": "ms", "target": None, "ok": True})
            print(f"F {width:>7,} {name} {step:7.2f}  (first step after {warm_up:.0f} s)", flush=True)
    REPORT.parent.mkdir(exist_ok=True)
    machine = {"card": card, "bf16_flops": rate, "copy_bytes": bandwidth, "torch": torch.__version__}
    sizes = {"rows": ROWS, "columns": COLUMNS, "l0": L0, "repeats": REPEATS}
    REPORT.write_text(json.dumps({"machine": machine, "sizes": sizes, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
