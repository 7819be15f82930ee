"""Rows a second of the product's harvest beside a bare forward pass of the same layers, in turn: prints the seconds of
each block as JSON."""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quality"))  # its rows, not this folder's

import rows

from cluster import gemma
from cluster.harvest import encode_bf16, harvest_block
from cluster.tokens import Span
from sae.sites import Site

SEQUENCES = 8


def main(job: dict) -> dict[str, list[float]]:
    torch.set_num_threads(job["threads"])
    site = Site(job.get("layer", rows.SITE.layer), rows.SITE.name)
    needed = (job["timed"] + 1) * SEQUENCES * rows.CONTEXT
    sequences = torch.from_numpy(rows.tokenise({"train": needed})["train"]).long()
    model, bos = gemma.load_trunk(rows.MODEL, [site], torch.device("cpu")), sequences[0, 0].item()
    taken: dict[str, list[float]] = {"bare": [], "harvest": []}
    for tokens in sequences.split(SEQUENCES)[: job["timed"] + 1]:
        start = time.perf_counter()
        with torch.no_grad():
            model(tokens)
        middle = time.perf_counter()
        _, found = harvest_block(model, Span.of_text(tokens, bos), [site], {site.key: float("inf")})
        encode_bf16(found[site.key])
        taken["bare"].append(middle - start)
        taken["harvest"].append(time.perf_counter() - middle)
    return {name: times[1:] for name, times in taken.items()}  # the first block warms up


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
