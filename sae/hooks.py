"""Reading and replacing the tensors at a Gemma 3's sites while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sae.sites import Site

STACK = "Gemma3TextModel"
Edit = Callable[[Tensor], Tensor | None]


def trunk(model: nn.Module) -> nn.Module:
    """The decoder stack without its language head: `model.*` of a text-only checkpoint, `model.language_model.*`
    of a multimodal one, and a bare stack itself."""
    return next(module for module in model.modules() if type(module).__name__ == STACK)


@contextmanager
def hooked(model: nn.Module, edits: dict[Site, Edit]) -> Iterator[None]:
    """Within the block each forward pass calls the edits with their site's tensor [sequences, T, D]; a tensor
    that an edit returns takes its place."""
    handles = [
        _hook(trunk(model).get_submodule(f"layers.{site.layer}"), site.name, edit) for site, edit in edits.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(layer: nn.Module, name: str, edit: Edit) -> Any:
    if name == "attn_out":  # the only site that is a module's input

        def before(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            edited = edit(inputs[0])
            return None if edited is None else (edited,)

        return layer.get_submodule("self_attn.o_proj").register_forward_pre_hook(before)
    module = {"mlp_in": "pre_feedforward_layernorm", "mlp_out": "post_feedforward_layernorm", "resid_post": ""}[name]
    return layer.get_submodule(module).register_forward_hook(lambda _, inputs, output: edit(output))


def splice(positions: Tensor, rows_BD: Tensor | None, tensor: Tensor) -> Tensor:
    """A site's tensor [sequences, T, D] with the rows at flat `positions` replaced, by zeros if there are none."""
    flat = tensor.flatten(0, 1).clone()
    flat[positions] = 0 if rows_BD is None else rows_BD.to(flat.dtype)
    return flat.view_as(tensor)


class _Stop(Exception):
    """Ends a forward pass at the last site needed: the rest of the model is not computed."""


@torch.no_grad()
def capture(model: nn.Module, tokens: Tensor, sites: list[Site], *, whole: bool = False) -> dict[Site, Tensor]:
    """The tensors at `sites` for token ids [sequences, T], each [sequences, T, D]; stops after the last site, unless
    the pass must be `whole`: ZeRO-3 puts a module's parameters away when its pass ends."""
    captured: dict[Site, Tensor] = {}
    last = max(sites, key=lambda site: site.depth)

    def keep(site: Site) -> Edit:
        def edit(tensor: Tensor) -> None:
            captured[site] = tensor
            if site == last and not whole:
                raise _Stop

        return edit

    with hooked(model, {site: keep(site) for site in sites}), suppress(_Stop):
        trunk(model)(tokens)
    return captured
