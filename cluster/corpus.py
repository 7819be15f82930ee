"""Text → token sequences, once per run.

The packing rule, the same on any cluster: documents are taken in the order of the paths and of their lines. A
document is held out if the first eight bytes of its text's sha256, as a number, fall in the lowest tenth, so that
equal texts never lie on both sides. Each side is one stream: BOS, the document's tokens, BOS, the next document's …
The stream is cut into sequences of `context` tokens that all begin with BOS: a sequence that begins inside a
document gets one of its own. What is left over at the end is not used.
"""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster import gemma, packages
from cluster.errors import UserError
from cluster.recipe import Corpus, Recipe
from sae import artifact

FORMATS = (".jsonl", ".txt", ".parquet")
HELDOUT_TENTH = 2**64 // 10
SIDES = ("train", "heldout")


def find(corpus: Corpus) -> tuple[pafs.FileSystem, list[str], str]:
    """File system, files in order, and their one format; UserError if any part of the text cannot be there."""
    found = [_expand(pattern) for pattern in corpus.paths]
    files = [path for _, paths in found for path in paths]
    formats = {next((end for end in FORMATS if path.endswith(end)), Path(path).suffix) for path in files}
    if len(formats) > 1 or not formats <= set(FORMATS):
        raise UserError(
            "corpus.paths", f"holds {', '.join(sorted(formats))}: name files of one format of {', '.join(FORMATS)}"
        )
    if len({type(filesystem) for filesystem, _ in found}) > 1:
        raise UserError("corpus.paths", "mixes local and s3:// files: name files of one place")
    filesystem = found[0][0]
    size = sum(info.size for info in filesystem.get_file_info(files))
    wanted = corpus.train_tokens + corpus.heldout_tokens
    if formats != {".parquet"} and size < wanted:  # no token is shorter than a byte
        raise UserError(
            "corpus.train_tokens",
            f"{wanted:,} tokens with the held-out ones, but the text has only {size:,} bytes: lower it or add text",
        )
    _probe(filesystem, files[0], formats.copy().pop(), corpus.text_column)
    return filesystem, files, formats.pop()


def _expand(pattern: str) -> tuple[pafs.FileSystem, list[str]]:
    if packages.is_package(pattern):
        return pafs.LocalFileSystem(), [str(packages.fetch(pattern, "corpus.paths"))]
    if pattern.startswith("s3://"):
        return _expand_s3(pattern)
    files = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not files:
        raise UserError("corpus.paths", f"{pattern!r} matches no file: check it, relative to {Path.cwd()}")
    return pafs.LocalFileSystem(), [str(Path(path).absolute()) for path in files]


def _expand_s3(pattern: str) -> tuple[pafs.FileSystem, list[str]]:
    """Lists with boto3, which finds endpoint and keys as AWS clients do; reads with pyarrow, as Ray Data does."""
    import fnmatch

    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = urlparse(pattern).netloc, urlparse(pattern, allow_fragments=False).path.lstrip("/")
    prefix = key.split("*")[0].split("?")[0].split("[")[0]
    try:
        client = boto3.client("s3", config=Config(connect_timeout=5, retries={"max_attempts": 1}))
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        frozen = boto3.Session().get_credentials().get_frozen_credentials()
    except (BotoCoreError, ClientError, AttributeError) as error:
        raise UserError(
            "corpus.paths",
            f"{pattern!r} cannot be listed ({error}): check the bucket, the AWS_* variables and AWS_ENDPOINT_URL",
        ) from error
    files = sorted(f"{bucket}/{name}" for name in keys if name == key or fnmatch.fnmatchcase(name, key))
    if not files:
        raise UserError("corpus.paths", f"{pattern!r} matches no object: check the bucket and the key")
    endpoint = client.meta.endpoint_url
    filesystem = pafs.S3FileSystem(
        access_key=frozen.access_key,
        secret_key=frozen.secret_key,
        session_token=frozen.token,
        region=client.meta.region_name or "us-east-1",
        endpoint_override=urlparse(endpoint).netloc,
        scheme=urlparse(endpoint).scheme,
    )
    return filesystem, files


def _probe(filesystem: pafs.FileSystem, path: str, format: str, column: str) -> None:
    """Reads the head of the first file: an unreadable corpus is told before anything is started."""
    try:
        if format == ".parquet":
            names = pq.read_schema(path, filesystem=filesystem).names
        elif format == ".jsonl":
            with filesystem.open_input_stream(path) as stream:
                line = pa.PythonFile(stream, "r").read(1 << 20).split(b"\n")[0]
            names = list(json.loads(line))
        else:
            return
    except (OSError, ValueError, TypeError) as error:
        raise UserError("corpus.paths", f"{path} is not readable as {format} ({str(error).splitlines()[0]})") from error
    if column not in names:
        raise UserError(
            "corpus.text_column", f"{column!r} is not in {path}, which has {', '.join(names)}: name one of these"
        )


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

    filesystem, files, format = find(recipe.corpus)
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
