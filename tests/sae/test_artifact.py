"""Artifacts read back equal, as Gemma Scope 2's format says, and nothing unsound is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sae import artifact
from sae.dictionary import Dictionary
from sae.spec import DictionarySpec, Training

D, F = 8, 24


@pytest.fixture
def dictionary() -> Dictionary:
    g = torch.Generator().manual_seed(0)
    return Dictionary(
        torch.randn(D, F, generator=g), torch.randn(F, generator=g), torch.rand(F, generator=g),
        torch.randn(F, D, generator=g), torch.randn(D, generator=g),
    )  # fmt: skip


@pytest.fixture
def spec() -> DictionarySpec:
    return DictionarySpec(
        id="x",
        site="resid_post",
        layer=9,
        kind="sae",
        activation="jumprelu",
        width=F,
        l0=4,
        seed=0,
        training=Training(),
    )


@pytest.fixture
def folder(tmp_path: Path, dictionary: Dictionary, spec: DictionarySpec) -> Path:
    folder = tmp_path / artifact.folder_name(spec)
    artifact.write(folder, dictionary, artifact.config(spec, "google/gemma-3-270m"))
    artifact.seal(folder)
    return folder


def test_read__gives_back_every_bit(folder: Path, dictionary: Dictionary) -> None:
    read, _ = artifact.read(folder)
    for name, mine, theirs in zip(Dictionary._fields, dictionary, read, strict=True):
        assert torch.equal(mine, theirs), name


def test_write__has_gemma_scope_2s_names_shapes_dtypes_and_config(folder: Path) -> None:
    assert folder.parts[-2:] == ("resid_post", "layer_9_width_24_l0_4")
    assert json.loads((folder / "config.json").read_text()) == {
        "hf_hook_point_in": "model.layers.9.output",
        "hf_hook_point_out": "model.layers.9.output",
        "width": F,
        "model_name": "google/gemma-3-270m",
        "architecture": "jump_relu",
        "l0": 4,
        "affine_connection": False,
        "type": "sae",
    }
    with safe_open(folder / "params.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118
    assert shapes == {"w_enc": (D, F), "b_enc": (F,), "threshold": (F,), "w_dec": (F, D), "b_dec": (D,)}


@pytest.mark.parametrize(
    ("width", "label"),
    [(16384, "16k"), (65536, "65k"), (262144, "262k"), (524288, "524k"), (1048576, "1m"), (4096, "4k"), (512, "512")],
)
def test_width_label__is_gemma_scope_2s(width: int, label: str) -> None:
    assert artifact.width_label(width) == label


def _flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "params.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "params.safetensors").write_bytes(content)


def _truncate(folder: Path) -> None:
    content = (folder / "params.safetensors").read_bytes()
    (folder / "params.safetensors").write_bytes(content[:-64])


def _claim_another_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"width": 2 * F}))
    artifact.seal(folder)


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_byte,
        _truncate,
        _claim_another_width,
        lambda f: (f / artifact.MANIFEST).unlink(),
        lambda f: (f / "config.json").unlink(),
    ],
)
def test_read__refuses_what_is_not_whole(folder: Path, damage) -> None:
    artifact.read(folder)
    damage(folder)
    with pytest.raises(artifact.ArtifactError):
        artifact.read(folder)
