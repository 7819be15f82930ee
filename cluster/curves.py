"""Curves on their way to MLflow: put into a file at once, logged from a thread. An outage costs the fit nothing and the
curves no point."""

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from cluster.run_folder import replace_text

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""A dictionary's figures at a step: its MLflow run, the step, the time in ms, the figures by name."""

MOST_METRICS = 1000  # of one request, by MLflow's own limit
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 15.0  # from one failed attempt to the next


class Curves:
    """What waits is in `spool`, a file of JSON lines that is gone when all is logged."""

    def __init__(self, uri: str, spool: Path):
        self.uri, self.spool = uri, spool
        self.waiting = waiting(spool)
        self.lock, self.added, self.ended = threading.Lock(), threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._log_all, name="curves", daemon=True)
        self.thread.start()

    def add(self, records: list[Record]) -> None:
        with self.lock, self.spool.open("a") as file:
            file.write(_lines(records))
            self.waiting += records
        self.added.set()

    def close(self) -> None:
        """Tries once more what waits, and leaves in the file what the tracker does not take."""
        self.ended.set()
        self.added.set()
        self.thread.join()

    def _log_all(self) -> None:
        client, wait = _patient_client(self.uri), FIRST_WAIT_SECONDS
        while not self.ended.is_set():
            self.added.wait()
            self.added.clear()
            if self._log_waiting(client):
                wait = FIRST_WAIT_SECONDS
                continue
            self.ended.wait(wait)
            self.added.set()
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        self._log_waiting(client)

    def _log_waiting(self, client: Any) -> bool:
        """Whether the tracker took all that waited at the start."""
        with self.lock:
            taken = list(self.waiting)
        left = log(client, taken)
        if len(left) < len(taken):
            with self.lock:
                self.waiting = left + self.waiting[len(taken) :]
                keep(self.waiting, self.spool)
        return not left


def waiting(spool: Path) -> list[Record]:
    """What an earlier process could not log. A line that it was killed in is of a step that is done again."""
    records = []
    for line in spool.read_text().splitlines() if spool.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            logger.warning("%s has half a line", spool)
    return records


def keep(records: list[Record], spool: Path) -> None:
    """Makes the file hold these."""
    if records:
        replace_text(spool, _lines(records))
    else:
        spool.unlink(missing_ok=True)


def log(client: Any, records: list[Record]) -> list[Record]:
    """Logs records, each run's together; those that the tracker did not take, whatever its fault is."""
    from mlflow.entities import Metric

    left: dict[str, list[Record]] = {}
    for record in records:
        left.setdefault(record["run"], []).append(record)
    try:
        for run in list(left):
            points = [
                Metric(key, value, record["at"], record["step"])
                for record in left[run]
                for key, value in record["figures"].items()
            ]
            for first in range(0, len(points), MOST_METRICS):
                client.log_batch(run, points[first : first + MOST_METRICS])
            del left[run]
    except Exception as error:
        logger.warning("MLflow did not take the curves of %d runs, they wait: %s", len(left), error)
    return [record for run in left.values() for record in run]


def _lines(records: list[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _patient_client(uri: str) -> Any:
    """A client that gives up within seconds, and is asked again."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
