"""Where published dictionaries lie: a local folder, or a prefix of a bucket that is copied to this machine."""

import hashlib
import json
import os
import shutil
import uuid
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlparse

import boto3
from botocore.config import Config

from sae.artifact import CONFIG, MANIFEST

MARKS = {CONFIG, MANIFEST}
MANIFEST_LIMIT = 2**24
CONFIGURATION = Config(connect_timeout=5, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 3})


class Source(Protocol):
    """Local folders of dictionaries, whole or not, by names with slashes."""

    def folders(self) -> dict[str, Path]: ...


def source(place: str, cache: Path) -> Source:
    """`place` is a folder or s3://bucket/prefix, and `cache` where a bucket's files are kept."""
    return Bucket(place, cache) if place.startswith("s3://") else Folder(Path(place))


class Folder:
    """Every folder below a root in which a manifest or config lies; links are not followed."""

    def __init__(self, root: Path):
        self.root = root.resolve()

    def folders(self) -> dict[str, Path]:
        found = ((Path(at), files) for at, _, files in os.walk(self.root) if MARKS & set(files))
        return {at.relative_to(self.root).as_posix(): at for at, _ in found if at != self.root}


class Bucket:
    """Each dictionary is downloaded once, to a folder named by its manifest's digest."""

    def __init__(self, url: str, cache: Path):
        parsed = urlparse(url, allow_fragments=False)
        self.bucket, self.cache = parsed.netloc, cache
        self.prefix = "".join(f"{part}/" for part in parsed.path.split("/") if part)
        self.known: dict[tuple[str, str], Path] = {}

    @cached_property
    def client(self) -> Any:
        return boto3.session.Session().client("s3", config=CONFIGURATION)

    def folders(self) -> dict[str, Path]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        items = {item["Key"]: item for page in pages for item in page.get("Contents", [])}
        found = {}
        for key, item in items.items():
            if key.endswith(f"/{MANIFEST}") and item["Size"] <= MANIFEST_LIMIT:
                place = (key, item["ETag"])
                self.known[place] = self.known.get(place) or self._copy(key, items)
                found[key.removeprefix(self.prefix).removesuffix(f"/{MANIFEST}")] = self.known[place]
        return found

    def _copy(self, key: str, items: dict[str, Any]) -> Path:
        """The files that a manifest lists, as far as they are there; who reads them sees whether they are whole."""
        manifest = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        final = self.cache / hashlib.sha256(manifest).hexdigest()
        if final.exists():
            return final
        staged = self.cache / f".staged-{uuid.uuid4().hex}"
        staged.mkdir(parents=True)
        try:
            (staged / MANIFEST).write_bytes(manifest)
            for name in _listed(manifest):
                origin = f"{key.removesuffix(MANIFEST)}{name}"
                if origin in items:
                    self.client.download_file(self.bucket, origin, str(staged / name))
            with suppress(OSError):  # another process of this machine was faster
                staged.rename(final)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return final


def _listed(manifest: bytes) -> list[str]:
    """Names in a manifest, of which only plain file names are used: it is not trusted."""
    try:
        files = json.loads(manifest)["files"]
        return [name for name in files if PurePosixPath(name).name == name and name not in (".", "..", MANIFEST)]
    except (ValueError, LookupError, TypeError):
        return []
