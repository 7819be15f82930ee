"""What the clocks inside the processes of a fit wrote down."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from watch import Watch


@dataclass
class Costs:
    """CPU seconds of a fit from its first step to its last: process starts are before."""

    by_process: Counter[str]
    """Of all processes, Ray's own included, by name."""
    by_work: Counter[str]
    """Of what is clocked: harvest, fit, exchange, windows, checkpoint, report, tracking."""
    rows: int
    """Trained on in these seconds."""

    @property
    def total(self) -> float:
        return sum(self.by_process.values())

    @property
    def useful(self) -> float:
        return self.by_work["harvest"] + self.by_work["fit"]

    @property
    def beside(self) -> float:
        """Ray, exchange and windows, as a share of harvest and fit: all but checkpoints and MLflow."""
        rest = self.total - self.useful - self.by_work["checkpoint"] - self.by_work["tracking"]
        return rest / self.useful


@dataclass
class Event:
    what: str
    cpu: float
    at: float
    """When it ended."""


def read(folder: Path) -> dict[str, list[Event]]:
    """By process."""
    return {
        path.stem: [Event(**json.loads(line)) for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }


def first_step(folder: Path) -> float:
    """When the last of the ranks had done its first step."""
    steps = [[event.at for event in events if event.what == "fit"] for events in read(folder).values()]
    return max(times[0] for times in steps if times)


def costs(folder: Path, watch: Watch, rows_a_step: float) -> Costs:
    processes = read(folder)
    start, end = first_step(folder), max(e.at for events in processes.values() for e in events if e.what == "fit")
    by_work: Counter[str] = Counter()
    steps = 0
    for events in processes.values():
        for event in events:
            if start < event.at <= end:
                by_work[event.what] += event.cpu
        steps = max(steps, sum(event.what == "fit" and event.at > start for event in events))
    return Costs(watch.cpu_between(start, end), by_work, round(steps * rows_a_step))
