"""SAELens, unmodified, loads what we publish and what we write in its own format; what it saves loads here."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import artifact, saelens
from sae.dictionary import Dictionary
from sae.strict import ArtifactError
from tests.published import make_config, make_dictionary, make_rows, make_spec

REPOSITORY = "someone/gemma-scope-2-270m-jumprelu"
D, F = 10, 24


def same(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


# --- Gemma Scope 2's layout, through the loader that SAELens uses for Google's own repositories ---

# What a user of SAELens types; nothing of SAELens is replaced.
READER = """
import json, sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import gemma_3_sae_huggingface_loader

repository, given, answer, *names = sys.argv[1:]
rows, loaded = load_file(given)["rows"], {}
for name in names:
    sae = SAE.from_pretrained(repository, name, converter=gemma_3_sae_huggingface_loader)
    save_file({"latents": sae.encode(rows), "rebuilt": sae(rows)}, f"{answer}/{name.replace('/', '.')}.safetensors")
    loaded[name] = [sae.cfg.architecture(), sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out]
json.dump(loaded, open(f"{answer}/loaded.json", "w"))
"""
PUBLISHED = {
    "sae": ["jumprelu", "blocks.9.hook_resid_post", None],
    "attn_sae": ["jumprelu", "blocks.9.attn.hook_z", None],
    "transcoder": ["jumprelu_transcoder", "blocks.9.hook_mlp_in", "blocks.9.hook_mlp_out"],
    "skip_transcoder": ["jumprelu_skip_transcoder", "blocks.9.hook_mlp_in", "blocks.9.hook_mlp_out"],
}


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
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
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
def hub(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A suite folder, and the endpoint that serves it as a repository."""
    suite = tmp_path / "suite"
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SuiteHub", (Hub,), {"suite": suite}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield suite, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_saelens__loads_published_folders_and_the_layers_of_a_clt(hub: tuple[Path, str], tmp_path: Path) -> None:
    suite, endpoint = hub
    dictionaries = {}
    for name in (*PUBLISHED, "skip_clt"):
        spec = make_spec(name)
        dictionaries[spec.folder] = make_dictionary(spec)
        artifact.write(suite / spec.folder, dictionaries[spec.folder], make_config(spec))
        artifact.seal(suite / spec.folder)
    expected = {make_spec(name).folder: answer for name, answer in PUBLISHED.items()}
    clt = make_spec("skip_clt").folder
    hooks = ["blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"]
    expected[f"{clt}/params_layer_1"] = ["jumprelu_skip_transcoder", *hooks]
    rows = make_rows(dictionaries[make_spec("sae").folder])
    save_file({"rows": rows}, tmp_path / "given.safetensors")

    command = [sys.executable, "-c", READER, REPOSITORY, tmp_path / "given.safetensors", tmp_path, *expected]
    hugging_face = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | hugging_face | {"HF_ENDPOINT": endpoint}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    assert json.loads((tmp_path / "loaded.json").read_text()) == expected
    answers = {name: load_file(tmp_path / f"{name.replace('/', '.')}.safetensors") for name in expected}
    for name in expected.keys() & dictionaries.keys():
        latents = dictionaries[name].encode(rows)
        assert 0.1 < (latents > 0).float().mean() < 0.6
        same(answers[name]["latents"], latents)
        same(answers[name]["rebuilt"], dictionaries[name].decode(latents, rows))
    # Of a CLT it takes one layer's latents; its "decoder" is the sum over the layers written, so nothing to compare.
    group = dictionaries[clt].shape.groups[1]
    given = torch.zeros(len(rows), dictionaries[clt].shape.d_in)
    given[:, group.reads] = rows
    same(answers[f"{clt}/params_layer_1"]["latents"], dictionaries[clt].encode(given)[:, group.latents])


# --- SAELens' native folder, written here ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_write__loads_from_disk_equally(name: str, tmp_path: Path) -> None:
    from sae_lens import SAE

    spec = make_spec(name)
    ours = make_dictionary(spec)
    rows = make_rows(ours)
    saelens.write(tmp_path / "x", ours, make_config(spec))
    theirs = SAE.load_from_disk(tmp_path / "x")
    metadata = theirs.cfg.metadata
    assert [theirs.cfg.architecture(), metadata.hook_name, metadata.hook_name_out] == PUBLISHED[name]
    assert (metadata.hf_hook_name, metadata.model_name) == (spec.reads[0].hook_point, "google/gemma-3-270m")
    latents = ours.encode(rows)
    same(theirs.encode(rows), latents)
    same(theirs(rows), ours.decode(latents, rows))
    back, _ = saelens.read(tmp_path / "x")
    assert torch.equal(back.decode(back.encode(rows), rows), ours.decode(latents, rows))


def test_write__keeps_a_top_k(tmp_path: Path) -> None:
    from sae_lens import SAE

    spec = make_spec("sae")
    ours = replace(make_dictionary(spec), k=5, threshold_F=torch.zeros(F))
    saelens.write(tmp_path / "x", ours, make_config(spec))
    theirs, rows = SAE.load_from_disk(tmp_path / "x"), make_rows(ours)
    assert theirs.cfg.architecture() == "topk"
    assert ((ours.encode(rows) > 0).sum(1) == 5).any()
    same(theirs.encode(rows), ours.encode(rows))
    assert saelens.read(tmp_path / "x")[0].k == 5


@pytest.mark.parametrize(
    ("name", "k"), [("crosscoder", None), ("acausal_crosscoder", None), ("clt", None), ("sae", 5), ("transcoder", 5)]
)
def test_write__refuses_what_saelens_has_no_class_for(name: str, k: int | None, tmp_path: Path) -> None:
    spec = make_spec(name)  # with thresholds, which a TopK there has not
    dictionary = replace(make_dictionary(spec), k=k)
    with pytest.raises(ValueError, match="SAELens has no"):
        saelens.write(tmp_path / "x", dictionary, make_config(spec))
    assert not (tmp_path / "x").exists()


# --- what SAELens saves, read here ---

INFERENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("StandardSAE", {}),
    "standard, input less b_dec": ("StandardSAE", {"apply_b_dec_to_input": True}),
    "jumprelu": ("JumpReLUSAE", {}),
    "jumprelu, input less b_dec": ("JumpReLUSAE", {"apply_b_dec_to_input": True}),
    "gated": ("GatedSAE", {}),
    "gated, input less b_dec": ("GatedSAE", {"apply_b_dec_to_input": True}),
    "topk": ("TopKSAE", {"k": 5}),
    "topk, rescaled": ("TopKSAE", {"k": 5, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True}),
    "transcoder": ("Transcoder", {"d_out": 6}),
    "skip transcoder": ("SkipTranscoder", {"d_out": 6}),
    "jumprelu transcoder": ("JumpReLUTranscoder", {"d_out": 6}),
    "jumprelu skip transcoder": ("JumpReLUSkipTranscoder", {"d_out": 6}),
    "square skip transcoder": ("JumpReLUSkipTranscoder", {"d_out": D}),
}
TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("StandardTrainingSAE", {}),
    "gated": ("GatedTrainingSAE", {}),
    "jumprelu": ("JumpReLUTrainingSAE", {}),
    "topk": ("TopKTrainingSAE", {"k": 5}),
    "topk, not rescaled": ("TopKTrainingSAE", {"k": 5, "rescale_acts_by_decoder_norm": False}),
    "batchtopk": ("BatchTopKTrainingSAE", {"k": 5}),
    "matryoshka batchtopk": ("MatryoshkaBatchTopKTrainingSAE", {"k": 5, "matryoshka_widths": [6, 12, F]}),
}


def build(class_name: str, **settings: Any) -> Any:
    """One of SAELens' classes with random weights; a threshold or a BatchTopK's is positive."""
    import sae_lens.saes

    config = getattr(sae_lens.saes, f"{class_name}Config")
    sae = getattr(sae_lens.saes, class_name)(
        config(**{"d_in": D, "d_sae": F, "apply_b_dec_to_input": False} | settings)
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            random = torch.randn(tensor.shape, generator=generator) / D**0.5
            tensor.copy_(random.abs() + 0.1 if "threshold" in name else random)
    return sae


def compare(folder: Path, rows: torch.Tensor, theirs: Any) -> Dictionary:
    """Features and rebuilt rows are those of SAELens; about a third of the latents is active."""
    ours, _ = saelens.read(folder)
    latents = theirs.encode(rows).detach()
    assert 0.05 < (latents > 0).float().mean() < 0.6
    # A TopK with the rescaling option has latents in units of its decoder's norms, in SAELens as here.
    flat = rows.flatten(1)
    same(latents, ours.encode(flat))
    same(theirs(rows).detach().flatten(1), ours.decode(ours.encode(flat), flat))
    return ours


@pytest.mark.parametrize("name", INFERENCE)
def test_read__equals_saelens(name: str, tmp_path: Path) -> None:
    class_name, settings = INFERENCE[name]
    theirs = build(class_name, **settings)
    theirs.save_model(tmp_path)
    ours = compare(tmp_path, torch.randn(64, D, generator=torch.Generator().manual_seed(5)), theirs)
    assert ours.shape.d_out == settings.get("d_out", D)
    assert ours.k == settings.get("k")


@pytest.mark.parametrize("name", TRAINING)
def test_read__equals_saelens_after_its_training(name: str, tmp_path: Path) -> None:
    from sae_lens import SAE

    class_name, settings = TRAINING[name]
    build(class_name, **settings).save_inference_model(tmp_path)
    rows = torch.randn(64, D, generator=torch.Generator().manual_seed(5))
    compare(tmp_path, rows, SAE.load_from_disk(tmp_path))


def test_read__takes_the_heads_of_hook_z_flat(tmp_path: Path) -> None:
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name="blocks.1.attn.hook_z")
    theirs = build("StandardSAE", reshape_activations="hook_z", metadata=metadata)
    theirs.save_model(tmp_path)
    compare(tmp_path, torch.randn(64, 2, D // 2, generator=torch.Generator().manual_seed(5)), theirs)


def test_read__passes_over_settings_of_other_architectures_as_saelens_does(tmp_path: Path) -> None:
    from sae_lens import SAE

    build("StandardSAE").save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"k": 2, "rescale_acts_by_decoder_norm": True, "d_out": 3}))
    rows = torch.randn(64, D, generator=torch.Generator().manual_seed(5))
    assert compare(tmp_path, rows, SAE.load_from_disk(tmp_path)).k is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_read__widens_half_precision(dtype: str, tmp_path: Path) -> None:
    theirs = build("JumpReLUSAE", dtype=dtype)
    theirs.save_model(tmp_path)
    ours, _ = saelens.read(tmp_path)
    assert torch.equal(ours.w_enc[0], theirs.W_enc.float())
    assert torch.equal(ours.threshold_F, theirs.threshold.float())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is layer_norm"),
        ({"normalize_activations": "constant_norm_rescale"}, "no fixed weights"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"architecture": "matryoshka_batchtopk"}, "save_inference_model"),
        ({"architecture": "abstopk", "k": 5}, "architecture"),
        ({"architecture": "matching_pursuit"}, "architecture"),
        ({"architecture": "topk"}, "k=None"),
        ({"architecture": "topk", "k": F + 1}, f"k={F + 1}"),
        ({"architecture": "gated"}, "lacks"),
        ({"architecture": "transcoder"}, "d_out"),
        ({"architecture": "transcoder", "d_out": D, "apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ({"d_sae": F + 1}, "expected F32"),
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": "bfloat16"}, "expected BF16"),
        ({"metadata": {"sae_lens_version": "5.9.1"}}, "before SAELens 6"),
        ({"metadata": {}}, "before SAELens 6"),
        ({"metadata": []}, "before SAELens 6"),
    ],
)
def test_read__refuses_what_it_would_read_wrong(changes: dict, match: str, tmp_path: Path) -> None:
    build("StandardSAE").save_model(tmp_path)
    saelens.read(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(ArtifactError, match=match):
        saelens.read(tmp_path)
