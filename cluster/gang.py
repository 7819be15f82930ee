"""The model of a harvest actor: in its own process, or shared by a gang of ranks that live and die together.

Ranks are processes of `cluster.gang_rank`, joined by torch.distributed and DeepSpeed. The actor is none of them: it
sends every rank the tokens of a block and puts together what they answer. A rank that dies, fails or does not answer
in time takes the gang down; a new gang tries the block again. Ranks die with the actor, however it dies.
"""

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from torch import Tensor

from cluster import gang_rank, gemma
from cluster.errors import UserError
from cluster.recipe import Harvest, Recipe
from sae import hooks
from sae.sites import Site

ATTEMPTS = 5  # of a block: what fails a gang this often is no accident
START_SECONDS = 1800.0  # to load the model
# Of tensor parallelism: norm of the difference to the unsharded model's tensor over that tensor's norm, at every site.
# In bfloat16 it is what the unsharded model itself is away from float32.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-4}

# The kernel ends a rank when the thread that started it ends, and Ray's threads come and go.
STARTER = ThreadPoolExecutor(1, thread_name_prefix="gang-starter")


class RankLost(Exception):
    """A rank died, failed or did not answer in time."""


class GangFailed(Exception):
    """A block failed as often as it may."""


def check(harvest: Harvest) -> None:
    """UserError if the recipe asks for ranks that cannot be started here."""
    if harvest.sharded and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "harvest.zero3" if harvest.zero3 else "harvest.tensor_parallel",
            "needs DeepSpeed, which is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation "
            "-c constraints.txt -e '.[sharded]', or leave it out",
        )


def numerics(recipe: Recipe) -> dict[str, float]:
    """What is to be known of a dictionary whose rows came from ranks that share each layer."""
    if recipe.harvest.tensor_parallel == 1:
        return {}
    return {
        "tensor_parallel": recipe.harvest.tensor_parallel,
        "tensor_parallel_tolerance": TOLERANCE[recipe.model.dtype],
    }


class Whole:
    """The model in this process."""

    def __init__(self, recipe: Recipe, sites: list[Site]):
        self.sites, self.device = sites, device(recipe.harvest)
        self.model = gemma.load_trunk(recipe.model, sites, self.device)

    def capture(self, tokens: Tensor) -> dict[Site, Tensor]:
        """The tensors at the sites for token ids [sequences, T], each [sequences, T, D]."""
        return hooks.capture(self.model, tokens, self.sites)

    def close(self) -> None:
        """There is nothing to end."""


class Gang:
    """The model in processes of its own, on a device each."""

    def __init__(self, recipe: Recipe, sites: list[Site]):
        self.recipe, self.sites, self.device = recipe, sites, device(recipe.harvest)
        self.folder = tempfile.TemporaryDirectory(prefix="gang-")  # nccl meets there at its first collective
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.resident: list[int] = []
        """Parameters that each rank held after the last block."""

    def capture(self, tokens: Tensor) -> dict[Site, Tensor]:
        """As `Whole.capture`, on the CPU; GangFailed if ATTEMPTS gangs were lost over it."""
        for _ in range(ATTEMPTS):
            try:
                if not self.ranks:
                    self._start()
                return self._forward(tokens)
            except RankLost as error:
                self.close()
                lost = error
                logging.getLogger(__name__).warning("a gang is started anew: %s", lost)
        raise GangFailed(f"{ATTEMPTS} gangs of {self.recipe.harvest.ranks} ranks were lost over a block: {lost}")

    def close(self) -> None:
        """Ends every rank."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()
        for connection in self.connections:
            connection.close()
        self.ranks, self.connections = [], []

    def _start(self) -> None:
        count, rendezvous = self.recipe.harvest.ranks, Path(self.folder.name, uuid.uuid4().hex)
        with self._time_limit(START_SECONDS):
            for number in range(count):
                here, there = Pipe()
                self.connections.append(here)
                self.ranks.append(STARTER.submit(_spawn, number, count, there, rendezvous).result())
                there.close()
            for connection in self.connections:
                connection.send((self.recipe.harvest, self.recipe.model, self.sites))
            self._receive()

    def _forward(self, tokens: Tensor) -> dict[Site, Tensor]:
        with self._time_limit(self.recipe.harvest.block_seconds):
            for connection in self.connections:
                connection.send(tokens.numpy())
            answers = self._receive()
        # In the order of the ranks, which is that of the heads. Whatever is not cut comes from rank 0 alone.
        return {site: torch.cat([part[site] for part in answers if site in part], dim=-1) for site in self.sites}

    def _receive(self) -> list[dict[Site, Tensor]]:
        """What every rank answers, by rank, read in the order in which they do."""
        answers: dict[int, gang_rank.Answer] = {}
        numbers = {connection: number for number, connection in enumerate(self.connections)}
        while waiting := [connection for connection, number in numbers.items() if number not in answers]:
            for connection in wait(waiting):
                assert isinstance(connection, Connection)
                answer = gang_rank.receive(connection)
                if answer.failure:  # the others may wait for this rank for ever
                    raise RankLost(answer.failure.strip())
                answers[numbers[connection]] = answer
        self.resident = [answers[number].resident for number in range(len(answers))]
        return [answers[number].tensors for number in range(len(answers))]

    @contextmanager
    def _time_limit(self, seconds: float) -> Iterator[None]:
        """Kills all ranks after some seconds, which ends every wait for them; RankLost if one is gone, or was killed.

        A stopped process answers nothing and closes nothing, in the middle of a message too: only its end ends that.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            for rank in self.ranks:
                rank.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield
        except (EOFError, OSError) as error:
            reason = f"no answer within {seconds:g} s" if late.is_set() else "a rank died"
            raise RankLost(reason) from error
        finally:
            timer.cancel()


def _spawn(number: int, count: int, connection: Connection, rendezvous: Path) -> subprocess.Popen[bytes]:
    """Starts a rank that talks over `connection`."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "GLOO_SOCKET_IFNAME": "lo",  # a gang does not leave its machine
        **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
    }
    return subprocess.Popen(
        [sys.executable, "-m", gang_rank.__name__, str(os.getpid()), str(connection.fileno()), str(rendezvous)],
        env=os.environ | environment,
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
    )


def device(harvest: Harvest) -> torch.device:
    """Where `open_model`'s model takes its tokens."""
    return torch.device("cuda" if harvest.gpus and not harvest.sharded else "cpu")


def open_model(recipe: Recipe, sites: list[Site]) -> Whole | Gang:
    """The model as the recipe wants it run."""
    torch.set_num_threads(max(1, int(recipe.harvest.cpus)))
    return Gang(recipe, sites) if recipe.harvest.sharded else Whole(recipe, sites)
