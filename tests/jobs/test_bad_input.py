"""Each wrong input is one line that names the field and the remedy, with exit code 2, before anything is started."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import sweep as job


def changed(recipe: dict, path: str, value: Any) -> dict:
    """The recipe with one value replaced; `path` is dotted, numbers index lists."""
    copy = yaml.safe_load(yaml.safe_dump(recipe))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = copy
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[last] = value
    return copy


# A grid of a kind whose layers make one dictionary.
JOINT = {"kind": "clt", "layers": [0, 1, 3], "activations": ["topk"], "widths": [66], "l0s": [8]}
# (field to change, value, what the message must name: the field and the remedy)
CASES = {
    "unknown key": ("swep", [], ["swep", "did you mean sweep?"]),
    "unknown nested key": ("corpus.contxt", 32, ["corpus.contxt", "did you mean context?"]),
    "unknown key in a list": ("sweep.0.width", [64], ["sweep.0.width", "did you mean widths?"]),
    "unlike any key": ("model.zzzzzz", 1, ["model.zzzzzz", "valid are name"]),
    "wrong type": ("corpus.train_tokens", "many", ["corpus.train_tokens", "integer", "many"]),
    "unknown option": ("sweep.0.options", {"matroshka": {}}, ["sweep.0.options.matroshka", "did you mean matryoshka"]),
    "unknown key of an option": (
        "sweep.0.options", {"auxk": {"latent": 3}}, ["sweep.0.options.auxk.latent", "did you mean latents?"],
    ),
    "unknown training key": ("training.learning_rat", 1, ["training.learning_rat", "did you mean learning_rate?"]),
    "unknown key over a preset": (
        "sweep.0.training", {"base": "gemma_scope_2", "jumprelu": {"bandwith": 1}},
        ["sweep.0.training.jumprelu.bandwith", "did you mean bandwidth?"],
    ),
    "no such preset": ("training", "gemma_scope2", ["training", "did you mean gemma_scope_2?"]),
    "no such activation": ("sweep.0.activations", ["topk9"], ["sweep.0.activations.0", "batch_topk"]),
    "no such kind": ("sweep.0.kind", "transcodr", ["sweep.0.kind", "transcoder"]),
    "no such layers": ("sweep.0.layers", "al", ["sweep.0.layers", "all or subset", "'al'"]),
    "a negative layer": ("sweep.0.layers", [-1], ["sweep.0.layers", "-1 is no whole number"]),
    "a layer twice": ("sweep.0.layers", [2, 2], ["sweep.0.layers", "layer 2 is listed twice"]),
    "all layers of an unknown model": ("sweep.0.layers", "all", ["sweep.0.layers", "all needs", "give numbers"]),
    "a labelled l0 of an unknown model": ("sweep.0.l0s", ["big"], ["sweep.0.l0s", "big needs", "give numbers"]),
    "no such width label": ("sweep.0.widths", ["16"], ["sweep.0.widths", "did you mean 16k?"]),
    "a width of zero": ("sweep.0.widths", [0], ["sweep.0.widths", "0 is no whole number"]),
    "no l0s": ("sweep.0.l0s", [], ["sweep.0.l0s", "give a list"]),
    "no such l0 label": ("sweep.0.l0s", ["bigg"], ["sweep.0.l0s", "did you mean big?"]),
    "a small crosscoder": (
        "sweep.0", {**JOINT, "kind": "crosscoder", "l0s": ["small"]}, ["sweep.0.l0s", "medium or big"],
    ),
    "a clt of one layer": ("sweep.0", {**JOINT, "layers": [1]}, ["sweep.0.layers", "list two or more"]),
    "a width that layers cannot share": ("sweep.0", {**JOINT, "widths": [65]}, ["sweep.0.widths", "66"]),
    "sites of a clt": ("sweep.0", {**JOINT, "sites": ["mlp_in"]}, ["sweep.0.sites", "drop sites"]),
    "a crosscoder of two sites": (
        "sweep.0", {**JOINT, "kind": "crosscoder", "sites": ["mlp_out", "mlp_in"]},
        ["sweep.0.sites", "a grid for each"],
    ),
    "an affine sae": ("sweep.0.affine", [True], ["sweep.0.affine", "sae has no skip"]),
    "affine as an option": ("sweep.0", {**JOINT, "options": {"affine": True}}, ["sweep.0.options.affine", "affine: ["]),
    "an acausal clt": ("sweep.0", {**JOINT, "options": {"causal": False}}, ["sweep.0.options.causal", "drop causal"]),
    "a layer the model lacks": ("sweep.0.layers", [40], ["sweep.layers", "layer 40", "0 to 3"]),
    "as many active latents as there are": ("sweep.0.l0s", [64], ["sweep.0", "raise widths"]),
    "a start that is not there": (
        "sweep.0.start_from", "/nowhere/layer_{layer}", ["sweep.start_from", "/nowhere/layer_0", "is no folder"],
    ),
    "braces that mean nothing": ("sweep.0.start_from", "x/{width}", ["sweep.0.start_from", "{layer} and {folder}"]),
    "layers of an acausal crosscoder": (
        "sweep.0", {**JOINT, "kind": "crosscoder", "options": {"causal": False}, "start_from": "x/{layer}"},
        ["sweep.0.start_from", "drop {layer}"],
    ),
    "finetuning longer than the text": ("end_to_end", {"tokens": 10**6}, ["end_to_end.tokens", "corpus.train_tokens"]),
    "finetuning shorter than a sequence": ("end_to_end", {"tokens": 5}, ["end_to_end.tokens", "one sequence (32)"]),
    "two cells of one name": ("sweep.0.widths", [4096, 4100], ["sweep", "both publish", "drop one", "a suite"]),
    "a missing model": ("model.name", "/nowhere/gemma", ["model.name", "/nowhere/gemma", "name a Gemma 3 folder"]),
    "an unknown package": ("model.name", "package:gemma-9", ["model.name", "package:gemma-3-270m"]),
    "a missing corpus": ("corpus.paths", ["/nowhere/*.jsonl"], ["corpus.paths", "/nowhere/*.jsonl", "matches no file"]),
    "a corpus of unknown format": ("corpus.paths", [__file__], ["corpus.paths", ".py", ".jsonl"]),
    "another text column": ("corpus.text_column", "body", ["corpus.text_column", "body", "text"]),
    "less text than tokens": ("corpus.train_tokens", 10**9, ["corpus.train_tokens", "lower it or add text"]),
    "workers that make no teams": ("fit.shards", 3, ["fit.workers", "cannot be cut", "shards must divide"]),
    "a worker too small": ("fit.memory_gib", 0.1, ["fit.memory_gib", "raise fit.memory_gib to", "no width would fit"]),
    "a window of broken forward passes": ("stream.window_sequences", 12, ["stream.window_seq", "harvest.sequences"]),
    "a model shared in two ways": ("harvest", {"tensor_parallel": 2, "zero3": 2}, ["harvest.zero3", "leave out"]),
    "more memory than there is": ("sweep.0.widths", [400_000_000], ["sweep", "GiB", "divide widths by"]),
    "labels on one machine": (
        "harvest.label_selector", {"ray-subcluster": "harvest"}, ["harvest.label_selector", "submit it to a cluster"],
    ),
    "what is no label": ("fit.label_selector", {"ray-subcluster": "!fit"}, ["fit.label_selector", "!fit"]),
    "a folder that cannot be written": ("output", "/proc/nowhere/run", ["output", "/proc/nowhere", "name a folder"]),
}  # fmt: skip


def run(monkeypatch, capsys, recipe: dict, tmp_path: Path) -> tuple[int, str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(path)])
    return job.main(), capsys.readouterr().err


def check(code: int, error: str, parts: list[str]) -> None:
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1  # one line
    for part in parts:
        assert part in error


@pytest.mark.parametrize("name", CASES)
def test_bad_recipe(name: str, tiny_recipe: dict, tmp_path: Path, monkeypatch, capsys) -> None:
    path, value, parts = CASES[name]
    started = time.monotonic()
    code, error = run(monkeypatch, capsys, changed(tiny_recipe, path, value), tmp_path)
    check(code, error, parts)
    assert time.monotonic() - started < 30
    assert not Path(tiny_recipe["output"]).exists()  # nothing half-written


@pytest.mark.parametrize(
    ("content", "part"), [("a: [", "is not YAML"), ("just words", "not a mapping"), (None, "cannot read")]
)
def test_bad_file(content: str | None, part: str, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(path)])
    assert job.main() == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("empty.jsonl", b"", "has only 0 bytes"),
        ("broken.jsonl", b"\x00\xff{" * 99_999, "not readable as .jsonl"),
        ("broken.parquet", b"PAR1" * 9, "not readable as .parquet"),
    ],
)
def test_bad_corpus_file(
    name: str, content: bytes, part: str, tiny_recipe: dict, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / name).write_bytes(content)
    recipe = changed(tiny_recipe, "corpus.paths", [str(tmp_path / name)])
    code, error = run(monkeypatch, capsys, recipe, tmp_path)
    check(code, error, ["corpus.", part])


@pytest.mark.parametrize(
    ("asked", "part"),
    [({"end_to_end": {"tokens": 2048}}, "end_to_end: "), ({"publication": {"saelens": True}}, "publication.saelens: ")],
)
def test_what_a_topk_transcoder_cannot_have(asked, part, tiny_recipe: dict, tmp_path, monkeypatch, capsys) -> None:
    grid = {"kind": "transcoder", "layers": [0], "activations": ["topk"], "widths": [64], "l0s": [8]}
    check(*run(monkeypatch, capsys, tiny_recipe | {"sweep": [grid]} | asked, tmp_path), [part, "topk"])


@pytest.mark.parametrize("way", ["tensor_parallel", "zero3"])
def test_a_shared_model_without_deepspeed(way: str, tiny_recipe: dict, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # which is how Python says that there is none
    recipe = changed(tiny_recipe, f"harvest.{way}", 2)
    check(*run(monkeypatch, capsys, recipe, tmp_path), [f"harvest.{way}", "not installed: ", "pip install", "leave it"])


def test_a_model_that_is_no_gemma(tiny_recipe: dict, tmp_path: Path, monkeypatch, capsys) -> None:
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path / "llama")
    recipe = changed(tiny_recipe, "model.name", str(tmp_path / "llama"))
    check(*run(monkeypatch, capsys, recipe, tmp_path), ["model.name", "llama", "Gemma 3"])


@pytest.mark.parametrize(("missing", "part"), [("model.safetensors", "no weights"), ("tokenizer*", "no tokenizer")])
def test_half_a_checkpoint(missing, part, tiny_recipe: dict, tiny_gemma, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = shutil.copytree(tiny_gemma, tmp_path / "half", ignore=shutil.ignore_patterns(missing))
    recipe = changed(tiny_recipe, "model.name", str(folder))
    check(*run(monkeypatch, capsys, recipe, tmp_path), ["model.name", part, "whole checkpoint"])


def test_mlflow_not_reachable(tiny_recipe: dict, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    check(*run(monkeypatch, capsys, tiny_recipe, tmp_path), ["MLFLOW_TRACKING_URI", "127.0.0.1:9", "unset"])


def test_a_folder_with_strangers_in_it_is_left_alone(tiny_recipe: dict, tmp_path: Path, monkeypatch, capsys) -> None:
    stranger = Path(tiny_recipe["output"]) / "thesis.txt"
    stranger.parent.mkdir()
    stranger.write_text("irreplaceable")
    check(*run(monkeypatch, capsys, tiny_recipe, tmp_path), ["output", "thesis.txt", "empty or new"])
    (stranger.parent / "recipe.yaml").write_text("my own")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--fresh"])
    assert job.main() == 2
    assert {path.name for path in stranger.parent.iterdir()} == {"thesis.txt", "recipe.yaml"}


def test_too_little_text_is_told_after_counting_and_leaves_no_tokens(tiny_recipe: dict, run_job) -> None:
    # More than the words that there are, fewer than their bytes: only the tokeniser can know.
    started = run_job(changed(tiny_recipe, "corpus.train_tokens", 200_000))
    assert started.wait() == 2
    assert "error: corpus.train_tokens: " in started.text.splitlines()[-1]
    assert not (started.output / "tokens").exists()


def test_two_sweeps_cannot_own_one_folder(tiny_recipe: dict, tmp_path: Path, monkeypatch, capsys) -> None:
    import fcntl

    folder = Path(tiny_recipe["output"])
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check(*run(monkeypatch, capsys, tiny_recipe, tmp_path), ["output", "another sweep is running"])
