"""Forward passes of a Gemma 3: in this process, or cut over several devices of this machine.

Of several ranks this process is the first. The others are told what each pass is over and run it with this one:
transformers cuts every layer's heads and hidden units over them. All hold the same residual stream, so that what is
read is here; what takes a tensor's place is made here and sent to them.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sae import hooks
from sae.hooks import Edit
from sae.sites import Site

CUT = "attn_out"  # the only site that no rank has the whole of: it is the heads side by side
Type = Literal["float32", "bfloat16"]
Next = Callable[[Tensor, dict[Site, Edit]], Tensor]
"""Of the ids that follow and what edits them: the logits of the token after. float32 [sequences, vocabulary]"""


class Alone:
    """The whole model in this process."""

    def __init__(self, folder: str, dtype: Type):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(folder, dtype).to(self.device)

    def capture(self, ids: Tensor, sites: list[Site]) -> dict[Site, Tensor]:
        """The tensors at the sites for token ids [sequences, T], each [sequences, T, D]."""
        return hooks.capture(self.model, ids.to(self.device), sites)

    @contextmanager
    def answer(self) -> Iterator[Next]:
        """Passes of which each goes on where the one before ended."""
        from transformers import DynamicCache

        cache = DynamicCache()
        yield lambda ids, edits: logits(self.model, ids.to(self.device), cache, edits)

    @property
    def healthy(self) -> bool:
        return True


class Ranks:
    """One model cut over `count` ranks, on a device each; ValueError if there are too few."""

    def __init__(self, folder: str, dtype: Type, count: int):
        if torch.cuda.is_available() and torch.cuda.device_count() < count:
            raise ValueError(
                f"model_ranks: {count} ranks need a device each, and there are {torch.cuda.device_count()}: give the "
                f"deployment Model ray_actor_options with num_gpus: {count}"
            )
        self.numbers, self.failed, self.telling = itertools.count(), False, threading.Lock()
        self.rendezvous = tempfile.TemporaryDirectory(prefix="ranks-")
        self.followers, self.connections = [], []
        meeting = str(Path(self.rendezvous.name, "meeting"))
        for rank in range(1, count):
            here, there = Pipe()
            self.followers.append(_spawn(rank, count, there, meeting, folder, dtype))
            self.connections.append(here)
            there.close()
        self.device = join(0, count, meeting)
        self.model = load(folder, dtype, count)

    def capture(self, ids: Tensor, sites: list[Site]) -> dict[Site, Tensor]:
        with self._told("capture", ids.tolist(), sites):
            return captured(self.model, ids.to(self.device), sites)

    @contextmanager
    def answer(self) -> Iterator[Next]:
        from transformers import DynamicCache

        number, cache = next(self.numbers), DynamicCache()

        def following(ids: Tensor, edits: dict[Site, Edit]) -> Tensor:
            with self._told("follow", number, ids.tolist(), list(edits)):
                shared = {site: everywhere(site, edit) for site, edit in edits.items()}
                return logits(self.model, ids.to(self.device), cache, shared)

        try:
            yield following
        finally:
            with self._told("end", number):
                pass

    @property
    def healthy(self) -> bool:
        """Whether all ranks are in step: one that is gone, or failed in a pass, cannot come back into it."""
        return not self.failed and all(follower.poll() is None for follower in self.followers)

    @contextmanager
    def _told(self, *order: object) -> Iterator[None]:
        """The others run the same as the block."""
        try:
            with self.telling:  # an answer that nobody reads any more ends whenever it is collected
                for connection in self.connections:
                    connection.send(order)
            yield
        except BaseException:
            self.failed = True
            raise


def open_passes(folder: str, dtype: Type, ranks: int) -> Alone | Ranks:
    return Alone(folder, dtype) if ranks == 1 else Ranks(folder, dtype, ranks)


def check(folder: str, ranks: int) -> None:
    """ValueError if there is no such Gemma 3, or its heads cannot be cut so."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except OSError as error:
        raise ValueError(f"model: {folder!r} is no Gemma 3 that could be read: {str(error).splitlines()[0]}") from None
    if config.model_type != "gemma3_text":
        raise ValueError(f"model: {folder!r} is a {config.model_type} model: name a Gemma 3")
    for heads, what in ((config.num_key_value_heads, "key-value"), (config.num_attention_heads, "attention")):
        if heads % ranks:
            raise ValueError(
                f"model_ranks: {ranks} ranks cannot share {heads} {what} heads: choose a divisor of {heads}"
            )


def load(folder: str, dtype: Type, ranks: int = 1) -> Any:
    """This rank's part, on its device if there are several."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    cut = {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan="auto")} if ranks > 1 else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **cut)
    return loaded.eval().requires_grad_(False)


def join(rank: int, count: int, meeting: str) -> torch.device:
    """Joins the ranks that meet at a file; this one's device."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}  # read by transformers
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count
    )
    return device


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any, edits: dict[Site, Edit]) -> Tensor:
    with hooks.hooked(model, edits):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].float().cpu()


def captured(model: Any, ids: Tensor, sites: list[Site]) -> dict[Site, Tensor]:
    """As `Alone.capture`, on every rank."""
    parts = hooks.capture(model, ids, sites)
    return {site: _whole(part) if site.name == CUT else part for site, part in parts.items()}


def everywhere(site: Site, edit: Edit | None) -> Edit:
    """What the first rank's edit leaves, on every rank; the others have no edit."""

    def edited(tensor: Tensor) -> Tensor:
        whole = _whole(tensor) if site.name == CUT else tensor
        new = edit(whole) if edit else None
        taken = (whole if new is None else new).clone(memory_format=torch.contiguous_format)
        dist.broadcast(taken, 0)
        return taken.chunk(dist.get_world_size(), -1)[dist.get_rank()] if site.name == CUT else taken

    return edited


def follow(connection: Connection, model: Any, device: torch.device) -> None:
    """Runs what the first rank does, until that is gone."""
    from transformers import DynamicCache

    caches: dict[int, Any] = {}
    while True:
        try:
            kind, *order = connection.recv()
        except EOFError:
            return
        if kind == "capture":
            ids, sites = order
            captured(model, torch.tensor(ids, device=device), sites)
        elif kind == "follow":
            number, ids, sites = order
            cache = caches.setdefault(number, DynamicCache())
            edits = {site: everywhere(site, None) for site in sites}
            logits(model, torch.tensor(ids, device=device), cache, edits)
        else:
            caches.pop(order[0], None)


def _whole(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, -1)


def _spawn(rank: int, count: int, connection: Connection, *more: str) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "serve.passes", str(rank), str(count), str(connection.fileno()), *more],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
    )


def main() -> None:
    """A follower."""
    rank, count, descriptor, meeting, folder, dtype = sys.argv[1:]
    device = join(int(rank), int(count), meeting)
    follow(Connection(int(descriptor)), load(folder, dtype, int(count)), device)  # type: ignore[arg-type]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
