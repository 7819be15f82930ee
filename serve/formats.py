"""Numbers as they are posted and answered: JSON for people, raw bytes and Arrow for programs.

application/json                       the models of `serve.schemas`
application/octet-stream               little-endian; X-Shape and X-Dtype say what is in it (`serve.raw`)
application/vnd.apache.arrow.stream    one record batch or more; a column a site (`serve.arrow`)
"""

import json
import re
from typing import Any, NamedTuple

import numpy as np
import pydantic_core
from pydantic import ValidationError

from serve import arrow, raw, schemas
from serve.catalog import Entry, SiteColumns
from serve.compute import Answer, Described, Features, Operation, Rebuilt, Selection, Work
from serve.limits import Limits
from serve.posted import Posted, check, matrix
from serve.problems import Problem

JSON, BYTES, ARROW = "application/json", "application/octet-stream", arrow.MEDIA_TYPE
MEDIA_TYPES = (JSON, BYTES, ARROW)
BODIES: dict[str, type[schemas.Body]] = {
    "encode": schemas.RowsBody,
    "decode": schemas.DecodeBody,
    "reconstruct": schemas.ReconstructBody,
}
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class Reply(NamedTuple):
    """A body with what describes it."""

    body: bytes
    media_type: str
    headers: dict[str, str]


def read(entry: Entry, operation: Operation, selection: Selection, headers: Any, body: bytes, limits: Limits) -> Work:
    """The numbers of a request to one dictionary; Problem if they are not what it reads."""
    media_type = headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if media_type not in MEDIA_TYPES:
        raise Problem(415, f"Content-Type can be {', '.join(MEDIA_TYPES)}")
    if media_type == JSON:
        posted = _from_json(entry, operation, body, limits)
    elif media_type == BYTES:
        posted = raw.read(entry, operation, headers, body)
    else:
        posted = arrow.read(entry, operation, body)
    check(entry, operation, posted, limits)
    y = posted.y
    if operation == "reconstruct" and y is None and entry.reads == entry.writes:
        y = posted.x
    return Work(operation, posted.n_rows, posted.x, y, posted.features, selection)


def accepted(headers: Any) -> str:
    """The media type of the answer: that asked for, by default that of the body."""
    own = headers.get("content-type", JSON).partition(";")[0].strip().lower()
    wanted = [part.partition(";")[0].strip().lower() for part in headers.get("accept", "*/*").split(",")]
    for media_type in wanted:
        if media_type in MEDIA_TYPES:
            return media_type
        if media_type in ("*/*", "application/*", ""):
            return own if own in MEDIA_TYPES else JSON
    raise Problem(406, f"an answer can be {', '.join(MEDIA_TYPES)}")


def write(entry: Entry, answer: Answer, media_type: str) -> Reply:
    if isinstance(answer, Problem):
        raise answer
    assert not isinstance(answer, Described)
    headers = {"X-Dictionary-Digest": entry.digest}
    if media_type == BYTES:
        body, more = raw.write(entry, answer)
        return Reply(body, media_type, headers | more)
    if media_type == ARROW:
        return Reply(arrow.write(entry, answer), media_type, headers)
    content = {"dictionary": entry.id, "digest": entry.digest} | _content(entry, answer)
    return Reply(pydantic_core.to_json(content), media_type, headers)


def parse_json(body: bytes, depth: int) -> Any:
    """JSON without repeated keys, NaN or infinities, and nested no deeper than that."""
    try:
        text = body.decode()
        level = 0
        for token in TOKENS.finditer(text):
            level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            if level > depth:
                raise Problem(400, f"JSON may be nested {depth} deep")
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Problem(400, "the body is no JSON: numbers are finite and keys are there once") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def problem_of(error: ValidationError | Any) -> Problem:
    """The first thing that is wrong, by its place; nothing that was sent is repeated."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "dict[")))
    return Problem(422, f"{place[:100] or 'the body'}: {first['msg'][:200]}")


def _from_json(entry: Entry, operation: Operation, body: bytes, limits: Limits) -> Posted:
    try:
        parsed = BODIES[operation].model_validate(parse_json(body, limits.json_depth))
    except ValidationError as error:
        raise problem_of(error) from None
    if isinstance(parsed, schemas.DecodeBody):
        features = _features(entry, parsed)
        x = None if parsed.rows is None else _by_site("rows", parsed.rows, entry.reads)
        return Posted(x=x, features=features)
    assert isinstance(parsed, schemas.RowsBody)
    x = _by_site("rows", parsed.rows, entry.reads)
    targets = parsed.targets if isinstance(parsed, schemas.ReconstructBody) else None
    return Posted(x=x, y=None if targets is None else _by_site("targets", targets, entry.writes))


def _by_site(field: str, rows: list[Any] | dict[str, Any], sites: list[SiteColumns]) -> np.ndarray:
    """The rows of all sites side by side, in the dictionary's order."""
    names = [part.site for part in sites]
    if isinstance(rows, list):
        if len(names) > 1:
            raise Problem(422, f"{field}: this dictionary has {len(names)} sites: name them, {', '.join(names)}")
        rows = {names[0]: rows}
    if set(rows) != set(names):
        raise Problem(422, f"{field}: has other sites than {', '.join(names)}")
    return np.concatenate([matrix(f"{field} of {part.site}", rows[part.site], part.width) for part in sites], axis=1)


def _features(entry: Entry, body: schemas.DecodeBody) -> Features:
    if (body.features is None) == (body.latents is None):
        raise Problem(422, "features, latents: give one of them")
    if body.latents is not None:
        return Posted.sparse(matrix("latents", body.latents, entry.width))
    rows = body.features or []
    for n, row in enumerate(rows):
        if len(row.indices) != len(row.values):
            raise Problem(422, f"features.{n}: has {len(row.indices)} indices and {len(row.values)} values")
    counts = [len(row.indices) for row in rows]
    indices = [np.array(row.indices, dtype=np.float64) for row in rows]  # which holds any integer, if not exactly
    values = [np.array(row.values, dtype=np.float64) for row in rows]
    if any((part >= entry.width).any() for part in indices):
        raise Problem(422, f"features: this dictionary has the latents 0 to {entry.width - 1}")
    with np.errstate(over="ignore"):
        flat = np.concatenate(indices).astype(np.int32), np.concatenate(values).astype(np.float32)
    return Features(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), *flat)


def _content(entry: Entry, answer: Features | Rebuilt) -> dict[str, Any]:
    if isinstance(answer, Features):
        bounds = zip(answer.offsets[:-1].tolist(), answer.offsets[1:].tolist(), strict=True)
        indices, values = answer.indices.tolist(), answer.values.tolist()
        return {"features": [{"indices": indices[a:b], "values": values[a:b]} for a, b in bounds]}
    ends = np.cumsum([part.width for part in entry.writes])
    rows = {
        part.site: answer.y[:, end - part.width : end].tolist() for part, end in zip(entry.writes, ends, strict=True)
    }
    if answer.fvu is None:
        return {"rows": rows}
    return {"rows": rows, "fvu": [value if np.isfinite(value) else None for value in answer.fvu.tolist()]}
