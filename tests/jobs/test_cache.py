"""Sweeps that write and read a cache, on text in two epochs and on the model's own answers; the oracle is the flat
loop, which has neither."""

import json
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster import recipe_file
from cluster.store import FolderStore, S3Store, Store
from cluster.tokens import ASSISTANT
from sae import artifact
from tests import flat_loop
from tests.conftest import WORDS, write_chat_tokenizer
from tests.jobs.conftest import Job
from tests.published import tensors

pytestmark = pytest.mark.chaos

GRID = {"activations": ["batch_topk"], "widths": [64], "l0s": [8]}


@pytest.fixture
def small(tiny_recipe: dict) -> dict:
    """Two dictionaries in 2 × 30 steps, one rank."""
    text = tiny_recipe["corpus"] | {"train_tokens": 15_360, "heldout_tokens": 640}
    sweep = [GRID | {"layers": [0, 3]}, GRID | {"layers": [1], "sites": ["mlp_out"]}]
    fit = tiny_recipe["fit"] | {"workers": 1}
    more = {"corpus": text, "sweep": sweep, "fit": fit, "stream": {"window_sequences": 128, "batch_rows": 512}}
    return tiny_recipe | more


def assert_equals_flat_loop(job: Job, sweep: dict, eligible: np.ndarray | None = None) -> None:
    known = flat_loop.fit(recipe_file.parse(sweep), np.load(job.output / "tokens" / "train.npy"), eligible)
    summary = json.loads((job.output / "summary.json").read_text())
    found = {row["id"]: artifact.read(Path(row["path"]))[0] for row in summary["dictionaries"]}
    assert found.keys() == known.keys()
    for id, expected in known.items():
        assert all(map(torch.equal, tensors(expected), tensors(found[id]))), id


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "cache")
    request.getfixturevalue("s3")
    return f"s3://runs/{uuid.uuid4().hex}"


def written(store: Store) -> dict[str, object]:
    """When each shard was."""
    if isinstance(store, FolderStore):
        return {name: (store.root / name).stat().st_mtime_ns for name in store.names("block-")}
    pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=f"{store.prefix}block-")
    return {Path(item["Key"]).name: item["LastModified"] for page in pages for item in page["Contents"]}


def spoil(store: Store, damaged: str, gone: str, folder: Path) -> None:
    content = bytearray(store.read(damaged))
    content[len(content) // 2] ^= 1
    (folder / "damaged").write_bytes(content)
    store.put_file(damaged, folder / "damaged")
    store.delete([gone])


def test_cache__sweeps_that_write_and_read_it_equal_one_without(
    small: dict, run_job, tmp_path: Path, place: str
) -> None:
    cached = small | {"stream": small["stream"] | {"epochs": 2}}
    cached["harvest"] = small["harvest"] | {"cache": place}
    first = run_job(cached | {"output": str(tmp_path / "first")})
    assert first.wait() == 0, first.text
    assert_equals_flat_loop(first, cached)
    store = S3Store(place) if place.startswith("s3") else FolderStore(Path(place))
    shards = store.names("block-")
    assert len(shards) == 60  # 480 sequences in blocks of 8, once for both epochs

    # Another sweep: fewer sites, other dictionaries, two ranks and actors. One shard is damaged, one is gone.
    sweep = [GRID | {"layers": [0, 3], "l0s": [4], "activations": ["batch_topk", "jumprelu"]}]
    other = cached | {"output": str(tmp_path / "second"), "sweep": sweep, "fit": cached["fit"] | {"workers": 2}}
    other["harvest"] = cached["harvest"] | {"actors": 2}
    spoil(store, shards[7], shards[9], tmp_path)
    before = written(store)
    second = run_job(other)
    assert second.wait() == 0, second.text
    assert f"59 blocks of rows are in {place}" in second.text
    assert_equals_flat_loop(second, other)
    # A block that the model ran for is written, so for the others it did not run.
    after = written(store)
    assert {name for name in shards if after[name] != before.get(name)} == {shards[7], shards[9]}

    refused = run_job(cached | {"output": str(tmp_path / "third"), "corpus": small["corpus"] | {"context": 16}})
    assert refused.wait() == 2
    assert "error: harvest.cache: " in refused.text
    assert "corpus.context is 32 there and 16 here" in refused.text


def test_chat__a_sweep_over_the_models_own_answers_equals_the_flat_loop(small: dict, run_job, tmp_path: Path) -> None:
    model = Path(small["model"]["name"])
    folder = tmp_path / "it"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_chat_tokenizer(folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": f"{a} {b}"}) + "\n" for a in WORDS[:20] for b in WORDS[:9]))
    corpus = {"kind": "chat", "paths": [str(prompts)], "context": 40, "train_tokens": 4800, "heldout_tokens": 320,
              "roles": ["assistant"], "rollouts": {"max_new_tokens": 16}}  # fmt: skip
    sweep = small | {"model": {"name": str(folder)}, "corpus": corpus, "output": str(tmp_path / "run")}
    sweep["stream"] = {"window_sequences": 32, "batch_rows": 128}
    job = run_job(sweep)
    assert job.wait() == 0, job.text
    roles = np.load(job.output / "tokens" / "train-roles.npy")
    eligible = (roles == ASSISTANT) & (np.arange(40) >= 4)
    assert 0.3 < eligible.mean() < 0.6
    assert_equals_flat_loop(job, sweep, eligible)
