"""MLflow: a parent run a sweep, a child run a dictionary. Only the driver and the Train controller log."""

import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

from cluster import curves
from cluster.checkpoint import Checkpoints, Collector
from cluster.curves import Curves
from cluster.errors import UserError
from cluster.evaluate import Evaluated
from cluster.layout import Layout
from cluster.recipe import Recipe
from cluster.report import draw_frequencies
from cluster.run_folder import RunFolder, replace_text
from sae.spec import DictionarySpec

PORT = 5000  # of the MLflow server that a person starts
REMEDY = "start that server, or unset MLFLOW_TRACKING_URI to use a file in the run folder"


def tracking_uri(folder: RunFolder) -> str:
    """MLFLOW_TRACKING_URI if it is set, else an SQLite file in the run folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.mlflow}"


def check_reachable() -> None:
    """UserError, in seconds, if MLFLOW_TRACKING_URI names a server that does not answer."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers; whether it lets us log is told by the first call
        except (OSError, ValueError) as error:
            raise UserError("MLFLOW_TRACKING_URI", f"{uri} is not reachable ({error}): {REMEDY}") from error


def how_to_look(folder: RunFolder) -> list[str]:
    """The command that opens MLflow, unless it is a server already, and the page that compares the dictionaries."""
    uri, known = tracking_uri(folder), json.loads(folder.runs.read_text())
    is_server = uri.startswith("http")
    if uri.startswith("sqlite:///") and not folder.mlflow.exists():
        return []  # the sweep was finished elsewhere, and its MLflow is a file there
    base = uri.rstrip("/") if is_server else f"http://127.0.0.1:{PORT}"
    mlflow = Path(sys.executable).with_name("mlflow")
    runs, experiments = (
        urllib.parse.quote(json.dumps(ids, separators=(",", ":")))
        for ids in (list(known["children"].values()), [known["experiment"]])
    )
    command = f"open {uri}" if is_server else f"{mlflow} server --backend-store-uri {uri} --port {PORT}"
    return [
        f"MLflow     {command}",
        f"compare    {base}/#/compare-runs?runs={runs}&experiments={experiments}",
    ]


class Runs:
    """The MLflow runs of one sweep, by id: found again by any process, made once."""

    def __init__(self, recipe: Recipe, folder: RunFolder):
        from mlflow import MlflowClient

        self.uri = tracking_uri(folder)
        self.client = MlflowClient(tracking_uri=self.uri)
        experiment = self.client.get_experiment_by_name(recipe.name)
        if experiment is None:
            location = None if self.uri.startswith("http") else folder.mlflow_artifacts.as_uri()
            self.experiment = self.client.create_experiment(recipe.name, artifact_location=location)
        else:
            self.experiment = experiment.experiment_id
        self.parent = ""
        self.children: dict[str, str] = {}

    def open(self, recipe: Recipe, layout: Layout, path: Path) -> None:
        """Creates the parent run and its children, or finds in `path` those of an earlier attempt."""
        if path.exists():
            known = json.loads(path.read_text())
            if self._knows(known["parent"]):
                self.parent, self.children = known["parent"], known["children"]
                return
        self.parent = self.client.create_run(self.experiment, run_name=recipe.name).info.run_id
        self.client.log_text(self.parent, recipe.to_yaml(), "recipe.yaml")
        for team, specs in enumerate(layout.teams):
            for spec in specs:
                self.children[spec.id] = self._create_child(recipe, spec, team)
        known = {"experiment": self.experiment, "parent": self.parent, "children": self.children}
        replace_text(path, json.dumps(known, indent=2) + "\n")

    def _knows(self, run: str) -> bool:
        """Whether the tracker has a run: one that is a file in a run folder does not know those of another machine."""
        from mlflow.exceptions import RESOURCE_DOES_NOT_EXIST, ErrorCode, MlflowException

        try:
            self.client.get_run(run)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return False
        return True

    def _create_child(self, recipe: Recipe, spec: DictionarySpec, team: int) -> str:
        from mlflow.entities import Param

        tags = {"mlflow.parentRunId": self.parent, "dictionary": spec.id}
        run = self.client.create_run(self.experiment, run_name=spec.id, tags=tags).info.run_id
        fields = spec.model_dump(exclude={"id", "l0", "options", "training"}) | {"l0_target": spec.l0, "team": team}
        fields |= _flat(spec.options.model_dump()) | _flat(spec.training.model_dump())
        fields |= {"model": recipe.model.name, "train_tokens": recipe.corpus.train_tokens}
        self.client.log_batch(run, params=[Param(key, str(value)) for key, value in fields.items()])
        self.client.log_text(run, recipe.to_yaml(), "recipe.yaml")
        return run

    def finish(
        self, summary: list[dict[str, Any]], results: dict[str, Evaluated], places: dict[str, Path], folder: RunFolder
    ) -> None:
        """Logs the held-out figures and pictures, what still waits of the curves, and ends the runs."""
        curves.keep(curves.log(self.client, curves.waiting(folder.spool)), folder.spool)
        with tempfile.TemporaryDirectory() as scratch:
            for row in summary:
                run, evaluated = self.children[row["id"]], results[row["id"]]
                for name, value in evaluated.scores._asdict().items():
                    self.client.log_metric(run, name, value)
                picture = Path(scratch, "latent_frequencies.png")
                draw_frequencies(picture, row["id"], evaluated)
                self.client.log_artifact(run, str(picture))
                self.client.log_artifact(run, str(places[row["id"]] / "config.json"))
        self.client.log_artifact(self.parent, str(folder.frontier))
        self.client.log_dict(self.parent, {"dictionaries": summary}, "summary.json")
        self.close("FINISHED")

    def close(self, status: str) -> None:
        for run in (*self.children.values(), self.parent):
            self.client.set_terminated(run, status)


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names, which MLflow can compare one by one."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        nested = {f"{name}.{key}": part for key, part in _flat(value).items()} if isinstance(value, dict) else {}
        flat |= nested or {name: value}
    return flat


class FitReporter(UserCallback):
    """Runs in the Train controller: commits checkpoints, tells the driver how it goes, hands curves on to MLflow.

    The ranks wait while it runs, so that nothing in it may wait for a server.
    """

    def __init__(self, runs: Runs, checkpoints: Checkpoints, progress: Path, spool: Path):
        self.uri, self.children, self.progress, self.spool = runs.uri, runs.children, progress, spool
        self.checkpoints = checkpoints
        self.collector: Collector | None = None  # like the curves made where it is used: neither pickles
        self.curves: Curves | None = None
        self.seconds_tracking = 0.0
        """In which the ranks waited for curves to be handed on."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        figures = {id: values for rank in metrics for id, values in rank["dictionaries"].items()}
        if self.collector is None:
            self.collector = Collector(self.checkpoints)
        written = [part for rank in metrics for part in rank["written"]]
        self.collector.add(written, [name for rank in metrics for name in rank["parts"]])
        if metrics[0]["last"]:
            self.collector.finish()
        self._hand_on(metrics[0]["position"]["step"], figures)
        blocked = max(rank["blocked_by_checkpoints"] for rank in metrics)
        told = metrics[0] | {"dictionaries": figures, "blocked_by_checkpoints": blocked}
        replace_text(self.progress, json.dumps(told | {"seconds_tracking": self.seconds_tracking}) + "\n")
        if metrics[0]["last"] and self.curves:
            self.curves.close()

    def _hand_on(self, step: int, figures: dict[str, dict[str, float]]) -> None:
        started, at = time.monotonic(), int(time.time() * 1000)
        if self.curves is None:
            self.curves = Curves(self.uri, self.spool)
        by_run = {self.children[id]: {f"train/{k}": v for k, v in values.items()} for id, values in figures.items()}
        self.curves.add([{"run": run, "step": step, "at": at, "figures": those} for run, those in by_run.items()])
        self.seconds_tracking += time.monotonic() - started
