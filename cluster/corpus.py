"""Text → token sequences, once per run.

The packing rule, the same on any cluster: documents are taken in the order of the paths and of their lines. A
document is held out if the first eight bytes of its text's sha256, as a number, fall in the lowest tenth, so that
equal texts never lie on both sides. Each side is one stream: BOS, the document's tokens, BOS, the next document's …
The stream is cut into sequences of `context` tokens that all begin with BOS: a sequence that begins inside a
document gets one of its own. What is left over at the end is not used.

Conversations are taken in the same order; how each becomes a sequence is at the top of cluster/chat.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import chat, gemma, rollouts, sources
from cluster.errors import UserError
from cluster.recipe import Recipe
from cluster.tokens import SIDES, is_heldout
from sae import artifact


class Tokenise:
    """Ray Data UDF: texts → token ids without BOS, and the side on which each document falls."""

    def __init__(self, model_path: str, column: str):
        from transformers import AutoTokenizer

        self.tokenizer, self.column = AutoTokenizer.from_pretrained(model_path), column

    def __call__(self, batch: pa.Table) -> pa.Table:
        texts = [_text(value) for value in batch[self.column].to_pylist()]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return pa.table(
            {
                "ids": pa.array([np.asarray(document, np.int32).tobytes() for document in ids], pa.binary()),
                "heldout": pa.array([is_heldout(text) for text in texts], pa.bool_()),
            }
        )


def _text(value: Any) -> str:
    """The text of one document; null is no text, and bytes are a whole .txt file."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


class Packer:
    """Cuts one stream of documents into sequences that begin with BOS, until it has enough."""

    def __init__(self, bos: int, context: int, sequences: int):
        self.bos, self.context, self.wanted = bos, context, sequences
        self.sequences: list[np.ndarray] = []
        self.rest = np.empty(0, np.int32)

    def add(self, documents: list[np.ndarray]) -> None:
        parts = [self.rest] + [part for ids in documents for part in (np.array([self.bos], np.int32), ids)]
        stream, at = np.concatenate(parts), 0
        while not self.full:
            own_bos = [] if at < len(stream) and stream[at] == self.bos else [self.bos]
            end = at + self.context - len(own_bos)
            if end > len(stream):
                break
            self.sequences.append(np.concatenate([np.array(own_bos, np.int32), stream[at:end]]))
            at = end
        self.rest = stream[at:]

    @property
    def full(self) -> bool:
        return len(self.sequences) == self.wanted


def check(recipe: Recipe) -> None:
    """UserError if the corpus cannot be read or the model has no template for its conversations."""
    sources.find(recipe.corpus)
    if recipe.corpus.kind == "chat":
        chat.Template(recipe.model)


def build(recipe: Recipe, folder: Path) -> None:
    """Writes train.npy and heldout.npy, int32 [sequences, context], and of a chat {side}-roles.npy, uint8 of the same
    shape, into `folder`, its manifest last.

    Ray must be running. Does nothing if the folder is whole; UserError if the text is too short.
    """
    try:
        return artifact.verify(folder)
    except artifact.ArtifactError:
        pass
    arrays: dict[str, np.ndarray] = {}
    for side, packer in _pack(recipe).items():
        arrays[side] = np.stack(packer.sequences)
        if isinstance(packer, chat.Padder):
            roles = np.stack(packer.roles)
            if recipe.corpus.rollouts:
                arrays[side], roles = rollouts.answer(recipe, recipe.corpus.rollouts, side, arrays[side], roles)
            arrays[f"{side}-roles"] = roles
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    artifact.seal(folder)


def _pack(recipe: Recipe) -> Mapping[str, Packer | chat.Padder]:
    corpus = recipe.corpus
    wanted = {"train": recipe.train_sequences, "heldout": recipe.heldout_sequences}
    packers: dict[str, Packer | chat.Padder]
    if corpus.kind == "chat":
        padding = chat.Template(recipe.model).padding
        packers = {side: chat.Padder(padding, corpus, wanted[side]) for side in SIDES}
    else:
        bos = gemma.text_config(recipe.model).bos_token_id
        packers = {side: Packer(bos, corpus.context, wanted[side]) for side in SIDES}
    seen = 0
    for table in _tokenised(recipe):
        if corpus.kind == "chat":
            chat.check(table, before=seen)
            seen += table.num_rows
        for side, packer in packers.items():
            chosen = table.filter(pa.compute.equal(table["heldout"], side == "heldout"))
            ids = [np.frombuffer(ids.as_py(), np.int32) for ids in chosen["ids"]]
            if isinstance(packer, Packer):
                packer.add(ids)
            else:
                packer.add(ids, [np.frombuffer(roles.as_py(), np.uint8) for roles in chosen["roles"]])
        if all(packer.full for packer in packers.values()):
            return packers
    side = next(side for side, packer in packers.items() if not packer.full)
    have = len(packers[side].sequences) * corpus.context
    raise UserError(
        f"corpus.{side}_tokens",
        f"{wanted[side] * corpus.context:,} asked for, but the text gives only {have:,} "
        f"({side} documents are {'a tenth' if side == 'heldout' else 'nine tenths'} of it"
        f"{_one_each(recipe)}): lower it or add text",
    )


def _one_each(recipe: Recipe) -> str:
    """What else a person may need to know who has too few conversations."""
    if recipe.corpus.kind == "text":
        return ""
    passed_over = ", prompts passed over that leave too little room for an answer" if recipe.corpus.rollouts else ""
    return f", a conversation is one sequence of {recipe.corpus.context}{passed_over}"


def _tokenised(recipe: Recipe) -> Any:
    """Tables of Tokenise's or chat.Render's columns, in the order of the documents."""
    import ray.data
    from pyarrow.json import ParseOptions
    from ray.data import ActorPoolStrategy

    filesystem, files, format = sources.find(recipe.corpus)
    corpus, column = recipe.corpus, sources.column(recipe.corpus)
    if format == ".parquet":
        documents = ray.data.read_parquet(files, filesystem=filesystem).select_columns([column])
    elif format == ".jsonl" and corpus.kind == "chat":
        column = "text"  # the column in which Ray Data hands over a line
        documents = ray.data.read_text(files, filesystem=filesystem)
    elif format == ".jsonl":
        only_text = ParseOptions(explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore")
        documents = ray.data.read_json(files, filesystem=filesystem, parse_options=only_text)
    else:
        column = "bytes"  # the column in which Ray Data hands over a file's content
        documents = ray.data.read_binary_files(files, filesystem=filesystem)
    udf: Any = Tokenise
    arguments: tuple[Any, ...] = (gemma.locate(recipe.model), column)
    if corpus.kind == "chat":
        udf, arguments = chat.Render, (recipe.model, corpus, column, format == ".jsonl")
    tokenised = documents.map_batches(
        udf,
        fn_constructor_args=arguments,
        batch_format="pyarrow",
        batch_size=256,
        num_cpus=recipe.harvest.cpus,
        compute=ActorPoolStrategy(size=1),
    )
    return tokenised.iter_batches(batch_size=None, batch_format="pyarrow")
