"""The rows that every trainer sees: one layer of Gemma 3 270M on Wikipedia introductions, harvested once.

Made as the product makes them (`cluster.harvest`), without Ray. bf16 travels as int16, since numpy has no bf16.
Runs in the main environment; `stream.py` reads the result and needs torch and numpy alone.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from cluster import calibrate, corpus, gemma, packages
from cluster.harvest import decode_bf16, encode_bf16, harvest_block
from cluster.recipe import Harvest, Model
from cluster.tokens import Span
from sae import hooks
from sae.sites import Site

MODEL = Model(name="package:gemma-3-270m")
TEXT = "package:wikipedia-introductions"
SITE = Site(12, "resid_post")
CONTEXT = 256
SHUFFLE_SEED = 20_261_122
SURPLUS = 1.05  # tokens harvested a row wanted: one a document and sequence is BOS, a few are outliers


def tokenise(rows: dict[str, int]) -> dict[str, np.ndarray]:
    """Sequences int32 [sequences, T] of each side, packed by the product's rule."""
    tokeniser = corpus.Tokenise(gemma.locate(MODEL), "text")
    bos = gemma.text_config(MODEL).bos_token_id
    packers = {side: corpus.Packer(bos, CONTEXT, int(n * SURPLUS) // CONTEXT + 2) for side, n in rows.items()}
    with packages.fetch(TEXT, "text").open() as lines:
        while chunk := list(islice(lines, 256)):
            table = tokeniser(pa.table({"text": [json.loads(line)["text"] for line in chunk]}))
            for side, packer in packers.items():
                chosen = table.filter(pa.compute.equal(table["heldout"], side == "heldout"))
                packer.add([np.frombuffer(ids.as_py(), np.int32) for ids in chosen["ids"]])
    return {side: np.stack(packer.sequences) for side, packer in packers.items()}


def harvest(model: torch.nn.Module, sequences: np.ndarray, limits: dict[str, float], n: int) -> np.ndarray:
    """The first n kept rows of the sequences, bf16 bits [n, D], in the order of the text."""
    bos, blocks, found = gemma.text_config(MODEL).bos_token_id, [], 0
    for first in range(0, len(sequences), Harvest().sequences):
        tokens = torch.from_numpy(sequences[first : first + Harvest().sequences]).long()
        _, rows = harvest_block(model, Span.of_text(tokens, bos), [SITE], limits)
        blocks.append(encode_bf16(rows[SITE.key]))
        found += len(blocks[-1])
        print(f"\rrows: {found:,} of {n:,}", end="", file=sys.stderr, flush=True)
        if found >= n:
            print(file=sys.stderr)
            return np.concatenate(blocks)[:n]
    raise ValueError(f"{len(sequences)} sequences gave only {found} of {n} rows: raise SURPLUS")


def root_mean_square_norm(bits: np.ndarray) -> float:
    squares = (
        decode_bf16(bits[first : first + 65_536]).double().square().sum() for first in range(0, len(bits), 65_536)
    )
    return (sum(squares).item() / len(bits)) ** 0.5


def build(folder: Path, train_rows: int, heldout_rows: int) -> None:
    """Writes train.npy (shuffled once), heldout.npy and, last, rows.json; does nothing where rows.json is there."""
    if (folder / "rows.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sequences = tokenise({"train": train_rows, "heldout": heldout_rows})
    model, bos = gemma.load(MODEL, torch.device("cpu")), gemma.text_config(MODEL).bos_token_id
    sample = torch.from_numpy(sequences["train"][: Harvest().calibration_sequences]).long()
    calibrated = calibrate.measure(sample != bos, hooks.capture(model, sample, [SITE]), Harvest().outlier_norm)
    limits = {key: Harvest().outlier_norm * scale.median_norm for key, scale in calibrated.items()}
    train = harvest(model, sequences["train"], limits, train_rows)
    train = train[np.random.default_rng(SHUFFLE_SEED).permutation(len(train))]
    np.save(folder / "train.npy", train)
    np.save(folder / "heldout.npy", harvest(model, sequences["heldout"], limits, heldout_rows))
    facts = {
        "model": MODEL.name,
        "text": TEXT,
        "site": SITE.key,
        "context": CONTEXT,
        "dropped": f"BOS, and rows above {Harvest().outlier_norm:g} times the median norm",
        "median_norm": calibrated[SITE.key].median_norm,
        "shuffle_seed": SHUFFLE_SEED,
        "train_rows": train_rows,
        "heldout_rows": heldout_rows,
        "scale": root_mean_square_norm(train),
    }
    staged = folder / "rows.json.staged"
    staged.write_text(json.dumps(facts, indent=2) + "\n")
    staged.rename(folder / "rows.json")
