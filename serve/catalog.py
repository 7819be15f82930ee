"""What can be asked: the published dictionaries of a folder or bucket, by id and by digest.

Ids are made from folder names and only ever looked up: no request's text becomes part of a path. The digest is that of
the manifest, which lists the digests of all files. A folder that does not verify is listed with the reason.
"""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter

from sae import artifact, strict
from sae.artifact import MANIFEST, ArtifactError
from serve.problems import Problem
from serve.sources import Source

logger = logging.getLogger(__name__)

METRICS = "metrics.json"


class SiteColumns(BaseModel):
    """A site and how many columns its rows have."""

    site: str
    width: int


class Entry(BaseModel):
    """One dictionary, as it is listed."""

    model_config = ConfigDict(frozen=True)

    id: str
    digest: str
    """SHA-256 of its manifest."""
    available: bool = True
    reason: str | None = None
    """Why it is not available."""
    model: str = ""
    kind: str = ""
    architecture: str = ""
    affine: bool = False
    """Whether decoding needs the rows that were encoded, too."""
    width: int = 0
    """Latents."""
    l0: int | None = None
    reads: list[SiteColumns] = []
    writes: list[SiteColumns] = []
    bytes: int = 0
    figures: dict[str, Any] = {}
    """Of its evaluation, as published."""

    @property
    def d_in(self) -> int:
        return sum(part.width for part in self.reads)

    @property
    def d_out(self) -> int:
        return sum(part.width for part in self.writes)

    @property
    def layers(self) -> set[int]:
        return {int(part.site.rsplit(".", 1)[1]) for part in [*self.reads, *self.writes]}

    @property
    def sites(self) -> set[str]:
        return {part.site.rsplit(".", 1)[0] for part in [*self.reads, *self.writes]}


class Place(NamedTuple):
    """A folder as it was when it was looked at."""

    folder: Path
    stamps: tuple[tuple[str, int, int], ...]
    """Name, bytes and time of change of each file."""


class Catalog:
    """`refresh` looks again; the rest answers from what it saw."""

    def __init__(self, source: Source):
        self.source = source
        self.entries: list[Entry] = []
        self.folders: dict[str, Path] = {}
        """By digest, of what is available."""
        self.refreshed = False
        self._seen: dict[Place, Entry] = {}
        self._by_name: dict[str, Entry] = {}

    def refresh(self) -> None:
        """Reads what is new; blocks, so call it in a thread."""
        seen: dict[Place, Entry] = {}
        by_id: dict[str, Entry] = {}
        for name, folder in sorted(self.source.folders().items()):
            place = Place(folder, _stamps(folder))
            entry = self._seen.get(place) or _entry(name, folder)
            seen[place] = entry
            if entry.id in by_id:
                entry = entry.model_copy(update={"id": f"{entry.id}-{entry.digest[:8]}"})
            by_id[entry.id] = entry
        self.entries, self._seen = list(by_id.values()), seen
        self.folders = {entry.digest: place.folder for place, entry in seen.items() if entry.available}
        self._by_name = {entry.digest: entry for entry in self.entries if entry.available} | by_id
        self.refreshed = True

    def find(self, name: str) -> Entry:
        """By id or digest; Problem if there is none or it is damaged."""
        entry = self._by_name.get(name)
        if entry is None:
            raise Problem(404, "there is no such dictionary: GET /v1/dictionaries lists those that there are")
        return entry

    def usable(self, name: str) -> Entry:
        entry = self.find(name)
        if not entry.available:
            raise Problem(409, f"this dictionary is not available: {entry.reason}")
        return entry


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in found)


def _entry(name: str, folder: Path) -> Entry:
    manifest = folder / MANIFEST
    identity: dict[str, Any] = {"id": id_of(name), "digest": ""}
    try:
        if not manifest.exists():
            raise ArtifactError(f"{folder}: it has no {MANIFEST}, and so was not published whole")
        identity["digest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
        facts = artifact.facts(folder)
        figures = strict.read_json(folder / METRICS) if (folder / METRICS).exists() else {}
        reads, writes = (
            [SiteColumns(site=site.key, width=width) for site, width in zip(sites, widths, strict=True)]
            for sites, widths in ((facts.reads, facts.shape.read_widths), (facts.writes, facts.shape.write_widths))
        )
        content = facts.config
        return Entry(
            **identity, model=str(content.get("model_name", "")), kind=content["type"],
            architecture=content["architecture"], affine=content["affine_connection"], width=content["width"],
            l0=TypeAdapter(int | None).validate_python(content.get("l0")), reads=reads, writes=writes,
            bytes=facts.bytes, figures=figures,
        )  # fmt: skip
    except (ArtifactError, OSError, ValueError) as error:
        logger.warning("%s is not available: %s", name, error)
        return Entry(**identity, available=False, reason=_without_paths(error, folder))


def id_of(name: str) -> str:
    """gemma-3-270m-jumprelu/resid_post/layer_9_width_4096_l0_32 → the same with dots for slashes."""
    plain = re.sub(r"[^a-z0-9._-]", "-", name.lower().replace("/", ".")).strip(".-_")
    return plain[-128:] or "dictionary"


def _without_paths(error: Exception, folder: Path) -> str:
    """What is wrong, for those who may not know where the files lie."""
    if isinstance(error, OSError):
        return "its files cannot be read"
    text = " ".join(str(error).split()).replace(f"{folder}/", "").replace(f"{folder}: ", "")
    return re.sub(r"/\S*/", "", text)[:300]
