"""Held-out figures against a direct computation on the whole held-out text at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster import evaluate, gemma, publish, recipe
from cluster.calibrate import measure
from sae import artifact
from sae.dictionary import Dictionary

BOS = 2


@pytest.fixture
def parts(tiny_recipe: dict, tmp_path: Path):
    """A recipe with two dictionaries at layer 2, their artifacts, the scales and held-out tokens of 20 sequences."""
    grid = {"layers": [2], "activations": ["batch_topk", "jumprelu"], "widths": [64], "l0s": [8]}
    corpus = tiny_recipe["corpus"] | {"heldout_tokens": 20 * 32}
    parsed = recipe.parse(
        tiny_recipe | {"sweep": [grid], "corpus": corpus, "harvest": {"sequences": 8, "outlier_norm": 1.05}}
    )
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 200, (20, 32), generator=g)
    tokens[:, 0] = BOS
    tokens[3, 10] = BOS
    np.save(tmp_path / "heldout.npy", tokens.int().numpy())
    model = gemma.load(parsed.model, torch.device("cpu"))
    scales = measure(tokens, gemma.capture(model, tokens, [spec.reads for spec in parsed.specs()]), 1.05, BOS)
    folders = publish.folders(parsed, tmp_path / "staging")
    for spec in parsed.specs():
        dictionary = Dictionary(
            torch.randn(32, 64, generator=g), torch.randn(64, generator=g), torch.full((64,), 2.0),
            0.1 * torch.randn(64, 32, generator=g), torch.randn(32, generator=g),
        )  # fmt: skip
        artifact.write(folders[spec.id], dictionary, artifact.config(spec, "tiny"))
        artifact.seal(folders[spec.id])
    return parsed, folders, scales, tmp_path / "heldout.npy", tokens, model


@torch.no_grad()
def test_evaluate__equals_a_direct_computation(ray_session, parts) -> None:
    parsed, folders, scales, path, tokens, model = parts
    results = evaluate.evaluate(parsed, folders, scales, path)
    for spec in parsed.specs():
        dictionary, _ = artifact.read(folders[spec.id])
        site = spec.reads
        tensor = torch.cat([gemma.capture(model, part, [site])[site] for part in tokens.split(8)])
        mask = (tokens != BOS) & (tensor.float().norm(dim=-1) <= 1.05 * scales[site.key].median_norm)
        x = tensor[mask].float()
        latents = dictionary.encode(x)
        rebuilt = dictionary.decode(latents)
        scores = results[spec.id].scores
        assert 0 < scores.rows_dropped == int((tokens != BOS).sum()) - len(x)
        assert scores.rows == len(x)
        assert scores.fvu == pytest.approx(
            ((rebuilt - x).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-4
        )
        assert scores.l0 == pytest.approx((latents > 0).sum().item() / len(x))
        assert scores.dead_fraction == pytest.approx(((latents > 0).sum(0) == 0).float().mean().item())
        assert np.array_equal(results[spec.id].fired_F, (latents > 0).sum(0).numpy())
        losses = loss_by_hand(model, tokens[:16], site, mask[:16], dictionary)
        assert (scores.loss_clean, scores.loss_spliced, scores.loss_zeroed) == pytest.approx(losses, rel=1e-4)
        clean, spliced, zeroed = losses
        assert scores.loss_recovered == pytest.approx((zeroed - spliced) / (zeroed - clean), abs=0.02)


def loss_by_hand(model, tokens, site, mask, dictionary) -> tuple[float, float, float]:
    """Clean, spliced and zeroed loss a predicted token, by editing the layer's output with a plain hook."""

    def run(edit) -> float:
        total = 0.0
        for part, rows in zip(tokens.split(8), mask.split(8), strict=True):

            def hook(_, inputs, output, rows=rows):
                output = output.clone()
                output[rows] = edit(output[rows])
                return output

            handle = gemma.trunk(model).layers[site.layer].register_forward_hook(hook)
            logits = model(input_ids=part).logits[:, :-1].float().flatten(0, 1)
            handle.remove()
            total += torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
        return total / tokens[:, 1:].numel()

    def splice(rows: torch.Tensor) -> torch.Tensor:
        return dictionary.decode(dictionary.encode(rows.float())).to(rows.dtype)

    return run(lambda rows: rows), run(splice), run(torch.zeros_like)
