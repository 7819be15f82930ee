"""What one dictionary is and how it is trained: the frozen description that everything else is built from.

`kind` says which sites a dictionary reads and writes, `activation` how latents become sparse, `options` what is added
to its loss; each composes with the others. Values are marked *published* (with their source), *measured here*
(tests/bench/LOG.md has the trials) or *assumed*.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from sae.sites import Site

Kind = Literal["sae", "transcoder", "crosscoder", "clt"]
ActivationName = Literal["relu", "topk", "batch_topk", "jumprelu", "gated"]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """Base of every configuration object: frozen, and an unknown key is an error."""

    # A default of 10 becomes 10.0 as a given one does: they must hash alike.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class JumpReLUSettings(Strict):
    """JumpReLU's estimators and penalty."""

    bandwidth: float = Field(0.01, gt=0)
    """Width ε of the rectangle kernel of the straight-through estimators, for rows of unit mean square norm
    (*measured here*; *published*: 0.001)."""
    threshold_start: float | None = Field(None, ge=0)
    """Where all thresholds start (*published*: 0.001); without it, where the first batch has the target L0
    (*measured here*: a small run is over before the published start comes down from F/2 active latents)."""
    penalty: Literal["quadratic", "linear", "tanh"] = "quadratic"
    """quadratic: λ(2/L0*)(L0 − L0*)², Gemma Scope 2; linear: λ·L0, Gemma Scope 1; tanh: λ·Σ tanh(c·f), Anthropic."""
    coefficient: float = Field(0.02, gt=0)
    """λ."""
    tanh_scale: float = Field(4.0, gt=0)
    """c of the tanh penalty (*published*: Anthropic, January 2025, for rows of mean norm √D; ours have unit norm)."""
    frequency_coefficient: float = Field(0.0, ge=0)
    """μ of the secondary penalty μ·Σ max(0, p − p₀)²/p₀ on the batch frequency p of each latent (Gemma Scope 2 has such
    a penalty; its form and estimator are *assumed*)."""
    frequency_limit: float = Field(0.04, gt=0, lt=1)
    """p₀ (*measured here*: the most frequent latent comes to lie somewhat above it, and below 10 %, which is what is
    *published*)."""


class L1Settings(Strict):
    """The L1 penalty of ReLU and Gated dictionaries: λ·Σ f^p, decoder rows being of unit norm."""

    coefficient: float = Field(0.1, gt=0)
    """λ, or where it starts if `l0_control` moves it."""
    p_end: float = Field(1.0, gt=0, le=1)
    """p falls linearly from 1 to this over the run's second to last fifth; 0.2 is p-anneal (*published*: Karvonen et
    al. 2024), with λ rescaled in each batch so that the penalty's size stays that of L1."""


class Training(Strict):
    """How a dictionary is fitted. Fractions are of the whole run; a number of steps, where given, takes their place.

    The defaults are *measured here* on 150k rows of Gemma 3 270M, layer 9; tests/bench/LOG.md has the trials.
    """

    learning_rate: float = Field(1e-3, gt=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Rise of the learning rate."""
    warmup_steps: PositiveInt | None = None
    warmup_shape: Literal["linear", "cosine"] = "linear"
    """linear from 0, or a half cosine from a tenth (*published*: Gemma Scope 1, 3.2)."""
    decay_fraction: float = Field(0.2, ge=0, lt=1)
    """Linear fall of the learning rate to 0 at the end (*published*: none)."""
    sparsity_warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Linear rise of the penalties' coefficients from 0."""
    sparsity_warmup_steps: PositiveInt | None = None
    l0_start: float = Field(1.0, ge=1)
    """The L0 target starts at this multiple of `l0` …"""
    l0_decay_fraction: float = Field(0.0, ge=0, le=1)
    """… and reaches `l0` linearly over this share of the run."""
    l0_decay_steps: PositiveInt | None = None
    l0_control: float = Field(0.05, ge=0)
    """Where a penalty has no target of its own (L1, linear, tanh), λ moves so that L0 meets `l0`: each step by this
    share for an L0 of e times the target (*measured here*); 0 leaves λ as it is, as published sweeps over λ do."""
    encoder_start: Literal["tied", "independent"] | None = None
    """W_enc starts along W_dec, or at directions of its own. By default tied where a dictionary writes the sites that
    it reads, independent for transcoders and CLTs (*published*: Gemma Scope 1, 3.2)."""
    encoder_init_scale: float = Field(0.7, gt=0)
    """Norm of W_enc's rows at the start (*published*: 1, as the decoder's). At 1 the overlapping directions that are
    active in a row rebuild it several times over, and the first steps only undo that."""
    centre: Literal["data", "zero"] = "data"
    """Biases start at the mean of the first batch (*measured here*: most of Gemma 3's few huge dimensions is their
    mean), or at zero (*published*)."""
    jumprelu: JumpReLUSettings = JumpReLUSettings()
    l1: L1Settings = L1Settings()

    @model_validator(mode="after")
    def _phases_fit(self) -> "Training":
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction add up to more than the run: lower one of them")
        return self


class Matryoshka(Strict):
    """Nested prefixes of the latents, each of which must rebuild the row by itself (Bussmann et al. 2025).

    The loss is the mean of the prefixes' squared errors, that of the whole dictionary being the last.
    """

    prefixes: tuple[Fraction, ...] = Field((1 / 16, 1 / 8, 1 / 4, 1 / 2), min_length=1)
    """Sizes as shares of the width, ascending (*assumed*: Gemma Scope 2's are not public)."""
    sampled: bool = False
    """As many prefixes drawn anew each step, log-uniformly from the smallest of `prefixes` up."""

    @model_validator(mode="after")
    def _ascending(self) -> "Matryoshka":
        if list(self.prefixes) != sorted(set(self.prefixes)):
            raise ValueError(f"{list(self.prefixes)} does not ascend: sort the prefixes")
        return self


class AuxK(Strict):
    """Dead latents rebuild what the living leave over (Gao et al. 2024, appendix A.2), encoder gradients included."""

    coefficient: float = Field(1 / 32, gt=0)
    """α of α·‖e − ê‖²/‖e‖² (*published*)."""
    latents: PositiveInt | None = None
    """Dead latents a row; by default half the width of what is written (*published*)."""


class Preactivation(Strict):
    """λ·Σ max(0, θ − z) over dead latents, which draws them up to their thresholds (Anthropic, January 2025)."""

    coefficient: float = Field(3e-6, gt=0)
    """*published*, for rows scaled to mean norm √D; ours have unit norm."""


class Resampling(Strict):
    """Dead latents restart at rows that are rebuilt badly (Bricken et al. 2023)."""

    at: tuple[Fraction, ...] = (0.1, 0.2, 0.3, 0.4)
    """Shares of the run after which it is done."""


class Start(Strict):
    """Where a dictionary starts, if not at random directions."""

    folders: tuple[str, ...] = Field(min_length=1)
    """A published dictionary to finetune; or, for a crosscoder or CLT, one single-layer dictionary a layer (Gemma Scope
    2, 3.3), best Matryoshka ones: their first latents are taken."""


class Options(Strict):
    """What composes with every kind and activation."""

    affine: bool = False
    """A skip W_skip·x from what is read to what is written at the same layer: transcoders and CLTs only."""
    causal: bool = True
    """Crosscoders: latents read one layer and write it and later ones; else they read and write all layers."""
    matryoshka: Matryoshka | None = None
    auxk: AuxK | None = None
    preactivation: Preactivation | None = None
    resampling: Resampling | None = None
    dead_after_rows: PositiveInt = 10_000
    """A latent that fired on none of so many rows in a row is dead (*measured here*; *published*: 10M, Gao et al.)."""


class DictionarySpec(Strict):
    """One cell of a sweep."""

    id: str
    """Readable name and a hash of every field that changes the result."""
    kind: Kind
    site: str
    """Site of an sae or a crosscoder; transcoders and CLTs read `mlp_in` and write `mlp_out`."""
    layers: tuple[int, ...]
    """One layer, or those that a crosscoder or CLT spans, ascending."""
    activation: ActivationName
    width: int
    """Latents F, over all layers."""
    l0: int
    """Target mean number of active latents a row, over all layers."""
    seed: int
    options: Options = Options()
    training: Training = Training()
    start: Start | None = None
    folder: str
    """Path of the published dictionary within its suite."""

    @property
    def reads(self) -> list[Site]:
        """Sites whose rows are encoded, by layer."""
        name = "mlp_in" if self.kind in ("transcoder", "clt") else self.site
        return [Site(layer, name) for layer in self.layers]

    @property
    def writes(self) -> list[Site]:
        """Sites whose rows are rebuilt, by layer."""
        name = "mlp_out" if self.kind in ("transcoder", "clt") else self.site
        return [Site(layer, name) for layer in self.layers]

    @property
    def sites(self) -> list[Site]:
        """What it reads and writes, each once, by depth."""
        return sorted({*self.reads, *self.writes}, key=lambda site: site.depth)

    @property
    def autoencodes(self) -> bool:
        """Whether it writes the sites that it reads."""
        return self.reads == self.writes
