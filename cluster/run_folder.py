"""The run folder: its files, its one owner, and how it is emptied."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import UserError
from cluster.recipe import Recipe


def replace_text(path: Path, text: str) -> None:
    """Writes a file that readers see whole or not at all."""
    staged = path.with_name(f"{path.name}.staged")
    staged.write_text(text)
    staged.rename(path)


class RunFolder:
    """Names of everything that a sweep keeps."""

    def __init__(self, root: Path):
        self.root = root
        self.recipe = root / "resolved-recipe.yaml"
        self.log = root / "sweep.log"
        self.tokens = root / "tokens"
        self.calibration = root / "calibration.json"
        self.train = root / "train"
        self.runs = root / "mlflow-runs.json"
        self.mlflow = root / "mlflow.db"
        self.mlflow_artifacts = root / "mlflow-artifacts"
        self.progress = root / "progress.json"
        self.spool = root / "curves-waiting.jsonl"
        self.stop = root / "stop"
        self.brought = root / "brought"
        self.staging = root / "staging"
        self.published = root / "published"
        self.frontier = root / "frontier.png"
        self.summary = root / "summary.json"
        """Written last: the sweep is finished when it exists."""

    @contextmanager
    def owned(self, recipe: Recipe, *, fresh: bool) -> Iterator[None]:
        """Holds the folder for this recipe; UserError if it cannot be written, is in use or is another recipe's."""
        self._refuse_strangers()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = open(self.root / ".lock", "w")  # noqa: SIM115, held until the end of the block
        except OSError as error:
            raise UserError(
                "output", f"{self.root} cannot be written ({error.strerror}): name a folder that can"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    "output", f"another sweep is running in {self.root}: wait for it or name another folder"
                ) from None
            if fresh:
                self._empty()
            new = not self.recipe.exists()
            self._claim(recipe)
            try:
                yield
            except UserError:
                if new:  # nothing was done yet: a mended recipe must find the folder as it was
                    self._empty()
                raise

    def _refuse_strangers(self) -> None:
        strangers = sorted(set(os.listdir(self.root)) - {".lock"}) if self.root.is_dir() else []
        if strangers and not self.recipe.exists():
            raise UserError("output", f"{self.root} holds {strangers[0]} and no sweep: name an empty or new folder")

    def _claim(self, recipe: Recipe) -> None:
        if not self.recipe.exists():
            return replace_text(self.recipe, recipe.to_yaml())
        refuse_another("output", str(self.root), self.recipe, recipe)

    def _empty(self) -> None:
        """Removes an earlier sweep, and nothing else that lies in the folder."""
        if self.recipe.exists():
            for path in {path for path in vars(self).values() if path != self.root}:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def refuse_another(field: str, place: str, kept: Path, recipe: Recipe) -> None:
    """UserError if the resolved recipe in the file `kept` gives other results than this one."""
    then, now = (results_of(part) for part in (yaml.safe_load(kept.read_text()), recipe.model_dump(mode="json")))
    changed = [key for key in now if then.get(key) != now[key]]
    if changed:
        raise UserError(
            field,
            f"{place} holds a sweep of another recipe ({', '.join(changed)} differs): "
            "name another, or start anew with FRESH=1 or --fresh",
        )


def results_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe that its results depend on: a sweep may go on with other workers or actors."""
    placement = ("actors", "cpus", "gpus", "label_selector", "cache", "zero3", "block_seconds")
    harvest = {key: value for key, value in recipe["harvest"].items() if key not in placement}
    fit = {"products": recipe["fit"].get("products")}
    return {key: value for key, value in recipe.items() if key != "output"} | {"harvest": harvest, "fit": fit}
