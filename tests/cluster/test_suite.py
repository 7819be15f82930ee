"""Gemma Scope 2's labels and folder names against lists of what was published."""

from itertools import product
from pathlib import Path

import pytest

from cluster import suite
from cluster.recipe_file import load

RECIPES = Path(__file__).resolve().parent.parent.parent / "jobs" / "recipes"

# Technical paper, table 1, and the lists of Google's repositories.
SUBSETS = {
    "270m": [5, 9, 12, 15],
    "1b": [7, 13, 17, 22],
    "4b": [9, 17, 22, 29],
    "12b": [12, 24, 31, 41],
    "27b": [16, 31, 40, 53],
}
# config.json's l0 in google/gemma-scope-2-270m-pt: (suite, label) → targets of some layers
TARGETS_270M = {
    (True, "small"): {0: 10, 1: 11, 5: 18, 6: 20, 17: 20},
    (True, "big"): {0: 60, 1: 70, 5: 110, 6: 120, 17: 120},
    (False, "small"): {5: 18, 9: 20, 12: 20, 15: 20},
    (False, "medium"): {5: 55, 9: 60, 12: 60, 15: 60},
    (False, "big"): {5: 135, 9: 150, 12: 150, 15: 150},
}


@pytest.mark.parametrize("size", SUBSETS)
def test_subset__is_the_published_four_layers(size: str) -> None:
    layers = suite.model_layers(f"google/gemma-3-{size}-pt")
    assert suite.subset_layers(layers) == SUBSETS[size]
    assert suite.model_layers(f"gemma-3-{size}-it") == layers


@pytest.mark.parametrize("name", ["gemma-3", "google/gemma-3-2b", "someone/gemma-3-1b-pt", "package:gemma-3-1b-pt"])
def test_model_layers__of_other_names_are_unknown(name: str) -> None:
    assert suite.model_layers(name) is None


@pytest.mark.parametrize(("all_layers", "label"), TARGETS_270M)
def test_l0_target__rises_with_depth(all_layers: bool, label: str) -> None:
    for layer, target in TARGETS_270M[all_layers, label].items():
        assert suite.l0_target(label, layer, 18, all_layers=all_layers) == target


def test_joint_width__is_the_published_clts() -> None:
    assert suite.joint_width("262k", 18) == 18 * 14_560
    assert suite.joint_width("262k", 26) == 26 * 10_080
    assert suite.joint_width("524k", 26) == 26 * 20_160
    assert [suite.joint_width(label, 4) for label in ("262k", "1m")] == [4 * 65_536, 4 * 262_144]
    assert suite.width_label(suite.joint_width("524k", 18)) == "524k"


@pytest.mark.parametrize(
    ("width", "label"), [(16_384, "16k"), (65_536, "65k"), (524_288, "524k"), (1_048_576, "1m"), (999, "999")]
)
def test_width_label__is_gemma_scope_2s(width: int, label: str) -> None:
    assert suite.width_label(width) == label


def published_270m() -> set[str]:
    """Every folder of Gemma Scope 2 for one 270M model, by the rules of its technical paper."""
    sites, everywhere, subset = ("resid_post", "mlp_out", "attn_out"), range(18), SUBSETS["270m"]
    every, some = [("16k", "262k"), ("small", "big")], [("16k", "65k", "262k"), ("small", "medium", "big")]
    affine = ("", "_affine")
    return {
        *(f"{s}_all/layer_{n}_width_{w}_l0_{l0}" for s, n, w, l0 in product(sites, everywhere, *every)),
        *(f"{s}/layer_{n}_width_{w}_l0_{l0}" for s, n, w, l0 in product(sites, subset, *some)),
        *(f"resid_post/layer_{n}_width_1m_l0_{l0}" for n, l0 in product(subset, some[1])),
        *(f"resid_post/layer_{n}_width_262k_l0_medium_seed_1" for n in subset),
        *(f"transcoder_all/layer_{n}_width_{w}_l0_{l0}{a}" for n, w, l0, a in product(everywhere, *every, affine)),
        *(f"transcoder/layer_{n}_width_{w}_l0_{l0}{a}" for n, w, l0, a in product(subset, *some, affine)),
        *(
            f"crosscoder/layer_5_9_12_15_width_{w}_l0_{l0}"
            for w, l0 in product(("65k", "262k", "524k", "1m"), ("medium", "big"))
        ),
        *(f"clt/width_{w}_l0_{l0}{a}" for w, l0, a in product(("262k", "524k"), ("medium", "big"), affine)),
    }


def test_gemma_scope_2_270m__is_the_published_suite() -> None:
    cells = load(str(RECIPES / "gemma_scope_2_270m.yaml")).cells()
    assert len(cells) == 216 + 108 + 12 + 4 + 144 + 72 + 8 + 8
    assert {cell.spec.folder for cell in cells} == published_270m()
    assert len({cell.suite for cell in cells}) == 1  # one repository
    assert len({cell.spec.id for cell in cells}) == len(cells)
    by_folder = {cell.spec.folder: cell.spec for cell in cells}
    seeds = [by_folder[f"resid_post/layer_5_width_262k_l0_medium{suffix}"].seed for suffix in ("", "_seed_1")]
    assert seeds == [0, 1]
    assert by_folder["resid_post_all/layer_5_width_16k_l0_big"].l0 == 110
    assert by_folder["resid_post/layer_5_width_16k_l0_big"].l0 == 135
    assert by_folder["clt/width_262k_l0_big_affine"].l0 == by_folder["clt/width_524k_l0_big"].l0 == 150
    assert by_folder["clt/width_262k_l0_big_affine"].width == 262_080
    assert by_folder["clt/width_262k_l0_big_affine"].options.affine
    assert by_folder["clt/width_262k_l0_big_affine"].layers == tuple(range(18))
