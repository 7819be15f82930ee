"""Checkpoints: a file a dictionary or a shard of one, keyed by its id, so that any layout can resume; the manifest
last.

Each rank puts its own files into the store from a thread of its own, and tells the Train controller with its next
report which. When all have arrived the controller writes the manifest. Without one that verifies nothing is read.
"""

import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.recipe import Recipe
from cluster.store import STAGED, FolderStore, Missing, S3Store, Store
from sae import artifact
from sae.artifact import MANIFEST
from sae.shards import join_shards

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
POSITION = "position.json"
STEP_PART = len("step-000000000")


class Position(NamedTuple):
    """Where in the order a run is: the batch to take next."""

    window: int = 0
    batch: int = 0
    step: int = 0
    rows: int = 0
    """Rows trained on so far."""
    done: bool = False


class Committed(NamedTuple):
    """A checkpoint that verifies, on this machine."""

    folder: Path
    position: Position


def name(step: int, attempt: str) -> str:
    """Of a checkpoint's folder; names sort by step. A folder is never written twice, so each attempt has its own."""
    return f"step-{step:09d}-{attempt}"


class Checkpoints:
    """All of a run, in its store; those of a bucket are read from copies in `folder`."""

    def __init__(self, store: Store, folder: Path, keep: int):
        self.store, self.folder, self.keep = store, folder, keep

    @classmethod
    def of(cls, recipe: Recipe, train_folder: Path) -> "Checkpoints":
        folder = train_folder / "checkpoints"
        store = S3Store(f"{recipe.storage}/checkpoints") if recipe.storage else FolderStore(folder)
        return cls(store, folder, recipe.fit.keep_checkpoints)

    def newest(self) -> Committed | None:
        """The committed checkpoint that is furthest on, whichever attempt wrote it; damaged ones are passed over."""
        while True:
            names = self._committed()
            for name in reversed(names):
                try:
                    folder = self.store.folder(name, self.folder / name)
                except (Missing, artifact.ArtifactError) as error:
                    logger.warning("checkpoint %s is passed over: %s", name, error)
                    continue
                return Committed(folder, Position(**json.loads((folder / POSITION).read_text())))
            if names == self._committed():  # else an earlier owner's last act was to write others and remove these
                return None

    def commit(self, name: str, files: dict[str, dict[str, Any]]) -> None:
        """Makes a folder, all of whose files are there, a checkpoint, and removes the ones before the last `keep`."""
        self.store.put_new(f"{name}/{MANIFEST}", artifact.manifest(files).encode())
        step = name[:STEP_PART]
        earlier = [other for other in self._committed() if other[:STEP_PART] < step]
        kept = [name, *earlier[::-1][: self.keep - 1]]
        # A later one was passed over as damaged. It goes when its step is reached again, not before.
        self._remove(lambda other: other not in kept and other[:STEP_PART] <= step)

    def prune(self, keep: Committed | None) -> None:
        """Removes what earlier attempts left, but for the checkpoint to resume from. Nobody may be writing."""
        kept = keep and keep.folder.name
        self._remove(lambda name: name != kept)
        self.discard_staged()

    def discard_staged(self) -> None:
        """Removes what ranks that were killed had staged. Nobody may be writing."""
        for path in self.folder.glob(f"{STAGED}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _committed(self) -> list[str]:
        return [Path(name).parent.name for name in self.store.names() if name.endswith(f"/{MANIFEST}")]

    def _remove(self, doomed: Callable[[str], bool]) -> None:
        """Folders whose names are doomed, in the store and copied: first their manifests."""
        names = [name for name in self.store.names() if doomed(name.partition("/")[0])]
        self.store.delete(sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}")))
        for copy in self.folder.glob("step-*"):
            if doomed(copy.name):
                shutil.rmtree(copy, ignore_errors=True)


def part_name(id: str, shard: int, shards: int) -> str:
    """Of the file of one shard of a dictionary."""
    return id if shards == 1 else f"{id}.shard-{shard}-of-{shards}"


class State(Mapping[str, Tensor]):
    """The state of a whole dictionary, joined from its shards' files as each entry is read."""

    def __init__(self, folder: Path, id: str):
        whole = folder / f"{id}{SUFFIX}"
        parts = sorted(folder.glob(f"{id}.shard-*{SUFFIX}"), key=lambda path: int(path.name.split("-")[-3]))
        self.files = [safe_open(path, framework="pt") for path in ([whole] if whole.exists() else parts)]

    def __getitem__(self, name: str) -> Tensor:
        return join_shards(name, [file.get_tensor(name) for file in self.files])

    def __iter__(self) -> Iterator[str]:
        return iter(self.files[0].keys())

    def __len__(self) -> int:
        return len(list(self.files[0].keys()))


class Writer:
    """One rank's side: a copy of its states in host memory, written to the store while the rank goes on."""

    def __init__(self, store: Store):
        self.store = store
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        self.parts: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def busy(self) -> bool:
        return self.writing is not None and not self.writing.done()

    def start(self, name: str, states: dict[str, dict[str, Tensor]], position: Position | None) -> None:
        """Copies the states and returns, after what was started before is done; one rank gives the position."""
        if self.writing is not None:
            wait([self.writing])
        copies = {
            id: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
            for id, state in states.items()
        }
        self.writing = self.pool.submit(self._write, name, copies, position)

    def finish(self) -> None:
        """Waits until what was started is written; its error, if it could not be."""
        if self.writing is not None:
            self.writing.result()

    def take(self) -> list[dict[str, Any]]:
        """What was written since the last call: the checkpoint's name and its files as a manifest lists them."""
        with self.lock:
            taken, self.parts = self.parts, []
        return taken

    def _write(self, name: str, states: dict[str, dict[str, Tensor]], position: Position | None) -> None:
        files: dict[str, dict[str, Any]] = {}
        try:
            with tempfile.TemporaryDirectory(prefix=STAGED, dir=self.store.scratch) as scratch:
                while states:
                    id, state = states.popitem()  # its memory is free as soon as it is written
                    path = Path(scratch, f"{id}{SUFFIX}")
                    save_file(state, path)
                    self._put(name, path, files)
                if position is not None:
                    path = Path(scratch, POSITION)
                    path.write_text(json.dumps(position._asdict()) + "\n")
                    self._put(name, path, files)
        except Exception:
            logger.exception("checkpoint %s could not be written", name)
            raise
        with self.lock:
            self.parts.append({"name": name, "files": files})

    def _put(self, name: str, path: Path, files: dict[str, dict[str, Any]]) -> None:
        files[path.name] = artifact.listed(path)
        self.store.put_file(f"{name}/{path.name}", path)
        path.unlink()


class Collector:
    """The controller's side: commits each checkpoint when all its parts have been reported, from a thread."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.pool = ThreadPoolExecutor(1, "commit")
        self.parts: dict[str, dict[str, dict[str, Any]]] = {}
        self.committing: Future[None] | None = None

    def add(self, parts: list[dict[str, Any]], names: list[str]) -> None:
        """`names` are those of all dictionaries of the run, or of their shards."""
        for part in parts:
            files = self.parts.setdefault(part["name"], {})
            files |= part["files"]
            if files.keys() == {POSITION, *(f"{name}{SUFFIX}" for name in names)}:
                self.parts = {name: kept for name, kept in self.parts.items() if name > part["name"]}
                self.committing = self.pool.submit(self._commit, part["name"], files)

    def finish(self) -> None:
        """Waits until the last commit is done; its error, if it failed."""
        if self.committing is not None:
            self.committing.result()

    def _commit(self, name: str, files: dict[str, dict[str, Any]]) -> None:
        try:
            self.checkpoints.commit(name, files)
        except Exception:
            logger.exception("checkpoint %s could not be committed", name)
            raise
