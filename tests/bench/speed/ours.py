"""The floor of a step and ours, in turn in one process: prints the milliseconds of each as JSON.

The floor is the encoder product into a buffer allocated once, in float32 or bfloat16, whichever is faster here, and
torch's fused Adam over the parameters.
"""

import json
import sys
from collections.abc import Callable
from itertools import cycle

import torch
from rows import CLOCKS, batches

from sae.spec import DictionarySpec
from sae.step import TrainingDictionary


def product(job: dict, dtype: torch.dtype) -> Callable[[], object]:
    x_BD = batches(job["rows"], job["columns"], job["k"])[0].to(dtype)
    w_FD, out_BF = torch.randn(job["width"], job["columns"]).to(dtype), x_BD.new_empty(job["rows"], job["width"])
    return lambda: torch.mm(x_BD, w_FD.T, out=out_BF)


def adam(job: dict) -> Callable[[], object]:
    parameters = torch.randn(2 * job["width"], job["columns"])
    parameters.grad = torch.randn_like(parameters)
    optimiser = torch.optim.Adam([parameters], fused=True)
    return optimiser.step


def step(job: dict, activation: str) -> Callable[[], object]:
    spec = DictionarySpec(
        id="bench", kind="sae", site="resid_post", layers=(0,), activation=activation, width=job["width"], l0=job["k"],
        seed=0, folder="bench",
    )  # fmt: skip
    dictionary = TrainingDictionary(spec, {"resid_post.0": job["columns"]}, torch.device("cpu"))
    pool = cycle(batches(job["rows"], job["columns"], job["k"]))

    def one() -> None:
        x_BD = next(pool)
        dictionary.step(x_BD, x_BD, 0.5)

    for _ in range(job["warmup"]):
        one()
    return one


def main(job: dict) -> dict[str, list[float]]:
    torch.set_num_threads(job["threads"])
    clock = CLOCKS[job["clock"]]
    parts = {"product float32": product(job, torch.float32), "adam": adam(job)}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        parts["product bfloat16"] = product(job, torch.bfloat16)
    parts |= {activation: step(job, activation) for activation in job["activations"]}
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for part in parts.values():
        part()
    for _ in range(job["timed"]):
        for name, part in parts.items():
            start = clock()
            part()
            taken[name].append(1e3 * (clock() - start))
    return taken


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
