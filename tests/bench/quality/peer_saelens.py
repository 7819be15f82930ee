"""SAELens's own SAETrainer on the raw rows.

BatchTopK: SAELens divides the rows itself, so that their mean norm is √D, as its examples do. Its estimate of that norm
takes its batches from the stream, so the first ones are handed over twice. JumpReLU: it gets rows of unit mean square
norm, the scale of Gemma Scope, whose quadratic mode this is (at √D its thresholds cannot follow; `trainers.py`).
"""

import json
import sys
import tempfile
from itertools import chain, islice
from pathlib import Path

import runner
import stream
from cell import Cell
from inference import Inference
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig

NORM_BATCHES = 32


def build(cell: Cell, d: int) -> BatchTopKTrainingSAE | JumpReLUTrainingSAE:
    shared = {"d_in": d, "d_sae": cell.width}
    if cell.activation == "batch_topk":
        normalise = "expected_average_only_in"
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=cell.l0, normalize_activations=normalise, **shared))
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=cell.l0,
            l0_coefficient=cell.options["l0_coefficient"],
            l0_warm_up_steps=round(cell.options["l0_warmup_fraction"] * cell.steps),
            **shared,
        )
    )


def train(cell: Cell, folder: Path) -> tuple[Inference, runner.Reconstruct]:
    options, scale = cell.options, 1.0
    if cell.activation == "jumprelu":
        scale = json.loads((folder / "rows.json").read_text())["scale"]
    batches = stream.Batches(folder, cell.batch_rows, divide_by=scale)
    norm_batches = min(NORM_BATCHES, cell.steps) if cell.activation == "batch_topk" else 0
    config = SAETrainerConfig(
        total_training_samples=cell.steps * cell.batch_rows,
        train_batch_size_samples=cell.batch_rows,
        lr=cell.learning_rate,
        lr_end=cell.learning_rate / 10,  # asserted, and not used by the constant schedule
        lr_warm_up_steps=round(options["warmup_fraction"] * cell.steps),
        lr_decay_steps=round(options["decay_fraction"] * cell.steps),
        dead_feature_window=round(options["dead_fraction"] * cell.steps),
        feature_sampling_window=10 * cell.steps,  # at each boundary it builds a wandb histogram, logged or not
        n_batches_for_norm_estimate=norm_batches,
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = build(cell, batches.bits.shape[1])
    SAETrainer(cfg=config, sae=sae, data_provider=chain(islice(batches, norm_batches), batches)).fit()
    sae.fold_activation_norm_scaling_factor(1 / scale)
    with tempfile.TemporaryDirectory() as shipped:
        sae.save_inference_model(shipped)
        own = SAE.load_from_disk(shipped).double().requires_grad_(False)
    shift_F = own.b_dec @ own.W_enc if own.cfg.apply_b_dec_to_input else 0
    dictionary = Inference(own.W_enc, own.b_enc - shift_F, own.threshold, own.W_dec, own.b_dec)
    return dictionary, lambda x_BD: own.decode(own.encode(x_BD))


if __name__ == "__main__":
    sys.exit(runner.main(train))
