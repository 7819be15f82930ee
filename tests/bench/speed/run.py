"""What a training step costs beside its floor and beside other trainers: python tests/bench/speed/run.py

Prints one table, writes reports/bench.json and tests/bench/results/<date>.json, and exits 1 if a target is missed. With
--check it fails only where a ratio falls behind `accepted.json` by more than its tolerance and the run's own noise.
Every process is timed alone, ours and the floor in turn; --clock cpu counts CPU seconds, for machines that are shared.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))

import demo  # noqa: E402

from cluster.recipe import fast_dtype  # noqa: E402
from tests.report import Row, row, write  # noqa: E402

ACCEPTED = HERE / "accepted.json"
COLUMNS = 640  # of Gemma 3 270M
ROWS = (2048, 4096)
WIDTHS = (16384, 65536)
FILE_ROWS = 4 * max(ROWS)
MANY = [(activation, k) for activation in ("topk", "batch_topk", "jumprelu") for k in (16, 32, 64, 128)]
MANY_WIDTH = 4096
TO_FLOOR = {"topk": 2.0, "batch_topk": 2.0, "jumprelu": 2.5}
BESIDE = [  # peer, activation, at its best setting, how many times ours its step should take
    ("saelens", "batch_topk", False, 20),
    ("saelens", "jumprelu", False, 15),
    ("dictionary_learning", "topk", False, 15),
    ("sparsify", "topk", False, 5),
    ("llamascopium", "batch_topk", False, 3),
    ("saelens", "batch_topk", True, 3),
    ("dictionary_learning", "topk", True, 3),
    ("sparsify", "topk", True, 3),
    ("llamascopium", "batch_topk", True, 3),
]


def run(python: str, script: str, job: dict[str, Any]) -> Any:
    """The JSON that a script prints last."""
    threads = str(job["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, str(HERE / script), json.dumps(job)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def beside_floor(job: dict[str, Any]) -> tuple[list[Row], dict[str, list[float]]]:
    """Each activation's step over the floor."""
    taken = run(sys.executable, "ours.py", job | {"what": "steps"})
    products = [statistics.median(taken[name]) for name in taken if name.startswith("product")]
    floor = min(products) + statistics.median(taken["adam"])
    where = f"F {job['width']} B {job['rows']}"
    rows = [row(f"{where} floor", floor, "ms", ">=", 0)]
    for activation in job["activations"]:
        ratio = statistics.median(taken[activation]) / floor
        rows.append(row(f"{where} {activation} / floor", ratio, "times", "<=", TO_FLOOR[activation]))
    return rows, taken


def beside_peers(job: dict[str, Any], taken: dict[str, list[float]], python: str) -> list[Row]:
    """Each peer's step over ours of the same activation."""
    rows = []
    for peer, activation, best, target in BESIDE:
        if activation not in job["activations"] or (best and fast_dtype() == "float32"):
            continue  # where bfloat16 takes a hundred times as long, it is no one's best
        theirs = run(python, "peers.py", job | {"peer": peer, "activation": activation, "best": best})
        ratio = statistics.median(theirs) / statistics.median(taken[activation])
        name = f"F {job['width']} B {job['rows']} {peer} {activation}{' bf16' if best else ''} / ours"
        rows.append(row(name, ratio, "times", ">=", target))
    return rows


def beside_many(job: dict[str, Any], python: str | None) -> tuple[list[Row], dict[str, list[float]]]:
    """Twelve dictionaries of one site on one batch."""
    job |= {"width": MANY_WIDTH, "many": MANY}
    taken = run(sys.executable, "ours.py", job | {"what": "many"})
    together = statistics.median(taken.pop("together"))
    singly = sum(statistics.median(times) for times in taken.values())
    where = f"F {MANY_WIDTH} B {job['rows']} {len(MANY)} dictionaries"
    rows = [row(f"{where} / each alone", together / singly, "times", "<=", 1 + noise(taken))]
    if python:
        theirs = statistics.median(run(python, "peers.py", job | {"peer": "saelens_multi", "best": False}))
        rows.append(row(f"{where} saelens / ours", theirs / together, "times", ">=", 10))
    return rows, taken


def in_memory(job: dict[str, Any]) -> list[Row]:
    """Most bytes of a step over parameters, touched gradients, moments and 1.5 · B·F in bfloat16."""
    rows = []
    for activation in job["activations"]:
        found = run(sys.executable, "ours.py", job | {"what": "memory", "activation": activation})
        planned = sum(found[part] for part in ("parameters", "gradients", "optimiser"))
        planned += 1.5 * 2 * job["rows"] * job["width"]
        name = f"F {job['width']} B {job['rows']} {activation} peak memory / plan"
        rows.append(row(name, found["peak"] / planned, "times", "<=", 1))
    return rows


def harvest(job: dict[str, Any]) -> Row:
    taken = {name: statistics.median(times) for name, times in run(sys.executable, "harvest.py", job).items()}
    return row("harvest / bare forward, rows a second", taken["bare"] / taken["harvest"], "times", ">=", 0.95)


def real_rows() -> str:
    """The file of rows of layer 12, made if it is not there."""
    from cluster.packages import cache

    folder = cache() / "bench" / f"rows-{FILE_ROWS}"
    build = f"import rows, pathlib; rows.build(pathlib.Path({str(folder)!r}), {FILE_ROWS}, 1024)"
    paths = os.pathsep.join([str(HERE.parent / "quality"), str(ROOT)])
    subprocess.run([sys.executable, "-c", build], env=os.environ | {"PYTHONPATH": paths}, check=True)
    return str(folder / "train.npy")


def noise(taken: dict[str, list[float]]) -> float:
    """The widest interquartile range of a part, over its median."""
    ranges = []
    for times in taken.values():
        low, middle, high = statistics.quantiles(times, n=4)
        ranges.append((high - low) / middle)
    return max(ranges)


def behind(rows: list[Row], wavering: float) -> list[str]:
    """Ratios to the floor that fell behind what was accepted."""
    accepted = json.loads(ACCEPTED.read_text())
    allowed = 1 + max(accepted["tolerance"], wavering)
    found = {one["name"]: one["value"] for one in rows}
    return [
        f"{name}: {found[name]:.2f}, accepted {ratio:.2f}, tolerated {ratio * allowed:.2f}"
        for name, ratio in accepted["ratios"][fast_dtype()].items()
        if name in found and found[name] > ratio * allowed
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--activations", nargs="+", default=list(TO_FLOOR), choices=list(TO_FLOOR))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timed", type=int, default=7, help="steps of which the median is taken")
    parser.add_argument("--warmup", type=int, default=20, help="steps before")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--peers", help="Python of the peers' environment; without it they are left out")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--made", action="store_true", help="rows made up, without the model; harvest is left out")
    chosen = parser.parse_args()
    rows, wavering, file = [], 0.0, None if chosen.made else real_rows()
    if file:
        rows.append(harvest({"threads": chosen.threads, "timed": chosen.timed}))
    for width in chosen.widths:
        for n_rows in chosen.rows:
            job = {
                "columns": COLUMNS,
                "width": width,
                "rows": n_rows,
                "file": file,
                "steps": chosen.timed + 3,
                "products": fast_dtype(),
            } | {name: getattr(chosen, name) for name in ("k", "activations", "threads", "timed", "warmup", "clock")}
            job["products"] = fast_dtype()
            found, taken = beside_floor(job)
            rows += found
            wavering = max(wavering, noise(taken))
            if chosen.peers:
                rows += beside_peers(job, taken, chosen.peers)
            if not chosen.check:
                rows += in_memory(job)
    if not chosen.check:
        found, taken = beside_many(job | {"rows": chosen.rows[0]}, chosen.peers)
        rows += found
    if chosen.peers and file and not chosen.check:
        rows += demo.beside_demo(run, job, sys.executable, chosen.peers)
    met = write("bench", rows, noise=wavering, arguments=vars(chosen))
    if chosen.check:
        fallen = behind(rows, wavering)
        print("\n".join(fallen) or "no ratio fell behind")
        return bool(fallen)
    results = HERE.parent / "results"
    results.mkdir(exist_ok=True)
    report = (ROOT / "reports" / "bench.json").read_text()
    (results / f"{datetime.date.today().isoformat()}.json").write_text(report)
    return not met


if __name__ == "__main__":
    sys.exit(main())
