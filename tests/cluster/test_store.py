"""The store, on a local folder and on a real S3 server: the same behaviour, one winner, nothing damaged handed out."""

import pickle
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from cluster import store
from cluster.store import Exists, FolderStore, Missing, S3Store, Store
from sae.artifact import MANIFEST, ArtifactError
from tests.s3_proxy import Faults, S3Proxy


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path: Path) -> Store:
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    request.getfixturevalue("s3")
    return S3Store(f"s3://runs/{uuid.uuid4().hex}/a/b")


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_files__are_kept_listed_and_deleted_by_name(place: Store, tmp_path: Path) -> None:
    path = written(tmp_path / "a", b"first")
    place.put_file("one/a", path)
    path.unlink()
    place.put_file("one/a", written(tmp_path / "b", b"second"))
    place.put_new("two/b", b"third")
    place.put_new("twofold/c", b"")
    assert place.names() == ["one/a", "two/b", "twofold/c"]
    assert place.names("two/") == ["two/b"]
    assert place.read("one/a") == b"second"
    place.delete(["one/a", "never/there"])
    assert place.names() == ["two/b", "twofold/c"]
    with pytest.raises(Missing):
        place.read("one/a")


def test_names__while_folders_come_and_go_lists_what_stays(tmp_path: Path) -> None:
    place, done = FolderStore(tmp_path), threading.Event()
    place.put_new("stays/a", b"")

    def come_and_go() -> None:
        while not done.is_set():
            place.put_new("goes/a", b"")
            place.delete(["goes/a"])

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(come_and_go)
        try:
            for _ in range(2000):
                assert "stays/a" in place.names()
        finally:
            done.set()
        changing.result()


def test_read_range__gives_what_there_is_of_it(place: Store, tmp_path: Path) -> None:
    place.put_file("a", written(tmp_path / "a", b"0123456789"))
    assert place.read_range("a", 2, 5) == b"234"
    assert place.read_range("a", 8, 99) == b"89"
    assert place.read_range("a", 10, 99) == b""
    assert place.read_range("a", 4, 4) == b""
    with pytest.raises(Missing):
        place.read_range("b", 0, 1)


def test_put_new__of_many_that_try_at_once_one_succeeds(place: Store) -> None:
    barrier = threading.Barrier(8)

    def attempt(number: int) -> bool:
        barrier.wait()
        try:
            place.put_new("owner", f"writer {number}".encode())
        except Exists:
            return False
        return True

    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(attempt, range(8)))
        assert won.count(True) == 1
        assert place.read("owner") == f"writer {won.index(True)}".encode()
        place.delete(["owner"])


def test_folder__is_there_with_its_manifest_and_refused_if_a_file_is_not_as_listed(place: Store, tmp_path) -> None:
    files = [written(tmp_path / "from" / name, name.encode() * 99) for name in ("a.txt", "b.txt")]
    store.put_folder(place, "texts/x", files)
    found = place.folder("texts/x", tmp_path / "into")
    assert {path.name for path in found.iterdir()} == {"a.txt", "b.txt", MANIFEST}
    assert (found / "b.txt").read_bytes() == b"b.txt" * 99

    place.put_file("texts/x/b.txt", written(tmp_path / "other", b"B.txt" * 99))
    with pytest.raises(ArtifactError):
        place.folder("texts/x", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    place.delete(["texts/x/b.txt"])
    with pytest.raises(ArtifactError):
        place.folder("texts/x", tmp_path / "elsewhere")
    store.put_folder(place, "texts/x", files)  # what was there, half of it or whole, is replaced
    place.folder("texts/x", tmp_path / "elsewhere")
    place.delete([f"texts/x/{MANIFEST}"])
    with pytest.raises(Missing):
        place.folder("texts/x", tmp_path / "nowhere")
    store.delete_folder(place, "texts")
    assert place.names() == []


@pytest.mark.parametrize("name", ["../outside", "..", "", "a/b", "/etc/x"])
def test_folder__a_manifest_cannot_name_what_lies_outside(place: Store, tmp_path: Path, name: str) -> None:
    listed = store.artifact.listed(written(tmp_path / "a", b""))
    place.put_new(f"x/{MANIFEST}", store.artifact.manifest({name: listed}).encode())
    with pytest.raises(ArtifactError, match="no file of its folder"):
        place.folder("x", tmp_path / "into")


def test_s3_folder__an_older_copy_on_this_machine_is_replaced(s3, tmp_path: Path) -> None:
    place = S3Store(f"s3://runs/{uuid.uuid4().hex}")
    for content in (b"old", b"new"):
        store.put_folder(place, "x", [written(tmp_path / "a", content)])
        assert (place.folder("x", tmp_path / "into") / "a").read_bytes() == content
    (tmp_path / "into" / "a").write_bytes(b"bad")  # damaged on this machine, and not in the bucket
    assert (place.folder("x", tmp_path / "into") / "a").read_bytes() == b"new"


def test_s3_put_file__large_files_go_in_parts_with_sha256(s3, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store, "TRANSFER", TransferConfig(multipart_threshold=2**23, multipart_chunksize=2**23))
    place, sent = S3Store(f"s3://runs/{uuid.uuid4().hex}"), []
    place.client.meta.events.register("before-parameter-build.s3.UploadPart", lambda params, **_: sent.append(params))
    content = uuid.uuid4().bytes * 2**20 + b"end"
    place.put_file("large", written(tmp_path / "large", content))
    assert len(sent) == 3
    assert {params["ChecksumAlgorithm"] for params in sent} == {"SHA256"}
    place.get_file("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_s3_put_new__an_attempt_whose_answer_was_lost_has_succeeded(s3) -> None:
    place = S3Store(f"s3://runs/{uuid.uuid4().hex}")
    place.put_new("x", b"ours")
    place.put_new("x", b"ours")  # what botocore does by itself when the connection breaks after the write
    with pytest.raises(Exists):
        place.put_new("x", b"theirs")


def test_s3_read_range__an_answer_that_breaks_off_is_asked_for_again(s3, s3_server, tmp_path, monkeypatch) -> None:
    proxy = S3Proxy(s3_server.environment["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    try:
        place, content = S3Store(f"s3://runs/{uuid.uuid4().hex}"), uuid.uuid4().bytes * 2**12
        place.put_file("a", written(tmp_path / "a", content))
        proxy.faults = Faults(("reset within",), share=0.5)
        assert [place.read_range("a", 5, len(content)) for _ in range(8)] == [content[5:]] * 8
        assert proxy.happened["reset within"] >= 3
    finally:
        proxy.close()


@pytest.mark.chaos
def test_s3_store__waits_for_a_server_that_is_away(s3, s3_server) -> None:
    place = pickle.loads(pickle.dumps(S3Store(f"s3://runs/{uuid.uuid4().hex}")))  # as it reaches other processes
    place.put_new("before", b"x")
    s3_server.kill()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(place.put_new, "after", b"y")
        time.sleep(1)
        assert not writing.done()
        s3_server.start()
        writing.result(timeout=60)
    assert place.names() == ["after", "before"]
