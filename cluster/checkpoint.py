"""Checkpoints: a file a dictionary, keyed by its id, so that any number of ranks can resume; the manifest last.

Ranks write their own files and report through Ray Train, which copies them into one folder. When all have
arrived the controller writes the manifest. A folder without a manifest that verifies is never read.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae import artifact

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
    """One rank's part: its dictionaries' states, and (the same at every rank) the position."""
    for id, state in states.items():
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / f"{id}{SUFFIX}")
    (folder / POSITION).write_text(json.dumps(position._asdict()) + "\n")


def commit(folder: Path, ids: list[str]) -> None:
    """Makes a folder with every dictionary's file a checkpoint."""
    missing = [id for id in ids if not (folder / f"{id}{SUFFIX}").is_file()]
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


def load(folder: Path, id: str) -> dict[str, Tensor]:
    """The state of one dictionary."""
    with safe_open(folder / f"{id}{SUFFIX}", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict


def prune(train_folder: Path, keep: Committed | None) -> None:
    """Removes what earlier attempts left, but for the checkpoint to resume from."""
    for attempt in train_folder.glob("*"):
        for folder in attempt.glob("*"):
            if folder.is_dir() and (keep is None or folder != keep.folder):
                shutil.rmtree(folder)
        if keep is None or attempt != keep.folder.parent:
            shutil.rmtree(attempt)
