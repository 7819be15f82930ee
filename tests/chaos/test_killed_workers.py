"""Workers and harvest ranks are killed again and again; weights and optimiser states are the calm fit's.

The oracles: the sha256 of every dictionary's state at the end, and a ledger of the rows of each batch.
"""

import numpy as np
import pytest

from tests.chaos import table
from tests.chaos.fits import Fits, Killer, Outcome, parse
from tests.report import row

pytestmark = pytest.mark.chaos
BOS = 2
COMMITTED = "checkpoints/step-*/manifest.json"
SABOTAGES = ("order from the start", "skip a batch", "repeat a batch", "another seed", "forget the momentum")


def whole_set(fitted: Fits, content: dict, calm: Outcome) -> set[int]:
    """Ids of all rows that are to be trained on: all tokens but BOS; the tiny model has no outliers."""
    tokens = np.load(fitted.tokens)
    return set(np.flatnonzero(tokens.reshape(-1) != BOS).tolist())


def test_ledger__each_row_once_in_the_calm_fit(fitted: Fits, content: dict, calm: Outcome) -> None:
    ids = [id for batch in calm.batches for id in batch]
    everything = whole_set(fitted, content, calm)
    table.add("1-ledger", row("calm fit: rows missing", len(everything - set(ids)), "rows", "==", 0),
              row("calm fit: rows trained on twice", len(ids) - len(set(ids)), "rows", "==", 0))  # fmt: skip
    assert len(calm.batches) == calm.steps
    assert sorted(ids) == sorted(everything)


@pytest.mark.parametrize(("workers", "actors"), [(1, 3), (2, 1), (4, 3)])
def test_layouts__the_same_batches_and_weights_whoever_harvested_and_however_late(
    fitted: Fits, content: dict, calm: Outcome, workers: int, actors: int
) -> None:
    changed = parse(content, fit={"workers": workers}, harvest={"actors": actors})
    found = fitted.run(changed, longest_delay=0.1)
    equal = sum(found.batches[ids] == rows for ids, rows in calm.batches.items() if ids in found.batches)
    table.add(f"2-layout-{workers}-{actors}",
              row(f"{workers} workers, {actors} harvest actors, blocks late at random: batches equal bit for bit",
                  equal, "batches", "==", calm.steps))  # fmt: skip
    assert found.batches == calm.batches
    assert found.digests == calm.digests


def test_killed__every_fit_ends_with_the_same_bits(fitted: Fits, content: dict, calm: Outcome, runs: int) -> None:
    killed, equal, exact, seconds = [], 0, 0, []
    for number in range(runs):
        layout = {"workers": (1, 2, 3)[number % 3]}
        killer = Killer(seed=number, every=(1, 6), most=2)
        found = fitted.run(parse(content, fit=layout, harvest={"actors": 1 + number % 2}), killer)
        killed += found.killed
        equal += found.digests == calm.digests
        exact += found.batches == calm.batches
        seconds.append(found.seconds)
    table.add(
        "3-killed-workers",
        row(f"workers and harvest ranks killed ({len(killed)} kills): fits with the calm fit's sha256",
            equal, f"of {runs}", "==", runs),
        row("the same: ledgers equal to the whole set, each batch the same", exact, f"of {runs}", "==", runs),
        row("kills of train workers", killed.count("RayTrainWorker"), "kills", ">=", runs // 2),
        row("kills of harvest actors", killed.count("MapWorker"), "kills", ">=", runs // 4),
        row("slowest fit against the calm one", max(seconds) / calm.seconds, "x", "<=", 60),
    )  # fmt: skip
    assert (equal, exact) == (runs, runs)
    assert len(killed) >= runs


def test_sabotage__a_fit_that_goes_on_wrongly_is_noticed(fitted: Fits, content: dict, calm: Outcome) -> None:
    caught = {}
    for sabotage in SABOTAGES:
        killer = Killer(7, every=(0, 0.5), most=1, kinds=("RayTrainWorker",), begins_with=COMMITTED)
        found = fitted.run(parse(content), killer, sabotage=sabotage)
        assert found.killed
        caught[sabotage] = found.digests != calm.digests
    table.add("4-sabotaged-workers", row("sabotages of what goes on after a kill: noticed", sum(caught.values()),
                                         f"of {len(SABOTAGES)}", "==", len(SABOTAGES)))  # fmt: skip
    assert all(caught.values()), caught
