"""One small sweep of the real Gemma 3 270M on real text, from package to published dictionaries."""

import json
from pathlib import Path

import pytest

from sae import artifact

pytestmark = pytest.mark.real

RECIPE = {
    "name": "real",
    "model": {"name": "package:gemma-3-270m"},
    "corpus": {
        "paths": ["package:wikipedia-introductions"],
        "context": 256,
        "train_tokens": 30_000,
        "heldout_tokens": 4096,
    },
    "stream": {"window_sequences": 32, "batch_rows": 512},
    "sweep": [{"layers": [9], "activations": ["batch_topk", "jumprelu"], "widths": [2048], "l0s": [64]}],
    "fit": {"workers": 2, "cpus_per_worker": 0.5},
    "evaluation": {"loss_tokens": 512},
}


def test_real_gemma__dictionaries_explain_it(run_job, tmp_path: Path) -> None:
    job = run_job(RECIPE | {"output": str(tmp_path / "run")}, HF_HUB_OFFLINE="0")
    assert job.wait(500) == 0, job.text
    assert "Gemma Terms of Use" in job.text
    summary = json.loads((job.output / "summary.json").read_text())
    assert len(summary["dictionaries"]) == 2
    for row in summary["dictionaries"]:
        assert row["loss_clean"] < 3.5  # nats: the model speaks English
        assert row["loss_clean"] < row["loss_spliced"] < row["loss_zeroed"]
        assert row["fvu"] < 0.5
        assert row["l0"] == pytest.approx(64, rel=0.25)
        dictionary, config = artifact.read(Path(row["path"]))
        assert config["model_name"] == "google/gemma-3-270m"
        assert dictionary.w_enc[0].shape == (640, 2048)
        assert Path(row["path"]).parts[-3] == f"gemma-3-270m-{row['activation']}"
    calibration = json.loads((job.output / "calibration.json").read_text())
    assert 3_000 < calibration["resid_post.9"]["median_norm"] < 12_000  # reference: about 6,200
