"""A sweep from recipe to published dictionaries: its stages in order, each of which a later run finds done."""

import json
import shutil
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import (
    cache,
    corpus,
    end_to_end,
    evaluate,
    fit,
    gang,
    gemma,
    publish,
    report,
    session,
    start,
    storage,
    tracking,
)
from cluster.calibrate import SiteScale, calibrate
from cluster.checkpoint import Checkpoints
from cluster.console import say, this_command
from cluster.errors import UserError
from cluster.layout import Layout
from cluster.memory import memory
from cluster.packages import GEMMA_NOTICE, is_package
from cluster.planner import lay_out, table
from cluster.progress import LiveLine
from cluster.recipe import Recipe
from cluster.run_folder import RunFolder
from cluster.storage import Storage
from cluster.stream import Order

INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended


class Interrupted(BaseException):
    """Somebody asked the sweep to stop; it can be resumed. Like KeyboardInterrupt it is no error: nothing that
    catches errors may swallow it, or mark the MLflow runs as failed."""


class SweepFailed(Exception):
    """The fit failed more often than the recipe allows."""


def run(recipe: Recipe, *, fresh: bool) -> int:
    """Plans, fits, evaluates and publishes, printing as it goes. Returns the exit code; UserError before anything is
    started if something in the recipe or the surroundings cannot work."""
    folder = RunFolder(recipe.folder())
    kept = Storage(recipe, folder)
    tracking.check_reachable()
    storage.check(recipe)
    layout = _plan(recipe)
    with folder.owned(recipe, fresh=fresh), kept.owned(fresh=fresh):
        if kept.finished():
            say(f"\nfinished before (FRESH=1 or --fresh runs it anew)\n\n{_closing(folder, kept)}")
            return 0
        say(f"details  {folder.log}")
        stop = Stop(folder.stop)
        try:
            # Twice: Ray, when it starts, puts its own handler of SIGTERM in the place of ours.
            with stop.listening(), session.session(recipe, folder.log), stop.listening():
                Sweep(recipe, layout, folder, kept, stop).run()
        except Interrupted:
            say(f"stopped; what is done is kept in {recipe.storage or folder.root}. Resume with: {this_command()}")
            return INTERRUPTED
        except UserError:
            raise
        except Exception as error:
            say(_explain_failure(error, folder.log))
            return 1
        say(f"\n{_closing(folder, kept)}")
        return 0


def plan(recipe: Recipe) -> int:
    """Prints who would hold what and the memory that it takes, and starts and fetches nothing. Returns 0."""
    layout, config = _lay_out(recipe)
    _show(recipe, layout, config)
    try:
        session.check_machine(recipe, layout, config)
    except UserError as error:
        say(f"note     here it would not start: {error}")
    return 0


def _plan(recipe: Recipe) -> Layout:
    """Checks everything that can be known before anything is started, and prints the plan."""
    layout, config = _lay_out(recipe)
    session.check_machine(recipe, layout, config)
    gang.check(recipe.harvest)
    corpus.check(recipe)
    cache.check(recipe, layout.widths)
    start.check(recipe, layout)
    _show(recipe, layout, config)
    location = gemma.locate(recipe.model)
    if is_package(recipe.model.name):
        say("licence  " + GEMMA_NOTICE.format(folder=location))
    return layout


def _lay_out(recipe: Recipe) -> tuple[Layout, Any]:
    """The layout, and the text model's config."""
    config = gemma.text_config(recipe.model)
    return lay_out(recipe, config), config


def _show(recipe: Recipe, layout: Layout, config: Any) -> None:
    order = Order.of(recipe)
    say(f"plan     {recipe.name}: {len(recipe.specs())} dictionaries from one pass of {recipe.model.name}")
    say(table(recipe, layout, memory(recipe, layout, config)))
    say(
        f"text     {order.sequences * order.context:,} tokens to train on"
        f"{f', {order.epochs} times,' if order.epochs > 1 else ''} in {order.windows} windows of "
        f"{order.window_sequences} sequences, about {order.steps} steps; "
        f"{recipe.heldout_sequences * recipe.corpus.context:,} held out"
    )


class Stop:
    """Ctrl-C and SIGTERM: while the dictionaries are being fitted they ask for a checkpoint, elsewhere they end
    the sweep at once, as a second Ctrl-C does."""

    def __init__(self, file: Path):
        self.file, self.fitting = file, False
        file.unlink(missing_ok=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(kind, self._asked) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)

    @property
    def requested(self) -> bool:
        return self.file.exists()

    def _asked(self, number: int, frame: Any) -> None:
        if not self.fitting or self.requested:
            raise Interrupted
        self.file.touch()
        say("\nstopping at the next step with a checkpoint; Ctrl-C again to stop at once")


class Sweep:
    """The stages, inside a Ray session."""

    def __init__(self, recipe: Recipe, layout: Layout, folder: RunFolder, kept: Storage, stop: Stop):
        self.recipe, self.layout, self.folder, self.kept, self.stop = recipe, layout, folder, kept, stop
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        with self._stage("corpus"), self.kept.folder("tokens", self.folder.tokens):
            corpus.build(self.recipe, self.folder.tokens)
            self.cache = cache.claim(self.recipe, self.layout.sites, self.folder.tokens / "train.npy")
        if self.cache:
            say(f"cache    {self.cache.blocks():,} blocks of rows are in {self.cache.store.url}")
        with self._stage("calibrate"), self.kept.files("calibration", self.folder.calibration):
            tokens_path = self.folder.tokens / "train.npy"
            scales = calibrate(self.recipe, self.layout.sites, tokens_path, self.folder.calibration)
        with self._stage("tracking"), self.kept.files("mlflow", self.folder.runs):
            runs = tracking.Runs(self.recipe, self.folder)
            runs.open(self.recipe, self.layout, self.folder.runs)
        try:
            self._fit_and_publish(scales, runs)
        except Exception:
            with suppress(Exception):  # a tracker that is away must not hide why the sweep failed
                runs.close("FAILED")
            raise

    def _fit_and_publish(self, scales: dict[str, SiteScale], runs: tracking.Runs) -> None:
        with self._stage("fit"):
            trained = self._fit(scales, runs)
        shutil.rmtree(self.folder.staging, ignore_errors=True)
        staged = publish.stage(self.recipe, self.layout, scales, trained, self.folder.staging)
        if settings := self.recipe.end_to_end:
            with self._stage("end to end"):
                end_to_end.finetune(self.recipe, settings, staged, scales, self.folder.tokens / "train.npy")
        with self._stage("evaluate"):
            results = evaluate.evaluate(self.recipe, staged, scales, self.folder.tokens / "heldout.npy")
        with self._stage("publish"):
            shutil.rmtree(self.folder.published, ignore_errors=True)
            publish.publish(self.recipe, self.folder.staging, self.folder.published, results)
            self.kept.publish()
            summary = report.rows(self.recipe, results, self.kept.places(), self._rows_per_second())
            report.draw_frontier(self.folder.frontier, self.recipe, summary)
            runs.finish(summary, results, publish.folders(self.recipe, self.folder.published), self.folder)
        report.write_summary(self.folder.summary, self.recipe, summary, self.seconds)
        self.kept.finish()
        shutil.rmtree(self.folder.train)  # the published weights are what is left of the checkpoints

    def _fit(self, scales: dict[str, SiteScale], runs: tracking.Runs) -> Path:
        """Trains to the end of the corpus; the folder of the last checkpoint."""
        checkpoints = Checkpoints.of(self.recipe, self.folder.train)
        found = checkpoints.newest()
        checkpoints.prune(keep=found)
        if found and found.position.done:
            return found.folder
        if found:
            say(f"resuming at step {found.position.step}")
        job = fit.Job(
            self.recipe,
            self.layout,
            scales,
            self.folder.tokens / "train.npy",
            self.cache,
            self.folder.train,
            self.folder.stop,
        )
        reporter = tracking.FitReporter(runs, checkpoints, self.folder.progress, self.folder.spool)
        self._watch(job, reporter)
        if self.folder.progress.exists():
            blocked = json.loads(self.folder.progress.read_text())["blocked_by_checkpoints"]
            say(f"checkpoints held the fit up for {blocked:.2%} of its time")
        reached = checkpoints.newest()
        if reached and reached.position.done:
            return reached.folder
        if self.stop.requested:
            raise Interrupted
        raise SweepFailed("its last checkpoint is not whole")

    def _rows_per_second(self) -> float:
        """Of the last attempt to fit; 0 if that was on another machine."""
        told = self.folder.progress
        return json.loads(told.read_text())["rows_per_second"] if told.exists() else 0.0

    def _watch(self, job: fit.Job, reporter: tracking.FitReporter) -> None:
        """Runs the fit in a thread, since it blocks, and draws the live line meanwhile."""
        failures: list[Exception] = []

        def body() -> None:
            try:
                fit.run(job, reporter, attempt=f"attempt-{uuid.uuid4().hex[:8]}")
            except Exception as error:
                failures.append(error)

        self.folder.progress.unlink(missing_ok=True)
        line, thread = (
            LiveLine(self.folder.progress, self.layout, Order.of(self.recipe)),
            threading.Thread(target=body, daemon=True),
        )
        self.stop.fitting = True
        thread.start()
        while thread.is_alive():
            line.show()
            thread.join(0.5)
        self.stop.fitting = False
        line.end()
        if failures and not self.stop.requested:
            raise SweepFailed(_cause(failures[0])) from failures[0]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        say(f"{name} …")
        yield
        self.seconds[name] = time.monotonic() - started
        say(f"{name} done in {self.seconds[name]:.0f} s")


def _cause(error: BaseException) -> str:
    """The innermost message of Ray Train's nested errors, in one line."""
    workers = getattr(error, "worker_failures", None)
    if workers:
        rank, inner = sorted(workers.items())[0]
        return f"rank {rank}: {_cause(inner)}"
    inner = getattr(error, "controller_failure", None) or getattr(error, "cause", None) or error.__cause__
    if isinstance(inner, BaseException) and inner is not error:
        return _cause(inner)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def _closing(folder: RunFolder, kept: Storage) -> str:
    """The table, and where to look next."""
    lines = [
        report.table(json.loads(folder.summary.read_text())["dictionaries"]),
        "",
        f"published  {kept.published()}",
        f"picture    {folder.frontier}",
        f"summary    {folder.summary}",
        *tracking.how_to_look(folder),
    ]
    return "\n".join(lines)


def _explain_failure(error: Exception, log: Path) -> str:
    """The last line of a failed job: why, in one line; the traceback goes to the log."""
    with log.open("a") as file:
        traceback.print_exception(error, file=file)
    return f"sweep failed: {error if isinstance(error, SweepFailed) else _cause(error)}; details in {log}"
