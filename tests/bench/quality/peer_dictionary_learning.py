"""dictionary_learning's own trainSAE on the raw rows. It divides them itself, so that their mean square norm is 1.

The package imports nnsight, which nothing here uses and which pins other packages: an empty stand-in takes its place.
"""

import sys
import types
from pathlib import Path

import runner
import stream
import torch
from cell import Cell
from inference import Inference

sys.modules["nnsight"] = types.ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object

from dictionary_learning import training  # noqa: E402
from dictionary_learning.dictionary import JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402


def trainer_config(cell: Cell, d: int) -> dict:
    options, steps = cell.options, cell.steps
    shared = {
        "steps": steps,
        "activation_dim": d,
        "dict_size": cell.width,
        "layer": 12,
        "lm_name": "gemma-3-270m",
        "lr": cell.learning_rate,
        "seed": cell.seed,
        "device": "cpu",
        "warmup_steps": round(options["warmup_fraction"] * steps),
        "decay_start": round((1 - options["decay_fraction"]) * steps),
    }
    if cell.activation == "batch_topk":
        return shared | {
            "trainer": BatchTopKTrainer,
            "dict_class": BatchTopKSAE,
            "k": cell.l0,
            "threshold_start_step": round(options["threshold_start_fraction"] * steps),
            "threshold_beta": options["threshold_beta"],
        }
    return shared | {
        "trainer": JumpReluTrainer,
        "dict_class": JumpReluAutoEncoder,
        "target_l0": float(cell.l0),
        "sparsity_penalty": options["sparsity_penalty"],
        "bandwidth": options["bandwidth"],
        "sparsity_warmup_steps": round(options["sparsity_warmup_fraction"] * steps),
    }


def train(cell: Cell, folder: Path) -> tuple[Inference, runner.Reconstruct]:
    batches = stream.Batches(folder, cell.batch_rows)
    config, made = trainer_config(cell, batches.bits.shape[1]), []
    trainer_class = config["trainer"]

    def remember(**kwargs):  # trainSAE builds its trainers and returns nothing
        made.append(trainer_class(**kwargs))
        made[0].dead_feature_threshold = round(cell.options["dead_fraction"] * cell.steps * cell.batch_rows)
        return made[0]

    training.trainSAE(
        data=batches,
        trainer_configs=[config | {"trainer": remember}],
        steps=cell.steps,
        normalize_activations=True,
        device="cpu",
    )
    own = made[0].ae.double().requires_grad_(False)
    if cell.activation == "batch_topk":
        w_enc_DF, threshold_F = own.encoder.weight.T, torch.as_tensor(own.threshold).expand(cell.width)
        dictionary = Inference(
            w_enc_DF, own.encoder.bias - own.b_dec @ w_enc_DF, threshold_F, own.decoder.weight.T, own.b_dec
        )
    else:
        dictionary = Inference(own.W_enc, own.b_enc, own.threshold, own.W_dec, own.b_dec)
    return dictionary, lambda x_BD: own.decode(own.encode(x_BD))


if __name__ == "__main__":
    sys.exit(runner.main(train))
