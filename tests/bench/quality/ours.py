"""Our trainer on the raw rows, without Ray: rows are divided by their root mean square norm, as the product does."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import runner
import stream
import torch
from cell import Cell
from inference import Inference

from sae.dictionary import Dictionary
from sae.spec import DictionarySpec, Options, Training
from sae.step import TrainingDictionary


def specification(cell: Cell) -> DictionarySpec:
    return DictionarySpec(
        id=cell.key,
        folder=cell.key,
        kind="sae",
        site="resid_post",
        layers=(12,),
        activation=cell.activation,
        width=cell.width,
        l0=cell.l0,
        seed=cell.seed,
        options=Options(**cell.options["options"]),
        training=Training(learning_rate=cell.learning_rate, **cell.options["training"]),
    )


def train(cell: Cell, folder: Path) -> tuple[Inference, runner.Reconstruct]:
    facts = json.loads((folder / "rows.json").read_text())
    spec, batches = specification(cell), stream.Batches(folder, cell.batch_rows, divide_by=facts["scale"])
    dictionary = TrainingDictionary(spec, {facts["site"]: batches.bits.shape[1]}, torch.device("cpu"))
    for step, x_BD in enumerate(batches, start=1):
        dictionary.step(x_BD, x_BD, step / cell.steps)
    own = dictionary.folded({facts["site"]: facts["scale"]})
    (w_enc_DF,), (w_dec_FD,) = own.w_enc, own.w_dec
    return Inference(w_enc_DF, own.b_enc_F, own.threshold_F, w_dec_FD, own.b_dec_D), reconstruct(own)


def reconstruct(own: Dictionary) -> runner.Reconstruct:
    """The dictionary's own encode and decode, in float64."""
    double = replace(
        own,
        w_enc=[w.double() for w in own.w_enc],
        b_enc_F=own.b_enc_F.double(),
        threshold_F=own.threshold_F.double(),
        w_dec=[w.double() for w in own.w_dec],
        b_dec_D=own.b_dec_D.double(),
    )
    return lambda x_BD: double.decode(double.encode(x_BD))


if __name__ == "__main__":
    sys.exit(runner.main(train))
