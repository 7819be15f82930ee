"""Mesh: the process groups of a layout's teams."""

import torch.distributed as dist

from cluster.layout import Layout, Place
from sae.team import Axis, Team


def team_of(layout: Layout, rank: int) -> Team:
    """This rank's team. Every rank calls, since all must make every group, in one order."""
    here = layout.place(rank)
    shards, replicas = range(layout.shards), range(layout.replicas)
    across_latents, across_rows = None, None
    for team in range(len(layout.teams)):
        for replica in replicas if layout.shards > 1 else ():
            group = dist.new_group([layout.rank(Place(team, replica, shard)) for shard in shards])
            across_latents = group if (team, replica) == (here.team, here.replica) else across_latents
        for shard in shards if layout.replicas > 1 else ():
            group = dist.new_group([layout.rank(Place(team, replica, shard)) for replica in replicas])
            across_rows = group if (team, shard) == (here.team, here.shard) else across_rows
    return Team(Axis(here.shard, layout.shards, across_latents), Axis(here.replica, layout.replicas, across_rows))
