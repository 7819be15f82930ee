"""Named ways of training, to start a recipe from."""

from sae.spec import JumpReLUSettings, Training

GEMMA_SCOPE_2 = Training(
    learning_rate=7e-5,
    adam_betas=(0.0, 0.999),
    warmup_steps=1_000,
    warmup_shape="cosine",
    decay_fraction=0,
    sparsity_warmup_steps=50_000,
    l0_decay_steps=50_000,
    encoder_init_scale=1,
    centre="zero",
    jumprelu=JumpReLUSettings(bandwidth=0.001, threshold_start=0.001, coefficient=0.1, frequency_coefficient=0.1),
)
"""Gemma Scope 2's published recipe (technical paper 2.2 and Gemma Scope 1, 3.2), for millions of steps: estimators,
starts, Adam, warm-ups, unit-norm decoder. λ and the frequency penalty's coefficient are not public: *measured here*, on
runs of some hundred steps. Its Matryoshka loss is an option of the dictionary."""

GEMMA_SCOPE_2_SHORT = Training(
    learning_rate=2e-3,
    warmup_shape="cosine",
    jumprelu=JumpReLUSettings(bandwidth=0.03, coefficient=0.1, frequency_coefficient=0.1),
)
"""The same losses for runs of some hundred steps: rates, momentum, starts, warm-ups and bandwidth *measured here* in
place of the published ones, with which such a run is over before anything is sparse (FVU 0.78 in place of 0.32, 147
steps). Without Adam's momentum a rate so high breaks a dictionary when a row of ten times the median norm comes."""

PRESETS = {"gemma_scope_2": GEMMA_SCOPE_2, "gemma_scope_2_short": GEMMA_SCOPE_2_SHORT}
