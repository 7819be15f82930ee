"""Quality against peers on the same real rows: python tests/bench/quality/run.py

Makes the peers' environment and the rows if the cache lacks them, trains every cell that it has no result of, prints
one table and writes reports/bench-quality.json; exits 1 if a run failed or a target is missed. What is finished stays
in the cache: an interrupted run goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import table
import torch
from cell import Cell
from environment import peers_python
from score import scores
from study import Result, Study, mean
from trainers import ACTIVATIONS, BATCH_TOPK, JUMPRELU, PEERS, ROOT, TRAINERS

from cluster.packages import cache

HERE = Path(__file__).parent
REPORT = ROOT / "reports/bench-quality.json"
L0S = (32, 64)
TRAIN_ROWS = 500_000
HELDOUT_ROWS = 32_768


class Bench:
    """Cells in, results out; each result is one JSON in the cache."""

    def __init__(self, train_rows: int, threads: int, jobs: int):
        self.cache = cache() / "bench-quality"
        self.train_rows, self.heldout_rows = train_rows, min(HELDOUT_ROWS, train_rows // 8)
        self.rows = self.cache / f"rows-{self.train_rows}-{self.heldout_rows}"
        self.threads, self.jobs = threads, jobs
        self.results: dict[str, Result] = {}
        self.seconds: list[float] = []
        for name in ("results", "dictionaries"):
            (self.cache / name).mkdir(parents=True, exist_ok=True)
        for path in (self.cache / "results").glob("*.json"):
            self.results[path.stem] = json.loads(path.read_text())

    def study(self, trainer: str, activation: str, l0: int) -> Study:
        return Study(TRAINERS[trainer], activation, l0, self.train_rows, self.heldout_rows)

    def harvest(self) -> None:
        if not (self.rows / "rows.json").exists():
            import rows  # loads the model's libraries, which a run with rows does not need

            rows.build(self.rows, self.train_rows, self.heldout_rows)

    def run(self, cells: Iterable[Cell], later: int) -> None:
        """Trains the cells that have no result, `jobs` at a time; `later` more are to come, for the estimate."""
        todo = {cell.key: cell for cell in cells if cell.key not in self.results}
        left = len(todo) + later
        with ThreadPoolExecutor(self.jobs) as pool:
            for key, result in zip(todo, pool.map(self.train, todo.values()), strict=True):
                self.results[key] = result
                left -= 1
                minutes = left * sum(self.seconds) / max(1, len(self.seconds)) / self.jobs / 60
                print(f"{key}: {describe(result)}; {left} cells left, about {minutes:.0f} min", flush=True)

    def train(self, cell: Cell) -> Result:
        start = time.perf_counter()
        python = peers_python(self.cache) if cell.trainer in PEERS else sys.executable
        output = self.cache / "dictionaries" / f"{cell.key}.safetensors"
        command = [str(python), str(HERE / TRAINERS[cell.trainer].runner), cell.to_json(), str(self.rows), str(output)]
        done = subprocess.run([*command, str(self.threads)], capture_output=True, text=True)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        result = json.loads(done.stdout.strip().splitlines()[-1])
        result |= scores(output, self.rows, cell.activation, cell.l0) | {"cell": json.loads(cell.to_json())}
        staged = self.cache / "results" / f"{cell.key}.staged"
        staged.write_text(json.dumps(result, indent=2) + "\n")
        staged.rename(staged.with_suffix(".json"))
        self.seconds.append(time.perf_counter() - start)
        return result

    def complete(self, groups: list[list[Study]]) -> None:
        """Group by group: all candidates, then the second seeds."""
        while groups:
            studies, *groups = groups
            later = sum(len(study.candidates()) + 1 for group in groups for study in group)
            self.run([cell for study in studies for cell in study.candidates()], later + len(studies))
            self.run([cell for study in studies for cell in study.second(self.results)], later)


def describe(result: Result) -> str:
    if "failed" in result:
        return f"FAILED {result['failed']}"
    exact = f" ({result['fvu_at_l0']:.4f} at the target L0)" if "fvu_at_l0" in result else ""
    cost = f"{result['cpu_seconds']:.0f} CPU s"
    return f"FVU {result['fvu']:.4f}{exact}, L0 {result['l0']:.1f}, dead {result['dead']:.3f}, {cost}"


def measured_l0(bench: Bench, peer: str, l0: int) -> int | None:
    """The L0 that a peer's JumpReLU came to, for ours to be trained at; None while the peer has no result."""
    final = bench.study(peer, JUMPRELU, l0).final(bench.results)
    return round(mean(final, "l0")) if final else None


def comparisons(bench: Bench) -> list[tuple[Study, Study]]:
    """Pairs of peer and ours, as far as the peers' results say what ours is to be trained at."""
    pairs = []
    for activation in ACTIVATIONS:
        for peer in PEERS:
            for l0 in L0S:
                ours = l0 if activation == BATCH_TOPK else measured_l0(bench, peer, l0)
                if ours is not None:
                    pairs.append((bench.study(peer, activation, l0), bench.study("scopeworks", activation, ours)))
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TRAINERS, nargs="+", default=[*TRAINERS], help="train these alone")
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="training rows; fewer for a smoke test")
    parser.add_argument("--threads", type=int, default=1, help="of one cell")
    parser.add_argument("--jobs", type=int, default=2, help="cells trained side by side")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.rows, options.threads, options.jobs)
    bench.harvest()
    if set(options.only) & set(PEERS):
        peers_python(bench.cache)  # before cells run side by side
    peers = [[bench.study(peer, activation, l0) for l0 in L0S] for activation in ACTIVATIONS for peer in PEERS]
    bench.complete([group for group in peers if group[0].trainer.name in options.only])
    if "scopeworks" in options.only:
        bench.complete([[ours for _, ours in comparisons(bench)]])
    report = table.report([study for group in peers for study in group], comparisons(bench), bench.results)
    report["sizes"] = json.loads((bench.rows / "rows.json").read_text())
    if options.rows == TRAIN_ROWS:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(json.dumps(report, indent=2) + "\n")
    failed = any("failed" in result for result in bench.results.values())
    return 1 if failed or not all(row["ok"] for row in report["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
