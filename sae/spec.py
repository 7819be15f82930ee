"""What one dictionary is and how it is trained: the frozen description that everything else is built from."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae.sites import Site


class Strict(BaseModel):
    """Base of every configuration object: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Training(Strict):
    """How a dictionary is fitted. Fractions are of the whole run.

    The defaults are *measured here* on 150k rows of Gemma 3 270M, layer 9; tests/bench/LOG.md has the trials.
    """

    learning_rate: float = Field(1e-3, gt=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Linear rise of the learning rate from 0."""
    decay_fraction: float = Field(0.2, ge=0, lt=1)
    """Linear fall of the learning rate to 0 at the end."""
    encoder_init_scale: float = Field(0.7, gt=0)
    """W_enc starts as this multiple of W_dec. At 1, the published start, the overlapping directions that are active
    in a row rebuild it several times over, and the first steps only undo that."""
    jumprelu_bandwidth: float = Field(0.01, gt=0)
    """Width of the rectangle kernel of the straight-through estimators, for rows of unit mean square norm."""
    sparsity_coefficient: float = Field(0.02, gt=0)
    """λ of JumpReLU's quadratic L0 penalty, risen linearly over the learning rate's warm-up."""

    @model_validator(mode="after")
    def _phases_fit(self) -> "Training":
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction add up to more than the run: lower one of them")
        return self


class DictionarySpec(Strict):
    """One cell of a sweep."""

    id: str
    """Readable name and a hash of every field that changes the result."""
    site: str
    layer: int
    kind: Literal["sae"]
    activation: Literal["batch_topk", "jumprelu"]
    width: int
    """Latents F."""
    l0: int
    """Target mean number of active latents a row."""
    seed: int
    training: Training

    @property
    def reads(self) -> Site:
        return Site(self.layer, self.site)
