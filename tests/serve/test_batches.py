"""What waits while one thread computes."""

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from serve import batches
from serve.batches import Batches
from serve.compute import Work


class Thread:
    """In the place of `compute`: each batch waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.begun, self.go, self.fails = threading.Semaphore(0), threading.Semaphore(0), set[int]()

    def __call__(self, dictionary, works: list[Work]) -> list[int]:
        rows = [work.n_rows for work in works]
        self.batches.append((dictionary.name, rows))
        self.begun.release()
        assert self.go.acquire(timeout=10)
        if self.fails & set(rows):
            raise MemoryError
        return rows

    async def computes(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=10)


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[Thread]:
    thread = Thread()
    monkeypatch.setattr(batches, "compute", thread)
    yield thread
    for _ in range(100):
        thread.go.release()


A, B = SimpleNamespace(name="a"), SimpleNamespace(name="b")


def ask(waiting: Batches, dictionary, n_rows: int) -> asyncio.Task:
    return asyncio.create_task(waiting.run(dictionary, Work("encode", n_rows)))


def test_run__computes_what_came_meanwhile_together(thread: Thread) -> None:
    async def act() -> list:
        waiting = Batches(most_rows=10)
        first = ask(waiting, A, 1)
        await thread.computes()
        rest = [ask(waiting, dictionary, rows) for dictionary, rows in ((A, 2), (B, 3), (A, 4), (A, 5), (A, 3))]
        await asyncio.sleep(0)
        for _ in range(4):
            thread.go.release()
        return await asyncio.gather(first, *rest)

    assert asyncio.run(act()) == [1, 2, 3, 4, 5, 3]
    assert thread.batches == [("a", [1]), ("a", [2, 4, 3]), ("b", [3]), ("a", [5])]


def test_run__computes_one_that_is_larger_than_a_batch(thread: Thread) -> None:
    async def act() -> int:
        thread.go.release()
        return await ask(Batches(most_rows=10), A, 11)

    assert asyncio.run(act()) == 11


def test_run__does_not_compute_for_who_went_away(thread: Thread) -> None:
    async def act() -> list:
        waiting = Batches(most_rows=10)
        first = ask(waiting, A, 1)
        await thread.computes()
        gone, last = ask(waiting, A, 2), ask(waiting, A, 3)
        await asyncio.sleep(0)
        gone.cancel()
        thread.go.release(2)
        return await asyncio.gather(first, last)

    assert asyncio.run(act()) == [1, 3]
    assert thread.batches == [("a", [1]), ("a", [3])]


def test_run__fails_for_those_of_a_batch_and_goes_on(thread: Thread) -> None:
    async def act() -> list:
        waiting = Batches(most_rows=4)
        thread.fails = {2}
        thread.go.release(3)
        first = await asyncio.gather(*(ask(waiting, A, rows) for rows in (1, 2, 3)), return_exceptions=True)
        return [*first, await ask(waiting, A, 4)]

    answers = asyncio.run(act())
    assert [type(answer) for answer in answers] == [MemoryError, MemoryError, int, int]
