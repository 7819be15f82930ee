"""Calls the endpoint from Python: arrays go and come as raw bytes, and what is worth a retry is tried again.

client = Client("http://127.0.0.1:8000", token)
features = client.encode("gemma-3-270m-jumprelu.resid_post.layer_9_width_4096_l0_32", rows, top_k=32)
"""

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
import torch

from serve import raw, schemas
from serve.catalog import Entry
from serve.compute import Features, Rebuilt

BYTES = "application/octet-stream"
JSON = {"Content-Type": "application/json"}
WORTH_A_RETRY = (408, 429, 503)
LONGEST_WAIT = 30.0  # seconds before a retry, whatever the service asks for

Prompt = str | list[dict[str, str]]
"""A text, or a conversation of turns with role and content."""
Rows = torch.Tensor | np.ndarray | Mapping[str, torch.Tensor | np.ndarray]
"""[B, d_in], the columns of all sites side by side as `Entry.reads` lists them; or by site."""


class Refused(Exception):
    """The service's answer was a problem document."""

    def __init__(self, status: int, detail: str, request_id: str):
        super().__init__(f"{status}: {detail} (request {request_id})")
        self.status, self.detail, self.request_id = status, detail, request_id


class Client:
    """May be shared by threads, each of which has a connection of its own."""

    def __init__(self, url: str, token: str | None = None, retries: int = 4, timeout: float = 60.0):
        parts = urlsplit(url)
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._netloc, self._path = parts.netloc, parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.retries, self.timeout = retries, timeout
        self._own = threading.local()
        self._entries: dict[str, Entry] = {}

    def dictionaries(self, **filters: Any) -> Iterator[Entry]:
        """All that the filters of GET /v1/dictionaries let through: model, site, layer, kind, available."""
        after: str | None = ""
        while after is not None:
            query = {key: str(value) for key, value in (filters | {"after": after}).items()}
            page = json.loads(self._call("GET", f"/v1/dictionaries?{urlencode(query)}")[0])
            yield from map(Entry.model_validate, page["dictionaries"])
            after = page["next"]

    def dictionary(self, name: str) -> Entry:
        """By id or digest."""
        return Entry.model_validate_json(self._call("GET", f"/v1/dictionaries/{quote(name, safe='')}")[0])

    def encode(
        self, name: str, rows: Rows, top_k: int | None = None, threshold: float = 0.0, features: list[int] | None = None
    ) -> Features:
        """Active latents of each row."""
        query: dict[str, Any] = {"threshold": threshold}
        query |= {"top_k": top_k} if top_k is not None else {}
        query |= {"features": ",".join(map(str, features))} if features else {}
        body, headers = raw.rows_to_bytes(self._side_by_side(rows, self._entry(name).reads))
        answer, told = self._post(name, f"encode?{urlencode(query)}", body, headers)
        reader, n_rows, n_pairs = raw.Reader(answer, "float32"), _rows_of(told), int(told["X-Pairs"])
        return Features(reader.array("<i8", n_rows + 1), reader.array("<i4", n_pairs), reader.array("<f4", n_pairs))

    def decode(self, name: str, features: Features, rows: Rows | None = None) -> np.ndarray:
        """float32 [B, d_out]; a dictionary with a skip needs the rows that were encoded."""
        entry = self._entry(name)
        arrays = features.offsets.astype("<i8"), features.indices.astype("<i4"), features.values.astype("<f4")
        body = b"".join(array.tobytes() for array in arrays)
        if rows is not None:
            body += raw.rows_to_bytes(self._side_by_side(rows, entry.reads).float())[0]
        shape = {"X-Shape": f"{features.n_rows},{entry.width}", "X-Layout": "csr"}
        answer, told = self._post(name, "decode", body, shape | {"X-Pairs": str(len(features.indices))})
        return raw.Reader(answer, "float32").rows(_rows_of(told), entry.d_out)

    def reconstruct(self, name: str, rows: Rows, targets: Rows | None = None) -> Rebuilt:
        """Rebuilt rows, and fvu if it is known what they should be."""
        entry = self._entry(name)
        body, headers = raw.rows_to_bytes(self._side_by_side(rows, entry.reads))
        if targets is not None:
            dtype = torch.bfloat16 if headers["X-Dtype"] == "bfloat16" else torch.float32
            body += raw.rows_to_bytes(self._side_by_side(targets, entry.writes).to(dtype))[0]
            headers |= {"X-Targets": "1"}
        answer, told = self._post(name, "reconstruct", body, headers)
        reader, n_rows = raw.Reader(answer, "float32"), _rows_of(told)
        y = reader.rows(n_rows, entry.d_out)
        return Rebuilt(y, reader.array("<f4", n_rows) if told.get("X-Fvu") else None)

    def read(self, prompt: Prompt, names: list[str], top_k: int | None = None, threshold: float = 0.0) -> schemas.Read:
        """The features of every token of a text or conversation, in several dictionaries."""
        body = _prompted(prompt) | {"dictionaries": names, "top_k": top_k, "threshold": threshold}
        return schemas.Read.model_validate_json(self._call("POST", "/v1/features", _json(body), JSON)[0])

    def steer(self, prompt: Prompt, changes: list[schemas.ChangeBody], **sampling: Any) -> Iterator[schemas.Said]:
        """What each token adds to the steered answer and to the unsteered, then both whole; ConnectionError if it
        breaks off. `sampling`: new_tokens, temperature, seed."""
        body = _prompted(prompt) | {"changes": [change.model_dump() for change in changes]} | sampling
        content, _ = self._call("POST", "/v1/steer", _json(body), JSON, whole=False)
        said = None
        for line in content:
            said = schemas.Said.model_validate_json(line)
            yield said
        if said is None or not said.done:
            raise ConnectionError("the answer broke off")

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            self._entries[name] = self.dictionary(name)
        return self._entries[name]

    def _side_by_side(self, rows: Rows, sites: list[Any]) -> torch.Tensor:
        if isinstance(rows, Mapping):
            return torch.cat([torch.as_tensor(rows[part.site]) for part in sites], dim=1)
        return torch.as_tensor(rows)

    def _post(self, name: str, operation: str, body: bytes, headers: dict[str, str]) -> tuple[bytes, Any]:
        types = {"Content-Type": BYTES, "Accept": BYTES}
        return self._call("POST", f"/v1/dictionaries/{quote(name, safe='')}/{operation}", body, headers | types)

    def _call(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}, *, whole: bool = True
    ) -> tuple[Any, Any]:
        """The body, or its lines as they come, and headers of an answer; Refused, or the connection's error, when all
        retries are used up."""
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                status, told, content = self._once(method, path, body, headers, whole)
            except (OSError, http.client.HTTPException):
                self._drop()
                if last:
                    raise
                time.sleep(0.1 * 2**attempt)  # every call is a question: asking again does no harm
                continue
            if status < 400:
                return content, told
            if last or status not in WORTH_A_RETRY:
                raise _refused(status, content)
            time.sleep(min(float(told.get("Retry-After", 2**attempt)), LONGEST_WAIT))
        raise AssertionError("the last attempt returns or raises")

    def _once(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], whole: bool
    ) -> tuple[int, Any, Any]:
        if getattr(self._own, "connection", None) is None:
            self._own.connection = self._connect(self._netloc, timeout=self.timeout)
        connection = self._own.connection
        connection.request(method, self._path + path, body, self._headers | dict(headers))
        response = connection.getresponse()
        content = response.read() if whole or response.status >= 400 else iter(response.readline, b"")
        return response.status, response.headers, content

    def _drop(self) -> None:
        if getattr(self._own, "connection", None) is not None:
            self._own.connection.close()
            self._own.connection = None


def _prompted(prompt: Prompt) -> dict[str, Any]:
    return {"text": prompt} if isinstance(prompt, str) else {"messages": prompt}


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _rows_of(headers: Any) -> int:
    return int(headers["X-Shape"].split(",")[0])


def _refused(status: int, content: bytes) -> Refused:
    try:
        told = json.loads(content)
        return Refused(status, told["detail"], told["request_id"])
    except (ValueError, LookupError, TypeError):  # of something between us and the service
        return Refused(status, "no problem document", "unknown")
