"""The demo's fit, in batches of so many rows, from its first token to its last step: prints the seconds as JSON.

python demo.py '{"rows": 2048}': the start of its processes, and from then on wall and CPU of all processes.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from cluster import recipe_file, session  # noqa: E402


def main(rows: int) -> dict[str, float]:
    session.set_environment()
    import clocks  # imports Ray and torch
    from fits import Fits, ray_session

    content = yaml.safe_load((ROOT / "jobs" / "recipes" / "demo.yaml").read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changed = {"output": str(folder / "run"), "stream": content["stream"] | {"batch_rows": rows}}
        with ray_session(folder):
            measured = Fits(folder).run(recipe_file.parse(content | changed))
        events = [event for events in clocks.read(measured.clocks).values() for event in events]
    first = min(event.at - event.cpu for event in events if event.what == "harvest")
    last = max(event.at for event in events if event.what == "fit")
    cpu = sum(measured.watch.cpu_between(first, last).values())
    parts = {what: sum(event.cpu for event in events if event.what == what) for what in ("harvest", "fit")}
    return {"start": first - measured.began, "wall": last - first, "cpu": cpu} | parts


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1])["rows"])))
