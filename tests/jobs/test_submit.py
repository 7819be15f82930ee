"""The README's submission: `ray job submit` to a running cluster with token authentication."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.jobs.conftest import ROOT
from tests.raylets import RAY, Raylets
from tests.test_readme import submit_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head of four CPUs with token authentication; (address, environment)."""
    raylets = Raylets(tmp_path_factory.mktemp("head"), SCOPEWORKS_HOME=str(tmp_path_factory.mktemp("home")))
    try:
        raylets.start_head(cpus=4)
        yield raylets.address, raylets.environment
    finally:
        raylets.close()


def submit(cluster, recipe_path: str, **environment: str) -> subprocess.CompletedProcess:
    address, base = cluster
    command = [str(RAY), *submit_command(address, recipe_path)[1:]]
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
