"""Order: whatever rank a row arrives at, and however late, the batches are the same, and each row comes once."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from cluster import recipe_file
from cluster.exchange import exchange
from cluster.harvest import BLOCK, BLOCK_ROWS, ROW, encode_bf16
from cluster.layout import Layout
from cluster.stream import Order, WindowReader
from sae.spec import DictionarySpec, Options, Training

ORDER = Order(sequences=37, context=16, block_sequences=4, window_sequences=12, batch_rows=50, seed=5)
WIDTHS = {"resid_post.1": 6, "attn_out.2": 10, "mlp_out.3": 6}
SITES = [("resid_post", 1), ("attn_out", 2), ("mlp_out", 3)]


def make_layout(teams: int, replicas: int, shards: int) -> Layout:
    """The last site's dictionaries lie on every team, the others' on one."""
    specs = [
        DictionarySpec(
            id=name, kind="sae", site=name, layers=(layer,), activation="topk", width=8, l0=2, seed=0, folder=name,
            options=Options(), training=Training(),
        )
        for name, layer in SITES
    ]  # fmt: skip
    held = [[spec for n, spec in enumerate(specs) if n == len(specs) - 1 or n % teams == team] for team in range(teams)]
    return Layout(held, WIDTHS, 4, replicas, shards)


ONE_RANK = make_layout(1, 1, 1)


def block_rows(block: int) -> dict[str, np.ndarray]:
    """A block's rows as a harvester emits them, every 13th row dropped; values are a function of the row id."""
    place = block % ORDER.blocks  # in its epoch
    first, last = place * ORDER.block_sequences, min((place + 1) * ORDER.block_sequences, ORDER.sequences)
    ids = np.arange(first * ORDER.context, last * ORDER.context)
    ids = ids[ids % 13 != 0]
    columns = {
        key: encode_bf16(torch.sin(torch.from_numpy(ids[:, None] * 0.37 + np.arange(d)) + len(key)))
        for key, d in WIDTHS.items()
    }
    return columns | {ROW: ids, BLOCK: np.full(len(ids), block), BLOCK_ROWS: np.full(len(ids), len(ids))}


def deal(order: Order, rank: int, world: int, seed: int, first_window: int) -> list[dict[str, np.ndarray]]:
    """What one rank is sent from a window on: blocks in order, dealt at random, some cut in two for different ranks."""
    chosen, mine = random.Random(seed), []
    for block in range(order.blocks_of(first_window).start, order.blocks):
        rows = block_rows(block)
        cut = chosen.choice([0, len(rows[ROW]) // 3])
        for part in (slice(0, cut), slice(cut, None)):
            owner = chosen.randrange(world)
            piece = {name: column[part] for name, column in rows.items()}
            if owner == rank and len(piece[ROW]):
                mine.append(piece)
    return mine


def run_rank(rank: int, order: Order, layout: Layout, seed: int, first_window: int, rendezvous: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=layout.n_ranks)
    reader = WindowReader(order, iter(deal(order, rank, layout.n_ranks, seed, first_window)), list(WIDTHS))
    place = layout.place(rank)
    for window in reader.windows(first_window):
        share = exchange(window, layout, order, torch.device("cpu"))
        for number, chosen in enumerate(order.batches(window.number, len(share.ids))):
            batch = share.batch(chosen)
            assert batch.keys() == set(layout.keys(place.team))
            for key, rows in batch.items():
                bits = rows.view(torch.int16).tolist()
                results.append((key, window.number, number, place.replica, bits, share.ids[chosen].tolist()))
    dist.barrier()
    dist.destroy_process_group()


def batches(
    layout: Layout, seed: int, tmp_path, first_window: int = 0, order: Order = ORDER
) -> dict[tuple, tuple[str, list[int]]]:
    """Digest and ids of each batch of each site, its replicas' rows put together."""
    rendezvous = str(tmp_path / f"rendezvous-{layout.n_ranks}-{seed}-{first_window}-{order.epochs}")
    with mp.Manager() as manager:
        results = [] if layout.n_ranks == 1 else manager.list()
        arguments = (order, layout, seed, first_window, rendezvous, results)
        if layout.n_ranks == 1:
            run_rank(0, *arguments)
        else:
            mp.spawn(run_rank, arguments, nprocs=layout.n_ranks)
        parts: dict[tuple, dict[int, tuple]] = {}
        for key, window, number, replica, bits, ids in results:
            part = parts.setdefault((key, window, number), {})
            assert part.setdefault(replica, (bits, ids)) == (bits, ids)  # equal at every shard and team
    found = {}
    for place, part in parts.items():
        assert sorted(part) == list(range(layout.replicas))
        rows = np.concatenate([np.array(part[replica][0], np.int16) for replica in sorted(part)])
        found[place] = hashlib.sha256(rows.tobytes()).hexdigest(), part[0][1]
    return found


def test_batches__are_the_same_for_any_layout_and_any_arrival(tmp_path) -> None:
    one = batches(ONE_RANK, 0, tmp_path)
    for seed, mesh in enumerate([(3, 1, 1), (2, 2, 1), (1, 2, 2)], start=1):
        assert batches(make_layout(*mesh), seed, tmp_path) == one, mesh
    wanted = {row for row in range(ORDER.sequences * ORDER.context) if row % 13}
    for key in WIDTHS:
        ids = [row for (k, _, _), (_, rows) in one.items() if k == key for row in rows]
        assert sorted(ids) == sorted(wanted)  # none lost, none twice
    whole_windows = [len(rows) for (_, window, _), (_, rows) in one.items() if window < 3]
    assert min(whole_windows) >= 0.85 * ORDER.batch_rows  # nearly equal sizes, no rest
    assert max(whole_windows) <= 1.15 * ORDER.batch_rows


def test_batches__of_a_second_epoch_have_every_row_once_more_in_another_order(tmp_path) -> None:
    twice = replace(ORDER, epochs=2)
    found = batches(make_layout(2, 1, 1), 3, tmp_path, order=twice)
    assert batches(ONE_RANK, 0, tmp_path, first_window=5, order=twice) == {
        at: b for at, b in found.items() if at[1] >= 5
    }
    key, wanted = "attn_out.2", sorted(row for row in range(ORDER.sequences * ORDER.context) if row % 13)
    epochs = [{at[1:]: b for at, b in found.items() if at[0] == key and at[1] // 4 == epoch} for epoch in (0, 1)]
    assert [window for window, _ in epochs[1]] == [window + 4 for window, _ in epochs[0]]
    for epoch in epochs:
        assert sorted(row for _, rows in epoch.values() for row in rows) == wanted
    for (window, number), (_, rows) in epochs[0].items():
        again = epochs[1][window + 4, number][1]
        assert rows != again
        assert {row // ORDER.context // 12 for row in again} == {window}  # the same sequences make a window
    assert epochs[0] == {at[1:]: b for at, b in batches(ONE_RANK, 4, tmp_path).items() if at[0] == key}


def test_batches__of_a_resumed_run_are_the_undisturbed_ones(tmp_path) -> None:
    whole = batches(ONE_RANK, 0, tmp_path)
    assert batches(ONE_RANK, 0, tmp_path, first_window=2) == {
        place: batch for place, batch in whole.items() if place[1] >= 2
    }


def test_batches__are_shuffled_within_their_window_and_differ_between_windows_and_seeds() -> None:
    first, second = ORDER.batches(0, 180)[0], ORDER.batches(1, 180)[0]
    reseeded = replace(ORDER, seed=6).batches(0, 180)[0]
    assert not torch.equal(first, first.sort().values)
    assert not torch.equal(first, second)
    assert not torch.equal(first, reseeded)


def pairs_of_one_sequence(batches: list[torch.Tensor], context: int) -> float:
    """The mean share of a batch's pairs of rows that are of one sequence; batches of row ids."""
    shares = []
    for ids in batches:
        _, counts = (ids // context).unique(return_counts=True)
        shares.append((counts * (counts - 1)).sum().item() / (len(ids) * (len(ids) - 1)))
    return sum(shares) / len(shares)


def mixing(order: Order) -> tuple[float, float]:
    """The share of pairs of one sequence in the batches of a run, and in those of a full shuffle of its rows."""
    counts = [order._sequences_in(window) * order.context for window in range(order.windows)]
    starts = np.cumsum([0, *counts])
    found = [int(starts[w]) + chosen for w in range(order.windows) for chosen in order.batches(w, counts[w])]
    everything = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(2))
    shuffled = list(everything.tensor_split(len(found)))
    return pairs_of_one_sequence(found, order.context), pairs_of_one_sequence(shuffled, order.context)


@pytest.mark.parametrize("windows", [1, 2, 6])
def test_batches__are_as_mixed_as_their_window_allows(windows: int) -> None:
    """Within a window like a full shuffle of its rows; against one of the whole text as many times worse as there are
    windows, since a sequence is in one of them."""
    alone, shuffled = mixing(Order(64 * windows, 128, 8, 64, 1024, seed=1))
    assert alone / shuffled == pytest.approx(windows, rel=0.02)
    assert alone == pytest.approx(127 / (64 * 128 - 1), rel=0.02)


def test_default_window__mixes_the_demos_text_half_as_well_as_a_full_shuffle() -> None:
    demo = yaml.safe_load(Path("jobs/recipes/demo.yaml").read_text())
    alone, shuffled = mixing(Order.of(recipe_file.parse(demo | {"stream": {"batch_rows": 512}})))
    assert alone / shuffled == pytest.approx(2, rel=0.02)


def test_default_window__is_bounded_in_rows_and_holds_whole_blocks() -> None:
    demo = yaml.safe_load(Path("jobs/recipes/demo.yaml").read_text()) | {"stream": {}}
    windows = {}
    for tokens in (256, 150_000, 100_000_000):
        parsed = recipe_file.parse(demo | {"corpus": demo["corpus"] | {"train_tokens": tokens}})
        windows[tokens] = parsed.window_sequences
        assert parsed.window_sequences % parsed.harvest.sequences == 0
    assert windows == {256: 8, 150_000: 296, 100_000_000: 2**17 // 256}


@pytest.mark.parametrize("epochs", [1, 3])
def test_progress__rises_to_one(epochs: int) -> None:
    order = replace(ORDER, epochs=epochs)
    steps = [
        order.progress(window, batch, len(chosen))
        for window in range(order.windows)
        for chosen in [order.batches(window, 16 * (1 if window % 4 == 3 else 12))]
        for batch in range(len(chosen))
    ]
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(1)
    assert len(steps) == order.steps
    assert len(set(steps)) == len(steps)
