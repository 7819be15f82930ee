"""The cluster of k8s/base for real, with raylets of this machine in place of pods: a head without CPUs, nodes labelled
harvest and fit, token authentication. One sweep is submitted to it, and loses a harvest node on its way."""

import json
import subprocess
import time
import urllib.error
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from cluster import recipe as recipes
from sae import artifact
from tests import flat_loop
from tests.k8s.manifests import ROOT, clusters, load, of_kind
from tests.published import tensors
from tests.raylets import RAY, Raylets

pytestmark = pytest.mark.chaos
MANIFESTS = load("k8s/base")
PLACEMENT = recipes.load(str(ROOT / "k8s" / "recipe.yaml"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head, two harvest nodes and a fit node."""
    home = tmp_path_factory.mktemp("home")
    raylets = Raylets(tmp_path_factory.mktemp("nodes"), SCOPEWORKS_HOME=str(home), PYTHONPATH=str(ROOT))
    try:
        spec = clusters(MANIFESTS)["RayJob/sweep"]
        raylets.start_head(int(spec["headGroupSpec"]["rayStartParams"]["num-cpus"]))
        for group in spec["workerGroupSpecs"]:
            for _ in range(group["replicas"]):
                raylets.start_worker(1, group["labels"])
        yield raylets
    finally:
        raylets.close()


@pytest.fixture(scope="module")
def recipe(tiny_gemma: Path, documents: Path) -> dict:
    """Two dictionaries in 60 steps. A harvest actor fills a harvest node, so that two of them are on both."""
    return {
        "name": "placed", "output": "placed", "model": {"name": str(tiny_gemma)},
        "corpus": {"paths": [str(documents)], "context": 32, "train_tokens": 30_720, "heldout_tokens": 1024},
        "harvest": {"actors": 2, "cpus": 1, "label_selector": PLACEMENT.harvest.label_selector},
        "stream": {"window_sequences": 128, "batch_rows": 512},
        "sweep": [{"layers": [0, 3], "activations": ["batch_topk"], "widths": [64], "l0s": [8]}],
        "fit": {"workers": 1, "cpus_per_worker": 1, "label_selector": PLACEMENT.fit.label_selector,
                "report_every_steps": 1, "checkpoint_every_steps": 10},
        "evaluation": {"loss_tokens": 256},
    }  # fmt: skip


class Ran(NamedTuple):
    """A sweep that lost a node."""

    printed: str
    exit_code: int
    output: Path
    step: int
    """At which the node was lost."""
    lost: str
    at: float
    """Milliseconds since the epoch."""
    placed: dict[str, set[str]]
    """The labels `ray-subcluster` of the nodes on which each class and task ran before."""


@pytest.fixture(scope="module")
def ran(cluster: Raylets, recipe: dict, tmp_path_factory) -> Ran:
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = submit(cluster, folder, str(folder / "recipe.yaml"))
    output = Path(cluster.environment["SCOPEWORKS_HOME"]) / "placed"
    step = wait_for_step(output, 8, job)
    placed = where_things_ran(cluster)
    before, at = cluster.alive().keys(), time.time() * 1000
    cluster.kill(cluster.nodes[1])
    cluster.wait_until(lambda: len(cluster.alive()) < len(before))
    (lost,) = before - cluster.alive().keys()
    printed, _ = job.communicate(timeout=300)
    return Ran(printed, job.returncode, output, step, lost, at, placed)


def submit(cluster: Raylets, folder: Path, recipe: str, **environment: str) -> subprocess.Popen:
    """The RayJob's entrypoint, without a working folder: the code is on the nodes, as it is in the image."""
    (job,) = of_kind(MANIFESTS, "RayJob")
    *program, _ = job["spec"]["entrypoint"].split()
    return subprocess.Popen(
        [RAY, "job", "submit", "--", *program, recipe],
        cwd=folder,
        env=cluster.environment | {"RAY_API_SERVER_ADDRESS": cluster.address} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(output: Path, step: int, job: subprocess.Popen) -> int:
    deadline = time.monotonic() + 240
    while job.poll() is None and time.monotonic() < deadline:
        try:
            reached = json.loads((output / "progress.json").read_text())["position"]["step"]
        except (OSError, ValueError):  # not there yet
            reached = 0
        if reached >= step:
            return reached
        time.sleep(0.05)
    job.kill()
    pytest.fail(f"step {step} was not reached:\n{job.communicate()[0]}")


def where_things_ran(cluster: Raylets) -> dict[str, set[str]]:
    nodes, placed = cluster.alive(), {}
    for run in cluster.listed("actors") + [task for task in cluster.listed("tasks") if task["type"] == "NORMAL_TASK"]:
        if run["node_id"]:
            name = run.get("class_name") or run["name"]
            placed.setdefault(name, set()).add(nodes[run["node_id"]].get("ray-subcluster", "head"))
    return placed


def test_submitted__the_model_runs_on_harvest_nodes_the_ranks_on_fit_nodes_and_the_rest_on_the_head(ran: Ran) -> None:
    assert {name: ran.placed[name] for name in ("RayTrainWorker", "JobSupervisor", "TrainController")} == {
        "RayTrainWorker": {"fit"},
        "JobSupervisor": {"head"},
        "TrainController": {"head"},
    }
    models = {name for name in ran.placed if name.startswith(("MapWorker", "_calibrate", "Read"))}
    assert len(models) == 4, models
    assert all(ran.placed[name] == {"harvest"} for name in models), ran.placed


def test_node_lost__the_sweep_finishes_on_what_is_left_with_the_same_weights(cluster, recipe, ran: Ran) -> None:
    assert ran.exit_code == 0, ran.printed
    assert ran.step < 40  # of 60
    harvested = [task for task in cluster.listed("tasks") if "Harvester" in task["name"] and task["start_time_ms"]]
    assert {task["node_id"] for task in harvested} > {ran.lost}
    assert any(task["start_time_ms"] > ran.at for task in harvested)
    expected = flat_loop.fit(recipes.parse(recipe), np.load(ran.output / "tokens" / "train.npy"))
    summary = json.loads((ran.output / "summary.json").read_text())
    assert {row["id"] for row in summary["dictionaries"]} == expected.keys()
    for row in summary["dictionaries"]:
        found = artifact.read(Path(row["path"]))[0]
        for mine, theirs in zip(tensors(expected[row["id"]]), tensors(found), strict=True):
            assert torch.equal(mine, theirs), row["id"]


@pytest.mark.parametrize(
    ("path", "method"), [("/api/jobs/", "GET"), ("/api/jobs/", "POST"), ("/api/jobs/x", "DELETE"), ("/nodes", "GET")]
)
@pytest.mark.parametrize("token", [None, "beef" * 12])
def test_without_the_token__the_dashboard_refuses(cluster: Raylets, path: str, method: str, token: str | None) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        cluster.ask(path, token, method)
    assert refused.value.code in (401, 403)


def test_without_the_token__nothing_is_submitted(cluster: Raylets, ran: Ran, tmp_path: Path) -> None:
    before = len(cluster.ask("/api/jobs/"))
    job = submit(cluster, tmp_path, "jobs/recipes/demo.yaml", RAY_AUTH_MODE="disabled")
    printed, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "auth" in printed.lower(), printed
    assert len(cluster.ask("/api/jobs/")) == before >= 1
