"""application/vnd.apache.arrow.stream: rows as one fixed-size list of float32 a site, features as two lists.

The schema is compared before any batch is read, and compressed bodies are refused: they state their own size.
"""

import struct
from typing import Any

import numpy as np
import pyarrow as pa

from serve.catalog import Entry, SiteColumns
from serve.compute import Features, Operation, Rebuilt
from serve.posted import Posted
from serve.problems import Problem

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
INDICES, VALUES, LATENTS, FVU = "indices", "values", "latents", "fvu"
TARGETS = "target."
COMPRESSION_SLOT = 10  # of a RecordBatch in Arrow's Message.fbs: the offset of its fourth field in the vtable


def read(entry: Entry, operation: Operation, body: bytes) -> Posted:
    try:
        table = _table(entry, operation, body)
    except (pa.ArrowException, struct.error, IndexError, ValueError, OverflowError, OSError):
        raise Problem(400, "the body is no Arrow stream") from None
    if any(column.null_count or column.combine_chunks().flatten().null_count for column in table.columns):
        raise Problem(422, "rows: holds nulls")
    names = set(table.column_names)
    x = _side_by_side(table, entry.reads) if entry.reads[0].site in names else None
    y = _side_by_side(table, entry.writes, TARGETS) if TARGETS + entry.writes[0].site in names else None
    return Posted(x, y, _features(table) if operation == "decode" else None)


def _table(entry: Entry, operation: Operation, body: bytes) -> pa.Table:
    with pa.ipc.open_stream(body) as stream:
        _check(stream.schema, _schemas(entry, operation))
        for message in pa.ipc.MessageReader.open_stream(body):
            if message.type == "dictionary" or (message.type == "record batch" and _is_compressed(message.metadata)):
                raise Problem(415, "Arrow streams may not be compressed or have dictionaries")
        table = stream.read_all()
    table.validate(full=True)
    return table


def _schemas(entry: Entry, operation: Operation) -> list[list[pa.Field]]:
    """Every set of columns that can be posted."""
    rows = [_site(part) for part in entry.reads]
    if operation == "encode":
        return [rows]
    if operation == "reconstruct":
        return [rows, rows + [_site(part, TARGETS) for part in entry.writes]]
    skip = rows if entry.affine else []
    sparse = [pa.field(INDICES, pa.list_(pa.int32())), pa.field(VALUES, pa.list_(pa.float32()))]
    return [sparse + skip, [pa.field(LATENTS, pa.list_(pa.float32(), entry.width)), *skip]]


def _site(part: SiteColumns, prefix: str = "") -> pa.Field:
    return pa.field(prefix + part.site, pa.list_(pa.float32(), part.width))


def _check(schema: pa.Schema, allowed: list[list[pa.Field]]) -> None:
    found = {(field.name, str(field.type)) for field in schema}
    wanted = [{(field.name, str(field.type)) for field in fields} for fields in allowed]
    # By their texts: those who write a list may name its items as they like.
    plain = {(name, type.replace("element:", "item:").replace(" not null", "")) for name, type in found}
    if len(schema) != len(found) or plain not in wanted:
        listed = " or ".join(", ".join(f"{field.name}: {field.type}" for field in fields) for fields in allowed)
        raise Problem(422, f"the columns have to be {listed}"[:1000])


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Whether a record batch has a BodyCompression, read off the flatbuffer of its message."""
    data = metadata.to_pybytes()

    def at(format: str, place: int) -> int:
        return struct.unpack_from(f"<{format}", data, place)[0]

    message = at("I", 0)
    header_slot = message - at("i", message) + 8
    header = message + at("H", header_slot)
    batch = header + at("I", header)
    vtable = batch - at("i", batch)
    return at("H", vtable) > COMPRESSION_SLOT and at("H", vtable + COMPRESSION_SLOT) != 0


def _matrix(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name).combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def _side_by_side(table: pa.Table, sites: list[SiteColumns], prefix: str = "") -> np.ndarray:
    return np.concatenate([_matrix(table, prefix + part.site) for part in sites], axis=1)


def _features(table: pa.Table) -> Features:
    if LATENTS in table.column_names:
        return Posted.sparse(_matrix(table, LATENTS))
    indices, values = (table.column(name).combine_chunks() for name in (INDICES, VALUES))
    ends = np.concatenate([[0], np.cumsum(indices.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)])
    if not indices.value_lengths().equals(values.value_lengths()):
        raise Problem(422, "features: a row has more indices than values, or fewer")
    return Features(ends, *(part.flatten().to_numpy(zero_copy_only=False) for part in (indices, values)))


def write(entry: Entry, answer: Features | Rebuilt) -> bytes:
    columns: dict[str, Any] = {}
    if isinstance(answer, Features):
        offsets = pa.array(answer.offsets.astype(np.int32))
        columns = {INDICES: pa.ListArray.from_arrays(offsets, answer.indices)}
        columns[VALUES] = pa.ListArray.from_arrays(offsets, answer.values)
    else:
        ends = np.cumsum([part.width for part in entry.writes])
        for part, end in zip(entry.writes, ends, strict=True):
            flat = np.ascontiguousarray(answer.y[:, end - part.width : end]).reshape(-1)
            columns[part.site] = pa.FixedSizeListArray.from_arrays(flat, part.width)
        if answer.fvu is not None:
            columns[FVU] = pa.array(answer.fvu, mask=~np.isfinite(answer.fvu))
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()
