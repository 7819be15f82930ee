"""The whole fit as one flat loop, without Ray: the reference that the cluster must equal bit for bit.

For each window of sequences: run the model, keep the rows, shuffle them, cut batches, step every dictionary.
"""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from cluster.recipe import Recipe
from sae.dictionary import Dictionary
from sae.step import TrainingDictionary

BOS = 2


def fit(recipe: Recipe, tokens: np.ndarray) -> dict[str, Dictionary]:
    """Trains all dictionaries of a resid_post-only recipe on token ids [sequences, T]."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.bfloat16)
    specs, everything = recipe.specs(), torch.from_numpy(np.array(tokens)).long()
    layers = sorted({spec.layer for spec in specs})
    outputs: dict[int, torch.Tensor] = {}
    for layer in layers:
        model.model.layers[layer].register_forward_hook(
            lambda _, inputs, out, layer=layer: outputs.update({layer: out})
        )

    with torch.no_grad():
        sample = everything[: recipe.harvest.calibration_sequences]
        model.model(sample)
        norms = {layer: outputs[layer].float().norm(dim=-1) for layer in layers}
        limits = {layer: recipe.harvest.outlier_norm * norms[layer][sample != BOS].median() for layer in layers}
        keep = (sample != BOS) & torch.stack([norms[layer] <= limits[layer] for layer in layers]).all(0)
        scales = {layer: norms[layer][keep].square().mean().sqrt().item() for layer in layers}

        bank = [TrainingDictionary(spec, model.config.hidden_size, torch.device("cpu")) for spec in specs]
        size = recipe.stream.window_sequences
        for window, sequences in enumerate(everything.split(size)):
            rows: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
            for block in sequences.split(recipe.harvest.sequences):
                model.model(block)
                keep = block != BOS
                for layer in layers:
                    keep &= outputs[layer].float().norm(dim=-1) <= limits[layer]
                for layer in layers:
                    rows[layer].append(outputs[layer][keep])
            window_rows = {layer: torch.cat(parts) for layer, parts in rows.items()}
            n = len(window_rows[layers[0]])
            order = torch.randperm(n, generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + window))
            batches = order.tensor_split(max(1, round(n / recipe.stream.batch_rows)))
            for number, chosen in enumerate(batches):
                done = (window * size + len(sequences) * (number + 1) / len(batches)) / len(everything)
                for dictionary in bank:
                    layer = dictionary.spec.layer
                    dictionary.step(window_rows[layer][chosen].float() / scales[layer], done)
    return {dictionary.spec.id: dictionary.folded(scales[dictionary.spec.layer]) for dictionary in bank}
