"""The peers' own Python environment, made once: their pins clash with ours."""

import subprocess
import sys
from pathlib import Path

SAELENS = "6.54.12"
DICTIONARY_LEARNING = "0.1.0"
INSTALLS = (
    ["torch==2.13.0"],  # first, so that nothing below picks another build
    [f"sae-lens=={SAELENS}", "einops"],
    ["--no-deps", f"dictionary-learning=={DICTIONARY_LEARNING}"],  # its nnsight<0.4 clashes with the rest
)


def peers_python(cache: Path) -> Path:
    """The interpreter of the environment below `cache`, installed if it is not there whole."""
    folder = cache / "peers-env"
    python, done = folder / "bin/python", folder / "installed"
    if not done.exists():
        print("making the peers' environment (once, some minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in INSTALLS:
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        done.write_text("\n".join(" ".join(packages) for packages in INSTALLS) + "\n")
    return python
