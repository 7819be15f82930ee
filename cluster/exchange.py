"""Exchange: "my rows, all sites" becomes "all rows, my sites".

One `all_to_all_single` with uneven splits carries every site's rows to the ranks that hold its dictionaries (the
transposition of mixture-of-experts models). A site whose dictionaries lie on two ranks is sent to both.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.harvest import decode_bf16
from cluster.stream import Window


def exchange(
    window: Window, keys_by_rank: list[list[str]], widths: dict[str, int], device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids of all the window's rows, ascending [N], and the rows of this rank's sites in that order, bf16 [N, D].

    `keys_by_rank` are the site keys that each rank needs; every rank calls with the same ones.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = _gather_counts(len(window.ids), world, device)
    ids = _to_all(torch.from_numpy(window.ids).to(device), counts)
    order = ids.argsort()

    local = {key: decode_bf16(bits).to(device).flatten() for key, bits in window.rows.items()}
    parts = [local[key] for keys in keys_by_rank for key in keys if key in local]
    send = torch.cat(parts) if parts else torch.empty(0, dtype=torch.bfloat16, device=device)
    row_sizes = [sum(widths[key] for key in keys) for keys in keys_by_rank]  # values that one row takes to each rank
    received = torch.empty(sum(counts) * row_sizes[rank], dtype=torch.bfloat16, device=device)
    dist.all_to_all_single(
        received,
        send,
        output_split_sizes=[count * row_sizes[rank] for count in counts],
        input_split_sizes=[counts[rank] * size for size in row_sizes],
    )
    return ids[order], {
        key: rows[order] for key, rows in _by_site(received, counts, keys_by_rank[rank], widths).items()
    }


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
