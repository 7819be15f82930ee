"""Sweeps whose harvest actor shares the model between two ranks: calm, with ranks and their leader killed, whole."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from cluster import gang_rank
from cluster.gang import TOLERANCE
from sae import artifact
from tests.jobs.conftest import Job
from tests.published import tensors

pytest.importorskip("deepspeed", reason="the extra `sharded` is not installed")
pytestmark = pytest.mark.chaos


@pytest.fixture
def sweep(tiny_recipe: dict, grouped_gemma: Path, tmp_path: Path):
    """A recipe of two dictionaries in a run folder of its own."""

    def sweep(name: str, **harvest: int) -> dict:
        grid = {"activations": ["jumprelu"], "widths": [64], "l0s": [8]}
        return tiny_recipe | {
            "name": name,
            "output": str(tmp_path / name),
            "model": {"name": str(grouped_gemma), "dtype": "float32"},
            "corpus": tiny_recipe["corpus"] | {"train_tokens": 16_384},
            "harvest": {"sequences": 8, "cpus": 0.5} | harvest,
            "sweep": [grid | {"layers": [2]}, grid | {"layers": [1], "sites": ["attn_out"]}],
            "fit": tiny_recipe["fit"] | {"workers": 1},
        }

    return sweep


def new_ranks(job: Job, seen: set[int], seconds: float = 600) -> list[int]:
    """The next two ranks that the job starts, by their numbers."""
    deadline = time.monotonic() + seconds
    while True:
        assert job.process.poll() is None, job.text
        assert time.monotonic() < deadline, job.text
        found = {}
        for child in psutil.Process(job.process.pid).children(recursive=True):
            try:
                if gang_rank.__name__ in child.cmdline() and child.pid not in seen:
                    found[child.environ()["RANK"]] = child.pid
            except psutil.Error:  # it ended meanwhile
                pass
        if len(found) == 2:
            return [found["0"], found["1"]]
        time.sleep(0.05)


def published(job: Job) -> dict[str, Path]:
    """Folders by what a dictionary is of."""
    summary = json.loads((job.output / "summary.json").read_text())
    return {row["of"]: Path(row["path"]) for row in summary["dictionaries"]}


def test_sweep__with_a_shared_model_repeats_itself_bit_for_bit_whoever_dies(sweep, run_job) -> None:
    calm = run_job(sweep("calm", tensor_parallel=2))
    assert calm.wait(900) == 0, calm.text
    assert "(2 ranks x " in calm.text

    job = run_job(sweep("disturbed", tensor_parallel=2))
    calibrating = new_ranks(job, set())
    os.kill(calibrating[1], signal.SIGKILL)
    again = new_ranks(job, set(calibrating))
    harvesting = new_ranks(job, {*calibrating, *again})
    leader = psutil.Process(harvesting[0]).ppid()
    os.kill(harvesting[1], signal.SIGSTOP)  # so that only the kernel can end it
    os.kill(leader, signal.SIGKILL)
    restarted = new_ranks(job, {*calibrating, *again, *harvesting})
    assert psutil.Process(restarted[0]).ppid() != leader
    assert job.wait(900) == 0, job.text
    for pid in (*calibrating, *again, *harvesting, *restarted):
        assert not psutil.pid_exists(pid)

    whole = run_job(sweep("whole"))
    assert whole.wait(900) == 0, whole.text
    for of, folder in published(calm).items():
        (dictionary, config), (repeated, _) = artifact.read(folder), artifact.read(published(job)[of])
        unsharded, unsharded_config = artifact.read(published(whole)[of])
        assert config.keys() == unsharded_config.keys()
        for mine, same, near in zip(tensors(dictionary), tensors(repeated), tensors(unsharded), strict=True):
            assert torch.equal(mine, same)
            assert (mine - near).norm() < 1e-4 * near.norm()
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["tensor_parallel"] == 2
        assert metrics["tensor_parallel_tolerance"] == TOLERANCE["float32"]
        assert "tensor_parallel" not in json.loads((published(whole)[of] / "metrics.json").read_text())
