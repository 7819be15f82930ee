"""Sites: the named tensors of Gemma 3 that dictionaries read, with Gemma Scope 2's hook strings."""

import re
from typing import NamedTuple

# Where each site lies, in the hook strings of Gemma Scope 2's config.json (technical paper, section 3.1).
HOOK_POINTS = {
    "attn_out": "model.layers.{layer}.self_attn.o_proj.input",
    "mlp_in": "model.layers.{layer}.pre_feedforward_layernorm.output",
    "mlp_out": "model.layers.{layer}.post_feedforward_layernorm.output",
    "resid_post": "model.layers.{layer}.output",
}
# The order in which one decoder layer computes them: harvest stops after the last one needed.
ORDER_IN_LAYER = ("attn_out", "mlp_in", "mlp_out", "resid_post")
STATIC_TOKENS = 4
"""Of a chat: `<bos><start_of_turn>user\\n`, the same in every sequence and not trained on (*published*: Gemma Scope 2's
dictionaries of the instruction-tuned models)."""


class Site(NamedTuple):
    """One tensor of the model: a site name of `HOOK_POINTS` at a layer, 0 being the first."""

    layer: int
    name: str

    @property
    def key(self) -> str:
        """Column name of the site in the activation stream."""
        return f"{self.name}.{self.layer}"

    @property
    def hook_point(self) -> str:
        return HOOK_POINTS[self.name].format(layer=self.layer)

    @property
    def depth(self) -> tuple[int, int]:
        """Sorts sites by when the forward pass reaches them."""
        return self.layer, ORDER_IN_LAYER.index(self.name)


def named(hook_point: str, count: int) -> list[Site]:
    """The `count` sites of a hook string, in which braces name several layers; ValueError if they are not so many."""
    for name, pattern in HOOK_POINTS.items():
        before, after = pattern.split("{layer}")
        found = re.fullmatch(rf"{re.escape(before)}(\d+|\{{[\d,]+\}}|\{{all\}}){re.escape(after)}", hook_point)
        if found:
            inner = found[1].strip("{}")
            layers = list(range(count)) if inner == "all" else [int(layer) for layer in inner.split(",") if layer]
            if len(set(layers)) == count == len(layers):
                return [Site(layer, name) for layer in layers]
    raise ValueError(f"{hook_point!r} does not name {count} of the sites of {', '.join(HOOK_POINTS)}")
