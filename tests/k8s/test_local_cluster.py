"""The cluster of k8s/base for real, with raylets of this machine in place of pods: a head without CPUs, nodes labelled
harvest and fit, token authentication. A sweep is submitted to it, and loses a harvest node that has done a part of its
blocks, holds their rows and is at another."""

import json
import subprocess
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from cluster import recipe_file
from sae import artifact
from tests import flat_loop
from tests.chaos import fits, table
from tests.k8s.manifests import ROOT, clusters, load, of_kind
from tests.published import tensors
from tests.raylets import RAY, Raylets
from tests.report import row

pytestmark = pytest.mark.chaos
MANIFESTS = load("k8s/base")
SPEC = clusters(MANIFESTS)["RayJob/sweep"]
PATIENCE = 600  # seconds
PLACEMENT = recipe_file.load(str(ROOT / "k8s" / "recipe.yaml"))


STEPS = 60
HOLD_FROM = 48  # of 120 blocks: three windows of 16 can be trained on


@pytest.fixture(scope="module")
def orders(tmp_path_factory) -> Path:
    """What tests/chaos/inside/sitecustomize.py reads in every process of the cluster."""
    path = tmp_path_factory.mktemp("orders") / "orders.json"
    path.write_text("{}")
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, orders: Path) -> Iterator[Raylets]:
    """A head, two harvest nodes and a fit node."""
    home = tmp_path_factory.mktemp("home")
    inside = fits.environment(orders)
    raylets = Raylets(tmp_path_factory.mktemp("nodes"), SCOPEWORKS_HOME=str(home), **inside)
    try:
        raylets.start_head(int(SPEC["headGroupSpec"]["rayStartParams"]["num-cpus"]))
        for group in SPEC["workerGroupSpecs"]:
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
                "report_every_steps": 1, "checkpoint_every_steps": 4},
        "evaluation": {"loss_tokens": 256},
    }  # fmt: skip


class Calls(NamedTuple):
    """Of the harvest: the blocks that each node has begun, and that it has done."""

    begun: dict[str, set[int]]
    done: dict[str, set[int]]

    @classmethod
    def read(cls, folder: Path) -> "Calls":
        calls = cls({}, {})
        for path in folder.iterdir():
            what, block, node = path.name.split("-")
            getattr(calls, what).setdefault(node, set()).add(int(block))
        return calls

    def at_work(self) -> set[str]:
        """Nodes that have done a block and are at another."""
        return {node for node, done in self.done.items() if self.begun[node] - done}


class Ran(NamedTuple):
    """A sweep that lost a node."""

    printed: str
    exit_code: int
    output: Path
    step: int
    """That was committed when the node was lost."""
    lost: str
    before: Calls
    """Until then."""
    after: Calls
    """In all."""
    placed: dict[str, set[str]]
    """The labels `ray-subcluster` of the nodes on which each class and task ran before."""

    def done_again(self) -> int:
        """Blocks that the lost node had done or was at, and that others have done since."""
        since = set().union(*(blocks - self.before.done.get(node, set()) for node, blocks in self.after.done.items()))
        return len(self.before.begun[self.lost] & since)

    def differing(self, recipe: dict) -> int:
        """Dictionaries whose weights are not the flat loop's, bit for bit."""
        expected = flat_loop.fit(recipe_file.parse(recipe), np.load(self.output / "tokens" / "train.npy"))
        summary = json.loads((self.output / "summary.json").read_text())
        assert {row["id"] for row in summary["dictionaries"]} == expected.keys()
        pairs = [(expected[row["id"]], artifact.read(Path(row["path"]))[0]) for row in summary["dictionaries"]]
        return sum(not all(map(torch.equal, tensors(one), tensors(other))) for one, other in pairs)


def lose_a_node(cluster: Raylets, node: subprocess.Popen, recipe: dict, orders: Path, folder: Path, **more: str) -> Ran:
    """A sweep whose harvest is held in its fourth window until both harvest nodes are at a block of it and steps are
    committed; then the node is killed, and the harvest goes on."""
    calls = folder / "calls"
    calls.mkdir()
    orders.write_text(json.dumps({"calls": str(calls), "hold_from": HOLD_FROM} | more))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = submit(cluster, folder, str(folder / "recipe.yaml"))
    output = Path(cluster.environment["SCOPEWORKS_HOME"]) / recipe["output"]
    step = wait_until_at_work(output, calls, job)
    placed, there, before = where_things_ran(cluster), cluster.alive().keys(), Calls.read(calls)
    cluster.kill(node)
    cluster.wait_until(lambda: len(cluster.alive()) < len(there))
    (lost,) = there - cluster.alive().keys()
    orders.write_text(json.dumps({"calls": str(calls)} | more))
    printed, _ = job.communicate(timeout=PATIENCE)
    return Ran(printed, job.returncode, output, step, lost, before, Calls.read(calls), placed)


@pytest.fixture(scope="module")
def ran(cluster: Raylets, recipe: dict, orders: Path, tmp_path_factory) -> Ran:
    return lose_a_node(cluster, cluster.nodes[1], recipe, orders, tmp_path_factory.mktemp("submitted"))


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


def wait_until_at_work(output: Path, calls: Path, job: subprocess.Popen) -> int:
    """Until a checkpoint is committed and two nodes are held at a block; its step."""
    deadline = time.monotonic() + PATIENCE
    while job.poll() is None and time.monotonic() < deadline:
        seals = sorted(output.glob("train/checkpoints/step-*/manifest.json"))
        if seals and len(Calls.read(calls).at_work()) == 2:
            return int(seals[-1].parent.name.split("-")[1])
        time.sleep(0.05)
    job.kill()
    pytest.fail(f"no step was committed while two nodes harvested:\n{job.communicate()[0]}")


def where_things_ran(cluster: Raylets) -> dict[str, set[str]]:
    nodes, placed = cluster.alive(), {}
    for run in cluster.listed("actors") + [task for task in cluster.listed("tasks") if task["type"] == "NORMAL_TASK"]:
        if run["node_id"] in nodes:  # not of a node that was lost before
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


def test_node_lost__the_sweep_finishes_on_what_is_left_with_the_same_weights(recipe: dict, ran: Ran) -> None:
    assert ran.exit_code == 0, ran.printed
    differing, held = ran.differing(recipe), ran.before.begun[ran.lost] - ran.before.done[ran.lost]
    table.add(
        "c-node-lost",
        row(f"node lost at step {ran.step} of {STEPS}: dictionaries that differ from the calm fit", differing, "of 2",
            "==", 0),
        row("the same: blocks that the node had done", len(ran.before.done[ran.lost]), "blocks", ">=", 1),
        row("the same: blocks that it was at", len(held), "blocks", ">=", 1),
        row("the same: of these, harvested again on what was left", ran.done_again(), "blocks", ">=", len(held)),
    )  # fmt: skip
    assert 0 < ran.step <= STEPS * HOLD_FROM // 120
    assert ran.before.done[ran.lost]
    assert held
    assert all(block in set().union(*ran.after.done.values()) for block in held)
    assert ran.after.begun[ran.lost] == ran.before.begun[ran.lost]  # it has begun nothing since
    assert differing == 0


def test_sabotage__other_rows_in_place_of_those_that_were_lost_are_noticed(
    cluster: Raylets, recipe: dict, orders: Path, ran: Ran, tmp_path: Path
) -> None:
    (group,) = [group for group in SPEC["workerGroupSpecs"] if group["replicas"] == 2]
    cluster.start_worker(1, group["labels"])
    again = recipe | {"name": "sabotaged", "output": "sabotaged"}
    sabotaged = lose_a_node(cluster, cluster.nodes[-1], again, orders, tmp_path, sabotage="other rows the second time")
    assert sabotaged.exit_code == 0, sabotaged.printed
    noticed = sabotaged.differing(again) > 0
    table.add("c-node-lost-sabotage", row("sabotage of what is harvested again: noticed", noticed, "of 1", "==", 1))
    assert noticed


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
