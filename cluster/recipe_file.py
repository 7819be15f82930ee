"""How a recipe is read from its file, and what is refused before anything is spent: each error names the field, its
value and the remedy."""

import re
import types
import typing
from pathlib import Path

import yaml
from pydantic import ValidationError

from cluster import s3
from cluster.errors import UserError
from cluster.grid import nearest
from cluster.recipe import S3, Corpus, Recipe
from sae.sites import STATIC_TOKENS

PREFIX_OF_BUCKET = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w=-][\w.=-]*)+"


def load(path: str) -> Recipe:
    """The recipe in a YAML file, local or s3://; UserError names the first wrong key or value and its remedy."""
    try:
        content = yaml.safe_load(_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "recipe", f"cannot read {path} ({error}): name a YAML file such as jobs/recipes/demo.yaml"
        ) from error
    except yaml.YAMLError as error:
        raise UserError("recipe", f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError("recipe", f"{path} is not a mapping of keys: start from jobs/recipes/demo.yaml")
    return parse(content)


def _text(path: str) -> str:
    if not path.startswith(S3):
        return Path(path).read_text()
    return s3.read_text(path, "recipe")


def parse(content: dict[str, typing.Any]) -> Recipe:
    """The recipe of a mapping of keys; UserError as of `load`."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(error) from error
    _check_buckets(recipe)
    if recipe.train_sequences == 0 or recipe.heldout_sequences == 0:
        raise UserError(
            "corpus.context",
            f"{recipe.corpus.context} tokens do not fit into train_tokens and heldout_tokens: lower it",
        )
    if recipe.harvest.tensor_parallel > 1 and recipe.harvest.zero3:
        raise UserError("harvest.zero3", "a model is shared in one way: leave out tensor_parallel or zero3")
    if recipe.window_sequences % recipe.harvest.sequences:
        raise UserError(
            "stream.window_sequences",
            f"{recipe.window_sequences} is no multiple of harvest.sequences "
            f"({recipe.harvest.sequences}): a window holds whole forward passes",
        )
    _check_chat(recipe.corpus)
    if (tuned := recipe.end_to_end) and not recipe.corpus.context <= tuned.tokens <= recipe.corpus.train_tokens:
        raise UserError(
            "end_to_end.tokens",
            f"{tuned.tokens} tokens are not between one sequence ({recipe.corpus.context}) and corpus.train_tokens "
            f"({recipe.corpus.train_tokens}): it learns from the start of the training text",
        )
    for spec in recipe.specs():
        if recipe.end_to_end and spec.activation == "topk":
            raise UserError("end_to_end", f"{spec.id} is a TopK, which has no thresholds: drop topk or end_to_end")
        if recipe.publication.saelens and spec.activation == "topk" and spec.kind == "transcoder":
            raise UserError(
                "publication.saelens", f"SAELens has no TopK transcoder such as {spec.id}: drop one of them"
            )
    return recipe


def _check_buckets(recipe: Recipe) -> None:
    cache = recipe.harvest.cache or ""
    places = {"storage": recipe.storage or "", "harvest.cache": cache if cache.startswith(S3) else ""}
    for field, place in places.items():
        if place and not re.fullmatch(PREFIX_OF_BUCKET, place):  # untold: it may hold a secret
            raise UserError(
                field, "is not s3://bucket/prefix: credentials and endpoint belong into the AWS_* variables"
            )
    storage, cache = (f"{place}/" for place in places.values())
    if all(places.values()) and (storage.startswith(cache) or cache.startswith(storage)):
        raise UserError("harvest.cache", "lies in storage, or storage in it: name a prefix beside it")


def _check_chat(corpus: Corpus) -> None:
    if corpus.kind == "text":
        for field in ("messages_column", "roles", "rollouts"):
            if getattr(corpus, field) != Corpus.model_fields[field].default:
                raise UserError(f"corpus.{field}", "belongs to conversations: add kind: chat, or drop it")
    elif corpus.context <= STATIC_TOKENS:
        raise UserError("corpus.context", f"the first {STATIC_TOKENS} tokens of a chat are not trained on: raise it")
    elif corpus.rollouts and corpus.rollouts.max_new_tokens >= corpus.context - STATIC_TOKENS:
        raise UserError(
            "corpus.rollouts.max_new_tokens",
            f"{corpus.rollouts.max_new_tokens} leaves no room for a prompt in corpus.context ({corpus.context}): "
            "lower it or raise context",
        )


def _explain(error: ValidationError) -> UserError:
    """The first fault, an unknown key before all else: it is often the cause of the others."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault, location = faults[0], faults[0]["loc"]
    field = ".".join(str(part) for part in location) or "recipe"
    if fault["type"] == "extra_forbidden":
        return UserError(field, f"unknown key; {nearest(str(location[-1]), _keys_at(location[:-1]))}")
    if fault["type"] == "missing":
        return UserError(field, "is missing: give it a value")
    return UserError(field, f"{fault['msg'].removeprefix('Value error, ')} (it is {fault['input']!r:.80})")


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that lies at a place of the recipe."""
    model: typing.Any = Recipe
    for part in location:
        model = model.model_fields[part].annotation if isinstance(part, str) else typing.get_args(model)[0]
        if isinstance(model, types.UnionType):
            model = typing.get_args(model)[0]
    return list(model.model_fields)
