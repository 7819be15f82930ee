"""Dictionaries of a Gemma 3's activations: what they are, how one step trains them, how they ship.

Only torch, numpy, pydantic and safetensors are imported here: the package knows nothing of Ray,
storage, MLflow or HTTP, so it runs on any machine with PyTorch alone.

Letters of shapes, used in names and docstrings throughout the project:
B rows of a batch, D width of a site, F latents, P active (row, latent) pairs, T positions of a sequence.
"""
