"""A Ray cluster of several raylets on this machine, as a Kubernetes cluster has them: token authentication, a head
without CPUs, nodes with labels. Each raylet is a process group of its own, so that one can be killed."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import free_port

RAY = Path(sys.executable).with_name("ray")
ROOT = Path(__file__).resolve().parent.parent
TOKEN = "c0ffee" * 8


class Raylets:
    """Starts nodes and asks the head about them; `close` kills all that are left."""

    def __init__(self, folder: Path, **environment: str):
        self.folder = folder
        self.files = Path(f"/tmp/ray-{os.getpid()}-{free_port()}")  # short: sockets lie below it
        self.gcs, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": f"{RAY.parent}:{os.environ['PATH']}",
            "RAY_health_check_timeout_ms": "60000",  # on a busy machine a slow raylet is not a dead one
        } | environment  # fmt: skip
        self.environment.pop("RAY_ADDRESS", None)
        self.nodes: list[subprocess.Popen] = []

    def start_head(self, cpus: int) -> None:
        self._start(
            "--head", f"--num-cpus={cpus}", f"--port={self.gcs}", f"--dashboard-port={self.address.split(':')[-1]}",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={self.files}", "--dashboard-host=127.0.0.1",
            "--object-store-memory=500000000",
        )  # fmt: skip
        self.wait_until(self.alive)  # the dashboard answers before the head is a node of its own cluster

    def start_worker(self, cpus: int, labels: dict[str, str]) -> None:
        """A node that joins the head. One at a time: two that start at once take each other's sockets."""
        before = len(self.alive())
        self._start(
            f"--address=127.0.0.1:{self.gcs}", f"--num-cpus={cpus}", "--object-store-memory=200000000",
            f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
        )  # fmt: skip
        self.wait_until(lambda: len(self.alive()) > before)

    def _start(self, *options: str) -> None:
        # Ranges and fixed defaults would collide between raylets of one machine.
        ports = ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        with (self.folder / f"node-{len(self.nodes)}.log").open("w") as log:
            node = subprocess.Popen(
                [RAY, "start", "--block", "--disable-usage-stats", *options, *ports],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.nodes.append(node)

    def wait_until(self, met: Any, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if met():
                    return
            except OSError:  # not up yet
                pass
            time.sleep(0.2)
        pytest.fail("\n".join(path.read_text() for path in self.folder.glob("node-*.log")))

    def ask(self, path: str, token: str | None = TOKEN, method: str = "GET") -> Any:
        """What the dashboard's HTTP interface answers."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.address + path, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """Ray's own list of its nodes, actors or tasks, ended ones too."""
        return self.ask(f"/api/v0/{kind}?limit=1000&detail=1")["data"]["result"]["result"]

    def alive(self) -> dict[str, dict[str, str]]:
        """Labels of the nodes that are alive, by node id."""
        return {node["node_id"]: node["labels"] for node in self.listed("nodes") if node["state"] == "ALIVE"}

    def kill(self, node: subprocess.Popen) -> None:
        """SIGKILLs a node: its raylet and every process on it."""
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            process.kill()
        node.wait()

    def close(self) -> None:
        for node in self.nodes:
            if node.poll() is None:
                self.kill(node)
        shutil.rmtree(self.files, ignore_errors=True)
