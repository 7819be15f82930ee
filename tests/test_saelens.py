"""What we publish loads in SAELens as it stands, through the loader that it uses for Google's own repositories."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import artifact
from sae.spec import DictionarySpec, Training
from sae.step import TrainingDictionary

REPOSITORY = "someone/gemma-scope-2-270m-batch_topk"
# What a user of SAELens types; nothing of SAELens is replaced.
READER = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import gemma_3_sae_huggingface_loader

repository, name, given, answer = sys.argv[1:]
sae = SAE.from_pretrained(repository, name, converter=gemma_3_sae_huggingface_loader)
assert sae.cfg.architecture() == "jumprelu"
assert sae.cfg.metadata.hook_name == "blocks.9.hook_resid_post"
rows = load_file(given)["rows"]
latents = sae.encode(rows)
save_file({"latents": latents, "rebuilt": sae.decode(latents)}, answer)
"""


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, str, torch.Tensor]:
    """A suite folder with one trained and folded dictionary, its path in the suite, and raw rows."""
    spec = DictionarySpec(
        id="x", site="resid_post", layer=9, kind="sae", activation="batch_topk", width=128, l0=8, seed=0,
        training=Training(),
    )  # fmt: skip
    dictionary = TrainingDictionary(spec, 64, torch.device("cpu"))
    rows = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    for step in range(20):
        dictionary.step(rows / 8, (step + 1) / 20)
    folder = tmp_path / "suite" / artifact.folder_name(spec)
    artifact.write(folder, dictionary.folded(8.0), artifact.config(spec, "google/gemma-3-270m"))
    artifact.seal(folder)
    return tmp_path / "suite", artifact.folder_name(spec), rows


class Hub(BaseHTTPRequestHandler):
    """As much of a Hugging Face hub as a download of one repository needs; `suite` is its folder."""

    suite: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.suite / self.path.removeprefix(f"/{REPOSITORY}/resolve/main/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            content = content[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206 if wanted else 200)
        for header, value in {"ETag": f'"{digest}"', "X-Repo-Commit": "0" * 40, "Content-Length": len(content)}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(published) -> Iterator[str]:
    """Serves the suite as a repository; the endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SuiteHub", (Hub,), {"suite": published[0]}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_saelens__loads_the_folder_and_encodes_equally(published, hub: str, tmp_path: Path) -> None:
    suite, name, rows = published
    ours, _ = artifact.read(suite / name)
    save_file({"rows": rows}, tmp_path / "given.safetensors")
    command = [
        sys.executable,
        "-c",
        READER,
        REPOSITORY,
        name,
        str(tmp_path / "given.safetensors"),
        str(tmp_path / "answer.safetensors"),
    ]
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "answer.safetensors")

    latents = ours.encode(rows)
    assert 0 < (latents > 0).sum() < latents.numel()
    torch.testing.assert_close(theirs["latents"], latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["rebuilt"], ours.decode(latents), rtol=1e-5, atol=1e-5)
