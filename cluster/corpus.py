"""Text → token sequences, once per run.

The packing rule, the same on any cluster: documents are taken in the order of the paths and of their lines. A
document is held out if the first eight bytes of its text's sha256, as a number, fall in the lowest tenth, so that
equal texts never lie on both sides. Each side is one stream: BOS, the document's tokens, BOS, the next document's …
The stream is cut into sequences of `context` tokens that all begin with BOS: a sequence that begins inside a
document gets one of its own. What is left over at the end is not used.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import gemma, sources
from cluster.errors import UserError
from cluster.recipe import Recipe
from sae import artifact

HELDOUT_TENTH = 2**64 // 10
SIDES = ("train", "heldout")


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
                "heldout": pa.array([_is_heldout(text) for text in texts], pa.bool_()),
            }
        )


def _text(value: Any) -> str:
    """The text of one document; null is no text, and bytes are a whole .txt file."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _is_heldout(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") < HELDOUT_TENTH


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


def build(recipe: Recipe, folder: Path) -> None:
    """Writes train.npy and heldout.npy, int32 [sequences, context], into `folder`, its manifest last.

    Ray must be running. Does nothing if the folder is whole; UserError if the text is too short.
    """
    try:
        return artifact.verify(folder)
    except artifact.ArtifactError:
        pass
    tokens = {side: packer.sequences for side, packer in _pack(recipe).items()}
    folder.mkdir(parents=True, exist_ok=True)
    for side, sequences in tokens.items():
        np.save(folder / f"{side}.npy", np.stack(sequences))
    artifact.seal(folder)


def _pack(recipe: Recipe) -> dict[str, Packer]:
    corpus = recipe.corpus
    bos = gemma.text_config(recipe.model).bos_token_id
    wanted = {"train": recipe.train_sequences, "heldout": recipe.heldout_sequences}
    packers = {side: Packer(bos, corpus.context, wanted[side]) for side in SIDES}
    for table in _tokenised(recipe):
        for side, packer in packers.items():
            chosen = table.filter(pa.compute.equal(table["heldout"], side == "heldout"))
            packer.add([np.frombuffer(ids.as_py(), np.int32) for ids in chosen["ids"]])
        if all(packer.full for packer in packers.values()):
            return packers
    side = next(side for side, packer in packers.items() if not packer.full)
    have = len(packers[side].sequences) * corpus.context
    raise UserError(
        f"corpus.{side}_tokens",
        f"{wanted[side] * corpus.context:,} asked for, but the text gives only {have:,} "
        f"({side} documents are {'a tenth' if side == 'heldout' else 'nine tenths'} of it): lower it or add text",
    )


def _tokenised(recipe: Recipe) -> Any:
    """Tables of Tokenise's columns, in the order of the documents."""
    import ray.data
    from pyarrow.json import ParseOptions
    from ray.data import ActorPoolStrategy

    filesystem, files, format = sources.find(recipe.corpus)
    column = recipe.corpus.text_column
    if format == ".parquet":
        documents = ray.data.read_parquet(files, filesystem=filesystem).select_columns([column])
    elif format == ".jsonl":
        only_text = ParseOptions(explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore")
        documents = ray.data.read_json(files, filesystem=filesystem, parse_options=only_text)
    else:
        column = "bytes"  # the column in which Ray Data hands over a file's content
        documents = ray.data.read_binary_files(files, filesystem=filesystem)
    tokenised = documents.map_batches(
        Tokenise,
        fn_constructor_args=(gemma.locate(recipe.model), column),
        batch_format="pyarrow",
        batch_size=256,
        num_cpus=recipe.harvest.cpus,
        compute=ActorPoolStrategy(size=1),
    )
    return tokenised.iter_batches(batch_size=None, batch_format="pyarrow")
