"""The README's submission: `ray job submit` to a running cluster with token authentication."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import free_port
from tests.jobs.conftest import ROOT
from tests.test_readme import submit_command

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head of four CPUs with token authentication, in a process group of its own; (address, environment)."""
    token = "c0ffee" * 8
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    environment["SCOPEWORKS_HOME"] = str(tmp_path_factory.mktemp("home"))
    dashboard, gcs, client = free_port(), free_port(), free_port()
    folder = tmp_path_factory.mktemp("head")
    ray_files = f"/tmp/ray-{os.getpid()}"  # short: sockets lie below it
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--temp-dir={ray_files}", "--object-store-memory=500000000",
        "--dashboard-host=127.0.0.1",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    for _ in range(120):
        listed = subprocess.run([RAY, "job", "list", "--address", address], env=environment, capture_output=True)
        if listed.returncode == 0:
            break
        time.sleep(1)
    else:
        pytest.fail((folder / "log").read_text())
    yield address, environment
    for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
        process.kill()
    head.wait()
    shutil.rmtree(ray_files, ignore_errors=True)


def submit(cluster, recipe_path: str, **environment: str) -> subprocess.CompletedProcess:
    address, base = cluster
    command = [RAY, *submit_command(address, recipe_path)[1:]]
    return subprocess.run(command, cwd=ROOT, env=base | environment, capture_output=True, text=True, timeout=300)


def last_job(cluster) -> dict:
    from ray.job_submission import JobSubmissionClient

    address, environment = cluster
    client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"})
    newest = max(client.list_jobs(), key=lambda details: details.start_time)
    return {
        "status": newest.status,
        "exit_code": newest.driver_exit_code,
        "logs": client.get_job_logs(newest.submission_id),
    }


def test_submit__publishes_all_four_sites_into_the_clusters_home(cluster, tiny_recipe: dict, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe | {"output": "runs/submitted"}))
    done = submit(cluster, str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    job = last_job(cluster)
    assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
    output = Path(cluster[1]["SCOPEWORKS_HOME"]) / "runs" / "submitted"
    summary = json.loads((output / "summary.json").read_text())
    assert {row["site"] for row in summary["dictionaries"]} == {"resid_post", "attn_out", "mlp_in", "mlp_out"}
    assert str(output / "published") in job["logs"]


def test_submit__a_failed_sweep_is_a_failed_job_whose_last_line_says_why(
    cluster, tiny_recipe: dict, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    tiny_recipe["sweep"][0]["layers"] = [40]
    path.write_text(yaml.safe_dump(tiny_recipe))
    assert submit(cluster, str(path)).returncode != 0
    job = last_job(cluster)
    assert (job["status"], job["exit_code"]) == ("FAILED", 2)
    assert job["logs"].strip().splitlines()[-1].startswith("error: sweep.layers: layer 40")


@pytest.mark.parametrize("wrong", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "beef" * 12}])
def test_submit__without_the_token_nothing_runs(cluster, wrong: dict[str, str]) -> None:
    before = last_job(cluster)["logs"]
    done = submit(cluster, "jobs/recipes/demo.yaml", **wrong)
    assert done.returncode != 0
    assert (
        "401" in done.stdout + done.stderr
        or "403" in done.stdout + done.stderr
        or "token" in (done.stdout + done.stderr).lower()
    )
    assert last_job(cluster)["logs"] == before
