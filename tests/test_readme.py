"""The README is true: its commands exist and are run, its recipe plans, its tree names every module."""

import re
from pathlib import Path

import pytest
import yaml

from cluster import recipe_file

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str = "") -> list[str]:
    """Contents of the fenced blocks of one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def commands() -> list[str]:
    """Lines of code blocks and inline code that start with a program."""
    lines = [line.split("#")[0].strip() for block in blocks() for line in block.splitlines()]
    inline = re.findall(r"`(make [^`]+)`", README)
    return [line for line in lines + inline if line.startswith(("make ", "python ", "ray "))]


def submit_command(address: str, recipe_path: str) -> list[str]:
    """The README's `ray job submit`, for another address and recipe."""
    (line,) = [line for line in commands() if line.startswith("ray job submit")]
    return line.replace("http://HEAD:8265", address).replace("jobs/recipes/demo.yaml", recipe_path).split()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert {"sweep", "test"} <= named <= targets


def test_own_recipe__parses_and_expands() -> None:
    (block,) = blocks("yaml")
    assert len(recipe_file.parse(yaml.safe_load(block)).specs()) == 2 * 4 * 2 * 2 * 2


def test_every_command_is_one_that_a_test_runs() -> None:
    """make targets by CI, jobs/sweep.py by tests/jobs/test_sweep.py, the submission by tests/jobs/test_submit.py, and
    what make serve runs by tests/serve/test_live.py."""
    in_ci = {line.split()[1] for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")}
    assert "check-demo" in in_ci  # which is make sweep, and looks at what it gave
    for line in commands():
        if line.startswith("make "):
            assert line.split()[1] in in_ci | {"sweep", "serve"}, line
        else:
            assert line.startswith(("python jobs/sweep.py mine.yaml", "ray job submit --address http://HEAD:8265 ")), (
                line
            )


@pytest.mark.parametrize("package", ["sae", "cluster", "serve"])
def test_tree__names_every_module(package: str) -> None:
    tree = blocks()[-1]
    for path in (ROOT / package).glob("*.py"):
        assert path.stem.startswith("__") or re.search(rf"\b{path.stem}\b", tree), path
