"""Gemma 3: finding a checkpoint, loading it as far as it is needed, and its loss."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster import packages
from cluster.errors import UserError
from cluster.recipe import Model
from sae import hooks
from sae.sites import Site

GEMMA_3_TYPES = ("gemma3", "gemma3_text")
# Where checkpoints keep the decoder stack: multimodal ones as published, and under transformers 5; text-only ones.
TRUNK_PREFIXES = {r"^(language_model\.model|model\.language_model|model)\.": ""}


def text_config(model: Model) -> Any:
    """The text model's Hugging Face config; UserError if the name is no Gemma 3. Nothing large is fetched."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from transformers import AutoConfig, Gemma3TextConfig

    if packages.is_package(model.name):
        if model.name.removeprefix(packages.PREFIX) not in packages.PUBLISHED_NAMES:
            packages.fetch(model.name, "model.name")  # raises, naming the packages that there are
        return Gemma3TextConfig.from_dict(packages.GEMMA_CONFIG)
    try:
        if not Path(model.name).is_dir() and not isinstance(try_to_load_from_cache(model.name, "config.json"), str):
            HfApi().model_info(model.name, timeout=10)  # answers at once where a download retries for half a minute
        config = AutoConfig.from_pretrained(model.name)
    except Exception as error:  # transformers and the hub raise many kinds; all mean that the model is not there
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            "model.name",
            f"{model.name!r} is no local folder and no model that could be fetched ({reason:.160}): "
            "name a Gemma 3 folder, a Hugging Face name, or package:gemma-3-270m",
        ) from error
    if config.model_type not in GEMMA_3_TYPES:
        raise UserError("model.name", f"{model.name!r} is a {config.model_type} model: name a Gemma 3 checkpoint")
    if Path(model.name).is_dir():
        for pattern, what in {"*.safetensors": "weights", "tokenizer*": "tokenizer"}.items():
            if not any(Path(model.name).glob(pattern)):
                raise UserError(
                    "model.name", f"{model.name!r} has no {what} ({pattern}): name a whole checkpoint folder"
                )
    return config.get_text_config()


def site_width(config: Any, site: Site) -> int:
    """D of a site: the heads side by side for attn_out, the residual stream's width for the others."""
    return config.num_attention_heads * config.head_dim if site.name == "attn_out" else config.hidden_size


def parameters(config: Any) -> int:
    """Parameters of the text model, counted without taking memory for them."""
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        return count(Gemma3ForCausalLM(config))


def trunk_parameters(config: Any, sites: list[Site]) -> int:
    """Parameters that `load_trunk` loads, counted likewise."""
    from transformers import Gemma3TextModel

    with torch.device("meta"):
        return count(_without_norm(Gemma3TextModel(_up_to(config, sites))))


def count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def locate(model: Model) -> str:
    """What transformers loads: a folder, fetched if it is a package, or a hub name."""
    return str(packages.fetch(model.name, "model.name")) if packages.is_package(model.name) else model.name


def load(model: Model, device: torch.device) -> nn.Module:
    """The causal language model, in evaluation mode and without gradients."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(locate(model), dtype=getattr(torch, model.dtype))
    return loaded.eval().requires_grad_(False).to(device)


def load_trunk(model: Model, sites: list[Site], device: torch.device) -> nn.Module:
    """The decoder stack up to the last layer that `sites` need, in evaluation mode and without gradients: what lies
    beyond (later layers, final norm, language head) and beside (vision tower) is not loaded."""
    from transformers import Gemma3TextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would list all that is left out
    stack: Any = Gemma3TextModel  # its annotations do not know of the loading info
    loaded, found = stack.from_pretrained(
        locate(model),
        config=_up_to(text_config(model), sites),
        dtype=getattr(torch, model.dtype),
        key_mapping=TRUNK_PREFIXES,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):  # transformers would leave them at random
        raise UserError("model.name", f"{model.name!r} has no {missing[0]}: name a whole checkpoint folder")
    return _without_norm(loaded).eval().requires_grad_(False).to(device)


def _up_to(config: Any, sites: list[Site]) -> Any:
    """The text model's config with the layers that `sites` need."""
    layers = 1 + max(site.layer for site in sites)
    shortened = copy.deepcopy(config)
    shortened.num_hidden_layers, shortened.layer_types = layers, config.layer_types[:layers]
    return shortened


def _without_norm(stack: nn.Module) -> nn.Module:
    stack.norm = nn.Identity()
    return stack


@torch.no_grad()
def loss(model: nn.Module, tokens: Tensor, real: Tensor) -> float:
    """Sum over all predicted tokens that are `real` of the cross-entropy in nats; both [sequences, T]."""
    hidden = hooks.trunk(model)(tokens).last_hidden_state
    head = model.get_submodule("lm_head")
    total = 0.0
    targets = tokens.masked_fill(~real, -100)
    for sequence_TD, ids_T in zip(hidden, targets, strict=True):  # one sequence's logits at a time bound the memory
        logits = head(sequence_TD[:-1]).float()
        total += nn.functional.cross_entropy(logits, ids_T[1:], ignore_index=-100, reduction="sum").item()
    return total
