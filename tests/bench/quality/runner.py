"""What every runner does around its trainer: python RUNNER.py CELL_JSON ROWS_FOLDER OUTPUT.safetensors THREADS

Trains one cell, checks that the exported form rebuilds rows as the trainer's own does, writes the dictionary, and
prints one JSON line. Needs torch, numpy and safetensors alone, so that it runs in the peers' environment too.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import stream
import torch
from cell import Cell
from inference import Inference
from torch import Tensor

Reconstruct = Callable[[Tensor], Tensor]
"""Raw float64 rows → the trainer's own reconstruction of them."""
Train = Callable[[Cell, Path], tuple[Inference, Reconstruct]]

TOLERANCE = 1e-6  # of the exported form against the trainer's own, in float64


def main(train: Train) -> None:
    cell, folder, output = Cell(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    torch.manual_seed(cell.seed)
    start = time.process_time()
    dictionary, own = train(cell, folder)
    seconds = time.process_time() - start
    difference = dictionary.difference(own, next(stream.heldout(folder)))
    if not difference < TOLERANCE:
        raise ValueError(f"{cell.key}: the exported form differs from the trainer's own by {difference:.2g}")
    dictionary.save(output)
    print(json.dumps({"cpu_seconds": seconds, "difference": difference}))
