"""Dictionaries that start from published ones: joined single layers, finetuned, and with the model in the loop."""

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from sae import artifact
from tests.published import make_rows

pytestmark = pytest.mark.slow


def published(output: Path) -> dict[str, Path]:
    """Folders by kind."""
    summary = json.loads((output / "summary.json").read_text())
    return {artifact.read(Path(row["path"]))[1]["type"]: Path(row["path"]) for row in summary["dictionaries"]}


@pytest.mark.chaos
def test_sweep__starts_from_what_another_published(tiny_recipe: dict, run_job, tmp_path: Path) -> None:
    common = {"activations": ["jumprelu"], "l0s": [6]}
    matryoshka = {"options": {"matryoshka": {"prefixes": [0.25, 0.5]}}}
    first = tiny_recipe | {
        "output": str(tmp_path / "first"),
        "sweep": [common | matryoshka | {"layers": [1, 3], "widths": [64]}],
        "publication": {"saelens": True},
    }
    job = run_job(first)
    assert job.wait() == 0, job.text
    suite = tmp_path / "first" / "published" / f"{Path(tiny_recipe['model']['name']).name}-jumprelu-matryoshka"
    source, _ = artifact.read(suite / "resid_post" / "layer_1_width_64_l0_6")

    foreign = SAE.load_from_disk(suite.with_name(f"{suite.name}-saelens") / "resid_post" / "layer_1_width_64_l0_6")
    x = make_rows(source) * 30
    torch.testing.assert_close(foreign.encode(x), source.encode(x), rtol=1e-4, atol=1e-2)

    gentle = {"learning_rate": 1e-4, "l0_decay_fraction": 0.5}
    second = tiny_recipe | {
        "name": "second",
        "output": str(tmp_path / "second"),
        "training": gentle,
        "end_to_end": {"tokens": 2048},
        "sweep": [
            common | {"layers": [1], "widths": [64], "start_from": f"{suite}/{{folder}}"},
            common
            | {
                "kind": "crosscoder",
                "layers": [1, 3],
                "widths": [64],
                "start_from": f"{suite}/resid_post/layer_{{layer}}_width_64_l0_6",
            },
        ],
    }
    job = run_job(second)
    assert job.wait() == 0, job.text
    assert job.text.count("nats a token") == 2
    folders = published(tmp_path / "second")
    finetuned, _ = artifact.read(folders["sae"])
    cosine = torch.nn.functional.cosine_similarity(finetuned.w_dec[0], source.w_dec[0])
    assert cosine.mean() > 0.95, "it went on from there"
    assert not torch.equal(finetuned.w_dec[0], source.w_dec[0])
    joined, _ = artifact.read(folders["crosscoder"])
    first_layer = torch.nn.functional.cosine_similarity(joined.w_enc[0], source.w_enc[0][:, :32], dim=0)
    assert first_layer.mean() > 0.95, "the first layer's prefix"
