"""What of a run must outlive its machine: in the bucket that the recipe's `storage` names, and brought from there.

    owner/       who may write                    recipe/        the resolved recipe
    tokens/      the packed text                  calibration/   scales: another machine's would differ in last bits
    mlflow/      ids of the runs                  checkpoints/   until the sweep is finished
    published/   the artifacts                    report/        summary.json and the picture, last of all

Tokens and calibration are kept and not made anew: the text may have changed since, and both decide the weights.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import bucket, owner, publish
from cluster.errors import UserError
from cluster.recipe import Recipe
from cluster.run_folder import RunFolder, refuse_another
from cluster.store import Missing, S3Store, delete_folder, put_folder
from sae.artifact import MANIFEST, ArtifactError

logger = logging.getLogger(__name__)

FOLDERS = ("report", "published", "checkpoints", "mlflow", "calibration", "tokens", "recipe")


def check(recipe: Recipe) -> None:
    """UserError, in seconds, unless the bucket can be used."""
    if recipe.storage is not None:
        bucket.check("storage", recipe.storage)


class Storage:
    """The bucket of one sweep, or none: then nothing is done, and the run folder is all there is."""

    def __init__(self, recipe: Recipe, run: RunFolder):
        self.store = S3Store(recipe.storage) if recipe.storage else None
        self.recipe, self.run = recipe, run

    @contextmanager
    def owned(self, *, fresh: bool) -> Iterator[None]:
        """Holds the prefix for this recipe; UserError if it is in use or another recipe's."""
        if self.store is None:
            yield
            return
        with owner.owned(self.store):
            if fresh and self.store.names("recipe/"):
                self._empty(self.store)
            new = self._claim(self.store)
            try:
                yield
            except UserError:
                if new:  # nothing was done yet: a mended recipe must find the prefix as it was
                    self._empty(self.store)
                raise

    def _claim(self, store: S3Store) -> bool:
        """Whether there was no recipe yet. The run folder's own is this one."""
        kept = self.run.brought / "recipe"
        try:
            refuse_another("storage", store.url, store.folder("recipe", kept) / self.run.recipe.name, self.recipe)
            return False
        except ArtifactError as error:
            raise UserError("storage", f"{error}: name another prefix, or start anew with --fresh") from error
        except Missing:
            pass
        strangers = [name for name in store.names() if not name.startswith(("owner/", bucket.PROBES, "recipe/"))]
        if strangers:
            raise UserError("storage", f"{store.url} holds {strangers[0]} and no sweep: name an empty or new prefix")
        put_folder(store, "recipe", [self.run.recipe])
        return True

    def _empty(self, store: S3Store) -> None:
        """Removes an earlier sweep, its recipe last, so that this too can be interrupted."""
        for name in FOLDERS:
            delete_folder(store, name)

    @contextmanager
    def folder(self, name: str, path: Path) -> Iterator[None]:
        """Around the making of a sealed folder, which is made once: brings it before, or keeps it after."""
        brought = self.store is not None and self._brought(self.store, name, path)
        yield
        if self.store and not brought:
            put_folder(self.store, name, _files(path))

    @contextmanager
    def files(self, name: str, *paths: Path) -> Iterator[None]:
        """As `folder`, for small files that lie among others; kept again if they have changed."""
        before = [path.read_bytes() for path in paths] if self.bring(name, *paths) else []
        yield
        if self.store and before != [path.read_bytes() for path in paths]:
            put_folder(self.store, name, paths)

    def bring(self, name: str, *paths: Path) -> bool:
        """Puts the kept files into their places in the run folder; whether there were any."""
        copy = self.run.brought / name
        if self.store is None or not self._brought(self.store, name, copy):
            return False
        for path in paths:
            os.replace(copy / path.name, path)
        shutil.rmtree(copy)
        return True

    def _brought(self, store: S3Store, name: str, path: Path) -> bool:
        try:
            store.folder(name, path)
        except Missing:
            return False
        except ArtifactError as error:
            logger.warning("%s is made anew: %s", name, error)
            return False
        return True

    def finished(self) -> bool:
        """Whether the sweep was finished before, its report brought if that was elsewhere."""
        run = self.run
        if self.store is None:
            return run.summary.exists()
        if self.bring("report", run.summary, run.frontier):
            self.bring("mlflow", run.runs)
            delete_folder(self.store, "checkpoints")
            return True
        run.summary.unlink(missing_ok=True)
        return False

    def published(self) -> str:
        """Where the artifacts are, for people and for summary.json."""
        return f"{self.store.url}/published" if self.store else str(self.run.published)

    def places(self) -> dict[str, str]:
        """Of each dictionary's artifact."""
        places = publish.folders(self.recipe, self.run.published)
        return {id: f"{self.published()}/{place.relative_to(self.run.published)}" for id, place in places.items()}

    def publish(self) -> None:
        """Keeps each artifact of the run folder, its manifest last."""
        if self.store:
            for folder in sorted({path.parent for path in self.run.published.rglob("*") if path.is_file()}):
                place = folder.relative_to(self.run.published).as_posix()
                put_folder(self.store, f"published/{place}", _files(folder))

    def finish(self) -> None:
        """The report makes the sweep finished; the published weights are what is left of the checkpoints."""
        if self.store:
            put_folder(self.store, "report", [self.run.summary, self.run.frontier])
            delete_folder(self.store, "checkpoints")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != MANIFEST)
