"""circuit-tracer, unmodified, loads the per-layer transcoders and CLTs that we publish, with equal latents and rows.

circuit-tracer 0.5.0 asks for huggingface-hub < 1 and transformers < 4.58, so it cannot live in our environment. It is
put into a folder of its own, with what it imports, and run by a Python that looks there first.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import artifact
from sae.dictionary import Dictionary
from sae.spec import DictionarySpec
from tests.published import make_config, make_dictionary, make_rows, make_spec

pytestmark = pytest.mark.real

PINS = ["circuit-tracer==0.5.0", "huggingface-hub==0.36.0", "tokenizers==0.22.1", "transformers==4.57.3"]
LAYERS = 3
# `load_transcoders` takes a config.yaml, and Google's layout where the repository has "gemma-scope-2" in its name.
READER = """
import sys, json, torch
from safetensors.torch import load_file, save_file
from circuit_tracer.utils.hf_utils import load_transcoders

config, given, answer = json.loads(sys.argv[1]), load_file(sys.argv[2]), sys.argv[3]
loaded = load_transcoders(config, device=torch.device("cpu"), dtype=torch.float32)
with torch.no_grad():
    latents = loaded.encode(given["x"])
    save_file({"latents": latents, "rebuilt": loaded.decode(latents, given["x"])}, answer)
"""


@pytest.fixture(scope="module")
def site(request) -> Path:
    """Where circuit-tracer is installed; kept in pytest's cache, complete or not there."""
    folder = request.config.cache.mkdir("circuit-tracer") / "-".join(PINS).replace("==", "-")
    if not folder.exists():
        staged = folder.with_name(f"staged-{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
        done = subprocess.run([*pip, "--target", str(staged), *PINS], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        staged.rename(folder)
    return folder


def run(site: Path, kind: str, files: list[Path], x_LBD: torch.Tensor, folder: Path) -> dict[str, torch.Tensor] | str:
    """What the reader answers, or its error."""
    config = {
        "model_kind": kind,
        "repo_id": "someone/gemma-scope-2-270m-jumprelu",
        "transcoders": [str(path) for path in files],
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "someone/gemma-scope-2-270m-jumprelu",
    }
    given, answer = folder / "given.safetensors", folder / "answer.safetensors"
    save_file({"x": x_LBD.contiguous()}, given)
    command = [sys.executable, "-c", READER, json.dumps(config), str(given), str(answer)]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return load_file(answer) if done.returncode == 0 else done.stderr


def publish(spec: DictionarySpec, dictionary: Dictionary, folder: Path) -> Path:
    artifact.write(folder, dictionary, make_config(spec))
    artifact.seal(folder)
    return folder


def publish_clt(name: str, root: Path) -> tuple[Dictionary, list[Path]]:
    spec = make_spec(name)
    dictionary = make_dictionary(spec)
    folder = publish(spec, dictionary, root / spec.folder)
    return dictionary, [folder / f"params_layer_{layer}.safetensors" for layer in range(LAYERS)]


def by_layer(rows: torch.Tensor) -> torch.Tensor:
    """[B, L·n] → [L, B, n]"""
    return rows.unflatten(1, (LAYERS, -1)).transpose(0, 1)


def same(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
def test_per_layer_transcoders__are_equal(name: str, site: Path, tmp_path: Path) -> None:
    dictionaries, files = [], []
    for layer in range(LAYERS):
        spec = make_spec(name).model_copy(update={"layers": (layer,)})
        dictionaries.append(make_dictionary(spec, seed=layer))
        folder = publish(spec, dictionaries[-1], tmp_path / f"layer_{layer}_width_24_l0_4")
        files.append(folder / "params.safetensors")
    rows = [make_rows(dictionary) + layer for layer, dictionary in enumerate(dictionaries)]
    answer = run(site, "transcoder_set", files, torch.stack(rows), tmp_path)
    assert isinstance(answer, dict), answer
    for layer, (dictionary, x) in enumerate(zip(dictionaries, rows, strict=True)):
        latents = dictionary.encode(x)
        assert 0.1 < (latents > 0).float().mean() < 0.6
        same(answer["latents"][layer], latents)
        same(answer["rebuilt"][layer], dictionary.decode(latents, x))


@pytest.mark.parametrize("name", ["clt", "skip_clt"])
def test_clt__is_equal_where_the_config_lists_its_last_file_twice(name: str, site: Path, tmp_path: Path) -> None:
    """So that `max(paths)` is the number of layers; then the loader is right throughout, the skips' orientation too."""
    dictionary, files = publish_clt(name, tmp_path)
    rows = make_rows(dictionary)
    latents = dictionary.encode(rows)
    answer = run(site, "cross_layer_transcoder", [*files, files[-1]], by_layer(rows), tmp_path)
    assert isinstance(answer, dict), answer
    assert 0.1 < (latents > 0).float().mean() < 0.6
    same(answer["latents"], by_layer(latents))
    same(answer["rebuilt"], by_layer(dictionary.decode(latents, rows)))


def test_clt__fault_of_circuit_tracer_0_5_0__leaves_the_last_layer_out_and_so_cannot_load(
    site: Path, tmp_path: Path
) -> None:
    """`range(max(paths))` over layers 0..L-1 reads L-1 files, whose decoders write L layers: the shapes do not fit.

    Ours is the format of Google's files, which it cannot load either; nothing is changed in it to please this loader.
    """
    dictionary, files = publish_clt("clt", tmp_path)
    answer = run(site, "cross_layer_transcoder", files, by_layer(make_rows(dictionary)), tmp_path)
    assert isinstance(answer, str)
    width, d = dictionary.shape.width // LAYERS, dictionary.shape.read_widths[0]
    for layer in range(LAYERS - 1):
        theirs, ours = ([width, n - layer, d] for n in (LAYERS - 1, LAYERS))
        assert f"size mismatch for W_dec.{layer}: copying a param with shape torch.Size({ours})" in answer
        assert f"the shape in current model is torch.Size({theirs})" in answer
    assert f"W_dec.{LAYERS - 1}" not in answer
