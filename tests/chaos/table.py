"""The fault table: the figures that the tests of faults left in reports/chaos/, as one.

python -m tests.chaos.table begin empties it, python -m tests.chaos.table prints it and writes reports/test-chaos.json.
"""

import json
import shutil
import sys

from tests import report

FOLDER = report.REPORTS / "chaos"


def add(test: str, *rows: report.Row) -> None:
    """Keeps what a test measured until the table is printed; call it before the assertions."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{test}.json").write_text(json.dumps(rows, indent=2) + "\n")


def main() -> int:
    if sys.argv[1:] == ["begin"]:
        shutil.rmtree(FOLDER, ignore_errors=True)
        return 0
    rows = [row for path in sorted(FOLDER.glob("*.json")) for row in json.loads(path.read_text())]
    return 0 if report.write("test-chaos", rows) else 1


if __name__ == "__main__":
    sys.exit(main())
