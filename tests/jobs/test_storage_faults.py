"""A sweep whose bucket is slow, answers errors, breaks connections off or dies twice: it waits and ends with the calm
run's bits, and nothing half-written is to be seen at any time. With wrong credentials it does not start.

The faults are those of a proxy before a real server, past which a watcher looks all the while.
"""

import hashlib
import json
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from cluster.store import IMPATIENT, Missing, S3Store
from sae.artifact import MANIFEST
from tests.chaos import fits, table
from tests.jobs.conftest import Job
from tests.report import row
from tests.s3_proxy import Faults, S3Proxy

pytestmark = pytest.mark.chaos
WAIT = 900  # seconds, of which a busy machine needs many
AWAY_SECONDS = 3
FAULTS = {
    "slow": Faults(("slow",), share=0.5, seconds=1.0),
    "errors": Faults(("500", "503"), share=0.25),
    "resets": Faults(("reset before", "reset after", "reset within"), share=0.25),
}


@pytest.fixture(scope="module")
def sweep(tiny_gemma: Path, documents: Path) -> dict[str, Any]:
    """Three dictionaries in 30 steps."""
    common = {"widths": [64], "l0s": [8]}
    return {
        "name": "kept", "model": {"name": str(tiny_gemma)},
        "corpus": {"paths": [str(documents)], "context": 32, "train_tokens": 15_360, "heldout_tokens": 640},
        "harvest": {"sequences": 8, "cpus": 0.5},
        "stream": {"window_sequences": 128, "batch_rows": 512},
        "sweep": [
            common | {"layers": [0], "activations": ["batch_topk", "jumprelu"]},
            common | {"kind": "clt", "layers": [0, 1, 2, 3], "activations": ["batch_topk"]},
        ],
        "fit": {"workers": 1, "cpus_per_worker": 0.5, "report_every_steps": 1, "checkpoint_every_steps": 4},
        "evaluation": {"loss_tokens": 256},
    }  # fmt: skip


class Watcher:
    """Reads everything that is sealed below a prefix, again and again, past the proxy."""

    def __init__(self, url: str):
        self.store, self.ended = S3Store(url, IMPATIENT), threading.Event()
        self.looks = 0
        self.sealed: set[str] = set()
        """Folders that were seen whole."""
        self.torn: list[str] = []
        self.known: set[str] = set()
        self.thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watcher":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.05):
            try:
                self.look()
            except (BotoCoreError, ClientError):  # the server is away
                continue

    def look(self) -> None:
        there = self._listed()
        for seal in (name for name in there if name.endswith(f"/{MANIFEST}")):
            folder = seal.removesuffix(f"/{MANIFEST}")
            version = str([item for item in there.items() if item[0].startswith(f"{folder}/")])
            if version not in self.known and self._is_whole(folder):
                self.known.add(version)
                self.sealed.add(folder)
        if f"report/{MANIFEST}" in there:
            missing = [place for place in self.published() if f"{place}/{MANIFEST}" not in there]
            self.torn += [f"report without {place}" for place in missing]
        self.looks += 1

    def _listed(self) -> dict[str, str]:
        """Versions of all objects by name."""
        pages = self.store.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.store.bucket, Prefix=self.store.prefix
        )
        items = [item for page in pages for item in page.get("Contents", [])]
        return {item["Key"].removeprefix(self.store.prefix): item["ETag"] for item in items}

    def _is_whole(self, folder: str) -> bool:
        """Whether all that a manifest lists is there; noted as torn if it is not and the manifest is there still."""
        try:
            manifest = self.store.read(f"{folder}/{MANIFEST}")
        except Missing:
            return False
        for name, listed in json.loads(manifest)["files"].items():
            try:
                content = self.store.read(f"{folder}/{name}")
            except Missing:
                content = b""
            if hashlib.sha256(content).hexdigest() != listed["sha256"]:
                try:
                    if self.store.read(f"{folder}/{MANIFEST}") == manifest:
                        self.torn.append(f"{folder}/{name}")
                except Missing:
                    pass
                return False
        return True

    def published(self) -> list[str]:
        """The folders that the report names."""
        told = json.loads(self.store.read("report/summary.json"))["dictionaries"]
        return [one["path"].removeprefix(f"{self.store.url}/") for one in told]

    def digests(self) -> dict[str, str]:
        names = [name for name in self.store.names("published/") if "/params" in name]
        return {name.removeprefix("published/"): hashlib.sha256(self.store.read(name)).hexdigest() for name in names}


@dataclass
class Outcome:
    """What a run through faults came to."""

    ended: int
    digests: dict[str, str]
    torn: list[str]
    looks: int
    sealed: set[str]
    left: set[str]
    """What the prefix has in the end."""
    text: str
    seconds: float
    happened: Counter[str] = field(default_factory=Counter)

    def is_as(self, expected: dict[str, str]) -> bool:
        """Whether it ended well, with these weights, and looked well all the while."""
        ended_well = self.ended == 0 and self.left == {
            "calibration", "mlflow", "owner", "published", "recipe", "report", "tokens"}  # fmt: skip
        return ended_well and self.digests == expected and not self.torn


class Runs:
    """Runs of one sweep, each in a bucket's prefix of its own behind the proxy."""

    def __init__(self, sweep: dict[str, Any], proxy: S3Proxy, folder: Path):
        self.sweep, self.proxy, self.folder = sweep, proxy, folder
        self.jobs: list[Job] = []

    def start(self, url: str | None, sabotage: str = "", environment: Any = None, **changes: Any) -> Job:
        """On a machine of its own: an empty run folder."""
        folder = self.folder / str(len(self.jobs))
        folder.mkdir()
        content = self.sweep | changes | {"output": str(folder / "run")} | ({"storage": url} if url else {})
        orders = folder / "orders.json"
        orders.write_text(json.dumps({"sabotage": sabotage}))
        at_proxy = {"AWS_ENDPOINT_URL": self.proxy.url} | fits.environment(orders)
        self.jobs.append(Job(content, folder, **at_proxy | (environment or {})))
        return self.jobs[-1]

    def through(
        self, faults: Faults | None, *, sabotage: str = "", dies: bool = False, meanwhile: Any = None
    ) -> Outcome:
        """To the end, with the faults from the start; one that `dies` is killed at a checkpoint, and another machine
        goes on."""
        url, started = f"s3://runs/{uuid.uuid4().hex}", time.monotonic()
        before = self.proxy.happened.copy()
        cache = {"harvest": self.sweep["harvest"] | {"cache": f"{url}-cache"}} if dies else {}
        with Watcher(url) as watcher:
            self.proxy.faults = faults
            try:
                job = self.start(url, sabotage, **cache)
                if meanwhile:
                    meanwhile(job)
                if dies:
                    assert came(lambda: any("checkpoints/" in name for name in watcher.sealed), job), job.text
                    job.kill()
                    job = self.start(url, sabotage, **cache)
                ended = job.wait(WAIT)
            finally:
                self.proxy.faults = None
        watcher.look()
        left = {name.split("/")[0] for name in watcher.store.names()}
        return Outcome(ended, watcher.digests(), watcher.torn, watcher.looks, watcher.sealed, left, job.text,
                       time.monotonic() - started, self.proxy.happened - before)  # fmt: skip


def came(met: Callable[[], bool], job: Job) -> bool:
    """Whether it came to that before the job ended."""
    deadline = time.monotonic() + WAIT
    while not met() and job.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return met()


@pytest.fixture(scope="module")
def proxy(s3, s3_server) -> Iterator[S3Proxy]:
    made = S3Proxy(s3_server.environment["AWS_ENDPOINT_URL"])
    yield made
    made.close()


@pytest.fixture(scope="module")
def runs_of(sweep: dict[str, Any], proxy: S3Proxy, tmp_path_factory) -> Iterator[Runs]:
    runs = Runs(sweep, proxy, tmp_path_factory.mktemp("kept"))
    yield runs
    for job in runs.jobs:
        if job.process.poll() is None:
            job.kill()


@pytest.fixture(scope="module")
def calm(runs_of: Runs) -> dict[str, str]:
    """What the same sweep publishes without a bucket."""
    job = runs_of.start(None)
    assert job.wait(WAIT) == 0, job.text
    root = job.output / "published"
    params = {path.relative_to(root).as_posix(): path for path in root.rglob("params*.safetensors")}
    assert len(params) == 2 + 4
    return {place: hashlib.sha256(path.read_bytes()).hexdigest() for place, path in params.items()}


def told(happened: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(happened.items()))


def note(name: str, what: str, ran: Outcome, expected: dict[str, str], least: int) -> None:
    table.add(
        f"b-storage-{name}",
        row(
            f"S3 {what} ({told(ran.happened)}): the calm run's sha256, all there", ran.is_as(expected), "of 1", "==", 1
        ),
        row(f"the same: half-written things seen in {ran.looks} looks", len(ran.torn), "seen", "==", 0),
        row("the same: faults", ran.happened.total(), "faults", ">=", least),
    )


@pytest.mark.parametrize("name", FAULTS)
def test_faults__the_run_waits_and_ends_with_the_same_bits(runs_of: Runs, calm: dict[str, str], name: str) -> None:
    ran = runs_of.through(FAULTS[name], dies=name == "resets")
    note(name, name, ran, calm, least=8)
    assert ran.torn == []
    assert ran.is_as(calm), (ran, ran.text)
    assert min(ran.happened[kind] for kind in FAULTS[name].kinds) >= 2
    assert ran.looks >= 20
    assert {name.split("/")[0] for name in ran.sealed} >= {"recipe", "tokens", "checkpoints", "published", "report"}


def killed_twice(runs_of: Runs, s3_server, sabotage: str = "") -> Outcome:
    """The server dies when the first checkpoint is to be sealed, and when the first artifact is to be put."""
    moments = [re.compile(rf"PUT .*/checkpoints/.*/{MANIFEST}"), re.compile(r"PUT .*/published/.*/params")]
    reached, gone = [threading.Event() for _ in moments], [threading.Event() for _ in moments]

    def before(method: str, target: str) -> None:
        for moment, now, done in zip(moments, reached, gone, strict=True):
            if moment.match(f"{method} {target}") and not done.is_set():
                now.set()
                done.wait()

    def kill(job: Job) -> None:
        for now, done in zip(reached, gone, strict=True):
            if not came(now.is_set, job):
                return
            s3_server.kill()
            runs_of.proxy.happened["server killed"] += 1
            done.set()
            time.sleep(AWAY_SECONDS)
            s3_server.start()

    runs_of.proxy.before = before
    try:
        return runs_of.through(None, sabotage=sabotage, meanwhile=kill)
    finally:
        for done in gone:
            done.set()
        runs_of.proxy.before = lambda method, target: None


def test_server_killed_twice__the_run_waits_and_ends_with_the_same_bits(runs_of: Runs, calm, s3_server) -> None:
    ran = killed_twice(runs_of, s3_server)
    note("killed", "server killed and started again", ran, calm, least=2)
    assert ran.torn == []
    assert ran.is_as(calm), (ran, ran.text)
    assert ran.happened["server killed"] == 2


SABOTAGES = {
    "the manifest first": FAULTS["slow"],
    "gives up at once": FAULTS["errors"],
    "a lost answer is another's": Faults(("reset after",), share=0.4),
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_sabotage__of_how_the_bucket_is_used_is_noticed(runs_of: Runs, calm: dict[str, str], sabotage: str) -> None:
    ran = runs_of.through(SABOTAGES[sabotage], sabotage=sabotage)
    noticed = not ran.is_as(calm)
    name = sabotage.replace(" ", "-").replace("'", "")
    table.add(f"b-storage-sabotage-{name}", row(f"sabotage, {sabotage}: noticed", noticed, "of 1", "==", 1))
    assert noticed, ran
    assert ran.happened.total() >= 1
    assert bool(ran.torn) == (sabotage == "the manifest first"), ran.torn


def fails_at_the_start(runs_of: Runs, sabotage: str = "") -> bool:
    """Whether a run with wrong credentials says so in its last line, before anything is started or put."""
    url = f"s3://runs/{uuid.uuid4().hex}"
    job = runs_of.start(url, sabotage, {"AWS_SECRET_ACCESS_KEY": "wrong-secret"})
    ended = job.wait(WAIT)
    last = job.text.strip().splitlines()[-1]
    said = re.search(r"^error: storage: .* cannot be written \((403|SignatureDoesNotMatch)\): set AWS_", last)
    spent = "corpus …" in job.text or job.output.exists() or S3Store(url, IMPATIENT).names()
    return ended == 2 and bool(said) and not spent and "wrong-secret" not in job.text


def test_wrong_credentials__it_fails_at_the_start_with_the_reason(runs_of: Runs) -> None:
    failed = fails_at_the_start(runs_of)
    noticed = not fails_at_the_start(runs_of, "looks at no bucket")
    table.add(
        "b-storage-credentials",
        row("S3 with wrong credentials: fails at the start with the reason, nothing spent", failed, "of 1", "==", 1),
        row("sabotage of what is looked at first: noticed", noticed, "of 1", "==", 1),
    )
    assert failed
    assert noticed
