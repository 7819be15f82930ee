"""The config file deploys what is there, and `python -m serve` refuses what would be open or empty."""

import subprocess
import sys

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve.deploy import build
from serve.settings import Settings
from tests.serve.live import ROOT

CONFIG = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())


def test_config__is_one_that_ray_serve_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOPEWORKS_TOKENS", f"[{{name: a, sha256: {'a' * 64}, scopes: [read]}}]")
    schema = ServeDeploySchema.model_validate(CONFIG)
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    settings = Settings.model_validate(application.args)
    assert not settings.insecure_local
    built = build(settings)
    names = {built._bound_deployment.name}
    names |= {argument._bound_deployment.name for argument in built._bound_deployment.init_args}
    assert {deployment.name for deployment in application.deployments} == names


def test_config__with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="threds"):
        Settings.model_validate({"catalog": "x", "threds": 2})


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "serve", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_command__says_what_is_missing() -> None:
    done = run("--catalog", "runs/none")
    assert (done.returncode, "make sweep" in done.stderr) == (2, True)
    done = run("--catalog", "tests", "--insecure-local", "--host", "0.0.0.0")
    assert (done.returncode, "configure tokens" in done.stderr) == (2, True)


def test_command__makes_a_token_that_its_line_admits() -> None:
    from serve import tokens

    printed = run("token", "team", "--scopes", "read", "steer").stdout.splitlines()
    token, line = printed[0].split()[-1], printed[1].partition(":")[2]
    (caller,) = tokens.load({tokens.TEXT: line.strip()})
    assert tokens.Tokens([caller]).find(token) == caller
    assert (caller.name, caller.scopes) == ("team", {"read", "steer"})


def test_make_serve__names_the_demos_model_as_its_dictionaries_do() -> None:
    """Where its package is, jobs/fetch.py says; other names it prints as they are."""
    from cluster.packages import PUBLISHED_NAMES

    for package, published in PUBLISHED_NAMES.items():
        asked = ["make", "-n", "serve", f"MODEL=package:{package}"]
        printed = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f"jobs/fetch.py package:{package}" in printed
        assert f"--model-name {published}" in printed
    assert fetch("google/gemma-3-1b-it").stdout == "google/gemma-3-1b-it\n"
    refused = fetch("package:none")
    assert (refused.returncode, "there are package:gemma-3-270m" in refused.stderr) == (2, True)


def fetch(name: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "jobs/fetch.py", name], cwd=ROOT, capture_output=True, text=True)
