"""Held-out figures against a direct computation on the whole held-out text at once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster import evaluate, gemma, publish, recipe_file
from cluster.calibrate import measure
from sae import artifact, hooks
from sae.sites import Site
from tests.published import make_dictionary

BOS = 2
GRIDS = [
    {"layers": [2], "activations": ["topk"]},
    {"kind": "transcoder", "layers": [1], "activations": ["jumprelu"], "affine": [True]},
    {"kind": "crosscoder", "layers": [0, 2], "activations": ["jumprelu"], "options": {"causal": False}},
    {"kind": "clt", "layers": [1, 2], "activations": ["jumprelu"], "affine": [True]},
]


@pytest.fixture
def parts(tiny_recipe: dict, tmp_path: Path):
    """A recipe with a dictionary of each kind, their artifacts, the scales and held-out tokens of 20 sequences."""
    corpus = tiny_recipe["corpus"] | {"heldout_tokens": 20 * 32}
    grids = [{"widths": [64], "l0s": [8]} | grid for grid in GRIDS]
    parsed = recipe_file.parse(
        tiny_recipe | {"sweep": grids, "corpus": corpus, "harvest": {"sequences": 8, "outlier_norm": 1.1}}
    )
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 200, (20, 32), generator=g)
    tokens[:, 0] = BOS
    tokens[3, 10] = BOS
    np.save(tmp_path / "heldout.npy", tokens.int().numpy())
    model = gemma.load(parsed.model, torch.device("cpu"))
    sites = [site for spec in parsed.specs() for site in spec.sites]
    scales = measure(tokens != BOS, hooks.capture(model, tokens, sites), 1.1)
    folders = publish.folders(parsed, tmp_path / "staging")
    for spec in parsed.specs():
        dictionary = make_dictionary(spec, d=32)
        if spec.activation == "topk":
            dictionary = replace(dictionary, k=spec.l0, threshold_F=torch.zeros(64))
        artifact.write(folders[spec.id], dictionary, artifact.config(spec, "tiny", 4))
        artifact.seal(folders[spec.id])
    return parsed, folders, scales, tmp_path / "heldout.npy", tokens, model


@torch.no_grad()
def test_evaluate__equals_a_direct_computation(ray_session, parts, monkeypatch) -> None:
    parsed, folders, scales, path, tokens, model = parts
    monkeypatch.setattr(evaluate, "PORTION_BYTES", 70_000)
    assert [len(portion) for portion in evaluate._portions(parsed.specs(), folders)] == [2, 2]
    results = evaluate.evaluate(parsed, folders, scales, path)
    sites = {site for spec in parsed.specs() for site in spec.sites}
    captured = {
        site: torch.cat([hooks.capture(model, part, [site])[site] for part in tokens.split(8)]) for site in sites
    }
    mask = tokens != BOS
    for site, tensor in captured.items():
        mask &= tensor.float().norm(dim=-1) <= 1.1 * scales[site.key].median_norm
    for spec in parsed.specs():
        dictionary, _ = artifact.read(folders[spec.id])
        x, y = (torch.cat([captured[site][mask].float() for site in part], dim=1) for part in (spec.reads, spec.writes))
        latents = dictionary.encode(x)
        rebuilt = dictionary.decode(latents, x)
        scores = results[spec.id].scores
        assert 0 < scores.rows_dropped == int((tokens != BOS).sum()) - len(x)
        assert scores.rows == len(x)
        fvus = [
            (part - true).square().sum() / (true - true.mean(0)).square().sum()
            for part, true in zip(rebuilt.split(32, dim=1), y.split(32, dim=1), strict=True)
        ]
        assert scores.fvu == pytest.approx(torch.stack(fvus).mean().item(), rel=1e-4)
        fired = (latents > 0).sum(0)
        assert scores.l0 == pytest.approx(fired.sum().item() / len(x))
        assert scores.dead_fraction == pytest.approx((fired == 0).float().mean().item())
        assert scores.max_frequency == pytest.approx(fired.max().item() / len(x))
        assert np.array_equal(results[spec.id].fired_F, fired.numpy())
        pieces = dict(zip(spec.writes, rebuilt.split(32, dim=1), strict=True))
        losses = loss_by_hand(model, tokens[:16], mask, pieces)
        assert (scores.loss_clean, scores.loss_spliced, scores.loss_zeroed) == pytest.approx(losses, rel=1e-4)
        assert len(set(losses)) == 3
        clean, spliced, zeroed = losses
        assert scores.loss_recovered == pytest.approx((zeroed - spliced) / (zeroed - clean), abs=0.02)


def loss_by_hand(model, tokens, mask, rebuilt: dict[Site, torch.Tensor]) -> tuple[float, float, float]:
    """Clean, spliced and zeroed loss a predicted token, all sites edited at once with plain hooks."""

    def run(replacement) -> float:
        total, start = 0.0, 0
        for part, rows in zip(tokens.split(8), mask.split(8), strict=False):
            end = start + int(rows.sum())
            handles = []
            for site, rows_BD in rebuilt.items():

                def hook(_, inputs, output, rows=rows, new=rows_BD[start:end]):
                    output = output.clone()
                    output[rows] = replacement(output[rows], new.to(output.dtype))
                    return output

                layer = hooks.trunk(model).layers[site.layer]
                module = layer.post_feedforward_layernorm if site.name == "mlp_out" else layer
                handles.append(module.register_forward_hook(hook))
            logits = model(input_ids=part).logits[:, :-1].float().flatten(0, 1)
            for handle in handles:
                handle.remove()
            total += torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
            start = end
        return total / tokens[:, 1:].numel()

    return run(lambda old, new: old), run(lambda old, new: new), run(lambda old, new: torch.zeros_like(old))
