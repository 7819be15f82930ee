"""What a cluster lacks is told before the sweep waits for it."""

import pytest

from cluster import recipe_file, session

HARVEST = {"Alive": True, "Labels": {"ray-subcluster": "harvest", "zone": "a"}}
FIT = {"Alive": True, "Labels": {"ray-subcluster": "fit"}}


@pytest.mark.parametrize(
    ("nodes", "missing"),
    [
        ([HARVEST, FIT], []),
        ([HARVEST], ["fit"]),
        ([HARVEST, FIT | {"Alive": False}], ["fit"]),
        ([], ["harvest", "fit"]),
    ],
)
def test_note__names_the_labels_that_no_node_has(nodes: list[dict], missing: list[str], tiny_recipe, capfd) -> None:
    for stage in ("harvest", "fit"):
        tiny_recipe[stage]["label_selector"] = {"ray-subcluster": stage}
    session._note_what_is_missing(recipe_file.parse(tiny_recipe), {"CPU": 99}, nodes)
    told = capfd.readouterr().out
    assert [stage for stage in ("harvest", "fit") if f"{stage}.label_selector" in told] == missing
