"""Running the job as a person does: its own process, its exit code and what it prints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent


class Job:
    """python jobs/sweep.py on a recipe, in a process group of its own."""

    def __init__(self, recipe: dict, folder: Path, *options: str, **environment: str):
        self.recipe_file = folder / f"{recipe['name']}.yaml"
        self.recipe_file.write_text(yaml.safe_dump(recipe))
        self.output = Path(recipe["output"])
        self.printed = folder / f"{recipe['name']}-{time.monotonic_ns()}.out"
        kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
        self.process = subprocess.Popen(
            [sys.executable, "jobs/sweep.py", str(self.recipe_file), *options],
            cwd=ROOT,
            env=kept | environment,
            stdout=self.printed.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float = 400) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"no end after {seconds} s:\n{self.text}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def text(self) -> str:
        return self.printed.read_text()

    @property
    def step(self) -> int:
        """The step that the fit has reported, 0 before."""
        import json

        try:
            return json.loads((self.output / "progress.json").read_text())["position"]["step"]
        except (OSError, ValueError):
            return 0

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while self.step < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"step {step} was not reached:\n{self.text}")
            time.sleep(0.02)


@pytest.fixture
def run_job(tmp_path: Path):
    """Starts jobs that end with the test."""
    jobs: list[Job] = []

    def start(recipe: dict, *options: str, **environment: str) -> Job:
        jobs.append(Job(recipe, tmp_path, *options, **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.kill()
