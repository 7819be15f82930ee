"""What the targets that measure print and write: one table, and reports/<target>.json."""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

REPORTS = Path(__file__).resolve().parent.parent / "reports"
Row = dict[str, Any]


def row(name: str, value: float, unit: str, comparison: str, target: float) -> Row:
    """A figure beside its target, said at once, since a table may take an hour; `comparison` is <=, >= or =="""
    print(f"{time.strftime('%H:%M')}  {name}: {value:,.5g} {unit}", file=sys.stderr, flush=True)
    ok = {"<=": value <= target, ">=": value >= target, "==": value == target}[comparison]
    return {"name": name, "value": value, "unit": unit, "target": f"{comparison} {target:g}", "ok": ok}


def write(target: str, rows: list[Row], **sizes: Any) -> bool:
    """Prints the rows and writes them; whether all targets were met."""
    width = max((len(one["name"]) for one in rows), default=0)
    for one in rows:
        mark = "ok" if one["ok"] else "MISSED"
        print(f"{mark:<7} {one['name']:<{width}} {one['value']:>12,.5g} {one['unit']:<9} {one['target']}")
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    REPORTS.mkdir(exist_ok=True)
    path = REPORTS / f"{target}.json"
    path.write_text(json.dumps({"machine": machine, "sizes": sizes, "rows": rows}, indent=2) + "\n")
    return all(one["ok"] for one in rows)
