"""Checkpoints under faults: writers killed or out of disk at every boundary, and every kind of damaged file.

The oracle is the state itself: what is recovered equals bit for bit what was written at step n, or at the one before.
"""

import errno
import functools
import itertools
import os
import shutil
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from cluster.checkpoint import Checkpoints, Collector, Position, State, Writer, name
from cluster.store import FolderStore, S3Store
from sae import artifact
from sae.artifact import MANIFEST
from tests.chaos import table
from tests.report import row

pytestmark = pytest.mark.faults
RANKS = [["a", "b"], ["c"]]
IDS = [id for rank in RANKS for id in rank]
BOUNDARIES = {"open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "http.client.send"}
CREATING = {"os.mkdir", "os.link", "os.rename"}


class Fault:
    """What happens at the n-th boundary, counted over all operations on files below `root` and sends to S3."""

    left: int | None = None  # boundaries until it happens; None is never
    kill = True
    root = ""


def at_boundary(event: str, arguments: tuple[Any, ...]) -> None:
    if Fault.left is None or event not in BOUNDARIES:
        return
    if event != "http.client.send" and not any(Fault.root in str(argument) for argument in arguments[:2]):
        return
    if Fault.kill:
        if Fault.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        Fault.left -= 1
    elif event in CREATING or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        Fault.left -= 1
        if Fault.left < 0:  # a full disk stays full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


sys.addaudithook(at_boundary)  # before each operation; a hook cannot be removed


@pytest.fixture(params=["folder", "s3"])
def checkpoints(request, tmp_path: Path, monkeypatch) -> Checkpoints:
    folder = tmp_path / "checkpoints"
    monkeypatch.setattr(Fault, "root", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if request.param == "folder":
        return Checkpoints(FolderStore(folder), folder, keep=2)
    request.getfixturevalue("s3")
    return Checkpoints(S3Store(f"s3://runs/{uuid.uuid4().hex}"), folder, keep=2)


def state(id: str, step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4, 5), float(step)), "steps": torch.tensor(step + ord(id))}


def write(checkpoints: Checkpoints, step: int) -> None:
    """As the ranks and the controller do."""
    attempt, writers = uuid.uuid4().hex[:8], [Writer(checkpoints.store) for _ in RANKS]
    for rank, (writer, ids) in enumerate(zip(writers, RANKS, strict=True)):
        states = {id: state(id, step) for id in ids}
        writer.start(name(step, attempt), states, None if rank else Position(step=step))
    for writer in writers:
        writer.finish()
    collector = Collector(checkpoints)
    collector.add([part for writer in writers for part in writer.take()], IDS)
    collector.finish()


def recovered(checkpoints: Checkpoints) -> int:
    """The step of the newest checkpoint, all of whose states are that step's; read on a machine that has no copy."""
    if isinstance(checkpoints.store, S3Store):
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
    found = checkpoints.newest()
    assert found is not None
    for id in IDS:
        loaded = State(found.folder, id)
        assert loaded.keys() == state(id, 0).keys()
        for key, tensor in state(id, found.position.step).items():
            assert torch.equal(loaded[key], tensor), f"torn: {id} of {found.folder}"
    return found.position.step


@functools.cache
def unused_store(url: str) -> S3Store:
    """One without connections, which the forks of this process must not share; to make it takes a while."""
    store = S3Store(url)
    assert store.client
    return store


def killed_while_writing(checkpoints: Checkpoints, step: int, boundary: int) -> bool:
    """Whether a process that writes a checkpoint was killed at this boundary; else it has finished."""
    unused = unused_store(checkpoints.store.url) if isinstance(checkpoints.store, S3Store) else checkpoints.store
    child = os.fork()
    if child == 0:
        checkpoints.store = unused
        Fault.left = boundary
        try:
            write(checkpoints, step)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.waitstatus_to_exitcode(status) != 0


def test_a_writer_killed_at_any_boundary__leaves_this_checkpoint_or_the_one_before(checkpoints: Checkpoints) -> None:
    write(checkpoints, 10)
    before, seen = 10, set()
    for boundary in itertools.count():
        was_killed = killed_while_writing(checkpoints, before + 10, boundary)
        after = recovered(checkpoints)
        assert after in (before, before + 10)
        seen.add(after - before)
        if isinstance(checkpoints.store, FolderStore):  # S3 promises it: what is seen, committed or not, is whole
            tensors = [place for place in checkpoints.store.names() if place.endswith(".safetensors")]
            assert len({len(checkpoints.store.read(place)) for place in tensors}) == 1
        if not was_killed:
            break
        before = after
        if boundary % 2:
            checkpoints.prune(checkpoints.newest())  # what a new start does; a restart of the workers does not
    found_whole("b-killed-writer", "writer killed at each boundary", checkpoints, boundary, 40, 25)
    assert after == before + 10
    assert seen == {0, 10}
    assert boundary >= (25 if isinstance(checkpoints.store, S3Store) else 40)  # the faults have happened
    checkpoints.prune(checkpoints.newest())
    assert len(checkpoints.store.names()) == len(IDS) + 2


@pytest.mark.parametrize("checkpoints", ["folder"], indirect=True)
def test_a_full_disk_at_any_boundary__leaves_this_checkpoint_or_the_one_before(checkpoints: Checkpoints) -> None:
    write(checkpoints, 10)
    Fault.kill, before = False, 10
    try:
        for boundary in itertools.count():
            Fault.left = boundary
            try:
                write(checkpoints, before + 10)
                break
            except OSError:
                pass
            finally:
                Fault.left = None
            after = recovered(checkpoints)
            assert after in (before, before + 10)
            before = after
    finally:
        Fault.kill = True
    found_whole("c-full-disk", "disk full at each boundary", checkpoints, boundary, 15, 15)
    assert boundary >= 15
    assert recovered(checkpoints) == before + 10


def found_whole(key: str, fault: str, checkpoints: Checkpoints, points: int, in_folder: int, in_bucket: int) -> None:
    """A line of the fault table: at so many points a whole checkpoint was found, this one or the one before."""
    in_s3 = isinstance(checkpoints.store, S3Store)
    where, least = ("a bucket", in_bucket) if in_s3 else ("a folder", in_folder)
    name = f"checkpoint in {where}, {fault}: points with step n or n−1 whole"
    table.add(f"{key}-{'bucket' if in_s3 else 'folder'}", row(name, points, "points", ">=", least))


def damaged(content: bytes, every: int) -> list[bytes]:
    """Cut at every `every`-th byte, and with one bit of it flipped."""
    places = range(0, len(content), every)
    flipped = [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in places]
    return [*(content[:at] for at in places), *flipped]


def test_damaged_files__are_noticed_and_the_checkpoint_before_is_used(checkpoints: Checkpoints) -> None:
    write(checkpoints, 10)
    write(checkpoints, 20)
    store, points, every = checkpoints.store, 0, 37 if isinstance(checkpoints.store, S3Store) else 2
    newest = checkpoints.newest()
    assert newest is not None
    for file in ("c.safetensors", "position.json", MANIFEST):
        place = f"{newest.folder.name}/{file}"
        content = store.read(place)
        for bad in damaged(content, every):
            replace(store, place, bad)
            if file == MANIFEST and bad == content.rstrip():
                continue  # the same JSON
            assert recovered(checkpoints) == 10
            points += 1
        replace(store, place, content)
        assert recovered(checkpoints) == 20
    store.delete([f"{newest.folder.name}/a.safetensors"])
    assert recovered(checkpoints) == 10
    found_whole("d-damaged", "files cut, or with a flipped bit, noticed before a step", checkpoints, points, 500, 40)
    assert points >= (40 if isinstance(store, S3Store) else 500)


def commit_early(self: Collector, parts: list[dict[str, Any]], names: list[str]) -> None:
    """Commits when the first part has arrived."""
    if self.committing is None:
        self.committing = self.pool.submit(self._commit, parts[0]["name"], parts[0]["files"])


committed = Checkpoints._committed
SABOTAGES = {
    "a manifest before all parts are there": (Collector, "add", commit_early),
    "no look at the digests": (artifact, "verify", lambda folder: None),
    "the oldest in place of the newest": (Checkpoints, "_committed", lambda self: committed(self)[::-1]),
}


@pytest.mark.parametrize("checkpoints", ["folder"], indirect=True)
@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage__a_wrong_way_of_writing_or_reading_is_noticed(
    checkpoints: Checkpoints, name: str, monkeypatch
) -> None:
    monkeypatch.setattr(*SABOTAGES[name])
    with pytest.raises((AssertionError, IndexError, SafetensorError)):  # a wrong step, a lost dictionary, a torn file
        test_damaged_files__are_noticed_and_the_checkpoint_before_is_used(checkpoints)
    key = f"e-sabotaged-{name.replace(' ', '-')}"
    table.add(key, row(f"sabotage of checkpoints, {name}: noticed", 1, "of 1", "==", 1))


def replace(store, place: str, content: bytes) -> None:
    if isinstance(store, S3Store):
        store.put(place, content)
    else:
        (store.root / place).write_bytes(content)


def test_keep__the_newest_are_kept_and_a_damaged_one_takes_no_place(checkpoints: Checkpoints) -> None:
    for step in (10, 20, 30):
        write(checkpoints, step)
    steps = [int(name[5:14]) for name in checkpoints.store.names() if name.endswith(MANIFEST)]
    assert steps == [20, 30]
    checkpoints.keep = 1
    for _ in range(4):  # whichever of two names of step 30 sorts first
        newest = checkpoints.newest()
        replace(checkpoints.store, f"{newest.folder.name}/a.safetensors", b"bad")
        write(checkpoints, 25)
        assert recovered(checkpoints) == 25
        write(checkpoints, 30)
        assert recovered(checkpoints) == 30
        assert len(checkpoints.store.names()) == len(IDS) + 2


def test_collector__commits_when_every_part_has_arrived_and_not_before(checkpoints: Checkpoints) -> None:
    writers = [Writer(checkpoints.store) for _ in RANKS]
    collector = Collector(checkpoints)
    for writer, ids, position in zip(writers, RANKS, (Position(step=5), None), strict=True):
        collector.finish()
        assert checkpoints.newest() is None
        writer.start(name(5, "x"), {id: state(id, 5) for id in ids}, position)
        writer.finish()
        collector.add(writer.take(), IDS)
    collector.finish()
    assert recovered(checkpoints) == 5


def test_writer__writes_the_state_at_its_start_whatever_becomes_of_it_meanwhile(checkpoints: Checkpoints) -> None:
    writer, tensor = Writer(checkpoints.store), torch.zeros(1000)
    for at in range(5):
        writer.start(name(at, "x"), {"a": {"w": tensor}}, Position(step=at))
        tensor += 1  # as the next step does
        writer.finish()
        (part,) = writer.take()
        checkpoints.commit(part["name"], part["files"])
        found = checkpoints.newest()
        assert found is not None
        assert torch.equal(State(found.folder, "a")["w"], torch.full((1000,), float(at)))
