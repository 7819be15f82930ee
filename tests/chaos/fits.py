"""Real fits, of Ray Train workers and Ray Data actors in one local Ray session, that are killed on their way.

What a fit ends with is its last checkpoint: weights and optimiser state of every dictionary, of which the bits count.
"""

import hashlib
import json
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from cluster import corpus, fit, gemma, recipe_file
from cluster.calibrate import SiteScale, calibrate
from cluster.checkpoint import Checkpoints
from cluster.planner import lay_out
from cluster.recipe import Recipe
from cluster.tracking import FitReporter

ROOT = Path(__file__).resolve().parent.parent.parent
INSIDE = Path(__file__).resolve().parent / "inside"
VICTIMS = ("RayTrainWorker", "MapWorker", "cluster.gang_rank")
Batches = dict[tuple[int, ...], dict[str, str]]
"""By the ids of a batch's rows: a digest of each site's rows, in the order in which they were trained on."""


def environment(orders: Path) -> dict[str, str]:
    """With which a process, and those that it starts, read `orders` as CHAOS."""
    return {"CHAOS": str(orders), "PYTHONPATH": f"{INSIDE}:{ROOT}"}


@dataclass
class Killer:
    """SIGKILLs one of this process' workers and harvest ranks again and again, at random times."""

    seed: int
    every: tuple[float, float]
    """Seconds between two kills."""
    most: int
    kinds: tuple[str, ...] = VICTIMS
    begins_with: str = "witness/*"
    """The file in the fit's folder before which nothing is killed: by default the first batch."""
    killed: list[str] = field(default_factory=list)

    def run(self, folder: Path, ended: threading.Event) -> None:
        chosen = random.Random(self.seed)
        while not any(folder.glob(self.begins_with)) and not ended.wait(0.05):
            pass
        while len(self.killed) < self.most and not ended.wait(chosen.uniform(*self.every)):
            if victims := processes(*self.kinds):
                name, victim = victims[chosen.randrange(len(victims))]
                victim.send_signal(signal.SIGKILL)
                self.killed.append(name)


def processes(*names: str, of: int | None = None) -> list[tuple[str, psutil.Process]]:
    """Descendants of a process, by default this one, whose command line has one of these names."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:  # it ended meanwhile
            continue
        found += [(name, child) for name in names if name in line]
    return found


@dataclass
class Outcome:
    """What a fit came to."""

    digests: dict[str, str]
    """sha256 of each dictionary's file in the last checkpoint: its weights and its optimiser's state."""
    steps: int
    batches: Batches
    killed: list[str]
    seconds: float


class Fits:
    """One corpus and its calibration, fitted again and again in one Ray session."""

    def __init__(self, folder: Path, recipe: Recipe, orders: Path):
        self.folder, self.orders = folder, orders
        self.tokens = folder / "tokens" / "train.npy"
        corpus.build(recipe, folder / "tokens")
        self.scales: dict[str, SiteScale] = calibrate(
            recipe, self.layout(recipe).sites, self.tokens, folder / "calibration.json"
        )

    def layout(self, recipe: Recipe) -> Any:
        return lay_out(recipe, gemma.text_config(recipe.model))

    def run(self, recipe: Recipe, killer: Killer | None = None, **orders: Any) -> Outcome:
        """Fits to the end, whatever is killed; `orders` are for the processes inside."""
        folder = self.folder / uuid.uuid4().hex[:8]
        witness = folder / "witness"
        witness.mkdir(parents=True)
        self.orders.write_text(json.dumps({"witness": str(witness)} | orders))
        checkpoints = Checkpoints.of(recipe, folder)
        layout = self.layout(recipe)
        job = fit.Job(recipe, layout, self.scales, self.tokens, None, folder, folder / "stop")
        runs = SimpleNamespace(uri=f"sqlite:///{folder / 'mlflow.db'}", children={s.id: s.id for s in recipe.specs()})
        reporter = FitReporter(runs, checkpoints, folder / "progress.json", folder / "curves.jsonl")
        started = time.monotonic()
        with running(killer, folder):
            fit.run(job, reporter, attempt="all")
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.position.done
        files = sorted(newest.folder.glob("*.safetensors"))
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        killed = killer.killed if killer else []
        return Outcome(digests, newest.position.step, read(witness), killed, time.monotonic() - started)


@contextmanager
def running(killer: Killer | None, folder: Path) -> Iterator[None]:
    if killer is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=killer.run, args=(folder, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read(witness: Path) -> Batches:
    """All batches that any process trained on. One that was done again must have had the same rows each time."""
    batches: Batches = {}
    for path in sorted(witness.iterdir(), key=os.path.getctime):
        for line in path.read_text().splitlines():
            try:
                seen = json.loads(line)
            except ValueError:  # the process was killed in it, and the batch was done again
                continue
            rows = batches.setdefault(tuple(seen["ids"]), {})
            for key, digest in seen["rows"].items():
                assert rows.setdefault(f"{key} of replica {seen['replica']}", digest) == digest
    return batches


def parse(content: dict[str, Any], **changes: dict[str, Any]) -> Recipe:
    """A recipe with some fields of its sections changed."""
    return recipe_file.parse(content | {section: content[section] | values for section, values in changes.items()})
