"""Tensors of a file in a store: fetched alone, and not without their sha256."""

from pathlib import Path

import numpy as np
import pytest

from cluster import tensors
from cluster.store import FolderStore, Missing

TOLD = {"identity": "x"}
ROWS = 2**20


class Counting(FolderStore):
    """Writes down what is fetched."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.fetched: list[int] = []

    def read_range(self, name: str, first: int, end: int) -> bytes:
        content = super().read_range(name, first, end)
        self.fetched.append(len(content))
        return content


@pytest.fixture
def place(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "store")


def numbers(rows: int = ROWS) -> dict[str, np.ndarray]:
    """Three tensors of 2 bytes a row."""
    return {key: np.random.default_rng(n).integers(0, 99, rows, dtype=np.int16) for n, key in enumerate("abc")}


@pytest.mark.parametrize(("wanted", "fetched"), [("a", [2 * ROWS]), ("ab", [4 * ROWS]), ("ac", [2 * ROWS, 2 * ROWS])])
def test_read__fetches_what_is_wanted_and_what_lies_together_at_once(place: Counting, wanted: str, fetched) -> None:
    written = numbers()
    tensors.write(place, "x", written, TOLD)
    found = tensors.read(place, "x", wanted, TOLD)
    assert found.keys() == set(wanted)
    assert all(np.array_equal(found[key], written[key]) for key in wanted)
    assert place.fetched == [tensors.HEAD_BYTES, *fetched]


def test_read__a_header_that_is_larger_than_what_is_fetched_first(place: Counting) -> None:
    many = {f"{n}": np.full((1, n % 3), n, np.int64) for n in range(1000)}  # some have no elements
    tensors.write(place, "x", many, TOLD)
    found = tensors.read(place, "x", many, TOLD)
    assert all(np.array_equal(found[key], value) and found[key].shape == value.shape for key, value in many.items())
    assert len(place.fetched) == 3


def test_read__tensors_without_elements(place: Counting) -> None:
    tensors.write(place, "x", {"a": np.empty((0, 4), np.float32)}, TOLD)
    assert tensors.read(place, "x", ["a"], TOLD)["a"].shape == (0, 4)


def test_read__what_is_missing_or_of_something_else(place: Counting) -> None:
    tensors.write(place, "x", numbers(9), TOLD)
    with pytest.raises(Missing):
        tensors.read(place, "y", "a", TOLD)
    for wanted, told in (("a", {"identity": "y"}), ("a", {"of": "x"}), ("d", TOLD)):
        with pytest.raises(tensors.Damaged):
            tensors.read(place, "x", wanted, told)
