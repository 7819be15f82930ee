"""Watches the processes of a fit from outside: the CPU seconds of all of them, and the peak memory of each role."""

import bisect
import re
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import psutil

ROLES = {"RayTrainWorker": "worker", "MapWorker(MapBatches(Harvester": "harvest actor"}
EVERY_SECONDS = 0.5


class Watch:
    """For the length of a `with` block. The watching thread's own CPU time is left out."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[Counter[str]] = []
        """At these times: CPU seconds of all processes so far, by name."""
        self.peaks: dict[str, int] = defaultdict(int)
        """Most bytes of one process' own memory, by role."""
        self.peak_total = 0
        """Most bytes of all processes' own memory at once, but for this process."""
        self.peak_store = 0
        """Most bytes of the object store that were touched."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def cpu_between(self, start: float, end: float) -> Counter[str]:
        """CPU seconds from one time to another, by the name of the process."""
        first, last = (self.cpu[min(bisect.bisect(self.times, moment), len(self.times) - 1)] for moment in (start, end))
        return last - first

    def _run(self) -> None:
        own, n = psutil.Process(), 0
        seen: dict[psutil.Process, tuple[str, float]] = {}  # that ended too: nobody else adds up Ray's workers
        while not self._ended.wait(EVERY_SECONDS):
            children = own.children(recursive=True)
            for process in [own, *children]:
                with suppress(psutil.Error):  # it ended meanwhile
                    seen[process] = _name(process), sum(process.cpu_times()[:2])
            self.times.append(time.time())
            self.cpu.append(Counter())
            for name, seconds in seen.values():
                self.cpu[-1][name] += seconds
            self.cpu[-1][_name(own)] -= time.thread_time()
            if n % 4 == 0:
                self._weigh(children)
            n += 1

    def _weigh(self, processes: list[psutil.Process]) -> None:
        total = 0
        for process in processes:
            try:
                line, memory = " ".join(process.cmdline()), process.memory_full_info()
            except psutil.Error:  # it ended meanwhile
                continue
            total += memory.uss
            if "raylet/raylet" in line:
                self.peak_store = max(self.peak_store, memory.shared)
            for name, role in ROLES.items():
                if name in line:
                    self.peaks[role] = max(self.peaks[role], memory.uss)
        self.peak_total = max(self.peak_total, total)


def _name(process: psutil.Process) -> str:
    """ray::MapWorker(…) → MapWorker, …/raylet --… → raylet, python …/run.py → run.py"""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return re.split(r"[^A-Za-z_]", words[0].removeprefix("ray::"))[0]
    scripts = [word for word in words if word.endswith(".py")]
    return Path(scripts[0] if scripts else words[0]).name
