"""Checkpoints: a file a dictionary or a shard of one, keyed by its id, so that any layout can resume; the manifest
last.

Ranks write their own files and report through Ray Train, which copies them into one folder. When all have
arrived the controller writes the manifest. A folder without a manifest that verifies is never read.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae import artifact
from sae.shards import join_shards

SUFFIX = ".safetensors"
POSITION = "position.json"


class Position(NamedTuple):
    """Where in the order a run is: the batch to take next."""

    window: int = 0
    batch: int = 0
    step: int = 0
    rows: int = 0
    """Rows trained on so far."""
    done: bool = False


class Committed(NamedTuple):
    """A checkpoint that verifies."""

    folder: Path
    position: Position


def stage(folder: Path, states: dict[str, dict[str, Tensor]], position: Position) -> None:
    """One rank's part: its dictionaries' or shards' states, and (the same at every rank) the position."""
    for name, state in states.items():
        save_file({key: tensor.contiguous().cpu() for key, tensor in state.items()}, folder / f"{name}{SUFFIX}")
    (folder / POSITION).write_text(json.dumps(position._asdict()) + "\n")


def commit(folder: Path, parts: list[str]) -> None:
    """Makes a folder with the files of all parts a checkpoint."""
    missing = [part for part in parts if not (folder / f"{part}{SUFFIX}").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    artifact.seal(folder)


def newest(train_folder: Path) -> Committed | None:
    """The committed checkpoint that is furthest on, whichever attempt wrote it; damaged ones are passed over."""
    found = []
    for manifest in train_folder.glob(f"*/*/{artifact.MANIFEST}"):
        try:
            position = Position(**json.loads((manifest.parent / POSITION).read_text()))
        except (OSError, ValueError, TypeError):
            continue
        found.append(Committed(manifest.parent, position))
    for committed in sorted(found, key=lambda c: (c.position.step, c.position.done), reverse=True):
        try:
            artifact.verify(committed.folder)
        except artifact.ArtifactError:
            continue
        return committed
    return None


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


def prune(train_folder: Path, keep: Committed | None) -> None:
    """Removes what earlier attempts left, but for the checkpoint to resume from."""
    for attempt in train_folder.glob("*"):
        for folder in attempt.glob("*"):
            if folder.is_dir() and (keep is None or folder != keep.folder):
                shutil.rmtree(folder)
        if keep is None or attempt != keep.folder.parent:
            shutil.rmtree(attempt)
