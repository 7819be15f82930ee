"""Fits of the real Gemma 3 270M in one local Ray session, with clocks inside and a watch outside."""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import clocks
import ray
from watch import Watch

from cluster import corpus, fit, gemma, recipe_file, session
from cluster.calibrate import calibrate
from cluster.checkpoint import Checkpoints
from cluster.layout import Layout
from cluster.memory import Memory, memory
from cluster.planner import lay_out
from cluster.recipe import Recipe
from cluster.stream import Order
from cluster.tracking import FitReporter

ROOT = Path(__file__).resolve().parents[3]
INSIDE = Path(__file__).resolve().parent / "inside"


@contextmanager
def ray_session(folder: Path) -> Iterator[None]:
    """A local Ray whose processes write their clocks where the file `CLOCKS` says."""
    os.environ |= {"CLOCKS": str(folder / "clocks"), "PYTHONPATH": f"{INSIDE}:{ROOT}"}
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=session.OBJECT_STORE_BYTES, log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


class Measured(NamedTuple):
    folder: Path
    watch: Watch
    began: float
    first_step: float

    @property
    def clocks(self) -> Path:
        return self.folder / "clocks"


class Fits:
    """Recipes that differ only in their dictionaries and lengths, fitted in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def recipe(self, layers: list[int], cells: dict[str, list[Any]], tokens: int, **sections: dict[str, Any]) -> Recipe:
        content: dict[str, Any] = {
            "name": "bench", "output": str(self.folder / "run"), "model": {"name": "package:gemma-3-270m"},
            "corpus": {"paths": ["package:wikipedia-introductions"], "context": 256, "train_tokens": tokens,
                       "heldout_tokens": 256},
            "stream": {"window_sequences": 32, "batch_rows": 512},
            "sweep": [{"layers": layers, "widths": [4096], **cells}],
            "fit": {"workers": 2, "cpus_per_worker": 0.5, "checkpoint_every_steps": 10_000},
        }  # fmt: skip
        return recipe_file.parse(content | {name: content.get(name, {}) | fields for name, fields in sections.items()})

    def layout(self, asked: Recipe) -> tuple[Layout, Memory]:
        config = gemma.text_config(asked.model)
        layout = lay_out(asked, config)
        return layout, memory(asked, layout, config)

    def run(self, asked: Recipe, *, after: Path | None = None, one_step: bool = False) -> Measured:
        """A fit to its end, from the checkpoint folder `after` if there is one; or only its first step."""
        folder = self.folder / uuid.uuid4().hex[:8]
        (folder / "clocks").mkdir(parents=True)
        (self.folder / "clocks").write_text(str(folder / "clocks"))
        layout, _ = self.layout(asked)
        tokens = self._tokens(asked)
        scales = calibrate(asked, layout.sites, tokens, folder / "calibration.json")
        checkpoints = Checkpoints.of(asked, folder)
        if after is not None:
            shutil.copytree(after, folder / "checkpoints" / after.name)
        stop = folder / "stop"
        if one_step:
            stop.touch()
        job = fit.Job(asked, layout, scales, tokens, None, folder, stop)
        runs = SimpleNamespace(uri=f"sqlite:///{folder / 'mlflow.db'}", children={s.id: s.id for s in asked.specs()})
        reporter = FitReporter(runs, checkpoints, folder / "progress.json", folder / "curves.jsonl")
        began = time.time()
        with Watch() as watch:
            fit.run(job, reporter, attempt="all")
        return Measured(folder, watch, began, clocks.first_step(folder / "clocks"))

    def costs(self, asked: Recipe) -> clocks.Costs:
        measured, order = self.run(asked), Order.of(asked)
        return clocks.costs(measured.clocks, measured.watch, order.sequences * order.context / order.steps)

    def _tokens(self, asked: Recipe) -> Path:
        """Of this many training tokens; built once."""
        folder = self.folder / f"tokens-{asked.corpus.train_tokens}"
        if not folder.exists():
            corpus.build(asked, folder)
        return folder / "train.npy"
