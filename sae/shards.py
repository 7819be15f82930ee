"""The state of a dictionary whose latents are cut over several ranks: shard r of m holds latents r, r + m, …"""

import torch
from torch import Tensor

REPLICATED = ("b_dec", "centre", "w_skip")


def has_latents(name: str, tensor: Tensor) -> bool:
    """Whether an entry of a `TrainingDictionary.state` has a row a latent; if not, it is the same at every shard."""
    return tensor.ndim > 0 and not name.removeprefix("adam.").startswith(REPLICATED)


def join_shards(name: str, parts: list[Tensor]) -> Tensor:
    """An entry of the whole dictionary's state from that of every shard."""
    if len(parts) == 1 or not has_latents(name, parts[0]):
        return parts[0]
    whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype)
    for index, part in enumerate(parts):
        whole[index :: len(parts)] = part
    return whole
