"""A model that two ranks share reads and answers as the whole one does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import Gemma3ForCausalLM, GPT2Config

from serve.passes import check
from tests.conftest import tiny_config, write_tokenizer
from tests.serve.live import ROOT


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "gemma"
    write_tokenizer(folder)
    torch.manual_seed(0)
    Gemma3ForCausalLM(tiny_config(num_key_value_heads=2)).save_pretrained(folder)
    return folder


def answers(gemma: Path, ranks: int, folder: Path) -> dict:
    report = folder / f"{ranks}.pt"
    command = [sys.executable, "-m", "tests.serve.two_ranks", str(gemma), str(ranks), str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(report, weights_only=False)


def test_two_ranks__read_and_answer_as_one(gemma: Path, tmp_path: Path) -> None:
    one, two = (answers(gemma, ranks, tmp_path) for ranks in (1, 2))
    assert one["rows"].keys() == two["rows"].keys()
    for key, rows in one["rows"].items():
        assert np.linalg.norm(two["rows"][key] - rows) <= 1e-5 * np.linalg.norm(rows), key
        assert np.array_equal(two["again"][key], two["rows"][key])
    assert one["answers"] == two["answers"]
    steered, plain = ("".join(getattr(step[0], which) for step in one["answers"]) for which in ("steered", "plain"))
    assert steered != plain
    assert two["healthy"]
    assert not two["bereft"]
    assert not [process for process in psutil.process_iter() if "serve.passes" in _command(process)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_what_cannot_be_loaded_or_shared__is_refused(tiny_gemma: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_ranks: 2 ranks cannot share 1 key-value heads: choose a divisor of 1"):
        check(str(tiny_gemma), 2)
    with pytest.raises(ValueError, match="model: '/nowhere' is no Gemma 3 that could be read"):
        check("/nowhere", 1)
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a gpt2 model: name a Gemma 3"):
        check(str(tmp_path), 1)
