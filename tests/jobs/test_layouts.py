"""A real sweep on meshes of workers, stopped on one and gone on with on another; the oracle is the flat loop."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from cluster import recipe_file
from sae import artifact
from tests import flat_loop
from tests.published import tensors

pytestmark = pytest.mark.chaos


@pytest.fixture
def sweep(tiny_recipe: dict) -> dict:
    """Dictionaries of one and of several sites, with what needs sums over a mesh, in 120 steps."""
    common = {"widths": [64], "l0s": [8]}
    revived = {"dead_after_rows": 2000, "auxk": {}}
    grids = [
        {"layers": [0], "activations": ["batch_topk", "gated"], "options": revived},
        {"kind": "clt", "layers": [0, 1, 3], "widths": [96], "activations": ["jumprelu"],
         "options": {"matryoshka": {}}},
    ]  # fmt: skip
    return tiny_recipe | {"sweep": [common | grid for grid in grids]}


def test_meshes__a_run_that_goes_from_one_to_the_next_ends_with_the_flat_loops_weights(sweep: dict, run_job) -> None:
    """Equal up to the rounding of float32 sums, which 120 steps of Adam amplify."""
    meshes = [
        {"workers": 2, "shards": 2},
        {"workers": 4, "shards": 2, "replicas": 2},
        {"workers": 1},
    ]
    for stop, mesh in zip((40, 80, None), meshes, strict=True):
        job = run_job(sweep | {"fit": sweep["fit"] | mesh})
        if stop is not None:
            job.wait_for_step(stop)
            os.kill(job.process.pid, signal.SIGTERM)
            assert job.wait() == 130, job.text
        else:
            assert job.wait() == 0, job.text
            assert "resuming at step" in job.text
    expected = flat_loop.fit(recipe_file.parse(sweep), np.load(job.output / "tokens" / "train.npy"))
    summary = json.loads((job.output / "summary.json").read_text())
    differences = []
    for row in summary["dictionaries"]:
        found = artifact.read(Path(row["path"]))[0]
        for mine, theirs in zip(tensors(found), tensors(expected[row["id"]]), strict=True):
            differences.append(float((mine - theirs).norm() / theirs.norm().clamp_min(1e-6)))
    assert 0 < max(differences) < 1e-5  # 2e-7 as measured; 0 if the meshes had not been used
