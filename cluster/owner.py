"""Who may write below a prefix of a bucket: one process, by a claim that only one can put.

Claims are numbered, `owner/000001.json` and on, and the highest rules: taking over is putting the next number, which
succeeds once. An owner rewrites its claim every few seconds. One whose process is gone from this machine is dead at
once, and one elsewhere when its claim has not changed for the lease: no two machines' clocks are ever compared.
"""

import json
import logging
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.console import say
from cluster.errors import UserError
from cluster.store import IMPATIENT, Exists, Missing, S3Store

logger = logging.getLogger(__name__)

FOLDER = "owner/"
BEAT_SECONDS = 5.0
LEASE_SECONDS = 30.0


@contextmanager
def owned(store: S3Store) -> Iterator[None]:
    """For the length of the block this process owns the prefix; UserError if another does. If a later owner appears
    all the same, after this process was held up for longer than the lease, it is asked to end by SIGTERM."""
    claim = Claim(store)
    claim.take()
    thread = threading.Thread(target=claim.keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        claim.ended.set()
        thread.join()
        with suppress(Exception):  # the server is away: the lease tells others
            claim.write(released=True)


class Claim:
    """One process's claim to a prefix."""

    def __init__(self, store: S3Store):
        self.store = S3Store(store.url, IMPATIENT)
        self.name = ""
        self.ended = threading.Event()
        self.content: dict[str, Any] = {
            "host": platform.node(),
            "machine": machine(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "id": uuid.uuid4().hex,
            "beat": 0,
            "released": False,
        }

    def take(self) -> None:
        names = self.store.names(FOLDER)
        number = 0
        if names:
            number = int(Path(names[-1]).stem)
            self._wait_for_the_end_of(names[-1])
        self.name = f"{FOLDER}{number + 1:06d}.json"
        try:
            self.store.put_new(self.name, self._encoded())
        except Exists:
            raise _in_use(self.store, "another process, which has just started") from None
        self.store.delete(names)

    def keep(self) -> None:
        """Rewrites the claim until the end, or until another has been put over it."""
        while not self.ended.wait(BEAT_SECONDS):
            try:
                self.write()
                if self.store.names(FOLDER)[-1] > self.name:
                    say(f"\n{self.store.url} has been taken over by another process")
                    return os.kill(os.getpid(), signal.SIGTERM)
            except Exception as error:  # the server is away: whatever it is, the run waits for it
                logger.warning("the claim to %s could not be renewed: %s", self.store.url, type(error).__name__)

    def write(self, *, released: bool = False) -> None:
        self.content |= {"beat": self.content["beat"] + 1, "released": released}
        self.store.put(self.name, self._encoded())

    def _encoded(self) -> bytes:
        return json.dumps(self.content).encode()

    def _wait_for_the_end_of(self, name: str) -> None:
        """Returns when the owner of a claim is known to be gone; UserError when it shows that it lives."""
        seen, since = self._read(name), time.monotonic()
        if _is_gone(seen):
            return
        holder = f"process {seen.get('pid')} on {seen.get('host')}"
        if seen.get("machine") == self.content["machine"]:
            raise _in_use(self.store, holder)
        say(f"note     {self.store.url} was last used by {holder}: watching for {LEASE_SECONDS:.0f} s whether it lives")
        while time.monotonic() - since < LEASE_SECONDS:
            time.sleep(BEAT_SECONDS / 5)
            now = self._read(name)
            if _is_gone(now):
                return
            if now != seen:
                raise _in_use(self.store, holder)

    def _read(self, name: str) -> dict[str, Any]:
        """A claim's content: none if it is damaged, released if it was taken away."""
        try:
            content = json.loads(self.store.read(name))
        except Missing:
            return {"released": True}
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


def _is_gone(content: dict[str, Any]) -> bool:
    """Whether an owner has ended for certain: it said so, or it was a process of this machine that is no more."""
    if content.get("released"):
        return True
    return content.get("machine") == machine() and started(content["pid"]) != content["started"]


def machine() -> str:
    """What process ids refer to: a boot of a kernel, and a container in it. Elsewhere than on Linux, nothing known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def started(pid: int) -> str:
    """When a process was started, in ticks since the boot, which no setting of the clock moves; empty if it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _in_use(store: S3Store, holder: str) -> UserError:
    return UserError("storage", f"{store.url} is in use by {holder}: wait for it, or name another prefix")
