"""Conversations → token sequences with a role for every token, by the model's own chat template.

A sequence is one conversation from its start, cut at `context` or padded on its right, so that every position is the
one that it has when the model is used; a conversation without a token to train on is passed over. A token has the role
of the turn in which it begins, the template's marks included. A conversation is held out by its first user's turn (the
rule of cluster/corpus.py), so that branches of one conversation never lie on both sides.
"""

import itertools
import json
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, TypeAdapter, ValidationError

from cluster import gemma
from cluster.errors import UserError
from cluster.recipe import Corpus, Model
from cluster.tokens import ASSISTANT, PADDING, ROLES, USER, is_heldout
from sae.sites import STATIC_TOKENS


class Message(BaseModel):
    """One turn; other keys that a data set has are of no use here."""

    role: Literal["system", "user", "assistant"]
    content: str


CONVERSATION: TypeAdapter[list[Message] | str] = TypeAdapter(list[Message] | str)


class Unsound(Exception):
    """A conversation that cannot be rendered, and why."""


class Template:
    """The chat template of one model's tokenizer."""

    def __init__(self, model: Model):
        """UserError if the tokenizer has none."""
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(gemma.locate(model))
        if not self.tokenizer.chat_template:
            raise UserError(
                "model.name",
                f"the tokenizer of {model.name!r} has no chat template: name an instruction-tuned checkpoint such as "
                "google/gemma-3-1b-it, or put a chat_template.jinja into the model's folder",
            )

    @property
    def padding(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def render(self, messages: list[Message], *, ask: bool) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [n] and their roles uint8 [n]; `ask` ends with the opening of the model's answer."""
        from jinja2 import TemplateError

        try:
            texts = [self._text(messages[:end]) for end in range(1, len(messages) + 1)]
            texts += [self._text(messages, ask=True)] if ask else []
        except TemplateError as error:
            raise Unsound(str(error)) from error
        for before, after in itertools.pairwise(texts):
            if not after.startswith(before):
                raise Unsound("the chat template does not write turn after turn")
        speakers = [ASSISTANT if message.role == "assistant" else USER for message in messages] + [ASSISTANT] * ask
        encoded = self.tokenizer(texts[-1], add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        turns = np.searchsorted([len(text) for text in texts], starts, side="right")
        return np.array(encoded["input_ids"], np.int32), np.array(speakers, np.uint8)[turns]

    def _text(self, messages: list[Message], *, ask: bool = False) -> str:
        content = [message.model_dump() for message in messages]
        return str(self.tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=ask))


class Render:
    """Ray Data UDF: conversations → token ids, roles, the side, or else what is wrong with one."""

    def __init__(self, model: Model, corpus: Corpus, column: str, as_json: bool):
        self.template, self.column, self.as_json = Template(model), column, as_json
        self.messages_column, self.ask = corpus.messages_column, corpus.rollouts is not None

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [self._row(value) for value in batch[self.column].to_pylist()]
        fields = {"ids": pa.binary(), "roles": pa.binary(), "heldout": pa.bool_(), "problem": pa.string()}
        return pa.Table.from_pylist(rows, pa.schema(list(fields.items())))

    def _row(self, value: Any) -> dict[str, Any]:
        try:
            messages = self._messages(value)
            ids, roles = self.template.render(messages, ask=self.ask)
        except Unsound as error:
            return {"problem": " ".join(str(error).split())}
        opening = next(message.content for message in messages if message.role == "user")
        return {"ids": ids.tobytes(), "roles": roles.tobytes(), "heldout": is_heldout(opening)}

    def _messages(self, value: Any) -> list[Message]:
        try:
            found = CONVERSATION.validate_python(json.loads(value)[self.messages_column] if self.as_json else value)
        except ValidationError as error:
            fault = error.errors()[0]
            raise Unsound(f"{'.'.join(map(str, fault['loc'][1:])) or self.messages_column}: {fault['msg']}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise Unsound(f"no JSON object with {self.messages_column!r}") from error
        messages = [Message(role="user", content=found)] if isinstance(found, str) else found
        if self.ask and messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        if not any(message.role == "user" for message in messages):
            raise Unsound("it has no user's turn")
        return messages


class Padder:
    """Makes each conversation one sequence, until it has enough."""

    def __init__(self, padding: int, corpus: Corpus, sequences: int):
        self.padding, self.context, self.wanted = padding, corpus.context, sequences
        self.trained = [ROLES[role] for role in corpus.roles]
        self.longest = corpus.context - corpus.rollouts.max_new_tokens if corpus.rollouts else None
        self.sequences: list[np.ndarray] = []
        self.roles: list[np.ndarray] = []

    def add(self, conversations: list[np.ndarray], roles_of_each: list[np.ndarray]) -> None:
        for ids, roles in zip(conversations, roles_of_each, strict=True):
            too_long = self.longest is not None and len(ids) > self.longest
            if not self.full and not too_long and np.isin(roles[STATIC_TOKENS : self.context], self.trained).any():
                self.sequences.append(self._fitted(ids, self.padding))
                self.roles.append(self._fitted(roles, PADDING))

    def _fitted(self, values: np.ndarray, filling: int) -> np.ndarray:
        cut = values[: self.context]
        return np.pad(cut, (0, self.context - len(cut)), constant_values=filling)

    @property
    def full(self) -> bool:
        return len(self.sequences) == self.wanted


def check(table: pa.Table, before: int) -> None:
    """UserError if one of these conversations, of which `before` came earlier, cannot be rendered."""
    for number, problem in enumerate(table["problem"].to_pylist(), start=before + 1):
        if problem is not None:
            raise UserError("corpus.paths", f"conversation {number} cannot be used ({problem:.160}): mend or drop it")
