"""Imports point one way: sae ← cluster ← jobs, and sae ← serve."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"sae", "cluster", "jobs", "serve"}
ALLOWED = {"sae": set(), "cluster": {"sae"}, "jobs": {"sae", "cluster"}, "serve": {"sae"}}
SAE_LIBRARIES = {"torch", "numpy", "pydantic", "safetensors"}
ON_A_CPU = {"compiled.py", "search_loops.py"}
ON_A_GPU = {"gpu.py", "triton_adam.py", "triton_products.py", "triton_select.py"}  # torch's CUDA build brings Triton


def imported(path: Path) -> set[str]:
    """Top-level names of every package that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", sorted(OURS))
def test_a_package_imports_only_what_lies_before_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert (imported(path) & OURS) - {package} <= ALLOWED[package], path


def test_sae_needs_nothing_but_torch_and_three_small_libraries() -> None:
    import sys

    for path in (ROOT / "sae").rglob("*.py"):
        foreign = imported(path) - OURS - set(sys.stdlib_module_names)
        of_a_device = {"triton"} if path.name in ON_A_GPU else {"numba"} if path.name in ON_A_CPU else set()
        assert foreign - of_a_device <= SAE_LIBRARIES, f"{path}: {foreign}"
