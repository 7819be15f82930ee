"""What the stream costs: python tests/bench/stream/run.py (make bench-stream)

Fits of the real Gemma 3 270M on this machine, with clocks in their processes. Prints one table and writes
reports/bench-stream.json; exits 1 if a target is missed. CPU seconds are from a fit's first step to its last.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3])]

from clocks import Costs  # noqa: E402
from fits import Fits, Measured, ray_session  # noqa: E402

from cluster.memory import RAY_BYTES  # noqa: E402
from cluster.stream import Order  # noqa: E402
from tests.report import Row, row, write  # noqa: E402

ONE = {"activations": ["batch_topk"], "l0s": [32]}
FOUR = {"activations": ["batch_topk", "jumprelu"], "l0s": [32, 64]}
TWELVE = {"activations": ["topk", "batch_topk", "jumprelu"], "l0s": [16, 32, 48, 64]}
LAYERS = [5, 9, 12]
WITHIN = 0.2


def told(name: str, costs: Costs) -> None:
    parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in costs.by_work.most_common())
    processes = ", ".join(f"{process} {seconds:.1f}" for process, seconds in costs.by_process.most_common(14))
    print(f"{name}: {costs.rows:,} rows, {costs.total:.1f} CPU seconds: {parts}\n  by process: {processes}", flush=True)


def cost_rows(fits: Fits, tokens: int) -> Iterator[Row]:
    """What Ray, exchange and windows take beside the work; and that one pass of the model serves any number."""
    found: dict[str, Costs] = {}
    for name, layers, cells in [
        ("12 dictionaries on 3 sites", LAYERS, FOUR),
        ("12 dictionaries on 1 site", [12], TWELVE),
        ("4 dictionaries on 1 site", [12], FOUR),
        ("1 dictionary on 1 site", [12], ONE),
    ]:
        # Two actors and two workers keep two cores busy: what Ray's processes take by the second then weighs least.
        found[name] = fits.costs(fits.recipe(layers, cells, tokens, harvest={"actors": 2}))
        told(name, found[name])
    many, twelve, four, one = found.values()
    yield row("Ray, exchange and windows beside harvest + fit, 12 dictionaries on 3 sites", many.beside, "fraction",
              "<=", 0.10)  # fmt: skip
    for what in ("exchange", "windows"):
        yield row(f"of it {what}", many.by_work[what] / many.useful, "fraction", "<=", 0.10)
    for name, ratio, most in [
        ("harvest of a row: 12 dictionaries against 1 on the same site", _ratio(twelve, one, "harvest"), 1.1),
        ("harvest of a row: 3 sites against the last of them", _ratio(many, four, "harvest"), 1.1),
        ("fit of a dictionary and row: on 3 sites against on 1", _ratio(many, four, "fit") / 3, 1.2),
    ]:
        yield row(name, ratio, "x", "<=", most)


def _ratio(a: Costs, b: Costs, what: str) -> float:
    return per_row(a, what) / per_row(b, what)


def per_row(costs: Costs, what: str) -> float:
    return costs.by_work[what] / costs.rows


def resume_rows(fits: Fits, tokens: int, repeats: int) -> Iterator[Row]:
    """Seconds from the command's fit to its first step, from checkpoints early and late in the run."""
    asked = fits.recipe([12], ONE, tokens)
    steps = Order.of(asked).steps
    places = [round(0.1 * steps), 9 * round(0.1 * steps)]
    kept = fits.recipe([12], ONE, tokens, fit={"checkpoint_every_steps": places[0], "keep_checkpoints": 20})
    checkpoints = fits.run(kept).folder / "checkpoints"
    seconds: dict[int, list[float]] = {place: [] for place in places}
    for _ in range(repeats):
        for place in places:
            (after,) = checkpoints.glob(f"step-{place:09d}-*")
            measured = fits.run(asked, after=after, one_step=True)
            seconds[place].append(measured.first_step - measured.began)
    early, late = (statistics.median(seconds[place]) for place in places)
    print(f"resumed at step {places[0]} and {places[1]} of {steps}: {seconds}", flush=True)
    yield row("resume at 90 % of a run against at 10 %: seconds to the first step", late / early, "x", "<=", 1.2)


def memory_rows(fits: Fits, tokens: int) -> Iterator[Row]:
    """Peaks against the plan; the store is planned as a whole, and what is touched of it is told."""
    asked = fits.recipe(LAYERS, FOUR, tokens, stream={"window_sequences": tokens // 512 // 8 * 8})
    _, planned = fits.layout(asked)
    measured: Measured = fits.run(asked)
    peaks = measured.watch.peaks
    total = RAY_BYTES + planned.harvest + sum(planned.workers)
    for name, peak, plan in [
        ("a fit worker", peaks["worker"], max(planned.workers)),
        ("a harvest actor", peaks["harvest actor"], planned.harvest),
        ("all processes", measured.watch.peak_total, total),
    ]:
        print(f"{name}: peak {peak / 2**30:.2f} GiB, planned {plan / 2**30:.2f} GiB", flush=True)
        yield row(f"peak memory of {name} beside its plan: off by", abs(peak / plan - 1), "fraction", "<=", WITHIN)
    yield row("object store touched", measured.watch.peak_store / 2**30, "of 1 GiB", "<=", 1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_session(Path(folder)):
        fits = Fits(Path(folder))
        rows = [
            *memory_rows(fits, asked.tokens),
            *cost_rows(fits, asked.tokens),
            *resume_rows(fits, asked.tokens, asked.repeats),
        ]
        return 0 if write("bench-stream", rows, tokens=asked.tokens, repeats=asked.repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
