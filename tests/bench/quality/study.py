"""A study: one trainer, activation and target L0; three learning rates, then a second seed at the best."""

from dataclasses import replace
from typing import Any, NamedTuple

from cell import Cell
from trainers import Trainer

Result = dict[str, Any]
NEAR = 0.1  # an L0 within this share of its target may win by its FVU; none there, the nearest L0 wins


class Study(NamedTuple):
    trainer: Trainer
    activation: str
    l0: int
    train_rows: int
    heldout_rows: int

    def candidates(self) -> list[Cell]:
        """The first seed at each learning rate."""
        return [
            Cell(
                trainer=self.trainer.name,
                version=self.trainer.version,
                activation=self.activation,
                l0=self.l0,
                learning_rate=learning_rate,
                seed=0,
                train_rows=self.train_rows,
                heldout_rows=self.heldout_rows,
                options=self.trainer.options[self.activation],
            )
            for learning_rate in self.trainer.learning_rates[self.activation]
        ]

    def best(self, results: dict[str, Result]) -> Cell | None:
        """The candidate that the study stands for; None while one is missing or all have failed."""
        found = [(cell, results[cell.key]) for cell in self.candidates() if cell.key in results]
        if len(found) < len(self.candidates()):
            return None
        found = [(cell, result) for cell, result in found if "failed" not in result]
        if not found:
            return None
        off = {cell.key: abs(figure(result, "l0") / self.l0 - 1) for cell, result in found}
        near = [pair for pair in found if off[pair[0].key] <= max(NEAR, min(off.values()))]
        return min(near, key=lambda pair: figure(pair[1], "fvu"))[0]

    def second(self, results: dict[str, Result]) -> list[Cell]:
        """The second seed at the best learning rate."""
        best = self.best(results)
        return [] if best is None else [replace(best, seed=1)]

    def final(self, results: dict[str, Result]) -> list[Result]:
        """Results of both seeds at the best learning rate, as far as there are."""
        best = self.best(results)
        cells = [] if best is None else [best, *self.second(results)]
        found = [results[cell.key] for cell in cells if cell.key in results]
        return [result for result in found if "failed" not in result]


def figure(result: Result, name: str) -> float:
    """`fvu`, `l0` or `dead`, at exactly the target L0 where one threshold can set it."""
    return result.get(f"{name}_at_l0", result[name])


def mean(results: list[Result], name: str) -> float:
    return sum(figure(result, name) for result in results) / len(results)
