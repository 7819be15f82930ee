"""The endpoint as people start it: `python -m serve` in a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from serve.client import Client
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 300
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # they look for the raylet now and then, and go after it


class Endpoint:
    """A running service; `kill` takes a replica away."""

    def __init__(self, catalog: Path, log: Path, *options: str):
        self.port, self.log = free_port(), log
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SCOPEWORKS_"))}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "serve", "--catalog", str(catalog), "--port", str(self.port), *options]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
        self._wait()
        self.printed = log.read_text()
        found = re.search(r"valid until then: (\S+)", self.printed)
        self.token = found[1] if found else None
        self.url = f"http://127.0.0.1:{self.port}"
        self.started = psutil.Process(self.process.pid).children(recursive=True)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "three calls:" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"the endpoint did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    @property
    def calls(self) -> list[str]:
        """The commands that it printed."""
        return [line for line in self.printed.splitlines() if "curl " in line]

    def client(self, **options) -> Client:
        return Client(self.url, self.token, **options)

    def processes(self, name: str) -> list[psutil.Process]:
        """Of one deployment: Ingress or Dictionaries; or Proxy."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                if line.startswith("ray::") and name in line:
                    found.append(process)
        return found

    def stop(self) -> list[psutil.Process]:
        """Whatever it leaves behind."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        agents = [process for process in self.started if _title(process).startswith(AGENTS)]
        _, alive = psutil.wait_procs([process for process in self.started if process not in agents], timeout=20)
        left = [process for process in alive if _title(process)]
        for process in [*alive, *agents]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return left


def _title(process: psutil.Process) -> str:
    """Empty of one that is gone or only waits to be reaped."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextlib.contextmanager
def endpoint(catalog: Path, log: Path, *options: str) -> Iterator[Endpoint]:
    running = Endpoint(catalog, log, *options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()
