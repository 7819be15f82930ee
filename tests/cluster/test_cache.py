"""The activation cache, in a folder and in a bucket: the rows of a run without one, bit for bit, whatever happened to
its files."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from boto3.s3.transfer import TransferConfig

from cluster import cache, gemma, harvest, recipe, recipe_file, store, tensors
from cluster.cache import Cache, Shard
from cluster.calibrate import measure
from cluster.errors import UserError
from cluster.harvest import BLOCK, BLOCK_ROWS, ROW, Harvester
from cluster.store import FolderStore, S3Store, Store
from sae import hooks
from sae.sites import Site

CPU, BOS = torch.device("cpu"), 2
SEQUENCES = 21  # two whole blocks of 8 and one of 5
GRIDS = [
    {"layers": [0, 3], "activations": ["batch_topk"], "widths": [64], "l0s": [8]},
    {"layers": [1], "sites": ["attn_out"], "activations": ["topk"], "widths": [64], "l0s": [8]},
]
in_both = pytest.mark.parametrize("place", ["folder", "s3"], indirect=True)
in_a_bucket = pytest.mark.parametrize("place", ["s3"], indirect=True)


@pytest.fixture
def model_folder(tiny_gemma: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Gemma, to be spoilt."""
    return shutil.copytree(tiny_gemma, tmp_path / "gemma")


@pytest.fixture
def place(request, tmp_path: Path) -> str:
    """Of a cache that is not there yet, in a folder if it is not said where."""
    if getattr(request, "param", "folder") == "folder":
        return str(tmp_path / "cache")
    request.getfixturevalue("s3")
    return f"s3://runs/{uuid.uuid4().hex}"


@pytest.fixture
def parsed(tiny_recipe: dict, model_folder: Path, place: str):
    """A recipe with a cache, as a function of what differs in it."""

    def parse(grids: list[dict] = GRIDS, harvest: dict | None = None, **changes) -> recipe.Recipe:
        text = tiny_recipe["corpus"] | {"train_tokens": SEQUENCES * 32}
        settings = {"sequences": 8, "outlier_norm": 1.1, "cache": place} | (harvest or {})
        model = {"name": str(model_folder), "dtype": "bfloat16"}
        content = {"model": model, "corpus": text, "sweep": grids, "harvest": settings}
        return recipe_file.parse(
            tiny_recipe | {"stream": {"window_sequences": 16, "batch_rows": 64}} | content | changes
        )

    return parse


@pytest.fixture
def tokens_path(tmp_path: Path) -> Path:
    tokens = torch.randint(4, 200, (SEQUENCES, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = BOS
    np.save(tmp_path / "train.npy", tokens.int().numpy())
    return tmp_path / "train.npy"


def sites_of(parsed: recipe.Recipe) -> list[Site]:
    return sorted({site for spec in parsed.specs() for site in spec.sites}, key=lambda site: site.depth)


def put(place: Store, name: str, content: bytes, folder: Path) -> None:
    """Puts a file in the place of another, as no cache would."""
    (folder / "put").write_bytes(content)
    place.put_file(name, folder / "put")
    (folder / "put").unlink()


class Run:
    """A sweep's harvest: its sites, its scales, and its rows block by block in this process."""

    def __init__(self, parsed: recipe.Recipe, tokens_path: Path):
        self.recipe, self.path, self.sites = parsed, tokens_path, sites_of(parsed)
        self.cache = cache.claim(parsed, self.sites, tokens_path)
        tokens = torch.from_numpy(np.load(tokens_path)).long()
        captured = hooks.capture(gemma.load(parsed.model, CPU), tokens, self.sites)
        self.scales = measure(tokens != BOS, captured, parsed.harvest.outlier_norm)

    def blocks(self, numbers: list[int], *, cached: bool = True) -> list[harvest.Rows]:
        harvester = Harvester(self.recipe, self.sites, self.scales, self.path, self.cache if cached else None)
        return [harvester({BLOCK: np.array([number])}) for number in numbers]


def assert_same(found: list[harvest.Rows], expected: list[harvest.Rows]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, column in theirs.items():
            assert np.array_equal(mine[key], column), key
            assert mine[key].dtype == column.dtype


def assert_equal_shards(found: Shard, expected: Shard) -> None:
    assert np.array_equal(found.positions, expected.positions)
    for mine, theirs in ((found.norms, expected.norms), (found.bits, expected.bits)):
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[key], theirs[key]) for key in theirs)


def spoil_model(folder: Path) -> None:
    """From here on whoever loads the weights fails."""
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match="header"):
        gemma.load(recipe.Model(name=str(folder)), CPU)


@in_both
def test_harvest__from_the_cache_is_bit_for_bit_what_the_model_gives(parsed, tokens_path, model_folder) -> None:
    run = Run(parsed(), tokens_path)
    alone = run.blocks([0, 1, 2], cached=False)
    kept = sum(len(rows[ROW]) for rows in alone)
    assert 0 < kept < SEQUENCES * 31  # the norm limit drops some
    assert_same(run.blocks([2, 0, 1]), [alone[n] for n in (2, 0, 1)])  # written
    spoil_model(model_folder)
    assert_same(run.blocks([0, 1, 2]), alone)  # read, without a model


def test_harvest__a_sweep_of_fewer_sites_and_other_limits_reads_the_same_cache(
    parsed, tokens_path, model_folder
) -> None:
    Run(parsed(), tokens_path).blocks([0, 1, 2])
    fewer = Run(parsed(GRIDS[:1], {"outlier_norm": 1.05}, fit={"workers": 1}), tokens_path)
    alone = fewer.blocks([0, 1, 2], cached=False)
    assert set(alone[0]) == {"resid_post.0", "resid_post.3", ROW, BLOCK, BLOCK_ROWS}
    spoil_model(model_folder)
    assert_same(fewer.blocks([0, 1, 2]), alone)


@in_both
def test_harvest__a_shard_that_a_smaller_sweep_mends_has_all_sites_again(parsed, tokens_path, model_folder) -> None:
    run = Run(parsed(), tokens_path)
    alone = run.blocks([0, 1, 2])
    run.cache.store.delete([cache._name(1)])
    Run(parsed(GRIDS[:1]), tokens_path).blocks([1])
    spoil_model(model_folder)
    assert_same(run.blocks([0, 1, 2]), alone)


def test_harvest__a_second_epoch_has_the_same_rows_in_blocks_of_its_own(parsed, tokens_path) -> None:
    run = Run(parsed(), tokens_path)
    first, second = run.blocks([0, 1, 2], cached=False), run.blocks([3, 4, 5], cached=False)
    for number, (mine, theirs) in enumerate(zip(second, first, strict=True), start=3):
        assert (mine[BLOCK] == number).all()
        assert_same([mine | {BLOCK: theirs[BLOCK]}], [theirs])
    assert_same(run.blocks([3, 0]), [second[0], first[0]])


@in_both
def test_read__any_damaged_byte_is_noticed_and_the_block_harvested_again(
    parsed, tokens_path, monkeypatch, tmp_path, place: str
) -> None:
    run, loads = Run(parsed(), tokens_path), []
    alone = run.blocks([1], cached=False)
    run.blocks([1])
    name, keys = cache._name(1), [site.key for site in run.sites]
    whole = run.cache.store.read(name)
    sound = run.cache.read(1, keys)
    header = 8 + int.from_bytes(whole[:8], "little")
    chosen = random.Random(0)
    places = [0, 3, 7, 8, header - 1, header, len(whole) - 1]
    times = 1 if place.startswith("s3") else 10
    places += [chosen.randrange(8, header) for _ in range(15 * times)]
    places += [chosen.randrange(header, len(whole)) for _ in range(6 * times)]
    unnoticed = 0
    for at in places:
        bit = 1 << chosen.randrange(8)
        put(run.cache.store, name, whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :], tmp_path)
        shard = run.cache.read(1, keys)
        if shard is not None:  # only what pads the header has no meaning
            unnoticed += 1
            assert at < header
            assert_equal_shards(shard, sound)
    assert unnoticed <= 12, unnoticed  # of 217
    for cut in (0, 7, header, len(whole) - 1):
        put(run.cache.store, name, whole[:cut], tmp_path)
        assert run.cache.read(1, keys) is None
    load = gemma.load_trunk
    monkeypatch.setattr(gemma, "load_trunk", lambda *a: loads.append(1) or load(*a))
    damaged = whole[: header + 100] + bytes([whole[header + 100] ^ 4]) + whole[header + 101 :]
    put(run.cache.store, name, damaged, tmp_path)
    assert_same(run.blocks([1]), alone)
    assert loads == [1]  # the fault was met, and mended:
    assert run.cache.read(1, keys) is not None


@in_both
def test_read__a_shard_of_another_identity_or_block_is_none(parsed, tokens_path, tmp_path) -> None:
    run = Run(parsed(), tokens_path)
    run.blocks([0, 1])
    keys = [site.key for site in run.sites]
    assert run.cache.read(0, keys) is not None
    assert run.cache._replace(identity="0" * 64).read(0, keys) is None
    put(run.cache.store, cache._name(1), run.cache.store.read(cache._name(0)), tmp_path)
    assert run.cache.read(1, keys) is None
    assert run.cache.read(2, keys) is None


DIFFERENT = {
    "dtype": ({"model": {"dtype": "float32"}}, "model.dtype is bfloat16 there and float32 here"),
    "context": ({"corpus": {"context": 16}}, "corpus.context is 32 there and 16 here"),
    "length": ({"corpus": {"train_tokens": 640}}, "corpus.train_tokens is 672 there and 640 here"),
    "forward pass": ({"harvest": {"sequences": 4}}, "harvest.sequences is 8 there and 4 here"),
    "sites": ({"sweep": [GRIDS[0] | {"layers": [0, 2]}]}, "lacks the sites resid_post.2"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_check__a_cache_of_something_else_is_refused_before_anything_is_spent(
    parsed, tokens_path, tiny_recipe, name
) -> None:
    Run(parsed(), tokens_path)
    changes, part = DIFFERENT[name]
    content = parsed().model_dump(mode="json")
    for field, value in changes.items():
        content[field] = content[field] | value if isinstance(value, dict) else value
    other = recipe_file.parse(content | {"fit": {"workers": 1}})
    with pytest.raises(UserError, match=f"harvest.cache: .*{part}.*: name another folder or prefix"):
        cache.check(other, {site.key: 32 for site in sites_of(other)})


@pytest.mark.parametrize("what", ["corpus", "model.name"])
def test_claim__other_tokens_or_weights_are_refused(parsed, tokens_path, model_folder, what: str) -> None:
    run = Run(parsed(), tokens_path)
    if what == "corpus":
        tokens = np.load(tokens_path)
        tokens[3, 5] += 1
        np.save(tokens_path, tokens)
    else:
        weights = bytearray((model_folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (model_folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=f"harvest.cache: .*{what} is .* there and .* here"):
        cache.claim(run.recipe, run.sites, tokens_path)


def test_claim__a_moved_model_is_the_same(parsed, tokens_path, model_folder) -> None:
    run = Run(parsed(), tokens_path)
    moved = shutil.copytree(model_folder, model_folder.with_name("moved"))
    again = cache.claim(parsed(model={"name": str(moved), "dtype": "bfloat16"}), run.sites, tokens_path)
    assert (again.identity, again.sites) == (run.cache.identity, run.cache.sites)


def test_check__a_folder_that_cannot_hold_a_cache_is_refused(parsed, tmp_path, monkeypatch) -> None:
    widths = {"resid_post.0": 32}
    with pytest.raises(UserError, match=r"harvest.cache: /proc/nowhere cannot be written"):
        cache.check(parsed(harvest={"cache": "/proc/nowhere"}), widths)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, SEQUENCES * 32 * 76 - 1))
    with pytest.raises(UserError, match=r"harvest.cache: needs .* GiB more"):
        cache.check(parsed(), widths)  # 8 bytes a row, 2·32 + 4 a row and site


@in_both
def test_check__a_place_that_holds_something_else_is_refused(parsed, place: str, tmp_path) -> None:
    widths, opened = {"resid_post.0": 32}, cache._open(place)
    cache.check(parsed(), widths)
    assert opened.names() == []
    opened.put_new("thesis.txt", b"irreplaceable")
    with pytest.raises(UserError, match=r"harvest.cache: .* holds thesis.txt and no cache"):
        cache.check(parsed(), widths)


@in_a_bucket
def test_check__a_bucket_that_cannot_hold_a_cache_is_refused(parsed, place: str, monkeypatch) -> None:
    widths = {"resid_post.0": 32}
    with pytest.raises(UserError, match=r"^harvest.cache: there is no bucket nowhere: create it"):
        cache.check(parsed(harvest={"cache": "s3://nowhere/x"}), widths)
    with pytest.raises(UserError, match=r"^harvest.cache: is not s3://bucket/prefix: .*AWS_"):
        parsed(harvest={"cache": "s3://key:secret@runs/x"})
    for one, other in ((place, place), (place, f"{place}/run"), (f"{place}/cache", place)):
        with pytest.raises(UserError, match=r"^harvest.cache: lies in storage, or storage in it"):
            parsed(harvest={"cache": one}, storage=other)
    parsed(storage=f"{place}-run")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"^harvest.cache: .* cannot be written .*AWS_SECRET_ACCESS_KEY"):
        cache.check(parsed(), widths)


@in_both
def test_claim__of_two_sweeps_that_make_it_at_once_both_have_the_firsts_sites(parsed, tokens_path, monkeypatch) -> None:
    """The second looks before the first has made it."""
    compare, looked = cache._compare, []

    def look_and_make(*arguments: object) -> object:
        looked.append(compare(*arguments))
        if len(looked) == 1:
            Run(parsed(), tokens_path)
        return looked[-1]

    monkeypatch.setattr(cache, "_compare", look_and_make)
    second = Run(parsed(GRIDS[:1]), tokens_path)
    assert looked[0] is None
    assert [site.key for site in second.cache.sites] == ["resid_post.0", "attn_out.1", "resid_post.3"]


def sample(seed: int) -> Shard:
    """Random rows, 6 MB: two parts of an upload."""
    n, site = 24_000, "resid_post.0"
    bits = np.random.default_rng(seed).integers(-(2**15), 2**15, (n, 128), dtype=np.int16)
    return Shard(np.arange(n), {site: np.full(n, float(seed), np.float32)}, {site: bits})


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_folder(moment: str) -> None:
    save, rename = tensors.save_file, os.replace

    def half_save(content: dict, path: Path, **more) -> None:
        save(content, path, **more)
        os.truncate(path, path.stat().st_size // 2)
        die()

    if moment == "in the middle":
        tensors.save_file = half_save
    else:
        os.replace = die if moment == "before its name" else lambda *paths: die(rename(*paths))


def die_in_a_bucket(moment: str, place: S3Store) -> None:
    store.TRANSFER = TransferConfig(multipart_threshold=2**22, multipart_chunksize=5 * 2**20, max_concurrency=1)
    events, parts = place.client.meta.events, []
    if moment == "in the middle":
        events.register("after-call.s3.UploadPart", lambda **_: parts.append(1) or (len(parts) == 1 and die()))
    else:
        events.register(f"{'before' if moment == 'before its name' else 'after'}-call.s3.CompleteMultipartUpload", die)


def write_and_die(written: Cache, shard: Shard, moment: str) -> None:
    """In a process of its own: SIGKILL in the middle of the file, before it has its name, or after."""
    if isinstance(written.store, S3Store):
        die_in_a_bucket(moment, written.store)
    else:
        die_in_a_folder(moment)
    written.write(0, shard)


@in_both
@pytest.mark.parametrize("moment", ["in the middle", "before its name", "after it"])
@pytest.mark.parametrize("there_before", [False, True])
def test_write__killed_leaves_the_old_shard_or_the_new_one(place: str, moment: str, there_before: bool) -> None:
    old, new = sample(0), sample(1)

    def opened() -> Cache:  # a client does not outlive a fork
        return Cache(cache._open(place), "identity", [Site(0, "resid_post")])

    if there_before:
        opened().write(0, old)
    writer = multiprocessing.get_context("fork").Process(target=write_and_die, args=(opened(), new, moment))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    written = opened()
    found, expected = written.read(0, ["resid_post.0"]), new if moment == "after it" else old
    if moment != "after it" and not there_before:
        assert found is None
        assert written.blocks() == 0
    else:
        assert_equal_shards(found, expected)
        assert written.store.names() == [cache._name(0)]
    if isinstance(written.store, FolderStore):
        assert len(list(Path(place).glob(f"{store.STAGED}*"))) >= 1  # the writer was killed on its way


def test_claim__removes_old_staged_files_and_no_others(parsed, tokens_path, tmp_path) -> None:
    folder = tmp_path / "cache"
    for name in (".staged-old", ".staged-new"):
        (folder / name).mkdir(parents=True)
        (folder / name / "tensors").touch()
    (folder / ".staged-file").touch()
    for name in (".staged-old", ".staged-file"):
        os.utime(folder / name, (0, 0))
    Run(parsed(), tokens_path)
    assert {path.name for path in folder.iterdir()} == {".staged-new", "identity.json"}
    assert json.loads((folder / "identity.json").read_text())["sites"] == ["resid_post.0", "attn_out.1", "resid_post.3"]


def test_activations__actors_read_the_cache_and_load_no_model(
    ray_session, parsed, tokens_path, model_folder, monkeypatch
) -> None:
    """Two actors and two epochs: the first writes, and then the weights are gone."""
    run = Run(parsed(harvest={"actors": 2, "cpus": 0.5}), tokens_path)
    alone = run.blocks([0, 1, 2, 3, 4, 5], cached=False)

    def streamed() -> list[harvest.Rows]:
        rows = harvest.activations(run.recipe, run.sites, run.scales, run.path, run.cache, 0, 6)
        return list(rows.iter_batches(batch_size=None, batch_format="numpy"))

    assert_same(streamed(), alone)
    spoil_model(model_folder)
    assert_same(streamed(), alone)
