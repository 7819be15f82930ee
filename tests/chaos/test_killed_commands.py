"""The command itself is killed, asked to end, or loses its controller; the same command again must end as if nothing
had happened. The oracle: the sha256 of everything published."""

import hashlib
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.chaos import fits, table
from tests.jobs.conftest import Job
from tests.report import row

pytestmark = pytest.mark.chaos
PATIENCE = 600  # seconds
STARTS = 4  # of one run, until it must have ended
GRACE_SECONDS = 30
TARGETS = (
    "driver",
    "TrainController",
    "gcs_server",
    "driver",
    "driver",
)  # of four kills a run each comes at each place
KILLS_OF_A_RUN = 4


class Command:
    """jobs/sweep.py on one recipe, started again and again."""

    def __init__(self, content: dict, folder: Path, tracker: Path):
        folder.mkdir()
        self.content, self.folder = content | {"output": str(folder / "run")}, folder
        self.orders = folder / "orders.json"
        self.orders.write_text("{}")
        self.environment = fits.environment(self.orders) | {"MLFLOW_TRACKING_URI": f"sqlite:///{tracker}"}
        self.job: Job | None = None

    def start(self) -> Job:
        self.job = Job(self.content, self.folder, **self.environment)
        return self.job

    def finish(self) -> int:
        """Starts it until it ends well; how many starts that took."""
        for number in range(1, STARTS + 1):
            if self.start().wait(PATIENCE) == 0:
                return number
        pytest.fail(f"not done after {STARTS} starts:\n{self.start().text}")

    def digests(self) -> dict[str, str]:
        root = self.folder / "run" / "published"
        files = sorted(root.rglob("*.safetensors"))
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def committed(self) -> int:
        """The step of the newest checkpoint with a manifest."""
        manifests = (self.folder / "run").glob("train/checkpoints/step-*/manifest.json")
        return max((int(path.parent.name.split("-")[1]) for path in manifests), default=0)


@pytest.fixture(scope="module")
def make(content: dict, tmp_path_factory) -> Callable[..., Command]:
    folder, made = tmp_path_factory.mktemp("commands"), []

    def command(**fit: object) -> Command:
        changed = content["fit"] | {"workers": 1} | fit  # that several resume: test_killed_workers.py
        made.append(Command(content | {"fit": changed}, folder / str(len(made)), folder / "mlflow.db"))
        return made[-1]

    yield command
    for one in made:
        if one.job and one.job.process.poll() is None:
            one.job.kill()


@pytest.fixture(scope="module")
def calm(make) -> tuple[dict[str, str], float]:
    """What the undisturbed command publishes, and how long it takes."""
    command, started = make(), time.monotonic()
    assert command.finish() == 1
    digests = command.digests()
    assert len(digests) == 2 + 2 + 4
    return digests, time.monotonic() - started


def kill(job: Job, target: str) -> str:
    """SIGKILLs the target, or the driver while there is no such process; which of them."""
    found = [] if target == "driver" else fits.processes(target, of=job.process.pid)
    try:
        found[0][1].send_signal(signal.SIGKILL)
        return target
    except (IndexError, psutil.NoSuchProcess):
        job.kill()
        return "driver"


def stage(job: Job) -> str:
    """Which stage the command is in, or the start."""
    begun = re.findall(r"^([a-z ]+) …$", job.text, re.MULTILINE)
    return begun[-1] if begun else "start"


def wait(job: Job, seconds: float, after: str | None = None) -> bool:
    """So long, from the begin of a stage if one is named; whether the job still runs then."""
    deadline = None if after else time.monotonic() + seconds
    while job.process.poll() is None:
        if deadline is None and stage(job) == after:
            deadline = time.monotonic() + seconds
        if deadline is not None and time.monotonic() > deadline:
            return True
        time.sleep(0.02)
    return False


def test_killed__the_same_command_goes_on_and_ends_with_the_same_bits(make, calm, runs: int) -> None:
    """Each run is killed several times, the last time when its dictionaries are evaluated or published."""
    expected, seconds = calm
    killed: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    number, ended, equal, starts = 0, 0, 0, 0
    while number < runs:
        command, chosen = make(), random.Random(number)
        for n in range(KILLS_OF_A_RUN):
            job = command.start()
            late = n == KILLS_OF_A_RUN - 1
            if wait(job, chosen.uniform(0, 12 if late else 0.6 * seconds), "evaluate" if late else None):
                stages[stage(job)] += 1
                killed[kill(job, TARGETS[number % len(TARGETS)])] += 1
                number += 1
            if job.wait(PATIENCE) == 0:
                break
        starts += command.finish()
        ended += 1
        equal += command.digests() == expected
    told, where = (
        ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) for counts in (killed, stages)
    )
    table.add(
        "5-killed-commands",
        row(f"kills of a command at random points ({told}; in {where})", killed.total(), "kills", ">=", runs),
        row("the same: runs that the same command, typed after each kill, ended with the calm run's sha256", equal,
            f"of {ended}", "==", ended),
        row("the same: starts that it took after the last kills", starts, f"for {ended} runs", "==", ended),
    )  # fmt: skip
    assert equal == ended
    assert starts == ended


def test_sabotage__a_command_that_resumes_wrongly_is_noticed(make, calm) -> None:
    command = make()
    job = command.start()
    job.wait_for_step(20, PATIENCE)
    job.kill()
    command.orders.write_text(json.dumps({"sabotage": "repeat a batch"}))
    command.finish()
    noticed = command.digests() != calm[0]
    table.add("6-sabotaged-command", row("sabotage of how a command resumes: noticed", noticed, "of 1", "==", 1))
    assert noticed


def stop_and_go_on(command: Command, stops: int) -> tuple[list[float], list[int]]:
    """SIGTERMs a run this often on its way; the seconds that each end took, and the steps that it lost."""
    seconds, lost = [], []
    for number in range(stops):
        job = command.start()
        job.wait_for_step(3 + 5 * number, PATIENCE)
        asked = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(PATIENCE) == 130, job.text
        seconds.append(time.monotonic() - asked)
        lost.append(job.step - command.committed())
    return seconds, lost


def test_sigterm__a_committed_checkpoint_within_the_grace_and_no_step_lost(make, calm, runs: int) -> None:
    command, stops = make(report_every_steps=1, checkpoint_every_steps=1000), min(3, runs)
    seconds, lost = stop_and_go_on(command, stops)
    command.finish()
    equal = command.digests() == calm[0]
    table.add(
        "7-sigterm",
        row(f"SIGTERM, {stops} times in one run: most steps lost", max(lost), "steps", "<=", 1),
        row("the same: slowest end", max(seconds), "s", "<=", GRACE_SECONDS),
        row("the same: the calm run's sha256", equal, "of 1", "==", 1),
    )
    assert max(lost) <= 1
    assert max(seconds) <= GRACE_SECONDS
    assert equal


def test_sabotage__a_stop_without_a_checkpoint_is_noticed(make) -> None:
    command = make(report_every_steps=1, checkpoint_every_steps=1000)
    command.orders.write_text(json.dumps({"sabotage": "no checkpoint at the stop"}))
    _, (lost,) = stop_and_go_on(command, 1)
    table.add("8-sabotaged-sigterm", row("sabotage of the stop: noticed", lost > 1, "of 1", "==", 1))
    assert lost > 1
