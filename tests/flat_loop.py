"""The whole fit as one flat loop, without Ray: the reference that the cluster must equal bit for bit.

For each window of sequences: run the model, keep the rows, shuffle them, cut batches, step every dictionary.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.recipe import Recipe
from sae.dictionary import Dictionary
from sae.sites import Site
from sae.step import TrainingDictionary

BOS = 2


def fit(recipe: Recipe, tokens: np.ndarray, eligible: np.ndarray | None = None) -> dict[str, Dictionary]:
    """Trains all dictionaries of a recipe for a text-only model on token ids [sequences, T]; on the rows of some of
    them, if `eligible` says so, else of all but BOS."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=getattr(torch, recipe.model.dtype))
    specs, everything = recipe.specs(), torch.from_numpy(np.array(tokens)).long()
    trained = everything != BOS if eligible is None else torch.from_numpy(eligible)
    sites = sorted({site for spec in specs for site in spec.sites})
    outputs: dict[Site, Tensor] = {}
    for site in sites:
        keep_output(model, site, outputs)

    with torch.no_grad():
        sample, seen = (part[: recipe.harvest.calibration_sequences] for part in (everything, trained))
        model.model(sample)
        norms = {site: outputs[site].float().norm(dim=-1) for site in sites}
        limits = {site: recipe.harvest.outlier_norm * norms[site][seen].median() for site in sites}
        keep = seen & torch.stack([norms[site] <= limits[site] for site in sites]).all(0)
        scales = {site: norms[site][keep].square().mean().sqrt().item() for site in sites}

        widths = {site.key: outputs[site].shape[-1] for site in sites}
        products = getattr(torch, recipe.fit.products)
        bank = [TrainingDictionary(spec, widths, torch.device("cpu"), products=products) for spec in specs]
        size = recipe.window_sequences
        parts = list(zip(everything.split(size), trained.split(size), strict=True))
        epochs = recipe.stream.epochs
        for window, (sequences, eligible_there) in enumerate(parts * epochs):
            rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
            per_pass = recipe.harvest.sequences
            for block, keep in zip(sequences.split(per_pass), eligible_there.clone().split(per_pass), strict=True):
                model.model(block)
                for site in sites:
                    keep &= outputs[site].float().norm(dim=-1) <= limits[site]
                for site in sites:
                    rows[site].append(outputs[site][keep].bfloat16())  # as the stream carries them
            window_rows = {site: torch.cat(parts) for site, parts in rows.items()}
            n = len(window_rows[sites[0]])
            order = torch.randperm(n, generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + window))
            batches = order.tensor_split(max(1, round(n / recipe.stream.batch_rows)))
            for number, chosen in enumerate(batches):
                epoch, place = divmod(window, len(parts))
                done = (epoch * len(everything) + place * size + len(sequences) * (number + 1) / len(batches)) / (
                    epochs * len(everything)
                )
                scaled = {site: window_rows[site][chosen].float() / scales[site] for site in sites}
                for dictionary in bank:
                    x_BD = torch.cat([scaled[site] for site in dictionary.spec.reads], dim=1)
                    y_BD = torch.cat([scaled[site] for site in dictionary.spec.writes], dim=1)
                    dictionary.step(x_BD, y_BD, done)
    by_key = {site.key: scale for site, scale in scales.items()}
    return {dictionary.spec.id: dictionary.folded(by_key) for dictionary in bank}


def keep_output(model: torch.nn.Module, site: Site, outputs: dict[Site, Tensor]) -> None:
    """Puts the tensor at a site into `outputs` in every forward pass."""
    layer = model.model.layers[site.layer]
    if site.name == "attn_out":
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.update({site: inputs[0]}))
        return
    module = {
        "mlp_in": layer.pre_feedforward_layernorm,
        "mlp_out": layer.post_feedforward_layernorm,
        "resid_post": layer,
    }[site.name]
    module.register_forward_hook(lambda _, inputs, output: outputs.update({site: output}))
