"""Two places that keep files by name, a local folder and an S3 prefix, and the folders with manifests that lie in them.

A name appears whole or not at all. What is more than one file is a folder that exists when its manifest does, which
is written last and removed first, and nothing in it is handed out before every file is what the manifest says.
"""

import io
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlparse

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

from sae import artifact
from sae.artifact import MANIFEST, ArtifactError

STAGED = ".staged-"
DELETED_AT_ONCE = 1000  # the most that S3 takes in one request
# Botocore's standard mode waits up to 20 s, with jitter, before each further attempt, and gives up when 100 of a client
# have failed: a server may be away for about five minutes, less while several parts are under way.
PATIENT = Config(connect_timeout=5, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 40})
IMPATIENT = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 2})
TRANSFER = TransferConfig(multipart_threshold=2**26, multipart_chunksize=2**25, max_concurrency=4)
SHA256 = {"ChecksumAlgorithm": "SHA256"}  # the server refuses a body that is not the one sent


class Missing(Exception):
    """No such name."""


class Exists(Exception):
    """The name is taken."""


class Store(Protocol):
    """Files by names such as `step-000000010/position.json`."""

    url: str
    """For people."""
    scratch: Path | None
    """Where to stage a file so that `put_file` need not copy it; None is the system's temporary folder."""

    def put_file(self, name: str, path: Path) -> None:
        """A copy of a local file, which must not be changed afterwards."""

    def put_new(self, name: str, content: bytes) -> None:
        """Exists if the name was taken: of several that try at once, one succeeds."""

    def read(self, name: str) -> bytes:
        """Of a small file; Missing if there is none."""

    def read_range(self, name: str, first: int, end: int) -> bytes:
        """Bytes [first, end) of a file, or as many as there are; Missing if there is none."""

    def names(self, prefix: str = "") -> list[str]:
        """All that begin so, sorted."""

    def delete(self, names: Iterable[str]) -> None:
        """In this order; it is no error if some are gone."""

    def folder(self, name: str, into: Path) -> Path:
        """Where the files of a sealed folder can be read on this machine, which is `into` unless the store is local.
        Missing if it has no manifest, ArtifactError if it is damaged."""


class FolderStore:
    """A local folder, or one of a file system that all nodes see."""

    def __init__(self, root: Path):
        self.root, self.url = root, str(root)
        self.scratch: Path | None = root
        root.mkdir(parents=True, exist_ok=True)

    def put_file(self, name: str, path: Path) -> None:
        with self._staged(name) as (staged, final):
            try:
                os.link(path, staged)  # staged on the same file system: its bytes are written once
            except OSError:
                shutil.copyfile(path, staged)
            _sync(staged)
            os.replace(staged, final)

    def put_new(self, name: str, content: bytes) -> None:
        with self._staged(name) as (staged, final):
            staged.write_bytes(content)
            _sync(staged)
            try:
                os.link(staged, final)
            except FileExistsError:
                raise Exists(f"{self.url}/{name}") from None

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            raise Missing(f"{self.url}/{name}") from None

    def read_range(self, name: str, first: int, end: int) -> bytes:
        try:
            with (self.root / name).open("rb") as file:
                file.seek(first)
                return file.read(max(0, min(end, os.fstat(file.fileno()).st_size) - first))
        except FileNotFoundError:
            raise Missing(f"{self.url}/{name}") from None

    def names(self, prefix: str = "") -> list[str]:
        found: list[str] = []
        for folder, folders, files in os.walk(self.root, onerror=_unless_gone):
            kept = [name for name in files if not name.startswith(STAGED)]
            folders[:] = [name for name in folders if not name.startswith(STAGED)]
            found += (Path(folder, name).relative_to(self.root).as_posix() for name in kept)
        return sorted(name for name in found if name.startswith(prefix))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self.root / name
            path.unlink(missing_ok=True)
            if path.parent != self.root:
                with suppress(OSError):  # others lie in it
                    path.parent.rmdir()

    def folder(self, name: str, into: Path) -> Path:
        if not (self.root / name / MANIFEST).exists():
            raise Missing(f"{self.url}/{name}")
        artifact.verify(self.root / name)
        return self.root / name

    @contextmanager
    def _staged(self, name: str) -> Iterator[tuple[Path, Path]]:
        """A place for the content, and where it is to be seen; the folder is synced at the end."""
        final = self.root / name
        final.parent.mkdir(parents=True, exist_ok=True)
        staged = self.root / f"{STAGED}{uuid.uuid4().hex}"
        try:
            yield staged, final
            _sync(final.parent)
        finally:
            staged.unlink(missing_ok=True)


def _unless_gone(error: OSError) -> None:
    """Others stage and delete folders while this one lists them."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync(path: Path) -> None:
    """Onto the disk: a manifest must not survive a loss of power that its files do not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class S3Store:
    """A prefix of a bucket: s3://bucket/prefix. Credentials and endpoint are found as every AWS client finds them."""

    def __init__(self, url: str, config: Config = PATIENT):
        parsed = urlparse(url, allow_fragments=False)
        self.url, self.config = url.rstrip("/"), config
        self.scratch: Path | None = None
        self.bucket, self.prefix = parsed.netloc, "".join(f"{part}/" for part in parsed.path.split("/") if part)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.url,)  # a client does not pickle

    @cached_property
    def client(self) -> Any:
        return boto3.session.Session().client("s3", config=self.config)

    def put_file(self, name: str, path: Path) -> None:
        self.client.upload_file(str(path), self.bucket, self.prefix + name, ExtraArgs=SHA256, Config=TRANSFER)

    def put(self, name: str, content: bytes, **conditions: str) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=content, **SHA256, **conditions)

    def put_new(self, name: str, content: bytes) -> None:
        try:
            self.put(name, content, IfNoneMatch="*")
        except ClientError as error:
            if _status(error) == 409:  # another write of the name is under way, and may yet fail
                time.sleep(0.2)
                return self.put_new(name, content)
            if _status(error) != 412:
                raise
            if self.read(name) != content:  # else it is ours, and the answer to an earlier attempt was lost
                raise Exists(f"{self.url}/{name}") from None

    def read(self, name: str) -> bytes:
        content = io.BytesIO()
        self._download(name, content)
        return content.getvalue()

    def read_range(self, name: str, first: int, end: int, attempts: int = 5) -> bytes:
        """Botocore tries a request again, but not the stream of its answer where that breaks off."""
        if end <= first:
            return b""
        place = {"Bucket": self.bucket, "Key": self.prefix + name, "Range": f"bytes={first}-{end - 1}"}
        try:
            content: bytes = self.client.get_object(**place)["Body"].read()
            return content
        except ClientError as error:
            if _status(error) == 416:  # nothing lies there
                return b""
            if _status(error) != 404:
                raise
            raise Missing(f"{self.url}/{name}") from None
        except S3_RETRYABLE_DOWNLOAD_ERRORS:
            if attempts == 1:
                raise
            return self.read_range(name, first, end, attempts - 1)

    def get_file(self, name: str, path: Path) -> None:
        with path.open("wb") as file:
            self._download(name, file)

    def _download(self, name: str, target: IO[bytes]) -> None:
        """In parts, each of which is tried again where its stream breaks off."""
        try:
            self.client.download_fileobj(self.bucket, self.prefix + name, target, Config=TRANSFER)
        except ClientError as error:
            if _status(error) != 404:
                raise
            raise Missing(f"{self.url}/{name}") from None

    def names(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        return sorted(item["Key"].removeprefix(self.prefix) for page in pages for item in page.get("Contents", []))

    def delete(self, names: Iterable[str]) -> None:
        keys = [{"Key": self.prefix + name} for name in names]
        for first in range(0, len(keys), DELETED_AT_ONCE):
            self.client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": keys[first : first + DELETED_AT_ONCE], "Quiet": True}
            )

    def folder(self, name: str, into: Path) -> Path:
        """Downloads what is not there yet; `into` itself appears when all of it is sound."""
        manifest = self.read(f"{name}/{MANIFEST}")
        if _is_sound(into, manifest):
            return into
        staged = into.with_name(f"{STAGED}{into.name}")
        for old in (staged, into):
            shutil.rmtree(old, ignore_errors=True)
        staged.mkdir(parents=True)
        (staged / MANIFEST).write_bytes(manifest)
        try:
            for file in artifact.listing(staged):
                self.get_file(f"{name}/{file}", staged / file)
            artifact.verify(staged)
        except Missing as error:
            raise ArtifactError(f"{self.url}/{name}: lacks a file that {MANIFEST} lists") from error
        staged.rename(into)
        return into


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _is_sound(folder: Path, manifest: bytes) -> bool:
    """Whether a folder has this manifest and is what it says."""
    try:
        artifact.verify(folder)
        return (folder / MANIFEST).read_bytes() == manifest
    except (ArtifactError, OSError):
        return False


def put_folder(store: Store, name: str, files: Iterable[Path]) -> None:
    """Keeps copies of some files as one sealed folder, in the place of what had the name."""
    listed = {}
    store.delete([f"{name}/{MANIFEST}"])
    for path in files:
        store.put_file(f"{name}/{path.name}", path)
        listed[path.name] = artifact.listed(path)
    store.put_new(f"{name}/{MANIFEST}", artifact.manifest(listed).encode())


def delete_folder(store: Store, name: str) -> None:
    """Removes everything below a name, manifests before what they list."""
    names = store.names(f"{name}/")
    seals = [name for name in names if name.endswith(f"/{MANIFEST}")]
    store.delete(seals)
    store.delete(name for name in names if name not in seals)
