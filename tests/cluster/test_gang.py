"""A gang of two ranks over gloo: its tensors against the unsharded model's, and what happens when a rank does not."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from cluster import gang, gemma, memory, packages, planner, recipe_file
from cluster.errors import UserError
from cluster.gang import TOLERANCE, Gang, GangFailed, RankLost, Whole
from cluster.gemma import count
from cluster.recipe import Recipe
from cluster.run_folder import results_of
from sae.sites import HOOK_POINTS, Site

pytest.importorskip("deepspeed", reason="the extra `sharded` is not installed")

TOKENS = torch.randint(4, 200, (3, 20), generator=torch.Generator().manual_seed(0))
SITES = [Site(layer, name) for layer in (0, 2) for name in HOOK_POINTS]
TENSOR_PARALLEL, ZERO_3 = {"tensor_parallel": 2}, {"zero3": 2}


def recipe_of(name: Path | str, harvest: dict, dtype: str = "float32") -> Recipe:
    grid = {"layers": [0, 2], "activations": ["topk"], "widths": [64], "l0s": [8]}
    corpus = {"paths": ["text.jsonl"], "context": 20, "train_tokens": 200, "heldout_tokens": 200}
    model = {"name": str(name), "dtype": dtype}
    return recipe_file.parse(
        {"name": "gang", "output": "run", "model": model, "corpus": corpus, "harvest": harvest, "sweep": [grid]}
    )


@pytest.fixture
def start():
    """Gangs that end with the test."""
    gangs: list[Gang] = []

    def start(name: Path | str, dtype: str = "float32", sites: list[Site] = SITES, **harvest) -> Gang:
        gangs.append(Gang(recipe_of(name, harvest, dtype), sites))
        return gangs[-1]

    yield start
    for one in gangs:
        one.close()


def differences(found: dict[Site, torch.Tensor], expected: dict[Site, torch.Tensor]) -> dict[str, float]:
    """At each site, the norm of the difference over that of what is expected."""
    assert found.keys() == expected.keys()
    for site in expected:
        assert found[site].shape == expected[site].shape, site
        assert found[site].dtype == expected[site].dtype, site
    return {
        site.key: ((found[site].double() - expected[site].double()).norm() / expected[site].double().norm()).item()
        for site in expected
    }


def assert_equal(found: dict[Site, torch.Tensor], expected: dict[Site, torch.Tensor]) -> None:
    assert set(differences(found, expected).values()) == {0.0}


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def pids(of: Gang) -> list[int]:
    return [rank.pid for rank in of.ranks]


def test_tensor_parallel__is_within_its_tolerance_at_every_site(grouped_gemma, start) -> None:
    whole = Whole(recipe_of(grouped_gemma, {}), SITES)
    gang = start(grouped_gemma, tensor_parallel=2)
    found = differences(gang.capture(TOKENS), whole.capture(TOKENS))
    assert max(found.values()) < TOLERANCE["float32"]
    assert found["resid_post.2"] > 0  # it really is computed in parts
    assert max(gang.resident) < 0.7 * count(whole.model)


@pytest.mark.chaos
def test_tensor_parallel__in_bfloat16_adds_no_more_than_bfloat16_does(grouped_gemma, start) -> None:
    exact = Whole(recipe_of(grouped_gemma, {}), SITES).capture(TOKENS)
    exact = {site: tensor.bfloat16() for site, tensor in exact.items()}
    whole = Whole(recipe_of(grouped_gemma, {}, "bfloat16"), SITES).capture(TOKENS)
    shared = start(grouped_gemma, "bfloat16", tensor_parallel=2).capture(TOKENS)
    assert max(differences(shared, whole).values()) < TOLERANCE["bfloat16"]
    rounding, found = differences(whole, exact), differences(shared, exact)
    assert all(found[key] < 1.5 * rounding[key] for key in found)


def test_zero_3__is_the_unsharded_model_bit_for_bit_and_keeps_nothing_between_blocks(tiny_gemma, start) -> None:
    sites = [*SITES[:4], Site(2, "attn_out")]  # the last lies before a module whose parameters are gathered by then
    whole = Whole(recipe_of(tiny_gemma, {}, "bfloat16"), sites)
    gang = start(tiny_gemma, "bfloat16", sites, zero3=2)
    for tokens in (TOKENS, TOKENS.flip(0)[:2]):
        assert_equal(gang.capture(tokens), whole.capture(tokens))
        assert gang.resident == [0, 0]


@pytest.mark.chaos
def test_a_rank_that_stops_or_dies__is_replaced_and_the_block_is_the_same(grouped_gemma, start) -> None:
    gang = start(grouped_gemma, tensor_parallel=2)
    calm = gang.capture(TOKENS)

    first = pids(gang)
    os.kill(first[1], signal.SIGSTOP)  # it hangs: nothing but the time limit can tell
    gang.recipe = recipe_of(grouped_gemma, {"tensor_parallel": 2, "block_seconds": 15})
    started = time.monotonic()
    assert_equal(gang.capture(TOKENS), calm)
    assert time.monotonic() - started > 15
    second = pids(gang)
    assert not set(first) & set(second)
    assert not alive(first)

    os.kill(second[1], signal.SIGSTOP)  # so that the block is under way when the rank is killed
    gang.recipe = recipe_of(grouped_gemma, {"tensor_parallel": 2, "block_seconds": 300})
    threading.Timer(1, os.kill, (second[1], signal.SIGKILL)).start()
    started = time.monotonic()
    assert_equal(gang.capture(TOKENS), calm)
    assert 1 < time.monotonic() - started < 250  # not by the time limit
    assert not set(second) & set(pids(gang))
    assert not alive(second)


@pytest.mark.chaos
def test_ranks__die_with_the_process_that_started_them(grouped_gemma, tmp_path: Path) -> None:
    """Even a rank that is stopped, and a leader that is killed and can tell nobody."""
    (tmp_path / "recipe.yaml").write_text(recipe_of(grouped_gemma, TENSOR_PARALLEL).to_yaml())
    body = (
        "import threading, time, torch; from cluster import gang, recipe_file; from sae.sites import Site\n"
        f"gang = gang.Gang(recipe_file.load({str(tmp_path / 'recipe.yaml')!r}), [Site(0, 'resid_post')])\n"
        # From a thread that ends: the ranks must not end with it.
        "starter = threading.Thread(target=gang.capture, args=[torch.zeros(1, 4, dtype=torch.long)])\n"
        "starter.start(); starter.join(); time.sleep(1)\n"
        "print('ranks', *(rank.pid for rank in gang.ranks if rank.poll() is None), flush=True); time.sleep(600)"
    )
    leader = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in leader.stdout if line.startswith("ranks"))  # DeepSpeed talks there too
        started = [int(word) for word in line.split()[1:]]
        assert len(started) == 2
        os.kill(started[1], signal.SIGSTOP)
    finally:
        leader.kill()
        leader.wait()
    deadline = time.monotonic() + 10
    while alive(started):
        assert time.monotonic() < deadline, f"orphans: {alive(started)}"
        time.sleep(0.1)


def test_a_block_that_fails_every_gang__fails_with_the_ranks_reason(tmp_path: Path, start, monkeypatch) -> None:
    monkeypatch.setattr(gang, "ATTEMPTS", 1)
    one = start(tmp_path / "nowhere", tensor_parallel=2)
    with pytest.raises(GangFailed, match=r"nowhere.* is no local folder") as failed:
        one.capture(TOKENS)
    assert "nowhere" in str(failed.value).splitlines()[-1]  # which is what a sweep that fails says last
    assert not one.ranks


def test_a_block__is_tried_a_few_times_and_no_more(start, monkeypatch) -> None:
    one, begun = start("nowhere", tensor_parallel=2), []

    def lose() -> None:
        begun.append(1)
        raise RankLost("it died")

    monkeypatch.setattr(one, "_start", lose)
    with pytest.raises(GangFailed, match="it died"):
        one.capture(TOKENS)
    assert len(begun) == gang.ATTEMPTS


@pytest.mark.chaos
def test_real_gemma__shared_by_two_ranks_is_within_the_tolerance(start) -> None:
    name = "package:gemma-3-270m"
    if not (packages.cache() / packages.PACKAGES["gemma-3-270m"][0]).exists():
        pytest.skip("the real model is not in the cache")
    whole = Whole(recipe_of(name, {}), SITES)
    gang = start(name, tensor_parallel=2)
    tokens = torch.randint(1000, 200_000, (2, 64), generator=torch.Generator().manual_seed(1))
    assert max(differences(gang.capture(tokens), whole.capture(tokens)).values()) < TOLERANCE["float32"]
    assert sum(gang.resident) < 2 * count(whole.model)


def test_recipe__tensor_parallel_decides_results_and_zero_3_does_not(tiny_gemma: Path) -> None:
    whole, shared, away = (recipe_of(tiny_gemma, harvest) for harvest in ({}, TENSOR_PARALLEL, ZERO_3))
    assert whole.specs()[0].id == away.specs()[0].id != shared.specs()[0].id
    kept = [results_of(one.model_dump(mode="json")) for one in (whole, shared, away)]
    assert kept[0] == kept[2] != kept[1]
    with pytest.raises(UserError, match=r"harvest\.zero3: .*leave out"):
        recipe_of(tiny_gemma, TENSOR_PARALLEL | ZERO_3)


def test_plan__counts_every_rank(tiny_gemma: Path) -> None:
    planned, lines = [], []
    for harvest in ({}, TENSOR_PARALLEL, {"tensor_parallel": 3}, ZERO_3):
        one = recipe_of(tiny_gemma, harvest)
        config = gemma.text_config(one.model)
        laid_out = planner.lay_out(one, config)
        planned.append(memory.memory(one, laid_out, config))
        lines.append(planner.table(one, laid_out, planned[-1]))
    whole, two, three, away = planned
    trunk = 4 * gemma.trunk_parameters(config, laid_out.sites)
    assert two.rank == memory.PROCESS_BYTES + trunk
    assert three.harvest - two.harvest == two.rank
    assert two.harvest == whole.harvest - trunk + 2 * two.rank
    assert away.rank > memory.PROCESS_BYTES + trunk + trunk // 2
    assert " ranks x " not in lines[0]
    assert "1 harvest x 1.5 (2 ranks x 0.5)" in lines[1]
