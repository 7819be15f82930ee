"""Exchange: "my rows, all sites" becomes "all rows, my sites".

One `all_to_all_single` with uneven splits carries every site's rows to the ranks that hold its dictionaries (the
transposition of mixture-of-experts models). A site whose dictionaries lie on two teams is sent to both. Of a team,
every shard gets the same rows, and each replica its own part of every batch.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.harvest import decode_bf16
from cluster.layout import Layout
from cluster.stream import Order, Window


class Share(NamedTuple):
    """What one rank trains on of a window."""

    ids: Tensor
    """Ids of all the window's rows, ascending [N]."""
    places: Tensor
    """Where in `ids` this rank's rows stand, ascending [n]."""
    rows: dict[str, Tensor]
    """The rows of its sites in that order, bf16 [n, D]."""
    replica: int
    replicas: int

    def batch(self, chosen: Tensor) -> dict[str, Tensor]:
        """This replica's rows of a batch, which `chosen` names by their places in `ids`."""
        part = chosen.tensor_split(self.replicas)[self.replica].to(self.places.device)
        mine = torch.searchsorted(self.places, part)
        return {key: rows[mine] for key, rows in self.rows.items()}


def exchange(window: Window, layout: Layout, order: Order, device: torch.device) -> Share:
    """Every rank calls with its share of the same window."""
    rank, ranks = dist.get_rank(), range(layout.n_ranks)
    counts = _gather_counts(len(window.ids), layout.n_ranks, device)
    ids = _to_all(torch.from_numpy(window.ids).to(device), counts)
    sorted_ids, by_id = ids.sort()
    places = by_id.argsort()  # of each row as it was sent
    replicas = order.replica_of(window.number, len(ids), layout.replicas).to(device)[places].split(counts)
    mine = layout.place(rank).replica

    local = {key: decode_bf16(bits).to(device) for key, bits in window.rows.items()}
    keys = [layout.keys(layout.place(to).team) for to in ranks]
    wanted = [replicas[rank] == layout.place(to).replica for to in ranks]
    send = [_only(local[key], wanted[to]).flatten() for to in ranks for key in keys[to] if key in local]
    row_sizes = [sum(layout.widths[key] for key in keys[to]) for to in ranks]  # values that one row takes to each rank
    arriving = [int((replicas[sender] == mine).sum()) for sender in ranks]
    received = torch.empty(sum(arriving) * row_sizes[rank], dtype=torch.bfloat16, device=device)
    dist.all_to_all_single(
        received,
        torch.cat(send) if send else received.new_empty(0),
        output_split_sizes=[count * row_sizes[rank] for count in arriving],
        input_split_sizes=[int(wanted[to].sum()) * row_sizes[to] for to in ranks],
    )
    my_places, in_order = places[torch.cat(replicas) == mine].sort()
    by_site = _by_site(received, arriving, keys[rank], layout.widths)
    my_rows = {key: rows[in_order] for key, rows in by_site.items()}
    return Share(sorted_ids, my_places, my_rows, mine, layout.replicas)


def _only(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows that a mask names, without a copy if these are all."""
    return rows if mask.all() else rows[mask]


def _gather_counts(mine: int, world: int, device: torch.device) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([mine], device=device))
    return [int(count) for count in counts]


def _to_all(ids: Tensor, counts: list[int]) -> Tensor:
    """All ranks' ids, by rank."""
    received = torch.empty(sum(counts), dtype=torch.int64, device=ids.device)
    dist.all_to_all_single(received, ids.repeat(len(counts)), counts, [len(ids)] * len(counts))
    return received


def _by_site(received: Tensor, counts: list[int], keys: list[str], widths: dict[str, int]) -> dict[str, Tensor]:
    """Takes apart what each rank sent: site after site, each [count, D]."""
    sizes = [count * widths[key] for count in counts for key in keys]
    parts = received.split(sizes)
    return {
        key: torch.cat([part.view(-1, widths[key]) for part in parts[index :: len(keys)]])
        for index, key in enumerate(keys)
    }
