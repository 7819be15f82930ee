"""Requests made from a running service's own contract, sound ones and unsound ones, by schemathesis."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# What a body must be depends on the dictionary (columns, latents), which a schema cannot say.
DEPENDS = "positive_data_acceptance"


class Checked(NamedTuple):
    cases: int
    failures: list[str]


def check(url: str, token: str, dictionary: str, examples: int, seed: int = 0) -> Checked:
    """Twice: with paths made up as all else, and with every path that of a dictionary, so that bodies are looked at."""
    placed = f'[parameters]\n"path.name" = "{dictionary}"\n'
    made_up = _run(url, token, examples, seed, DEPENDS, "")
    named = _run(url, token, examples, seed, f"{DEPENDS},negative_data_rejection", placed)
    return Checked(made_up.cases + named.cases, made_up.failures + named.failures)


def _run(url: str, token: str, examples: int, seed: int, excluded: str, settings: str) -> Checked:
    with tempfile.TemporaryDirectory() as folder:
        config, told = Path(folder) / "schemathesis.toml", Path(folder) / "report.json"
        config.write_text(settings)
        done = subprocess.run(
            [str(Path(sys.executable).with_name("st")), "--config-file", str(config), "run", f"{url}/openapi.json",
             "-H", f"Authorization: Bearer {token}", "--max-examples", str(examples), "--seed", str(seed),
             "--no-shrink", "--continue-on-failure", "--exclude-checks", excluded,
             "--report", "json", "--report-json-path", str(told)],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        if not told.exists():
            raise AssertionError(done.stdout[-3000:] + done.stderr[-3000:])
        report = json.loads(told.read_text())
    assert report["complete"], done.stdout[-3000:]
    return Checked(
        report["test_cases"]["generated"], [json.dumps(one)[:500] for one in report["failures"] + report["errors"]]
    )
