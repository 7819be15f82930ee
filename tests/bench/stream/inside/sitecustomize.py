"""Python imports this at its start in every process whose PYTHONPATH begins with this folder, Ray's workers included.

It puts a clock around what the stream is for (the model's forward passes, the training steps) and around what the
exchange and the windows add. Each call is a line in CLOCKS/<pid>.jsonl. The processes that are timed have one thread
for tensors, so that the time of the calling thread is all that a call takes.
"""

import functools
import json
import os
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path


def clocked(owner, name: str, label: str) -> None:
    """Puts a clock around a function or method of a module or class."""
    call = getattr(owner, name)

    @functools.wraps(call)
    def timed(*arguments, **named):
        began = time.thread_time()
        try:
            return call(*arguments, **named)
        finally:
            line = {"what": label, "cpu": time.thread_time() - began, "at": time.time()}
            folder = Path(Path(os.environ["CLOCKS"]).read_text())
            with (folder / f"{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    setattr(owner, name, timed)


def clock_fit(fit) -> None:
    clocked(fit.Rank, "step", "fit")
    clocked(fit.Rank, "checkpoint", "checkpoint")
    clocked(fit.Rank, "report", "report")
    clocked(fit, "exchange", "exchange")
    clocked(fit.WindowReader, "_is_whole", "windows")
    clocked(fit.WindowReader, "_take", "windows")
    clocked(fit.Share, "batch", "windows")


def clock_harvest(harvest) -> None:
    clocked(harvest.Harvester, "__call__", "harvest")


def clock_curves(curves) -> None:
    clocked(curves, "_patient_client", "tracking")  # which imports MLflow
    clocked(curves, "log", "tracking")


CLOCKS = {"cluster.fit": clock_fit, "cluster.harvest": clock_harvest, "cluster.curves": clock_curves}


class Finder:
    """Finds the modules that are clocked, and puts the clocks in once they are loaded."""

    @staticmethod
    def find_spec(name, path, target=None):
        if name not in CLOCKS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def clocked_load(module) -> None:
            load(module)
            CLOCKS[name](module)

        spec.loader.exec_module = clocked_load
        return spec


if "CLOCKS" in os.environ:
    sys.meta_path.insert(0, Finder)
