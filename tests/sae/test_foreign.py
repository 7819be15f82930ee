"""Files from elsewhere: Gemma Scope 1 reads right, and every unsound file is refused before memory is taken for it."""

import io
import json
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import artifact, gemma_scope_1, saelens, strict
from sae.strict import ArtifactError
from tests.published import make_config, make_dictionary, make_rows, make_spec, tensors

TEBIBYTE = 1 << 40


class Executes:
    """Its pickle leaves a file behind when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refused(read: Callable, path: Path, match: str | None = None) -> None:
    """`read` raises the typed error in under a second, having taken no memory to speak of."""
    before, started = peak_bytes(), time.perf_counter()
    with pytest.raises(ArtifactError, match=match) as error:
        read(path)
    assert time.perf_counter() - started < 1
    assert peak_bytes() - before < 64 << 20
    assert str(path if path.is_dir() else path.parent) in str(error.value)


# --- safetensors: the same reader for Gemma Scope 2's folders and for SAELens' ---


@pytest.fixture(params=["gemma_scope_2", "clt", "saelens"])
def foreign(request, tmp_path: Path) -> tuple[Callable, Path, Path]:
    """A reader, a sound folder of its, and the weights in it that are to be spoilt."""
    spec = make_spec("clt" if request.param == "clt" else "sae")
    folder, dictionary = tmp_path / "folder", make_dictionary(spec)
    if request.param == "saelens":
        saelens.write(folder, dictionary, make_config(spec))
        saelens.read(folder)
        return saelens.read, folder, folder / "sae_weights.safetensors"
    artifact.write(folder, dictionary, make_config(spec))
    artifact.read_gemma_scope_2(folder)
    last = "params_layer_2.safetensors" if request.param == "clt" else "params.safetensors"
    return artifact.read_gemma_scope_2, folder, folder / last


def header_and_data(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: dict | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def change_header(path: Path, change: Callable[[dict], None]) -> None:
    header, data = header_and_data(path)
    change(header)
    write_raw(path, header, data)


def change_tensors(path: Path, change: Callable[[dict], None]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    path.unlink()  # the tensors above are views of it
    save_file(weights, path)


def _claim_a_tebibyte(header: dict) -> None:
    name = max(header, key=lambda key: header[key]["data_offsets"][1])
    begin = header[name]["data_offsets"][0]
    header[name] |= {"shape": [TEBIBYTE // 4], "data_offsets": [begin, begin + TEBIBYTE]}


def _overlap(header: dict) -> None:
    vectors = sorted((key for key in header if key.startswith("b_e") or key == "threshold"), key=str)
    header[vectors[1]]["data_offsets"] = header[vectors[0]]["data_offsets"]


def _transpose(header: dict) -> None:
    name = next(key for key in header if key.lower() == "w_enc")
    header[name]["shape"] = header[name]["shape"][::-1]


def _duplicate_key(path: Path) -> None:
    header, data = header_and_data(path)
    raw = json.dumps(header).encode()
    write_raw(path, raw[:-1] + b", " + raw[1:], data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing file": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to(path.parent / "nowhere")),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "empty": lambda path: path.write_bytes(b""),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "cut in the data": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "bytes appended": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 4),
    "header of a tebibyte": lambda path: path.write_bytes(TEBIBYTE.to_bytes(8, "little") + path.read_bytes()[8:]),
    "header is no JSON": lambda path: write_raw(path, b"{" * 100, b""),
    "header is too deep": lambda path: write_raw(path, b'{"a":' * 100_000, b""),
    "header is a list": lambda path: write_raw(path, b"[]", b""),
    "a tensor of a tebibyte": lambda path: change_header(path, _claim_a_tebibyte),
    "tensors overlap": lambda path: change_header(path, _overlap),
    "a shape is turned": lambda path: change_header(path, _transpose),
    "a negative dimension": lambda path: change_header(path, lambda h: h["b_enc"].update(shape=[-24])),
    "a dimension is a fraction": lambda path: change_header(path, lambda h: h["b_enc"].update(shape=[24.0])),
    "an entry is no object": lambda path: change_header(path, lambda h: h.update(b_enc=3)),
    "an unknown dtype": lambda path: change_header(path, lambda h: h["b_enc"].update(dtype="I32")),
    "a key twice": _duplicate_key,
    "a tensor is missing": lambda path: change_tensors(path, lambda w: w.pop("b_enc")),
    "a tensor too many": lambda path: change_tensors(path, lambda w: w.update(more=torch.zeros(1))),
    "another dtype": lambda path: change_tensors(path, lambda w: w.update(b_enc=w["b_enc"].bfloat16())),
    "a scalar": lambda path: change_tensors(path, lambda w: w.update(b_dec=torch.tensor(1.0))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unsound_safetensors_are_refused_before_one_is_loaded(foreign, damage: str, monkeypatch) -> None:
    read, folder, weights = foreign
    DAMAGE[damage](weights)
    loaded = []
    monkeypatch.setattr(strict, "load_file", lambda path: loaded.append(path))
    refused(read, folder)
    assert not loaded


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["threshold", "b_dec"])
def test_values_that_are_not_finite_are_refused(foreign, name: str, value: float) -> None:
    read, folder, weights = foreign
    change_tensors(weights, lambda tensors: tensors[name].__setitem__(3, value))
    refused(read, folder, "not finite")


def test_a_pickle_in_place_of_safetensors_is_refused_and_not_run(foreign, tmp_path: Path) -> None:
    read, folder, weights = foreign
    torch.save({"w_enc": Executes(tmp_path / "trace")}, weights)
    refused(read, folder)
    weights.write_bytes(pickle.dumps(Executes(tmp_path / "trace")))
    refused(read, folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"width": "24"}', "[" * 100_000, " " * (1 << 25)])
def test_an_unsound_config_is_refused(foreign, content: str) -> None:
    read, folder, _ = foreign
    name = "cfg.json" if read is saelens.read else "config.json"
    (folder / name).write_text(content)
    refused(read, folder)


def test_a_header_that_lies_is_refused_though_the_file_is_as_large_as_it_says(tmp_path: Path) -> None:
    """A sparse file of 1 TiB costs nothing to send: only the config can say that it is too large."""
    spec = make_spec("sae")
    artifact.write(tmp_path / "x", make_dictionary(spec), make_config(spec))
    path = tmp_path / "x" / "params.safetensors"
    change_header(path, _claim_a_tebibyte)
    header, data = header_and_data(path)
    described = max(entry["data_offsets"][1] for entry in header.values())
    os.truncate(path, path.stat().st_size - len(data) + described)
    refused(artifact.read_gemma_scope_2, tmp_path / "x", "reads 274877906944 and writes 10")
    path.unlink()


def test_a_decoder_that_writes_earlier_layers_is_refused_and_not_cut_silently(tmp_path: Path) -> None:
    spec = make_spec("crosscoder")
    artifact.write(tmp_path / "x", make_dictionary(spec), make_config(spec))
    path = tmp_path / "x" / "params_layer_1.safetensors"
    change_tensors(path, lambda weights: weights["w_dec"][5, 0].__setitem__(2, 1e-30))
    refused(artifact.read_gemma_scope_2, tmp_path / "x", "not weakly causal")


def test_an_sae_that_writes_another_width_than_it_reads_is_refused(tmp_path: Path) -> None:
    spec = make_spec("sae")
    artifact.write(tmp_path / "x", make_dictionary(spec), make_config(spec))
    change_tensors(
        tmp_path / "x" / "params.safetensors",
        lambda weights: weights.update(w_dec=weights["w_dec"][:, :5].contiguous(), b_dec=weights["b_dec"][:5].clone()),
    )
    refused(artifact.read_gemma_scope_2, tmp_path / "x", "reads 10 and writes 5")


# --- Gemma Scope 1 ---


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """As Google's params.npz has them; written out of a dictionary of ours."""
    dictionary = make_dictionary(make_spec("sae"))
    named = {
        "W_enc": dictionary.w_enc[0], "W_dec": dictionary.w_dec[0], "b_enc": dictionary.b_enc_F,
        "b_dec": dictionary.b_dec_D, "threshold": dictionary.threshold_F,
    }  # fmt: skip
    return {name: tensor.numpy() for name, tensor in named.items()}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_gemma_scope_1__reads_every_bit(save: Callable, order: str, arrays, tmp_path: Path) -> None:
    save(tmp_path / "params.npz", **{name: np.asarray(array, order=order) for name, array in arrays.items()})
    mine, theirs = make_dictionary(make_spec("sae")), gemma_scope_1.read(tmp_path / "params.npz")
    assert theirs.shape == mine.shape
    for n, (a, b) in enumerate(zip(tensors(mine), tensors(theirs), strict=True)):
        assert torch.equal(a, b), n


def test_gemma_scope_1__is_the_jumprelu_that_its_paper_gives(arrays, tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", **arrays)
    dictionary = gemma_scope_1.read(tmp_path / "params.npz")
    rows = make_rows(dictionary)
    x, w = rows.double().numpy(), {name: array.astype(np.float64) for name, array in arrays.items()}
    pre = x @ w["W_enc"] + w["b_enc"]
    latents = pre * (pre > w["threshold"])
    assert 0.1 < (latents > 0).mean() < 0.6
    np.testing.assert_allclose(dictionary.encode(rows).numpy(), latents, atol=1e-5)
    rebuilt = dictionary.decode(dictionary.encode(rows)).numpy()
    np.testing.assert_allclose(rebuilt, latents @ w["W_dec"] + w["b_dec"], atol=1e-5)


def test_gemma_scope_1__reads_a_transcoder_of_two_widths(arrays, tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", **arrays | {"W_dec": np.ones((24, 5), "f4"), "b_dec": np.ones(5, "f4")})
    shape = gemma_scope_1.read(tmp_path / "params.npz").shape
    assert (shape.d_in, shape.width, shape.d_out) == (10, 24, 5)


def _write_entries(path: Path, arrays: dict, compression: int = zipfile.ZIP_STORED, **instead: bytes) -> None:
    """An npz of these arrays, some entries being other bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in arrays.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", instead.get(name, file.getvalue()))


def _npy(shape: tuple, data: bytes = b"", descr: str = "<f4", version: bytes = b"\1\0") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


def _save(change: Callable[[dict], object]) -> Callable[[Path, dict], object]:
    def damage(path: Path, arrays: dict) -> None:
        changed = dict(arrays)
        change(changed)
        np.savez(path, **changed)

    return damage


def _spoil(change: Callable[[bytes], bytes]) -> Callable[[Path, dict], object]:
    def damage(path: Path, arrays: dict) -> None:
        np.savez(path, **arrays)
        path.write_bytes(change(path.read_bytes()))

    return damage


def _twice(path: Path, arrays: dict) -> None:
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("W_enc.npy", _npy((10, 24), bytes(10 * 24 * 4)))


def _bomb(path: Path, arrays: dict) -> None:
    """64 MiB of zeros in 64 KiB, with shapes that agree."""
    wide = {"W_enc": np.zeros((8, 1 << 20), "f4"), "W_dec": np.zeros((1 << 20, 8), "f4")}
    vectors = {"b_enc": np.zeros(1 << 20, "f4"), "threshold": np.zeros(1 << 20, "f4"), "b_dec": np.zeros(8, "f4")}
    np.savez_compressed(path, **wide, **vectors)


NPZ_DAMAGE: dict[str, Callable[[Path, dict], object]] = {
    "missing file": lambda path, arrays: None,
    "not a zip": lambda path, arrays: path.write_bytes(b"PK\3\4" + bytes(1000)),
    "a bare array": lambda path, arrays: np.save(path.open("wb"), arrays["W_enc"]),
    "cut short": _spoil(lambda content: content[:-100]),
    "bytes appended": _spoil(lambda content: content + b"\0" * 10),
    "a flipped bit": _spoil(lambda content: content[:400] + bytes([content[400] ^ 1]) + content[401:]),
    "an array is missing": _save(lambda a: a.pop("threshold")),
    "an array too many": _save(lambda a: a.update(more=a["b_enc"])),
    "an array twice": _twice,
    "a turned shape": _save(lambda a: a.update(W_enc=a["W_enc"].T)),
    "a short vector": _save(lambda a: a.update(b_enc=a["b_enc"][:-1])),
    "a matrix that is a vector": _save(lambda a: a.update(W_dec=a["W_dec"].ravel())),
    "float64": _save(lambda a: a.update(b_dec=a["b_dec"].astype("f8"))),
    "big endian": _save(lambda a: a.update(b_dec=a["b_dec"].astype(">f4"))),
    "NaN": _save(lambda a: a.update(threshold=np.full_like(a["threshold"], np.nan))),
    "a tebibyte": lambda path, a: _write_entries(path, a, W_enc=_npy((10, TEBIBYTE // 32))),
    "a negative dimension": lambda path, a: _write_entries(path, a, b_enc=_npy((-24,), bytes(96))),
    "data after the array": lambda path, a: _write_entries(path, a, b_enc=_npy((24,), bytes(100))),
    "a version to come": lambda path, a: _write_entries(path, a, b_enc=_npy((24,), bytes(96), version=b"\7\0")),
    "a header that runs code": lambda path, a: _write_entries(path, a, b_enc=_npy("__import__('os')", bytes(96))),
    "a compression bomb": _bomb,
}


@pytest.mark.parametrize("damage", NPZ_DAMAGE)
def test_gemma_scope_1__refuses_unsound_files(damage: str, arrays, tmp_path: Path) -> None:
    NPZ_DAMAGE[damage](tmp_path / "params.npz", arrays)
    refused(gemma_scope_1.read, tmp_path / "params.npz")


def test_gemma_scope_1__refuses_a_dictionary_of_nothing(arrays, tmp_path: Path) -> None:
    np.savez(
        tmp_path / "params.npz",
        **{name: array[..., :0] for name, array in arrays.items()} | {"W_dec": np.zeros((0, 0), "f4")},
    )
    refused(gemma_scope_1.read, tmp_path / "params.npz", "not those of one dictionary")


def test_gemma_scope_1__a_pickled_object_is_refused_and_not_run(arrays, tmp_path: Path) -> None:
    objects = np.array([Executes(tmp_path / "trace")], dtype=object)
    np.savez(tmp_path / "params.npz", **arrays | {"b_enc": objects})
    refused(gemma_scope_1.read, tmp_path / "params.npz", "object")
    assert not (tmp_path / "trace").exists()
