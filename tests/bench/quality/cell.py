"""One training run of the comparison, as the driver hands it to a runner."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Everything that decides the result, so that its hash names it in the cache."""

    trainer: str
    version: str
    """Of the peer's package, or a digest of our code."""
    activation: str
    """batch_topk or jumprelu."""
    l0: int
    """Target mean number of active latents a row."""
    learning_rate: float
    seed: int
    train_rows: int
    heldout_rows: int
    batch_rows: int = 1024
    width: int = 4096
    options: dict[str, Any] = field(default_factory=dict)
    """What else this trainer is told; `trainers.py` says why."""

    @property
    def steps(self) -> int:
        """One pass; the last, partial batch is left out for everyone."""
        return self.train_rows // self.batch_rows

    @property
    def key(self) -> str:
        settings = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:10]
        return f"{self.trainer}-{self.activation}-l0_{self.l0}-lr_{self.learning_rate:g}-seed_{self.seed}-{digest}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))
