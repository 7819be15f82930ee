"""Artifacts read back equal, as Gemma Scope 2's format says, and nothing unsound is read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sae import artifact
from tests.published import KINDS, MODEL, make_config, make_dictionary, make_rows, make_spec, tensors

D, F, L = 10, 24, 3
SINGLE = {"w_enc": (D, F), "b_enc": (F,), "threshold": (F,), "w_dec": (F, D), "b_dec": (D,)}
WIDE = {"w_enc": (L * D, F), "b_enc": (F,), "threshold": (F,), "w_dec": (F, L * D), "b_dec": (L * D,)}
LAYER = {"w_enc": (D, F // L), "b_enc": (F // L,), "threshold": (F // L,), "w_dec": (F // L, L, D), "b_dec": (D,)}
SKIP = {"affine_skip_connection": (D, D)}
RESID, MLP_IN, MLP_OUT = "output", "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"


def layers(shapes: dict) -> dict:
    return {f"params_layer_{n}.safetensors": shapes for n in range(L)}


# What Google's repositories hold for each kind: layers and tensors of the hook strings, and every file's shapes.
PUBLISHED = {
    "sae": ("9", RESID, RESID, {"params.safetensors": SINGLE}),
    "attn_sae": ("9", "self_attn.o_proj.input", "self_attn.o_proj.input", {"params.safetensors": SINGLE}),
    "transcoder": ("9", MLP_IN, MLP_OUT, {"params.safetensors": SINGLE}),
    "skip_transcoder": ("9", MLP_IN, MLP_OUT, {"params.safetensors": SINGLE | SKIP}),
    "crosscoder": ("{5,9,12}", RESID, RESID, layers(LAYER)),
    "acausal_crosscoder": ("{5,9,12}", RESID, RESID, {"params.safetensors": WIDE}),
    "clt": ("{0,1,2}", MLP_IN, MLP_OUT, layers(LAYER)),
    "skip_clt": ("{0,1,2}", MLP_IN, MLP_OUT, layers(LAYER | SKIP)),
}


def publish(name: str, root: Path) -> Path:
    spec = make_spec(name)
    artifact.write(root / spec.folder, make_dictionary(spec), make_config(spec))
    artifact.seal(root / spec.folder)
    return root / spec.folder


@pytest.mark.parametrize("name", KINDS)
def test_read__gives_back_every_bit(name: str, tmp_path: Path) -> None:
    mine = make_dictionary(make_spec(name))
    theirs, _ = artifact.read(publish(name, tmp_path))
    assert theirs.shape == mine.shape
    for n, (a, b) in enumerate(zip(tensors(mine), tensors(theirs), strict=True)):
        assert torch.equal(a, b), n


@pytest.mark.parametrize("name", KINDS)
def test_write__has_gemma_scope_2s_files_names_shapes_dtypes_and_config(name: str, tmp_path: Path) -> None:
    folder = publish(name, tmp_path)
    where, read, written, files = PUBLISHED[name]
    assert (folder / "config.json").read_text() == json.dumps(
        {
            "hf_hook_point_in": f"model.layers.{where}.{read}",
            "hf_hook_point_out": f"model.layers.{where}.{written}",
            "width": F,
            "model_name": MODEL,
            "architecture": "jump_relu",
            "l0": 4,
            "affine_connection": "skip" in name,
            "type": name.split("_")[-1],
        },
        indent=2,
    ) + "\n"  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"config.json", "manifest.json", *files}
    for file_name, shapes in files.items():
        with safe_open(folder / file_name, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            assert {key: tuple(part.get_shape()) for key, part in slices.items()} == shapes
            assert {part.get_dtype() for part in slices.values()} == {"F32"}


@pytest.mark.parametrize("name", ["crosscoder", "skip_clt"])
def test_write__the_layer_files_give_the_rows_by_the_formula_of_googles_tutorial(name: str, tmp_path: Path) -> None:
    folder, mine = publish(name, tmp_path), make_dictionary(make_spec(name))
    names = LAYER | (SKIP if mine.w_skip else {})
    stacked = {}
    for key in names:
        parts = []
        for n in range(L):
            with safe_open(folder / f"params_layer_{n}.safetensors", framework="pt") as file:
                parts.append(file.get_tensor(key))
        stacked[key] = torch.stack(parts)
    rows = make_rows(mine)
    x_LBD = rows.unflatten(1, (L, D)).transpose(0, 1)
    pre_LBF = x_LBD @ stacked["w_enc"] + stacked["b_enc"][:, None]
    f_LBF = (pre_LBF > stacked["threshold"][:, None]) * pre_LBF.relu()
    y_LBD = torch.einsum("lbf,lfmd->mbd", f_LBF, stacked["w_dec"]) + stacked["b_dec"][:, None]
    if mine.w_skip:
        y_LBD = y_LBD + x_LBD @ stacked["affine_skip_connection"]
    latents = mine.encode(rows)
    assert 0.1 < (latents > 0).float().mean() < 0.6
    torch.testing.assert_close(f_LBF.transpose(0, 1).flatten(1), latents)
    torch.testing.assert_close(y_LBD.transpose(0, 1).flatten(1), mine.decode(latents, rows))


def test_config__of_a_clt_over_every_layer_says_all(tmp_path: Path) -> None:
    spec = make_spec("clt")
    config = artifact.config(spec, MODEL, n_layers=L)
    assert config["hf_hook_point_in"] == "model.layers.{all}.pre_feedforward_layernorm.output"
    assert config["hf_hook_point_out"] == "model.layers.{all}.post_feedforward_layernorm.output"
    artifact.write(tmp_path / "clt", make_dictionary(spec), config)
    assert artifact.read_gemma_scope_2(tmp_path / "clt")[0].shape == make_dictionary(spec).shape


def test_read_gemma_scope_2__follows_the_links_of_a_hugging_face_cache(tmp_path: Path) -> None:
    folder, snapshot = publish("sae", tmp_path), tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "params.safetensors"):
        (snapshot / name).symlink_to(folder / name)
    assert artifact.read_gemma_scope_2(snapshot)[0].shape == artifact.read(folder)[0].shape


@pytest.mark.parametrize("name", ["sae", "clt"])
def test_topk__keeps_its_k_and_has_no_thresholds_that_another_reader_could_use(name: str, tmp_path: Path) -> None:
    spec = make_spec(name).model_copy(update={"activation": "topk"})
    dictionary = make_dictionary(spec)
    dictionary = replace(dictionary, threshold_F=torch.zeros_like(dictionary.threshold_F), k=spec.l0)
    artifact.write(tmp_path / "x", dictionary, make_config(spec))
    artifact.seal(tmp_path / "x")
    again, settings = artifact.read(tmp_path / "x")
    x = make_rows(dictionary)
    assert (settings["architecture"], settings["k"], again.k) == ("topk", spec.l0, spec.l0)
    assert torch.equal(again.encode(x), dictionary.encode(x))
    for path in (tmp_path / "x").glob("params*"):
        with safe_open(path, framework="pt") as file:
            assert "threshold" not in file.keys()  # noqa: SIM118, not a dict


def _flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "params.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "params.safetensors").write_bytes(content)


def _truncate(folder: Path) -> None:
    content = (folder / "params.safetensors").read_bytes()
    (folder / "params.safetensors").write_bytes(content[:-64])


def _change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    artifact.seal(folder)


def _unlist(folder: Path) -> None:
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    del manifest["files"]["params.safetensors"]
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_byte,
        _truncate,
        _unlist,
        lambda f: _change_config(f, width=2 * F),
        lambda f: _change_config(f, affine_connection=True),
        lambda f: _change_config(f, architecture="topk"),
        lambda f: _change_config(f, type="clt"),
        lambda f: _change_config(f, type="something"),
        lambda f: (f / artifact.MANIFEST).unlink(),
        lambda f: (f / artifact.MANIFEST).write_text('{"files": {"config.json": 3}}'),
        lambda f: (f / artifact.MANIFEST).write_text("[]"),
        lambda f: (f / "config.json").unlink(),
    ],
)
def test_read__refuses_what_is_not_whole(damage, tmp_path: Path) -> None:
    folder = publish("sae", tmp_path)
    artifact.read(folder)
    damage(folder)
    with pytest.raises(artifact.ArtifactError):
        artifact.read(folder)


def test_read_gemma_scope_2__names_the_remedy_for_a_missing_config(tmp_path: Path) -> None:
    folder = publish("sae", tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(artifact.ArtifactError, match="write one"):
        artifact.read_gemma_scope_2(folder)


@pytest.mark.parametrize("change", ["one fewer", "one more", "other hooks"])
def test_read_gemma_scope_2__refuses_files_of_other_layers(change: str, tmp_path: Path) -> None:
    folder = publish("clt", tmp_path)
    if change == "one fewer":
        (folder / "params_layer_2.safetensors").unlink()
    elif change == "one more":
        shutil.copy(folder / "params_layer_2.safetensors", folder / "params_layer_3.safetensors")
    else:
        _change_config(folder, hf_hook_point_in="model.layers.{0,1}.pre_feedforward_layernorm.output")
    with pytest.raises(artifact.ArtifactError, match="layers"):
        artifact.read_gemma_scope_2(folder)
