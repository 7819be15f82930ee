"""Activation cache: the rows of each block, written while a sweep trains and read by later epochs and sweeps.

    identity.json                   what the rows depend on, and the sites that there are
    block-000000000.safetensors     a shard: one forward pass

It lies in a folder or in a bucket. A shard has every eligible row with its norms, since which rows are dropped depends
on the sites and limits of a sweep; a sweep that needs some of the sites fetches those, and drops the same rows that it
would without a cache. A shard appears whole, with the digest of the identity and the sha256 of each tensor in its
header. One that is damaged or of another identity is therefore none, and its block is harvested again.
"""

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cluster import bucket, gemma, tensors
from cluster.calibrate import kept
from cluster.errors import UserError
from cluster.recipe import S3, Recipe, below_home
from cluster.store import STAGED, Exists, FolderStore, Missing, S3Store, Store
from cluster.tokens import roles_path
from sae import artifact
from sae.sites import Site

FIELD = "harvest.cache"
IDENTITY, SHARD = "identity.json", "block-"
POSITIONS = "positions"
STALE_SECONDS = 3600  # a staged file that is older belongs to nobody: a shard is written in seconds

Facts = dict[str, str | int | list[str]]


class Shard(NamedTuple):
    """The eligible rows of a block at some sites, by site key."""

    positions: np.ndarray
    """Indices into the block's tokens, int64 [n]."""
    norms: dict[str, np.ndarray]
    """float32 [n], of the rows before they were rounded to bf16."""
    bits: dict[str, np.ndarray]
    """bf16 as int16 [n, D]."""

    def within(self, limits: dict[str, float]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Positions and rows of those that are below the norm limit at each of these sites."""
        norms = {key: torch.from_numpy(self.norms[key]) for key in limits}
        mask = kept(torch.ones(len(self.positions), dtype=torch.bool), norms, limits).numpy()
        return self.positions[mask], {key: self.bits[key][mask] for key in limits}


class Cache(NamedTuple):
    """A cache that is the rows of this sweep's tokens, opened by `claim`."""

    store: Store
    identity: str
    sites: list[Site]
    """All that a shard has; a sweep may need fewer."""

    def read(self, block: int, keys: Iterable[str]) -> Shard | None:
        """A block's rows at some sites; None if the shard is not there or not sound."""
        keys = list(keys)
        wanted = [POSITIONS, *keys, *map(_norm, keys)]
        try:
            found = tensors.read(self.store, _name(block), wanted, self._told(block))
        except (Missing, tensors.Damaged, OSError):
            return None  # whatever is wrong with it, the model gives the rows again
        norms = {key: found[_norm(key)].copy() for key in keys}  # torch takes no array that cannot be written to
        return Shard(found[POSITIONS], norms, {key: found[key] for key in keys})

    def write(self, block: int, shard: Shard) -> None:
        """Commits a block's rows at all of the cache's sites."""
        norms = {_norm(key): norm for key, norm in shard.norms.items()}
        tensors.write(self.store, _name(block), {POSITIONS: shard.positions} | shard.bits | norms, self._told(block))

    def blocks(self) -> int:
        """Shards that are there, sound or not."""
        return len(self.store.names(SHARD))

    def _told(self, block: int) -> dict[str, str]:
        return {"identity": self.identity, "block": str(block)}


def _name(block: int) -> str:
    return f"{SHARD}{block:09d}.safetensors"


def _norm(key: str) -> str:
    return f"{key}.norm"


def check(recipe: Recipe, widths: dict[str, int]) -> None:
    """UserError if the cache is of something else, as far as that shows before there are tokens, cannot be written or
    would not fit. `widths` are D by site key."""
    if recipe.harvest.cache is None:
        return
    if recipe.harvest.cache.startswith(S3):
        bucket.check(FIELD, recipe.harvest.cache)
    store = _open(recipe.harvest.cache)
    if _compare(store, _cheap_facts(recipe), list(widths)) is None:
        strangers = [name for name in store.names() if not name.startswith((SHARD, bucket.PROBES))]
        if strangers:
            raise UserError(FIELD, f"{store.url} holds {strangers[0]} and no cache: name an empty or new one")
    if isinstance(store, FolderStore):
        _check_folder(recipe, store.root, widths)


def _open(place: str) -> Store:
    if place.startswith(S3):
        return S3Store(place)
    folder = below_home(place)
    try:
        return FolderStore(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(FIELD, f"{folder} cannot be written ({error.strerror}): name a folder that can")


def _check_folder(recipe: Recipe, folder: Path, widths: dict[str, int]) -> None:
    try:
        (probe := folder / f"{STAGED}{uuid.uuid4().hex}").touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from error
    have = sum(path.stat().st_size for path in folder.glob(f"{SHARD}*"))
    needed = recipe.train_sequences * recipe.corpus.context * (8 + sum(2 * d + 4 for d in widths.values())) - have
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            FIELD,
            f"needs {needed / 2**30:.1f} GiB more and {folder} has {free / 2**30:.1f} GiB free: name another folder, "
            "lower corpus.train_tokens, or drop it",
        )


def claim(recipe: Recipe, sites: list[Site], tokens_path: Path) -> Cache | None:
    """The recipe's cache, made if there is none; UserError if it is of something else."""
    if recipe.harvest.cache is None:
        return None
    store = _open(recipe.harvest.cache)
    if store.scratch:
        _remove_stale(store.scratch)
    facts = _cheap_facts(recipe) | {"model.name": _model_digest(recipe), "corpus": _tokens_digest(tokens_path)}
    keys = [site.key for site in sites]
    there = _compare(store, facts, keys) or _make(store, facts, keys)
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Cache(store, identity, [_site(key) for key in there])


def _make(store: Store, facts: Facts, keys: list[str]) -> list[str]:
    """The sites that it has: another sweep may make it at the same time."""
    try:
        store.put_new(IDENTITY, (json.dumps({"rows": facts, "sites": keys}, indent=2) + "\n").encode())
    except Exists:
        return _compare(store, facts, keys) or keys
    return keys


def _remove_stale(folder: Path) -> None:
    """What writers that were killed had staged."""
    for path in folder.glob(f"{STAGED}*"):
        if path.stat().st_mtime < time.time() - STALE_SECONDS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _cheap_facts(recipe: Recipe) -> Facts:
    """What the rows depend on, by the recipe's fields, but for the weights and the tokens."""
    roles: Facts = {"corpus.roles": sorted(recipe.corpus.roles)} if recipe.corpus.kind == "chat" else {}
    return roles | {
        "model.dtype": recipe.model.dtype,
        "corpus.kind": recipe.corpus.kind,
        "corpus.context": recipe.corpus.context,
        "corpus.train_tokens": recipe.train_sequences * recipe.corpus.context,
        "harvest.sequences": recipe.harvest.sequences,
        "harvest.tensor_parallel": recipe.harvest.tensor_parallel,
    }


def _compare(store: Store, facts: Facts, keys: list[str]) -> list[str] | None:
    """The sites that the cache has, None if there is no cache; UserError if these facts or sites are not its own."""
    try:
        told = json.loads(store.read(IDENTITY))
        there, sites = dict(told["rows"]), list(told["sites"])
    except Missing:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(FIELD, f"{store.url}/{IDENTITY} is damaged ({error}): name another folder or prefix") from error
    differs = [
        f"{name} is {there.get(name)!s:.12} there and {here!s:.12} here"
        for name, here in facts.items()
        if there.get(name) != here
    ]
    if missing := [key for key in keys if key not in sites]:
        differs.append(f"it lacks the sites {', '.join(missing)}")
    if differs:
        differences = "; ".join(differs)
        raise UserError(
            FIELD, f"{store.url} has the rows of something else ({differences}): name another folder or prefix"
        )
    return sites


def _site(key: str) -> Site:
    name, _, layer = key.rpartition(".")
    return Site(int(layer), name)


def _tokens_digest(tokens_path: Path) -> str:
    """Of the tokens, and of their roles where there are any."""
    return " ".join(artifact.sha256(path) for path in (tokens_path, roles_path(tokens_path)) if path.exists())


def _model_digest(recipe: Recipe) -> str:
    """Of a folder's config and weights; of a hub's model its commit."""
    from huggingface_hub import hf_hub_download

    folder = Path(gemma.locate(recipe.model))
    if not folder.is_dir():
        return Path(hf_hub_download(recipe.model.name, "config.json")).parent.name
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {artifact.sha256(path)} ".encode())
    return digest.hexdigest()
