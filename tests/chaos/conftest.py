"""The fits that are killed, and how often each fault is tried: SCOPEWORKS_CHAOS_RUNS, by default 20."""

import os
from pathlib import Path

import pytest

from cluster import session
from tests.chaos import fits


@pytest.fixture(scope="session")
def runs() -> int:
    return int(os.environ.get("SCOPEWORKS_CHAOS_RUNS", "20"))


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory):
    """A local Ray whose processes do what the file says that this returns."""
    import ray

    orders = tmp_path_factory.mktemp("chaos") / "orders.json"
    orders.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in fits.environment(orders).items():
            patch.setenv(key, value)
        ray.init(
            num_cpus=8, include_dashboard=False, object_store_memory=session.OBJECT_STORE_BYTES, log_to_driver=False
        )
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        yield orders
        ray.shutdown()


@pytest.fixture(scope="module")
def content(tiny_gemma: Path, documents: Path) -> dict:
    """Dictionaries of four kinds on five sites, in 60 steps of 8 windows."""
    common = {"widths": [64], "l0s": [8]}
    grids = [
        {"layers": [0], "activations": ["batch_topk", "gated"], "options": {"dead_after_rows": 2000, "auxk": {}}},
        {"kind": "crosscoder", "layers": [0, 3], "activations": ["jumprelu"]},
        {"kind": "clt", "layers": [0, 1, 2, 3], "activations": ["batch_topk"],
         "options": {"matryoshka": {"sampled": True}}},
    ]  # fmt: skip
    return {
        "name": "chaos", "output": "runs/chaos", "model": {"name": str(tiny_gemma)},
        "corpus": {"paths": [str(documents)], "context": 32, "train_tokens": 30_720, "heldout_tokens": 1024},
        "harvest": {"sequences": 8, "cpus": 0.5},
        "stream": {"window_sequences": 128, "batch_rows": 512},
        "sweep": [common | grid for grid in grids],
        "fit": {"workers": 2, "cpus_per_worker": 0.5, "report_every_steps": 2, "checkpoint_every_steps": 4,
                "max_failures": 100},
    }  # fmt: skip


@pytest.fixture(scope="module")
def fitted(ray_session: Path, content: dict, tmp_path_factory) -> fits.Fits:
    return fits.Fits(tmp_path_factory.mktemp("fits"), fits.parse(content), ray_session)


@pytest.fixture(scope="module")
def calm(fitted: fits.Fits, content: dict) -> fits.Outcome:
    """The same fit, by one worker, with nothing killed."""
    return fitted.run(fits.parse(content, fit={"workers": 1}))
