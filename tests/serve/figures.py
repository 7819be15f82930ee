"""The endpoint's table of figures, printed and in reports/test-serve.json: python -m tests.serve.figures [--seconds 20]

Endpoints with two replicas serve dictionaries of every kind and one of 640 → 4,096; `--seconds` is how long each part
that is about load lasts. The status is 1 if a figure misses its target; of a slice, one that counts something.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from sae import artifact
from serve.limits import Limits
from serve.settings import Settings
from tests import report
from tests.published import make_config, make_dictionary, make_spec
from tests.serve import attack, load
from tests.serve.conftest import publish
from tests.serve.live import Endpoint, endpoint

LIMITS = Limits(body_bytes=2**23, concurrent=8, idle_seconds=2, body_seconds=6)
FEW = 2  # requests in the house of the endpoint that is overloaded: the time of those accepted is about that of so many
WIDE = "suite.wide"
SOAK = 6  # as long as another part
COUNTS = ("routes", "wrong", "lost", "5xx", "open", "failed", "accepted", "flagged", "changed", "left")


def prepare(root: Path) -> None:
    publish(root)
    spec = make_spec("sae", width=4096)
    dictionary = make_dictionary(spec, d=640)
    dictionary.threshold_F.fill_(2.0)  # about a fiftieth of the latents are active
    artifact.write(root / "suite" / "wide", dictionary, make_config(spec))
    artifact.seal(root / "suite" / "wide")


@contextlib.contextmanager
def started(root: Path, name: str, **fields: Any) -> Iterator[tuple[Endpoint, Path]]:
    """One with two replicas, and the file of its settings."""
    settings = Settings(catalog=str(root), replicas=2, **fields)
    path = root.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude={"catalog"}, exclude_unset=True)))
    with endpoint(root, root.parent / f"{name}.log", "--settings", str(path)) as running:
        yield running, path


def measure(running: Endpoint, root: Path, seconds: float) -> list[report.Row]:
    rows = attack.answers(running, root, round(10 * seconds), "of the ingress")
    rows += load.speed(running, root, WIDE, seconds)
    rows += attack.fuzz(running, round(min(10_000, 100 * seconds)))
    rows += attack.of_contract(running, round(min(400, 2 * seconds)))
    rows += attack.bodies(running, LIMITS, round(min(100, 2 * seconds)))
    rows += attack.auth(running)
    rows += load.leak(running, WIDE, SOAK * seconds)
    rows += load.faults(running, WIDE, seconds)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "published"
        prepare(root)
        with started(root, "far", near_mib=0.0) as (running, _):
            rows = attack.answers(running, root, round(10 * seconds), "of replicas")
        with started(root, "few", limits=LIMITS.model_copy(update={"concurrent": FEW})) as (running, _):
            rows += load.overload(running, WIDE, FEW, seconds)
        with started(root, "whole", limits=LIMITS) as (running, settings):
            rows += measure(running, root, seconds)
            rows += load.rolling(running, WIDE, settings)
            rows.append(report.row("processes left after SIGTERM", len(running.stop()), "left", "==", 0))
    met = report.write("test-serve", rows, seconds=seconds, width=4096, d=640, limits=LIMITS.model_dump(), few=FEW)
    counted = all(row["ok"] for row in rows if row["unit"] in COUNTS)
    return 0 if met or (seconds < 300 and counted) else 1


if __name__ == "__main__":
    sys.exit(main())
