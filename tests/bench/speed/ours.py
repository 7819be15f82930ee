"""The floor of a step and ours, in turn in one process: prints the milliseconds of each, or bytes, as JSON.

The floor is the encoder product into a buffer allocated once, in float32 or bfloat16, whichever is faster here, and
torch's fused Adam over the parameters.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `cluster.session` sets it, before torch is imported

import torch
from rows import CLOCKS, batches

from sae.spec import DictionarySpec
from sae.step import TrainingDictionary

Part = Callable[[], object]


def product(job: dict, dtype: torch.dtype) -> Part:
    x_BD = batches(job)[0].to(dtype)
    w_FD, out_BF = torch.randn(job["width"], job["columns"]).to(dtype), x_BD.new_empty(job["rows"], job["width"])
    return lambda: torch.mm(x_BD, w_FD.T, out=out_BF)


def adam(job: dict) -> Part:
    parameters = torch.randn(2 * job["width"], job["columns"])
    parameters.grad = torch.randn_like(parameters)
    optimiser = torch.optim.Adam([parameters], fused=True)
    return optimiser.step


def made(job: dict, activation: str, k: int) -> TrainingDictionary:
    spec = DictionarySpec(
        id="bench", kind="sae", site="resid_post", layers=(0,), activation=activation, width=job["width"], l0=k,
        seed=0, folder="bench",
    )  # fmt: skip
    products = getattr(torch, job["products"])
    return TrainingDictionary(spec, {"resid_post.0": job["columns"]}, torch.device("cpu"), products=products)


def stepping(job: dict, dictionaries: list[TrainingDictionary]) -> Part:
    """A batch, and a step of each on it."""
    pool = cycle(batches(job))

    def one() -> None:
        x_BD = next(pool)
        for dictionary in dictionaries:
            dictionary.step(x_BD, x_BD, 0.5)

    for _ in range(job["warmup"]):
        one()
    return one


def taken(job: dict, parts: dict[str, Part]) -> dict[str, list[float]]:
    clock = CLOCKS[job["clock"]]
    times: dict[str, list[float]] = {name: [] for name in parts}
    for part in parts.values():
        part()
    for _ in range(job["timed"]):
        for name, part in parts.items():
            start = clock()
            part()
            times[name].append(1e3 * (clock() - start))
    return times


def steps(job: dict) -> dict[str, list[float]]:
    parts = {"product float32": product(job, torch.float32), "adam": adam(job)}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        parts["product bfloat16"] = product(job, torch.bfloat16)
    return taken(
        job,
        parts | {activation: stepping(job, [made(job, activation, job["k"])]) for activation in job["activations"]},
    )


def many(job: dict) -> dict[str, list[float]]:
    """All dictionaries of `job["many"]`, pairs of activation and L0, on one batch; and each on its own."""
    dictionaries = {f"{activation} {k}": made(job, activation, k) for activation, k in job["many"]}
    parts = {name: stepping(job, [dictionary]) for name, dictionary in dictionaries.items()}
    return taken(job, {"together": stepping(job | {"warmup": 0}, list(dictionaries.values()))} | parts)


def memory(job: dict) -> dict[str, int]:
    """Most bytes resident beyond those before there was a dictionary, over some steps of it; and of its parts."""
    pool = batches(job)
    dictionary = made(job, "topk", 1)  # whatever is imported or compiled at first is
    for x_BD in pool:
        dictionary.step(x_BD[:64], x_BD[:64], 0.5)
    del dictionary
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak (proc(5))
    dictionary = made(job, job["activation"], job["k"])
    for x_BD in pool:
        dictionary.step(x_BD, x_BD, 0.5)
    peak = _resident("VmHWM") - before
    parameters = sum(parameter.nbytes for parameter in dictionary.parameters.values())
    gradients = 0 if dictionary.fused else parameters
    return {"peak": peak, "parameters": parameters, "gradients": gradients, "optimiser": 2 * parameters}


def _resident(field: str) -> int:
    (kib,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kib)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    print(json.dumps({"steps": steps, "many": many, "memory": memory}[job["what"]](job)))
