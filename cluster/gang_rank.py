"""One rank of a gang: python -m cluster.gang_rank LEADER CONNECTION RENDEZVOUS, started by `cluster.gang`.

Answers each block of tokens with the tensors, or the part of them, that this rank holds. Collectives happen only
inside the model, so a gang that waits for tokens waits without limit.
"""

import ctypes
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster import gemma
from cluster.recipe import Harvest, Model
from sae import hooks
from sae.sites import Site

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Answer(NamedTuple):
    """What a rank says when it is ready, and after each block."""

    resident: int
    """Parameters that it holds now."""
    tensors: dict[Site, Tensor]
    failure: str
    """A traceback, or nothing."""


def send(connection: Connection, answer: Answer) -> None:
    """The tensors' bytes go as they are: a block's rows are large."""
    shapes = [(site, tensor.shape, tensor.dtype) for site, tensor in answer.tensors.items()]
    connection.send((answer.resident, shapes, answer.failure))
    for tensor in answer.tensors.values():
        connection.send_bytes(_bytes_of(tensor.cpu()))


def receive(connection: Connection) -> Answer:
    resident, shapes, failure = connection.recv()
    tensors = {site: torch.empty(shape, dtype=dtype) for site, shape, dtype in shapes}
    for tensor in tensors.values():
        connection.recv_bytes_into(_bytes_of(tensor))
    return Answer(resident, tensors, failure)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def main() -> None:
    leader, descriptor, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    _die_with(leader)
    connection = Connection(descriptor)
    try:
        _serve(connection, rendezvous)
    except (EOFError, BrokenPipeError):  # the leader is gone
        return
    except Exception:
        send(connection, Answer(0, {}, traceback.format_exc()))


def _die_with(leader: int) -> None:
    """The kernel kills this process when the leader's thread that started it ends, even if it is stopped."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leader:  # it ended before
        os._exit(1)


def _serve(connection: Connection, rendezvous: str) -> None:
    harvest, settings, sites = connection.recv()
    rank, ranks = int(os.environ["RANK"]), harvest.ranks
    device = torch.device("cuda", rank) if harvest.gpus else torch.device("cpu")
    if harvest.gpus:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, int(harvest.cpus)))
    dist.init_process_group(
        "nccl" if harvest.gpus else "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks
    )
    model = _shard(harvest, settings, sites)
    send(connection, Answer(_resident(model), {}, ""))
    while True:
        tokens = torch.from_numpy(connection.recv()).to(device)
        captured = hooks.capture(model, tokens, sites, whole=harvest.zero3 > 0)
        # Under tensor parallelism attn_out is cut by heads; all else, as everything under ZeRO-3, is whole everywhere.
        mine = {site: t for site, t in captured.items() if rank == 0 or (not harvest.zero3 and site.name == "attn_out")}
        send(connection, Answer(_resident(model), mine, ""))


def _resident(model: nn.Module) -> int:
    """Parameters in this rank's device memory; ZeRO-3 empties those that it has put away."""
    return sum(parameter.data.numel() for parameter in model.parameters())


def _shard(harvest: Harvest, settings: Model, sites: list[Site]) -> nn.Module:
    """This rank's share of the model, loaded up to the last site."""
    if not harvest.gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo's own all-reduce needs no compiler
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    if harvest.zero3:
        return _put_away(config, settings, sites)
    stack = gemma.load_trunk(settings, sites, torch.device("cpu"))
    stack.requires_grad_(True)  # AutoTP hangs hooks on gradients, and fails if there are none
    config["tensor_parallel"] = {"autotp_size": harvest.tensor_parallel}
    engine, *_ = deepspeed.initialize(model=stack, config=config)
    return engine.module.eval().requires_grad_(False)


def _put_away(config: dict[str, Any], settings: Model, sites: list[Site]) -> nn.Module:
    """ZeRO-3 without an optimiser: every parameter cut over the ranks, in host memory, gathered while it is used."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config["bf16"] = {"enabled": settings.dtype == "bfloat16"}
    config["zero_optimization"] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()},
    }
    loading_in_parts = HfDeepSpeedConfig(config)  # transformers asks for it as long as it lives
    stack = gemma.load_trunk(settings, sites, torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=stack, config=config)
    del loading_in_parts
    for buffer in engine.module.buffers():  # DeepSpeed moves the parameters alone
        buffer.data = buffer.data.to(engine.device)
    return engine.module.eval()


if __name__ == "__main__":
    main()
