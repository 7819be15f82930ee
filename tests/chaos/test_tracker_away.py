"""MLflow is a black hole for the whole middle of a run: the ranks do not wait, and every point is there in the end."""

import json
import os
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient

from tests.chaos import fits, table
from tests.conftest import free_port
from tests.jobs.conftest import Job
from tests.jobs.test_sweep import serve
from tests.report import row

pytestmark = pytest.mark.chaos
AWAY = (60, 180)  # steps, of more than 200
PATIENCE = 600  # seconds


class Tracker(NamedTuple):
    url: str
    group: int


@pytest.fixture(scope="module")
def tracker(tmp_path_factory) -> Iterator[Tracker]:
    folder, port = tmp_path_factory.mktemp("tracker"), free_port()
    url, mlflow = f"http://127.0.0.1:{port}", str(Path(sys.executable).with_name("mlflow"))
    database = f"sqlite:///{folder / 'mlflow.db'}"
    server = serve([mlflow, "server", "--backend-store-uri", database, "--port", str(port)], folder, url)
    yield Tracker(url, server.pid)
    os.killpg(server.pid, signal.SIGKILL)


class Ran(NamedTuple):
    steps: int
    waited: float
    """Share of the fit in which the ranks waited for curves to be handed on."""
    points: dict[int, int]
    """Of one curve: when each step was reported, in ms."""
    curves: list[set[int]]
    """The steps of each dictionary's curve."""


def run(content: dict, folder: Path, tracker: Tracker, away: tuple[int, int] = AWAY, **orders: str) -> Ran:
    """A sweep whose every step is reported, to a tracker that answers nothing from one step to another."""
    folder.mkdir()
    (folder / "orders.json").write_text(json.dumps(orders))
    changed = content | {
        "name": folder.name, "output": str(folder / "run"), "stream": content["stream"] | {"batch_rows": 128},
        "fit": content["fit"] | {"workers": 1, "report_every_steps": 1, "checkpoint_every_steps": 1000},
    }  # fmt: skip
    environment = fits.environment(folder / "orders.json") | {"MLFLOW_TRACKING_URI": tracker.url}
    job, waiting = Job(changed, folder, **environment), folder / "run" / "curves-waiting.jsonl"
    try:
        job.wait_for_step(away[0], PATIENCE)
        os.killpg(tracker.group, signal.SIGSTOP)
        job.wait_for_step(away[1], PATIENCE)
        assert len(waiting.read_text().splitlines()) >= away[1] - away[0]  # the fault has happened
    finally:
        os.killpg(tracker.group, signal.SIGCONT)
    assert job.wait(PATIENCE) == 0, job.text
    assert not waiting.exists()
    told = json.loads((folder / "run" / "progress.json").read_text())
    position = told["position"]
    assert position["done"]
    waited = told["seconds_tracking"] * told["rows_per_second"] / position["rows"]
    client = MlflowClient(tracking_uri=tracker.url)
    children = json.loads((folder / "run" / "mlflow-runs.json").read_text())["children"]
    histories = [client.get_metric_history(id, "train/fvu") for id in children.values()]
    points = {point.step: point.timestamp for point in sorted(histories[0], key=lambda point: -point.timestamp)}
    return Ran(position["step"], waited, points, [{point.step for point in curve} for curve in histories])


def step_ms(points: dict[int, int], steps: range) -> float:
    return statistics.median(points[step + 1] - points[step] for step in steps)


def test_away__the_ranks_do_not_wait_and_no_point_is_lost(content: dict, tracker: Tracker, tmp_path: Path) -> None:
    ran = run(content, tmp_path / "away", tracker)
    everything = set(range(1, ran.steps + 1))
    missing = sum(len(everything - curve) for curve in ran.curves)
    away, there = step_ms(ran.points, range(AWAY[0] + 10, AWAY[1] - 10)), step_ms(ran.points, range(20, AWAY[0]))
    table.add(
        "9-tracker",
        row("MLflow a black hole for half the run: share of the fit that ranks waited", ran.waited, "fraction",
            "<=", 0.01),
        row("the same: points missing after its return", missing, f"of {ran.steps * len(ran.curves)}", "==", 0),
        row("the same: median step while away against before", away / there, "x", "<=", 1.2),
    )  # fmt: skip
    assert ran.steps > 200
    assert ran.waited <= 0.01
    assert missing == 0


def test_sabotage__ranks_that_wait_for_the_tracker_are_noticed(content: dict, tracker: Tracker, tmp_path: Path) -> None:
    ran = run(content, tmp_path / "waits", tracker, away=(60, 62), sabotage="wait for the tracker")
    noticed = ran.waited > 0.01
    table.add("a-sabotaged-tracker", row("sabotage of how curves are handed on: noticed", noticed, "of 1", "==", 1))
    assert noticed
