"""Requests that wait for one thread's products: those that came meanwhile with one dictionary are computed together."""

import asyncio
from typing import NamedTuple

from sae.dictionary import Dictionary
from serve.compute import Answer, Work, compute


class Waiting(NamedTuple):
    """One request."""

    dictionary: Dictionary
    work: Work
    answer: asyncio.Future[Answer]


class Batches:
    """`@serve.batch` makes a batch of who is there when it looks, not of who came while the last one was computed: with
    no wait for company each was of one request (tests/bench/LOG.md)."""

    def __init__(self, most_rows: int):
        """`most_rows` of several requests; one may have more."""
        self.most_rows, self.waiting = most_rows, list[Waiting]()
        self.computing: asyncio.Task[None] | None = None

    async def run(self, dictionary: Dictionary, work: Work) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.append(Waiting(dictionary, work, answer))
        if self.computing is None:
            self.computing = asyncio.create_task(self._compute_all())
        return await answer

    async def _compute_all(self) -> None:
        while batch := self._next():
            try:
                answers = await asyncio.to_thread(compute, batch[0].dictionary, [one.work for one in batch])
            except Exception as error:
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():  # whose caller went away
                    one.answer.set_result(answer)
        self.computing = None

    def _next(self) -> list[Waiting]:
        """The first that waits and others with its dictionary, in the order in which they came."""
        batch, rest, n_rows = list[Waiting](), list[Waiting](), 0
        for one in self.waiting:
            if one.answer.done():
                continue
            joins = not batch or (one.dictionary is batch[0].dictionary and n_rows + one.work.n_rows <= self.most_rows)
            (batch if joins else rest).append(one)
            n_rows += one.work.n_rows if joins else 0
        self.waiting = rest
        return batch
