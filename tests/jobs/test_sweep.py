"""Whole sweeps on the tiny model, in processes of their own, killed and resumed; the oracle is the flat loop."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient

from cluster import recipe_file
from sae import artifact
from sae.dictionary import Dictionary
from tests import flat_loop
from tests.conftest import free_port
from tests.jobs.conftest import Job
from tests.published import tensors

pytestmark = pytest.mark.slow


@pytest.fixture
def sweep(tiny_recipe: dict) -> dict:
    """Eight dictionaries of all kinds and activations, with every option, in 120 steps; those whose steps are fused
    with products in bfloat16."""
    common = {"widths": [64], "l0s": [8]}
    revived = {"dead_after_rows": 2000}
    grids = [
        {"layers": [0], "activations": ["relu", "topk", "gated"], "options": revived | {"auxk": {}}},
        {"layers": [1], "activations": ["batch_topk"]},
        {"kind": "transcoder", "layers": [1], "activations": ["jumprelu"], "affine": [True],
         "options": revived | {"preactivation": {}}},
        {"kind": "crosscoder", "layers": [0, 3], "activations": ["batch_topk"],
         "options": revived | {"resampling": {}}},
        {"kind": "clt", "layers": [0, 1, 2, 3], "activations": ["batch_topk", "jumprelu"],
         "options": {"matryoshka": {"sampled": True}}},
    ]  # fmt: skip
    fit = tiny_recipe["fit"] | {"products": "bfloat16"}
    return tiny_recipe | {"sweep": [common | grid for grid in grids], "fit": fit}


@pytest.fixture(scope="module")
def known() -> dict[str, Dictionary]:
    """The flat loop's dictionaries, computed once, by the first test that has tokens."""
    return {}


def published(output: Path) -> dict[str, Dictionary]:
    summary = json.loads((output / "summary.json").read_text())
    return {row["id"]: artifact.read(Path(row["path"]))[0] for row in summary["dictionaries"]}


def assert_equals_flat_loop(sweep: dict, output: Path, known: dict[str, Dictionary]) -> None:
    recipe = recipe_file.parse(sweep)
    if not known:
        known |= flat_loop.fit(recipe, np.load(output / "tokens" / "train.npy"))
    found = published(output)
    assert found.keys() == known.keys()
    for id, expected in known.items():
        assert found[id].shape == expected.shape
        for n, (mine, theirs) in enumerate(zip(tensors(expected), tensors(found[id]), strict=True)):
            assert torch.equal(mine, theirs), f"{id} tensor {n}: largest difference {(mine - theirs).abs().max()}"


def train_workers(job: Job) -> list[psutil.Process]:
    workers = []
    for child in psutil.Process(job.process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                workers.append(child)
        except psutil.NoSuchProcess:  # it ended meanwhile
            pass
    return workers


def test_one_worker__equals_the_flat_loop_bit_for_bit(sweep: dict, run_job, known) -> None:
    sweep["fit"] |= {"workers": 1}
    job = run_job(sweep)
    assert job.wait() == 0, job.text
    assert_equals_flat_loop(sweep, job.output, known)
    assert_everything_is_there(job)
    assert_the_printed_command_opens_mlflow(job)

    again = run_job(sweep)
    started = time.monotonic()
    assert again.wait() == 0
    assert time.monotonic() - started < 20
    assert "finished before" in again.text

    other = run_job(sweep | {"seed": 1})
    assert other.wait() == 2
    assert "seed differs" in other.text


def assert_the_printed_command_opens_mlflow(job: Job) -> None:
    (line,) = [line for line in job.text.splitlines() if line.startswith("MLflow ")]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = serve(line.removeprefix("MLflow").replace("--port 5000", f"--port {port}").split(), job.output, url)
    try:
        parent = json.loads((job.output / "mlflow-runs.json").read_text())["parent"]
        picture = urllib.request.urlopen(f"{url}/get-artifact?path=frontier.png&run_uuid={parent}").read()
        assert picture == (job.output / "frontier.png").read_bytes()
        (link,) = [line for line in job.text.splitlines() if line.startswith("compare ")]
        compared = urllib.parse.parse_qs(link.partition("?")[2])["runs"][0]
        client = MlflowClient(tracking_uri=url)
        assert {client.get_run(run).data.tags["mlflow.parentRunId"] for run in json.loads(compared)} == {parent}
        assert len(json.loads(compared)) == 8
    finally:
        os.killpg(server.pid, signal.SIGKILL)


def assert_everything_is_there(job: Job) -> None:
    """What the end of a sweep promises: table, summary, picture, artifacts, MLflow runs."""
    summary = json.loads((job.output / "summary.json").read_text())
    promised = {"id", "site", "layers", "kind", "activation", "width", "l0", "fvu", "max_frequency",
        "dead_fraction", "loss_recovered", "rows_per_second", "path"}  # fmt: skip
    params = {
        "resid_post": {"params.safetensors"},
        "transcoder": {"params.safetensors"},
        "crosscoder": {f"params_layer_{n}.safetensors" for n in range(2)},
        "clt": {f"params_layer_{n}.safetensors" for n in range(4)},
    }
    assert len(summary["dictionaries"]) == 8
    assert {Path(row["path"]).parent.name for row in summary["dictionaries"]} == params.keys()
    for row in summary["dictionaries"]:
        assert promised <= row.keys()
        assert row["id"] in job.text
        names = {path.name for path in Path(row["path"]).iterdir()}
        directory = Path(row["path"]).parent.name
        assert names == {"config.json", "metrics.json", "manifest.json", "recipe.yaml"} | params[directory]
        assert 0 < row["fvu"] < 1
        assert yaml.safe_load(Path(row["path"], "recipe.yaml").read_text())["training"]["learning_rate"] == 1e-3
    assert (job.output / "frontier.png").read_bytes().startswith(b"\x89PNG")

    client = MlflowClient(tracking_uri=f"sqlite:///{job.output / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {row["id"] for row in summary["dictionaries"]}
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {
        "frontier.png",
        "recipe.yaml",
        "summary.json",
    }
    for run in runs:
        assert run.info.status == "FINISHED"
    for run in children:
        assert run.data.metrics["fvu"] == pytest.approx(
            next(r["fvu"] for r in summary["dictionaries"] if r["id"] == run.info.run_name)
        )
        curve = client.get_metric_history(run.info.run_id, "train/fvu")
        assert len({point.step for point in curve}) >= 50
        assert curve[-1].value < curve[0].value
        assert run.data.params["activation"] in run.info.run_name
        assert run.data.params["jumprelu.bandwidth"] == "0.01"
        assert {item.path for item in client.list_artifacts(run.info.run_id)} == {
            "config.json",
            "latent_frequencies.png",
            "recipe.yaml",
        }


@pytest.mark.chaos
def test_mlflow_goes_away__the_fit_goes_on_and_no_point_is_lost(sweep: dict, run_job, tmp_path: Path) -> None:
    """The server is the command that a sweep prints at its end, on a database of its own."""
    port = free_port()
    url, database = f"http://127.0.0.1:{port}", f"sqlite:///{tmp_path / 'server.db'}"
    mlflow = str(Path(sys.executable).with_name("mlflow"))
    command = [mlflow, "server", "--backend-store-uri", database, "--port", str(port)]
    grid = {"layers": [0], "activations": ["batch_topk"], "widths": [64], "l0s": [8]}
    server = serve(command, tmp_path, url)
    try:
        job = run_job(sweep | {"sweep": [grid], "fit": sweep["fit"] | {"workers": 1}}, MLFLOW_TRACKING_URI=url)
        job.wait_for_step(20)
        os.killpg(server.pid, signal.SIGKILL)
        waiting = job.output / "curves-waiting.jsonl"
        while not waiting.exists():  # the fault has happened: something could not be logged
            assert job.process.poll() is None, job.text
            time.sleep(0.1)
        server = serve(command, tmp_path, url)
        assert job.wait() == 0, job.text
        assert not waiting.exists()
        assert not (job.output / "mlflow.db").exists()
        client = MlflowClient(tracking_uri=url)
        (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        (child,) = [run for run in runs if run is not parent]
        curve = client.get_metric_history(child.info.run_id, "train/fvu")
        assert sorted(point.step for point in curve) == list(range(2, 121, 2))
        picture = f"{url}/get-artifact?path=frontier.png&run_uuid={parent.info.run_id}"
        assert urllib.request.urlopen(picture).read() == (job.output / "frontier.png").read_bytes()
        assert f"MLflow     open {url}" in job.text
    finally:
        os.killpg(server.pid, signal.SIGKILL)


def serve(command: list[str], folder: Path, url: str) -> subprocess.Popen:
    """Starts an MLflow server in a process group of its own."""
    server = subprocess.Popen(command, cwd=folder, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"{url}/health")
    except pytest.fail.Exception:
        os.killpg(server.pid, signal.SIGKILL)
        raise
    return server


def wait_for(url: str) -> None:
    for _ in range(120):
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"{url} does not answer")


@pytest.mark.chaos
def test_ctrl_c_then_kill__the_same_command_resumes_on_other_workers(sweep: dict, run_job, known) -> None:
    first = run_job(sweep)
    first.wait_for_step(25)
    os.kill(first.process.pid, signal.SIGINT)
    assert first.wait() == 130
    assert re.search(r"^stopped; .* Resume with: \S*python\S* jobs/sweep.py \S+tiny.yaml$", first.text, re.MULTILINE)
    client = MlflowClient(tracking_uri=f"sqlite:///{first.output / 'mlflow.db'}")
    runs = json.loads((first.output / "mlflow-runs.json").read_text())
    assert client.get_run(runs["parent"]).info.status == "RUNNING"  # to be resumed, and not failed
    stopped_at = max(int(path.name.split("-")[1]) for path in first.output.glob("train/*/step-*"))
    assert stopped_at >= 25

    sweep["fit"] |= {"workers": 3}
    second = run_job(sweep)
    second.wait_for_step(stopped_at + 25)
    assert f"resuming at step {stopped_at}" in second.text
    second.kill()

    third = run_job(sweep)
    assert third.wait() == 0, third.text
    assert "resuming at step" in third.text
    assert_equals_flat_loop(sweep, third.output, known)
    assert not (third.output / "train").exists()


@pytest.mark.chaos
def test_a_fit_that_fails_for_good__says_why_on_its_last_line(sweep: dict, run_job) -> None:
    sweep["fit"] |= {"max_failures": 0}
    job = run_job(sweep)
    job.wait_for_step(5)
    train_workers(job)[0].send_signal(signal.SIGKILL)
    assert job.wait() == 1
    assert job.text.splitlines()[-1].startswith("sweep failed: ")
    assert str(job.output / "sweep.log") in job.text.splitlines()[-1]
