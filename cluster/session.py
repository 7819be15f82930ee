"""The Ray session: the cluster that the job was submitted to, or a local one; and its logs out of sight."""

import contextlib
import logging
import os
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cluster.console import say
from cluster.errors import UserError
from cluster.layout import Layout
from cluster.memory import GIB, memory
from cluster.planner import narrower
from cluster.recipe import Recipe

OBJECT_STORE_BYTES = GIB  # of a local session: a window's rows and what is prefetched are far below it


def cluster_address() -> str | None:
    """The cluster to join: RAY_ADDRESS, which `ray job submit` sets for its jobs."""
    return os.environ.get("RAY_ADDRESS")


def set_environment() -> None:
    """What Ray reads when it is imported: call before. A local session gets a token of its own, since Ray's choice
    depends on what earlier sessions left in the home folder."""
    os.environ.update(
        RAY_DATA_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        # A rank that reports waits until the controller looks: 2 s by default, most of a small step.
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
        TOKENIZERS_PARALLELISM="false",
        # Torch's threads would spin after each product, on the cores on which the kernels' own then work.
        OMP_WAIT_POLICY="PASSIVE",
    )
    if cluster_address() is None:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def check_machine(recipe: Recipe, layout: Layout, config: Any) -> None:
    """UserError if the sweep cannot run on this machine alone; a cluster has its own scheduler and limits. `config` is
    the text model's."""
    import psutil

    if cluster_address():
        return
    for stage in ("harvest", "fit"):
        if labels := getattr(recipe, stage).label_selector:
            raise UserError(
                f"{stage}.label_selector", f"this machine has no labels {labels}: drop them, or submit it to a cluster"
            )

    def needed(layout: Layout) -> int:
        return memory(recipe, layout, config).total(recipe) + OBJECT_STORE_BYTES

    available = psutil.virtual_memory().available
    if needed(layout) > available:
        raise UserError(
            "sweep",
            f"needs {needed(layout) / GIB:.1f} GiB and this machine has {available / GIB:.1f} GiB free: "
            f"{narrower(layout, lambda layout: needed(layout) <= available)}, list fewer dictionaries, or submit it to "
            "a cluster",
        )


@contextlib.contextmanager
def session(recipe: Recipe, log: Path) -> Iterator[None]:
    """Ray, for the length of the block."""
    address = cluster_address()
    import ray
    import ray.data

    warnings.filterwarnings("ignore", module="ray")
    _send_logs_to(log)
    local = {} if address else _local_resources(recipe)
    with log.open("a") as file, contextlib.redirect_stdout(file), _stderr_to(file):
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **local
            )
        except (ConnectionError, RuntimeError) as error:
            where = f"the cluster at {address}" if address else "a local Ray"
            raise UserError(
                "RAY_ADDRESS", f"{where} could not be reached ({str(error).splitlines()[0]:.160})"
            ) from error
        _note_what_is_missing(recipe, ray.cluster_resources(), ray.nodes())
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.execution_options.label_selector = recipe.harvest.label_selector or None
        context.enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()


def _note_what_is_missing(recipe: Recipe, there: dict[str, float], nodes: list[dict[str, Any]]) -> None:
    """A cluster may still grow, so a sweep that does not fit waits; the person is told for what."""
    fit, harvest = recipe.fit, recipe.harvest
    wanted = {
        "CPU": fit.workers * fit.cpus_per_worker + harvest.actors * harvest.ranks * harvest.cpus,
        "GPU": fit.workers * fit.gpu + harvest.actors * harvest.ranks * harvest.gpus,
    }
    for kind, count in wanted.items():
        if count > there.get(kind, 0):
            say(f"note     the cluster has {there.get(kind, 0):g} {kind}s, the fit wants {count:g}: it waits for more")
    for stage, labels in {"harvest": harvest.label_selector, "fit": fit.label_selector}.items():
        if not any(labels.items() <= node["Labels"].items() for node in nodes if node["Alive"]):
            say(f"note     no node has the labels {labels} of {stage}.label_selector: it waits for one")


def _local_resources(recipe: Recipe) -> dict[str, Any]:
    """Logical CPUs for all that must run at once, whatever the machine has: a laptop's two cores are shared."""
    fit = recipe.fit.workers * recipe.fit.cpus_per_worker
    wanted = int(fit + recipe.harvest.actors * recipe.harvest.ranks * recipe.harvest.cpus) + 2
    return {
        "num_cpus": max(wanted, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }


@contextlib.contextmanager
def _stderr_to(file: TextIO) -> Iterator[None]:
    """Ray's C++ core writes to the error stream itself, past all logging; for the length of the block, to a file."""
    terminal = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _send_logs_to(log: Path) -> None:
    """Ray's and the libraries' messages go to the log file; the terminal is for the person."""
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("ray", "ray.data", "ray.train", "mlflow", "alembic", "transformers"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
