"""The trainers under comparison: what each is told, and why.

All: one pass, 1,024 rows a step, and one learning-rate schedule, a rise over 5 % and a fall over the last 20 %, as
the peers' own examples have (their library defaults, constant rates, are for runs of some 100,000 steps). What a peer
gives in steps or rows is likewise scaled to this run, as a fraction of it:

* a latent is dead, and AuxK works on it, after a tenth of the run (SAELens 1,000 steps, dictionary_learning 10M rows:
  both longer than this run, so that AuxK would never act);
* dictionary_learning's BatchTopK starts to follow its threshold half way, with a memory of 50 steps (its 1,000 steps
  and 0.999 would ship the threshold of the start); SAELens's 0.01 a step is left as it is;
* the L0 penalty rises over the first steps: SAELens's examples say 5 %, dictionary_learning twice the learning rate's.

Ours has AuxK at 0.1, three times its default, and was seen at 4e-3 too before its three rates were fixed (LOG.md).
Everything else is each trainer's default: initialisation, Adam, gradient clipping, AuxK's weight, bandwidth, penalty.
Each peer divides the rows as it is made to: SAELens to a mean norm of √D, dictionary_learning to a mean square of 1.
The one exception is SAELens's JumpReLU: its defaults (√D, coefficient 1) end at an L0 of 1,128 where 32 is asked for,
so it gets rows of unit mean square norm and the second coefficient tried.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import DICTIONARY_LEARNING, SAELENS

ROOT = Path(__file__).parents[3]
BATCH_TOPK, JUMPRELU = "batch_topk", "jumprelu"
ACTIVATIONS = (BATCH_TOPK, JUMPRELU)
SCHEDULE = {"warmup_fraction": 0.05, "decay_fraction": 0.2}


@dataclass(frozen=True)
class Trainer:
    name: str
    version: str
    runner: str
    learning_rates: dict[str, tuple[float, ...]]
    """Three an activation."""
    options: dict[str, dict[str, Any]]


def source_digest() -> str:
    """Version of our trainer: a digest of sae/'s source."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "sae").glob("*.py")))).hexdigest()[:10]


TRAINERS = {
    "saelens": Trainer(
        name="saelens",
        version=SAELENS,
        runner="peer_saelens.py",
        learning_rates={BATCH_TOPK: (3e-4, 1e-3, 3e-3), JUMPRELU: (3e-4, 1e-3, 3e-3)},
        options={
            BATCH_TOPK: SCHEDULE | {"dead_fraction": 0.1},
            JUMPRELU: SCHEDULE | {"dead_fraction": 0.1, "l0_coefficient": 0.02, "l0_warmup_fraction": 0.05},
        },
    ),
    "dictionary_learning": Trainer(
        name="dictionary_learning",
        version=DICTIONARY_LEARNING,
        runner="peer_dictionary_learning.py",
        learning_rates={BATCH_TOPK: (3e-4, 1e-3, 3e-3), JUMPRELU: (3e-4, 1e-3, 3e-3)},
        options={
            BATCH_TOPK: SCHEDULE | {"dead_fraction": 0.1, "threshold_start_fraction": 0.5, "threshold_beta": 0.98},
            JUMPRELU: SCHEDULE
            | {"dead_fraction": 0.1, "sparsity_penalty": 1.0, "bandwidth": 0.001, "sparsity_warmup_fraction": 0.1},
        },
    ),
    "scopeworks": Trainer(
        name="scopeworks",
        version=source_digest(),
        runner="ours.py",
        learning_rates={BATCH_TOPK: (1e-3, 2e-3, 3e-3), JUMPRELU: (1e-3, 2e-3, 3e-3)},
        options={
            activation: {"training": SCHEDULE, "options": {"auxk": {"coefficient": 0.1}}} for activation in ACTIVATIONS
        },
    ),
}
PEERS = ("dictionary_learning", "saelens")
