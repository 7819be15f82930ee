"""Gemma Scope 2 as published: layers, widths and L0 targets behind its labels, and where each dictionary lies.

*Published*: technical paper, section 3.1 and table 1; the L0 ramp and the folder names are those of Google's
repositories (every entry of SAELens' list of them agrees).
"""

import re
from typing import Literal

LayersLabel = Literal["all", "subset"]
WidthLabel = Literal["16k", "65k", "262k", "524k", "1m"]
L0Label = Literal["small", "medium", "big"]

MODEL_LAYERS = {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}
SUBSET_DEPTHS = (25, 50, 65, 85)  # percent; floor(depth·layers + ½) is the published layer in all five models
WIDTHS: dict[WidthLabel, int] = {"16k": 2**14, "65k": 2**16, "262k": 2**18, "524k": 2**19, "1m": 2**20}
RAMPS: dict[L0Label, tuple[int, int]] = {
    "small": (10, 20),
    "medium": (30, 60),
    "big": (60, 150),
}  # from the first layer to a third of the depth
ALL_LAYERS_RAMPS: dict[L0Label, tuple[int, int]] = {"small": (10, 20), "big": (60, 120)}
JOINT_L0S: dict[L0Label, int] = {"medium": 50, "big": 150}  # crosscoders and CLTs, over all layers
# 262k is 18·14,560 and 26·10,080 latents in the published CLTs, 524k is 26·20,160: a multiple of 8, 16 or 32 in each
# layer (*assumed* for other models; 524k for 18 layers, which is not listed, is 18·29,120 with each of the three).
LATENTS_MULTIPLE = 32


def model_layers(published_name: str) -> int | None:
    """Layers of a Gemma 3 by Google's name for it, such as google/gemma-3-1b-pt; None for other names."""
    known = re.fullmatch(r"(?:google/)?gemma-3-(\d+[mb])(?:-pt|-it)?", published_name)
    return MODEL_LAYERS.get(known[1]) if known else None


def subset_layers(model_layers: int) -> list[int]:
    """The four layers with the most dictionaries."""
    return [(2 * depth * model_layers + 100) // 200 for depth in SUBSET_DEPTHS]


def l0_target(label: L0Label, layer: int, model_layers: int, *, all_layers: bool) -> int | None:
    """floor(lo + (hi − lo)·min(1, 3·layer/layers)); None if there is no such dictionary."""
    ramp = (ALL_LAYERS_RAMPS if all_layers else RAMPS).get(label)
    return None if ramp is None else ramp[0] + (ramp[1] - ramp[0]) * min(model_layers, 3 * layer) // model_layers


def joint_width(label: WidthLabel, n_layers: int) -> int:
    """Latents over all layers of a crosscoder or CLT."""
    return n_layers * (WIDTHS[label] // n_layers // LATENTS_MULTIPLE * LATENTS_MULTIPLE)


def width_label(width: int) -> str:
    """16384 → 16k, 65536 → 65k, 1048576 → 1m; below a thousand, the number."""
    if width >= 1_000_000:
        return f"{width // 1_000_000}m"
    return f"{width // 1000}k" if width >= 1000 else str(width)


def folder(
    kind: str,
    site: str,
    layers: tuple[int, ...],
    width: int,
    l0: int | str,
    *,
    all_layers: bool,
    seed: int,
    affine: bool,
) -> str:
    """Path of a dictionary within its suite.

    *Ours*, as Google has none: CLTs over some layers, crosscoders of other sites than resid_post, L0 as a number.
    """
    directory = {"sae": site, "transcoder": "transcoder", "clt": "clt", "crosscoder": "crosscoder"}[kind]
    if kind == "crosscoder" and site != "resid_post":
        directory += f"_{site}"
    if kind in ("sae", "transcoder") and all_layers:
        directory += "_all"
    place = "" if kind == "clt" and all_layers else f"layer_{'_'.join(map(str, layers))}_"
    suffix = ("_affine" if affine else "") + (f"_seed_{seed}" if seed else "")
    return f"{directory}/{place}width_{width_label(width)}_l0_{l0}{suffix}"
