"""Activation cache: the rows of each block, written while a sweep trains and read by later epochs and sweeps.

    identity.json                   what the rows depend on, and the sites that there are
    block-000000000.safetensors     a shard: one forward pass

A shard has every eligible row with its norms, since which rows are dropped depends on the sites and limits of a sweep;
a sweep that needs some of the sites drops the same ones that it would without a cache. Its header has the digest of
the identity and the sha256 of each tensor, and it is written under another name and renamed. A shard that is torn,
damaged or of another identity is therefore none, and its block is harvested again.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cluster import gemma
from cluster.calibrate import kept
from cluster.errors import UserError
from cluster.recipe import Recipe, below_home
from cluster.run_folder import replace_text
from cluster.tokens import roles_path
from sae import artifact
from sae.sites import Site

FIELD = "harvest.cache"
POSITIONS = "positions"
STAGED = ".staged"
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

    folder: Path
    identity: str
    sites: list[Site]
    """All that a shard has; a sweep may need fewer."""

    def read(self, block: int, keys: Iterable[str]) -> Shard | None:
        """A block's rows at some sites; None if the shard is not there or not sound."""
        try:
            with safe_open(self._path(block), framework="numpy") as file:
                told = file.metadata() or {}
                if (told.get("identity"), told.get("block")) != (self.identity, str(block)):
                    return None

                def tensor(name: str) -> np.ndarray:
                    found: np.ndarray = file.get_tensor(name)
                    if told.get(name) != _digest(found):
                        raise artifact.ArtifactError(f"block {block}: {name} is damaged")
                    return found

                norms = {key: tensor(_norm(key)) for key in keys}
                return Shard(tensor(POSITIONS), norms, {key: tensor(key) for key in keys})
        except (OSError, SafetensorError, artifact.ArtifactError, KeyError, ValueError, TypeError):
            return None  # whatever is wrong with it, the model gives the rows again

    def write(self, block: int, shard: Shard) -> None:
        """Commits a block's rows at all of the cache's sites."""
        tensors = {POSITIONS: shard.positions} | shard.bits | {_norm(key): norm for key, norm in shard.norms.items()}
        told = {"identity": self.identity, "block": str(block)} | {name: _digest(t) for name, t in tensors.items()}
        staged = self.folder / f"{uuid.uuid4().hex}{STAGED}"
        save_file(tensors, staged, metadata=told)
        os.chmod(staged, 0o644)  # safetensors writes 0600, unreadable for another user
        os.replace(staged, self._path(block))

    def blocks(self) -> int:
        """Shards that are there, sound or not."""
        return sum(1 for _ in self.folder.glob("block-*.safetensors"))

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:09d}.safetensors"


def _norm(key: str) -> str:
    return f"{key}.norm"


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check(recipe: Recipe, widths: dict[str, int]) -> None:
    """UserError if the cache is of something else, as far as that shows before there are tokens, cannot be written or
    would not fit. `widths` are D by site key."""
    if recipe.harvest.cache is None:
        return
    folder = below_home(recipe.harvest.cache)
    _compare(folder, _cheap_facts(recipe), list(widths))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (probe := folder / f"{uuid.uuid4().hex}{STAGED}").touch()
        probe.unlink()
    except OSError as error:
        raise UserError(FIELD, f"{folder} cannot be written ({error.strerror}): name a folder that can") from error
    strangers = [path.name for path in folder.iterdir() if path.suffix not in (".safetensors", ".json", STAGED)]
    if strangers and not _identity(folder).exists():
        raise UserError(FIELD, f"{folder} holds {strangers[0]} and no cache: name an empty or new folder")
    have = sum(path.stat().st_size for path in folder.glob("block-*.safetensors"))
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
    folder = below_home(recipe.harvest.cache)
    facts = _cheap_facts(recipe) | {"model.name": _model_digest(recipe), "corpus": _tokens_digest(tokens_path)}
    folder.mkdir(parents=True, exist_ok=True)
    there = _compare(folder, facts, [site.key for site in sites])
    if there is None:
        there = [site.key for site in sites]
        replace_text(_identity(folder), json.dumps({"rows": facts, "sites": there}, indent=2) + "\n")
    for path in folder.glob(f"*{STAGED}"):
        if path.stat().st_mtime < time.time() - STALE_SECONDS:
            path.unlink(missing_ok=True)
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Cache(folder, identity, [_site(key) for key in there])


def _identity(folder: Path) -> Path:
    return folder / "identity.json"


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


def _compare(folder: Path, facts: Facts, keys: list[str]) -> list[str] | None:
    """The sites that the cache has, None if there is no cache; UserError if these facts or sites are not its own."""
    try:
        told = json.loads(_identity(folder).read_text())
        there, sites = dict(told["rows"]), list(told["sites"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(FIELD, f"{_identity(folder)} is damaged ({error}): name another folder") from error
    differs = [
        f"{name} is {there.get(name)!s:.12} there and {here!s:.12} here"
        for name, here in facts.items()
        if there.get(name) != here
    ]
    if missing := [key for key in keys if key not in sites]:
        differs.append(f"it lacks the sites {', '.join(missing)}")
    if differs:
        raise UserError(FIELD, f"{folder} has the rows of something else ({'; '.join(differs)}): name another folder")
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
