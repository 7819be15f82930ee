"""Fit: the Ray Train job. Each rank trains the dictionaries of its own sites on all rows of the stream."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray.data
import ray.train
import torch
import torch.distributed as dist
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor

from cluster import checkpoint, harvest, start
from cluster.cache import Cache
from cluster.calibrate import SiteScale
from cluster.checkpoint import Checkpoints, Position, Writer
from cluster.exchange import Share, exchange
from cluster.layout import Layout
from cluster.mesh import team_of
from cluster.recipe import Recipe
from cluster.stream import Order, WindowReader
from cluster.tracking import FitReporter
from sae.sites import Site
from sae.step import TrainingDictionary

STREAM = "activations"


class Job(NamedTuple):
    """What every process of the fit is told."""

    recipe: Recipe
    layout: Layout
    scales: dict[str, SiteScale]
    tokens_path: Path
    cache: Cache | None
    train_folder: Path
    stop_file: Path
    """Its presence asks the ranks to checkpoint and return."""

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints.of(self.recipe, self.train_folder)

    def stream(self) -> ray.data.Dataset:
        """The activation rows from the first window that the newest checkpoint has not wholly consumed.

        Ray Train calls this again at every restart of the worker group.
        """
        order, committed = Order.of(self.recipe), self.checkpoints.newest()
        first = order.blocks_of(committed.position.window).start if committed else 0
        sites = self.layout.sites
        return harvest.activations(self.recipe, sites, self.scales, self.tokens_path, self.cache, first, order.blocks)


class EveryRow(DataConfig):
    """Ray Train's own split drops rows so that all ranks get equally many; windows need no such equality."""

    def __init__(self, harvest_nodes: dict[str, str]):
        super().__init__()
        self.harvest_nodes = harvest_nodes

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: Any,
        **_: Any,
    ) -> list[dict[str, ray.data.DataIterator]]:
        splits: list[dict[str, ray.data.DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.context.execution_options.preserve_order = True
            dataset.context.execution_options.label_selector = self.harvest_nodes or None
            dataset.context.execution_no_progress_timeout_s = -1  # a slow fit is no fault of the stream's
            for rank, split in enumerate(
                dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            ):
                splits[rank][name] = split
        return splits


def run(job: Job, reporter: FitReporter, attempt: str) -> None:
    """Trains from the newest checkpoint to the end of the corpus, or until the stop file appears. Blocks."""
    fit = job.recipe.fit
    TorchTrainer(
        fit_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if fit.gpu else "gloo"),
        datasets={STREAM: job.stream},
        dataset_config=EveryRow(job.recipe.harvest.label_selector),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # Ray's annotation is the first version's, without labels
            num_workers=fit.workers,
            use_gpu=fit.gpu,
            resources_per_worker={"CPU": fit.cpus_per_worker} | ({"GPU": 1} if fit.gpu else {}),
            label_selector=fit.label_selector or None,
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=str(job.train_folder / "ray"),
            failure_config=FailureConfig(max_failures=fit.max_failures),
            callbacks=[reporter],  # type: ignore[list-item]  # Ray's annotation names Tune's callbacks
        ),
    ).fit()


def fit_worker(config: dict[str, Job]) -> None:
    """The train loop of one rank."""
    job = config["job"]
    rank = Rank(job, dist.get_rank(), ray.train.torch.get_device())
    rank.restore()
    source = ray.train.get_dataset_shard(STREAM).iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
    for batches in rank.windows(iter(source)):
        for rows, progress, after in batches:
            rank.step(rows, progress)
            stop = rank.stop_requested()
            last = stop or after.done
            if last or after.step % job.recipe.fit.checkpoint_every_steps == 0:
                rank.checkpoint(after, last=last)
            if last or after.step % job.recipe.fit.report_every_steps == 0:
                rank.report(after, last=last)
            if last:
                return


class Rank:
    """One rank's dictionaries and its place in the order."""

    def __init__(self, job: Job, number: int, device: torch.device):
        torch.set_num_threads(max(1, int(job.recipe.fit.cpus_per_worker)))
        self.job, self.number, self.device = job, number, device
        self.order, self.place, team = Order.of(job.recipe), job.layout.place(number), team_of(job.layout, number)
        widths = job.layout.widths
        products = None if job.recipe.fit.gpu else getattr(torch, job.recipe.fit.products)
        self.bank = [
            TrainingDictionary(spec, widths, device, team=team, products=products)
            for spec in job.layout.teams[self.place.team]
        ]
        self.position = Position()
        self.started = time.monotonic()
        self.rows_at_start = 0
        self.writer = Writer(job.checkpoints.store)
        self.attempt = ""
        self.seconds_blocked = 0.0
        """In which the loop stood still for checkpoints."""
        self.seconds_after = 0.0
        """In which the last was written, when the loop was over."""

    def restore(self) -> None:
        """Takes over the newest checkpoint, on which rank 0 decides."""
        found: list[Any] = [None, uuid.uuid4().hex[:8]]
        if self.number == 0:
            self.job.checkpoints.discard_staged()
            found[0] = self.job.checkpoints.newest()
        dist.broadcast_object_list(found, src=0)
        committed, self.attempt = found
        if committed is not None:
            self.position = committed.position
            self.rows_at_start = committed.position.rows
            for dictionary in self.bank:
                dictionary.load(checkpoint.State(committed.folder, dictionary.spec.id))
            return
        for dictionary in self.bank:
            start.take_over(dictionary, self.job.scales)

    def windows(self, source: Iterator[harvest.Rows]) -> Iterator[Iterator[tuple[dict[str, Tensor], float, Position]]]:
        """For each window from this position on, its batches."""
        keys = [site.key for site in self.job.layout.sites]
        for window in WindowReader(self.order, source, keys).windows(self.position.window):
            yield self._batches(window.number, exchange(window, self.job.layout, self.order, self.device))

    def _batches(self, window: int, share: Share) -> Iterator[tuple[dict[str, Tensor], float, Position]]:
        """This replica's rows of each batch, the run's progress with it, and the position after it."""
        batches = self.order.batches(window, len(share.ids))
        for number, chosen in enumerate(batches):
            if (window, number) < (self.position.window, self.position.batch):
                continue  # trained on before the checkpoint
            ends_window = number + 1 == len(batches)
            after = Position(
                window=window + 1 if ends_window else window,
                batch=0 if ends_window else number + 1,
                step=self.position.step + 1,
                rows=self.position.rows + len(chosen),
                done=ends_window and window + 1 == self.order.windows,
            )
            progress = self.order.progress(window, number, len(batches))
            yield share.batch(chosen), progress, after
            self.position = after

    def step(self, rows: dict[str, Tensor], progress: float) -> None:
        scaled = {key: tensor.float() / self.job.scales[key].scale for key, tensor in rows.items()}
        concatenated: dict[tuple[Site, ...], Tensor] = {}  # dictionaries of the same sites share their rows

        def rows_of(sites: list[Site]) -> Tensor:
            key = tuple(sites)
            if key not in concatenated:
                parts = [scaled[site.key] for site in sites]
                concatenated[key] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            return concatenated[key]

        for dictionary in self.bank:
            dictionary.step(rows_of(dictionary.spec.reads), rows_of(dictionary.spec.writes), progress)

    def _part(self, dictionary: TrainingDictionary) -> str:
        return checkpoint.part_name(dictionary.spec.id, self.place.shard, self.job.layout.shards)

    def stop_requested(self) -> bool:
        """Whether to stop here: all ranks must agree, so rank 0's view is everyone's."""
        asked = torch.tensor([self.number == 0 and self.job.stop_file.exists()], dtype=torch.uint8)
        dist.broadcast(asked, src=0)
        return bool(asked)

    def checkpoint(self, position: Position, *, last: bool) -> None:
        """Starts to write one, unless a rank still writes the one before; the last is waited for."""
        started = time.monotonic()
        if last or not self._any(self.writer.busy):
            writes = self.place.replica == 0  # the others' states are the same
            states = {self._part(dictionary): dictionary.state() for dictionary in self.bank} if writes else {}
            name = checkpoint.name(position.step, self.attempt)
            self.writer.start(name, states, position if self.number == 0 else None)
        if last:
            self.writer.finish()
            self.seconds_after += time.monotonic() - started
        else:
            self.seconds_blocked += time.monotonic() - started

    def _any(self, mine: bool) -> bool:
        """Whether it is so at any rank."""
        flag = torch.tensor([mine], dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def report(self, position: Position, *, last: bool) -> None:
        """Tells the controller how the fit goes and what was written; a barrier of all ranks."""
        seconds = time.monotonic() - self.started - self.seconds_after
        ray.train.report(
            {
                "position": position._asdict(),
                "last": last,
                "rows_per_second": (position.rows - self.rows_at_start) / seconds,
                "blocked_by_checkpoints": self.seconds_blocked / seconds,
                "dictionaries": {dictionary.spec.id: dictionary.sums.take() for dictionary in self.bank},
                "parts": [self._part(dictionary) for dictionary in self.bank],
                "written": self.writer.take(),
            }
        )
