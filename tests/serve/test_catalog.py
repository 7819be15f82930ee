"""The catalog lists every kind by id and digest, sees new versions, and never offers what is damaged."""

import asyncio
import json
import shutil
import traceback
from pathlib import Path

import pytest

from sae import artifact
from serve.catalog import Catalog, Entry
from serve.local import Local
from serve.problems import Problem
from serve.sources import Bucket, Folder, source
from tests.published import KINDS, make_config, make_dictionary, make_spec

SUITE = "gemma-3-270m-jumprelu"


def publish(root: Path, kind: str = "sae", seed: int = 1, folder: str | None = None) -> Path:
    spec = make_spec(kind)
    place = root / SUITE / (folder or spec.folder)
    artifact.write(place, make_dictionary(spec, seed=seed), make_config(spec))
    (place / "metrics.json").write_text(json.dumps({"fvu": 0.1}))
    artifact.seal(place)
    return place


def look(root: Path) -> list[Entry]:
    catalog = Catalog(Folder(root))
    catalog.refresh()
    return catalog.entries


@pytest.mark.parametrize("kind", KINDS)
def test_entry__says_what_a_dictionary_is(kind: str, tmp_path: Path) -> None:
    publish(tmp_path, kind)
    spec = make_spec(kind)
    (entry,) = look(tmp_path)
    assert (entry.available, entry.kind, entry.width, entry.affine) == (True, spec.kind, 24, spec.options.affine)
    assert [part.site for part in entry.reads] == [site.key for site in spec.reads]
    assert [part.site for part in entry.writes] == [site.key for site in spec.writes]
    assert {part.width for part in [*entry.reads, *entry.writes]} == {10}
    assert (entry.l0, entry.figures, entry.model) == (4, {"fvu": 0.1}, "google/gemma-3-270m")
    assert entry.id == f"{SUITE}.{spec.folder.replace('/', '.')}"


def _cut(folder: Path) -> None:
    path = folder / "params.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _flip(folder: Path) -> None:
    path = folder / "params.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _reseal(folder: Path, **config: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    artifact.seal(folder)


DAMAGE = {
    "a file cut short": (_cut, "params.safetensors: not the file that manifest.json lists"),
    "a flipped bit": (_flip, "not the file"),
    "a file gone": (lambda folder: (folder / "params.safetensors").unlink(), "not the file"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "was not published whole"),
    "a manifest that is no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "no sound JSON"),
    "another width": (lambda folder: _reseal(folder, width=25), "expected"),
    "an unknown site": (lambda folder: _reseal(folder, hf_hook_point_in="model.layers.1.x"), "does not name"),
    "two sites": (lambda folder: _reseal(folder, hf_hook_point_in="model.layers.{1,2}.output"), "does not name"),
    "an unknown kind": (lambda folder: _reseal(folder, type="lora"), "type"),
    "l0 a text": (lambda folder: _reseal(folder, l0="many"), "int"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged__is_listed_with_the_reason_and_not_served(damage: str, tmp_path: Path) -> None:
    act, part = DAMAGE[damage]
    folder = publish(tmp_path)
    catalog = Catalog(Folder(tmp_path))
    catalog.refresh()
    (before,) = catalog.entries
    act(folder)
    catalog.refresh()
    (entry,) = catalog.entries
    assert not entry.available
    assert part in (entry.reason or "")
    assert str(tmp_path) not in (entry.reason or "")
    assert entry.id == before.id
    assert catalog.folders == {}
    with pytest.raises(Problem) as refused:
        catalog.usable(entry.id)
    assert refused.value.status == 409
    with pytest.raises(Problem) as unknown:
        catalog.usable(before.digest)
    assert unknown.value.status == 404


def test_gone__is_told_again_and_again_without_keeping_anything(tmp_path: Path) -> None:
    local = Local(Catalog(Folder(tmp_path)), 2**20)

    def frames() -> int:
        with pytest.raises(Problem) as gone:
            asyncio.run(local.dictionary("0" * 64))
        assert gone.value.status == 409
        return len(list(traceback.walk_tb(gone.value.__traceback__)))

    assert frames() == frames() == frames()


def test_versions__come_and_go_by_digest(tmp_path: Path) -> None:
    folder = publish(tmp_path)
    catalog = Catalog(Folder(tmp_path))
    catalog.refresh()
    (first,) = catalog.entries
    shutil.rmtree(folder)
    publish(tmp_path, seed=2)
    publish(tmp_path, "clt")
    catalog.refresh()
    second = catalog.find(first.id)
    assert second.digest != first.digest
    assert len(catalog.entries) == 2
    assert catalog.find(second.digest) == second
    with pytest.raises(Problem):
        catalog.find(first.digest)


@pytest.mark.parametrize(
    "name", ["../x", "..", "/etc/passwd", "%2e%2e", "x\0", "", "a" * 5000, "gemma-3-270m-jumprelu/resid_post", "s3://b"]
)
def test_names__that_are_not_listed_open_nothing(name: str, tmp_path: Path) -> None:
    publish(tmp_path)
    catalog = Catalog(Folder(tmp_path))
    catalog.refresh()
    with pytest.raises(Problem) as refused:
        catalog.find(name)
    assert refused.value.status == 404


def test_ids__that_fall_together_are_told_apart(tmp_path: Path) -> None:
    publish(tmp_path, folder="resid_post/layer_9")
    publish(tmp_path, folder="resid_post.layer_9", seed=2)
    entries = look(tmp_path)
    assert len({entry.id for entry in entries}) == 2


def test_folder__follows_no_link(tmp_path: Path) -> None:
    publish(tmp_path / "outside")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    assert look(tmp_path / "root") == []


def test_bucket__is_copied_once_and_seen_as_a_folder(s3, tmp_path: Path) -> None:
    def upload(folder: Path, name: str) -> None:
        for path in folder.iterdir():
            s3.upload_file(str(path), "runs", f"served/{SUITE}/{name}/{path.name}")

    local = publish(tmp_path / "local")
    upload(local, "a")
    upload(publish(tmp_path / "local", "clt"), "b")
    s3.delete_object(Bucket="runs", Key=f"served/{SUITE}/b/params_layer_1.safetensors")
    bucket = source("s3://runs/served", tmp_path / "cache")
    assert isinstance(bucket, Bucket)
    catalog = Catalog(bucket)
    catalog.refresh()
    whole, damaged = sorted(catalog.entries, key=lambda entry: entry.id)
    assert (whole.available, damaged.available) == (True, False)
    (expected,) = [entry for entry in look(tmp_path / "local") if entry.kind == "sae"]
    assert whole.digest == expected.digest
    assert catalog.folders[whole.digest].parent == tmp_path / "cache"
    shutil.rmtree(local)
    upload(publish(tmp_path / "local", seed=2), "a")
    catalog.refresh()
    assert catalog.find(whole.id).digest != whole.digest
