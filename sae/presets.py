"""Named ways of training, to start a recipe from."""

from sae.spec import JumpReLUSettings, Training

GEMMA_SCOPE_2 = Training(
    learning_rate=7e-5,
    adam_betas=(0.0, 0.999),
    warmup_steps=1_000,
    warmup_shape="cosine",
    decay_fraction=0,
    sparsity_warmup_steps=50_000,
    encoder_init_scale=1,
    centre="zero",
    jumprelu=JumpReLUSettings(bandwidth=0.001, threshold_start=0.001, frequency_coefficient=0.01),
)
"""Gemma Scope 2's published recipe (technical paper 2.2 and Gemma Scope 1, 3.2): the estimators, starts, Adam,
warm-ups and unit-norm decoder. λ and the frequency penalty's coefficient are *assumed*: they are not public."""

PRESETS = {"gemma_scope_2": GEMMA_SCOPE_2}
