"""Every kind in every format equals an offline dictionary bit for bit; whatever is wrong is told."""

import asyncio
import io
import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sae.dictionary import Dictionary
from serve import arrow, raw
from serve.catalog import Entry
from serve.compute import Features
from tests.published import KINDS, make_rows
from tests.serve.asgi import Answer, call, exchange, parts, scope
from tests.serve.conftest import ADMIN, BEARER, LIMITS, Service, make_service

OPERATIONS = ("encode", "decode", "reconstruct")


def post(service: Service, kind: str, operation: str, body: object, headers: dict | None = None) -> Answer:
    """A body in JSON, or as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    name, _, query = operation.partition("?")
    target = f"/v1/dictionaries/suite.{kind}/{name}?{query}"
    return call(service.app, "POST", target, BEARER | {"content-type": "application/json"} | (headers or {}), [content])


def by_site(entry_sites, x_BD: torch.Tensor) -> dict[str, list]:
    ends = np.cumsum([part.width for part in entry_sites])
    return {part.site: x_BD[:, end - part.width : end].tolist() for part, end in zip(entry_sites, ends, strict=True)}


def dense(features: list[dict] | Features, width: int) -> torch.Tensor:
    if not isinstance(features, list):
        bounds = zip(features.offsets[:-1], features.offsets[1:], strict=True)
        features = [{"indices": features.indices[a:b], "values": features.values[a:b]} for a, b in bounds]
    f_BF = torch.zeros(len(features), width)
    for n, row in enumerate(features):
        f_BF[n, torch.tensor(row["indices"]).long()] = torch.tensor(row["values"], dtype=torch.float32)
    return f_BF


def offline(service: Service, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What is listed of a dictionary, itself, and rows of a type with their latents and what is rebuilt."""
    entry, dictionary = service.entry(kind), service.dictionary(kind)
    rows_BD = make_rows(dictionary).to(dtype)
    f_BF = dictionary.encode(rows_BD.float())
    return entry, dictionary, rows_BD, f_BF, dictionary.decode(f_BF, rows_BD.float())


@pytest.mark.parametrize("kind", KINDS)
def test_json__equals_offline(service: Service, kind: str) -> None:
    entry, dictionary, x_BD, f_BF, y_BD = offline(service, kind)
    encoded = post(service, kind, "encode", {"rows": by_site(entry.reads, x_BD)}).json()
    assert torch.equal(dense(encoded["features"], entry.width), f_BF)
    assert (encoded["dictionary"], encoded["digest"]) == (entry.id, entry.digest)
    skip = {"rows": by_site(entry.reads, x_BD)} if entry.affine else {}
    for body in ({"features": encoded["features"]}, {"latents": f_BF.tolist()}):
        assert post(service, kind, "decode", body | skip).json()["rows"] == by_site(entry.writes, y_BD)
    targets = torch.randn(len(x_BD), entry.d_out, generator=torch.Generator().manual_seed(5))
    body = {"rows": by_site(entry.reads, x_BD), "targets": by_site(entry.writes, targets)}
    rebuilt = post(service, kind, "reconstruct", body).json()
    assert rebuilt["rows"] == by_site(entry.writes, y_BD)
    torch.testing.assert_close(torch.tensor(rebuilt["fvu"]), fvu(dictionary, targets, y_BD), rtol=1e-5, atol=0)


def fvu(dictionary: Dictionary, targets_BD: torch.Tensor, y_BD: torch.Tensor) -> torch.Tensor:
    ratios = [
        (targets_BD[:, part] - y_BD[:, part]).double().square().sum(1)
        / (targets_BD[:, part] - dictionary.b_dec_D[part]).double().square().sum(1)
        for part in dictionary.shape.write_columns
    ]
    return torch.stack(ratios).mean(0).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes__equal_offline(service: Service, kind: str, dtype: torch.dtype) -> None:
    entry, _, rows, f_BF, y_BD = offline(service, kind, dtype)
    x_BD = rows.float()
    body, headers = raw.rows_to_bytes(rows)
    headers |= {"content-type": "application/octet-stream"}
    encoded = post(service, kind, "encode", body, headers)
    assert encoded.headers["x-dictionary-digest"] == entry.digest
    features = _csr(encoded)
    assert torch.equal(dense(features, entry.width), f_BF)
    sparse = {"X-Shape": encoded.headers["x-shape"], "X-Layout": "csr", "X-Pairs": encoded.headers["x-pairs"]}
    for layout, content in ((sparse, encoded.body), ({"X-Shape": f"64,{entry.width}"}, f_BF.numpy().tobytes())):
        skip = x_BD.numpy().tobytes() if entry.affine else b""
        decoded = post(service, kind, "decode", content + skip, {"content-type": "application/octet-stream"} | layout)
        assert decoded.body == y_BD.numpy().tobytes()
    rebuilt = post(service, kind, "reconstruct", body, headers)
    assert rebuilt.body[: y_BD.nbytes] == y_BD.numpy().tobytes()
    autoencodes = entry.reads == entry.writes
    assert rebuilt.headers.get("x-fvu") == ("1" if autoencodes else None)
    assert len(rebuilt.body) == y_BD.nbytes + autoencodes * 64 * 4


def _csr(answer: Answer) -> Features:
    reader = raw.Reader(answer.body, "float32")
    n_rows, pairs = int(answer.headers["x-shape"].split(",")[0]), int(answer.headers["x-pairs"])
    return Features(reader.array("<i8", n_rows + 1), reader.array("<i4", pairs), reader.array("<f4", pairs))


def _table(columns: dict[str, object], **options) -> bytes:
    table = pa.table(columns)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, **options) as stream:
        stream.write_table(table)
    return sink.getvalue()


def _site_columns(sites, x_BD: torch.Tensor, prefix: str = "") -> dict[str, pa.Array]:
    return {
        prefix + name: pa.array(rows, type=pa.list_(pa.float32(), len(rows[0])))
        for name, rows in by_site(sites, x_BD).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_arrow__equals_offline(service: Service, kind: str) -> None:
    entry, dictionary, x_BD, f_BF, y_BD = offline(service, kind)
    headers = {"content-type": arrow.MEDIA_TYPE}
    columns = _site_columns(entry.reads, x_BD)

    def tabled(answer: Answer) -> pa.Table:
        assert answer.status == 200, answer.body
        return pa.ipc.open_stream(answer.body).read_all()

    encoded = tabled(post(service, kind, "encode", _table(columns), headers))
    assert torch.equal(dense(encoded.to_pylist(), entry.width), f_BF)
    skip = columns if entry.affine else {}
    latents = {"latents": pa.array(f_BF.tolist(), type=pa.list_(pa.float32(), entry.width))}
    for posted in ({name: encoded.column(name) for name in ("indices", "values")}, latents):
        decoded = tabled(post(service, kind, "decode", _table(posted | skip), headers))
        assert decoded.select([part.site for part in entry.writes]).to_pydict() == by_site(entry.writes, y_BD)
    targets = _site_columns(entry.writes, y_BD + 1, "target.")
    rebuilt = tabled(post(service, kind, "reconstruct", _table(columns | targets), headers))
    expected = fvu(dictionary, y_BD + 1, y_BD)
    torch.testing.assert_close(torch.tensor(rebuilt.column("fvu").to_pylist()), expected, rtol=1e-5, atol=0)


def test_selection__is_by_rank_value_and_number(service: Service) -> None:
    dictionary = service.dictionary("sae")
    x_BD = make_rows(dictionary)
    body, f_BF = {"rows": x_BD.tolist()}, dictionary.encode(x_BD)

    def encoded(query: str) -> torch.Tensor:
        return dense(post(service, "sae", f"encode?{query}", body).json()["features"], 24)

    kept = f_BF.topk(3, dim=1)
    assert torch.equal(encoded("top_k=3"), torch.zeros_like(f_BF).scatter_(1, kept.indices, kept.values))
    assert torch.equal(encoded("threshold=0.7"), f_BF * (f_BF > 0.7))
    only = torch.zeros(24, dtype=torch.bool)
    only[[2, 5, 23]] = True
    assert torch.equal(encoded("features=23,2,5"), f_BF * only)
    largest = (f_BF * only).topk(1, dim=1)
    one = torch.zeros_like(f_BF).scatter_(1, largest.indices, largest.values)
    assert torch.equal(encoded("features=23,2,5&top_k=1"), one)


def test_answers__come_in_the_format_that_is_asked_for(service: Service) -> None:
    body = {"rows": [[0.5] * 10]}
    for accept, media_type in {
        "application/octet-stream": "application/octet-stream",
        "text/html, */*;q=0.1": "application/json",
        arrow.MEDIA_TYPE: arrow.MEDIA_TYPE,
    }.items():
        answer = post(service, "sae", "encode", body, {"accept": accept})
        assert (answer.status, answer.headers["content-type"]) == (200, media_type)
    assert post(service, "sae", "encode", body, {"accept": "text/html"}).status == 406


ROW = [0.5] * 10
# (kind, operation, body, status, part of what is said)
BAD = {
    "no JSON": ("sae", "encode", b"{", 400, "no JSON"),
    "an empty body": ("sae", "encode", b"", 400, "no JSON"),
    "no UTF-8": ("sae", "encode", b'{"rows": "\xff"}', 400, "no JSON"),
    "NaN": ("sae", "encode", b'{"rows": [[NaN,0,0,0,0,0,0,0,0,0]]}', 400, "no JSON"),
    "Infinity": ("sae", "encode", b'{"rows": [[-Infinity,0,0,0,0,0,0,0,0,0]]}', 400, "no JSON"),
    "beyond a double": ("sae", "encode", b'{"rows": [[1e999,0,0,0,0,0,0,0,0,0]]}', 422, "finite"),
    "beyond float32": ("sae", "encode", {"rows": [[1e39, *ROW[1:]]]}, 422, "beyond float32"),
    "a huge integer": ("sae", "encode", b'{"rows": [[' + b"9" * 4000 + b",0,0,0,0,0,0,0,0,0]]}", 422, "rows"),
    "a larger integer": ("sae", "encode", b'{"rows": [[' + b"9" * 9000 + b",0,0,0,0,0,0,0,0,0]]}", 400, "no JSON"),
    "a key twice": ("sae", "encode", b'{"rows": [[1]], "rows": [[1]]}', 400, "once"),
    "an unknown key": ("sae", "encode", {"rows": [ROW], "row": 1}, 422, "row: Extra"),
    "a text for a number": ("sae", "encode", {"rows": [["0.5", *ROW[1:]]]}, 422, "rows"),
    "true for a number": ("sae", "encode", {"rows": [[True, *ROW[1:]]]}, 422, "rows"),
    "null for a number": ("sae", "encode", {"rows": [[None, *ROW[1:]]]}, 422, "rows"),
    "a list": ("sae", "encode", [], 422, "the body"),
    "no rows": ("sae", "encode", {"rows": []}, 422, "rows"),
    "deep": ("sae", "encode", b"[" * 10**5, 400, "nested 8"),
    "deep in a text": ("sae", "encode", {"rows": "[" * 100}, 422, "rows"),
    "an open text": ("sae", "encode", b'{"' + b'\\"' * 10**5, 400, "no JSON"),
    "narrow rows": ("sae", "encode", {"rows": [ROW, ROW[1:]]}, 422, "row 1 has 9 columns, and 10 are read"),
    "wide rows": ("sae", "encode", {"rows": [ROW + ROW]}, 422, "row 0 has 20 columns, and 10 are read"),
    "another site": ("sae", "encode", {"rows": {"resid_post.8": [ROW]}}, 422, "resid_post.9"),
    "a site too few": ("clt", "encode", {"rows": {"mlp_in.0": [ROW]}}, 422, "mlp_in.0, mlp_in.1, mlp_in.2"),
    "no names": ("clt", "encode", {"rows": [ROW]}, 422, "has 3 sites"),
    "too many rows": ("sae", "encode", {"rows": [ROW] * 301}, 413, "at most 300 rows, and this one has 301"),
    "many numbers back": ("skip_clt", "reconstruct", {"rows": {f"mlp_in.{n}": [ROW] * 300 for n in range(3)}},
                          200, ""),
    "uneven targets": ("transcoder", "reconstruct", {"rows": [ROW], "targets": [ROW, ROW]}, 422, "targets"),
    "features and latents": ("sae", "decode", {"features": [], "latents": [[0.0] * 24]}, 422, "features"),
    "neither": ("sae", "decode", {}, 422, "give one of them"),
    "uneven features": ("sae", "decode", {"features": [{"indices": [1], "values": []}]}, 422, "features.0"),
    "a latent that there is not": ("sae", "decode", {"features": [{"indices": [24], "values": [1.0]}]}, 422, "0 to 23"),
    "a huge latent": ("sae", "decode", {"features": [{"indices": [2**70], "values": [1.0]}]}, 422, "0 to 23"),
    "a negative latent": ("sae", "decode", {"features": [{"indices": [-1], "values": [1.0]}]}, 422, "features"),
    "half a latent": ("sae", "decode", {"features": [{"indices": [1.5], "values": [1.0]}]}, 422, "features"),
    "a latent twice": ("sae", "decode", {"features": [{"indices": [1, 1], "values": [1.0, 2.0]}]}, 422, "twice"),
    "no rows for a skip": ("skip_clt", "decode", {"latents": [[0.0] * 24]}, 422, "needs the rows"),
    "rows for no skip": ("sae", "decode", {"latents": [[0.0] * 24], "rows": [ROW]}, 422, "from features alone"),
    "a threshold of NaN": ("sae", "encode?threshold=nan", {"rows": [ROW]}, 422, "threshold"),
    "a negative top_k": ("sae", "encode?top_k=-1", {"rows": [ROW]}, 422, "top_k"),
    "features with a gap": ("sae", "encode?features=1,,2", {"rows": [ROW]}, 422, "features"),
    "a feature that there is not": ("sae", "encode?features=24", {"rows": [ROW]}, 422, "0 to 23"),
    "an unknown dictionary": ("nothing", "encode", {"rows": [ROW]}, 404, "no such dictionary"),
    "a path": ("..%2f..%2fetc", "encode", {"rows": [ROW]}, 404, "no such dictionary"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_json__is_the_callers_error(service: Service, name: str) -> None:
    kind, operation, body, status, part = BAD[name]
    answer = post(service, kind, operation, body)
    assert answer.status == status, answer.body[:300]
    if status >= 400:
        assert part in answer.json()["detail"]
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == status
        assert str(service.root) not in answer.body.decode()


SHAPE = {"X-Shape": "1,10"}
FLOATS = struct.pack("<10f", *ROW)
BAD_BYTES = {
    "no shape": ("encode", FLOATS, {}, 422, "say rows,columns"),
    "another width": ("encode", FLOATS, {"X-Shape": "1,11"}, 422, "has 11 columns, and 10 are read"),
    "a negative shape": ("encode", FLOATS, {"X-Shape": "-1,10"}, 422, "X-Shape"),
    "a huge shape": ("encode", FLOATS, {"X-Shape": "999999999,10"}, 422, "say more"),
    "no rows": ("encode", b"", {"X-Shape": "0,10"}, 422, "no rows"),
    "a byte short": ("encode", FLOATS[1:], SHAPE, 422, "39 bytes"),
    "a byte more": ("encode", FLOATS + b"x", SHAPE, 422, "41 bytes"),
    "half floats": ("encode", FLOATS, SHAPE | {"X-Dtype": "float16"}, 415, "bfloat16"),
    "NaN": ("encode", struct.pack("<10f", *ROW[1:], float("nan")), SHAPE, 422, "NaN"),
    "an infinity": ("encode", b"\x80\x7f" * 10, SHAPE | {"X-Dtype": "bfloat16"}, 422, "NaN"),
    "another layout": ("decode", b"", {"X-Shape": "1,24", "X-Layout": "coo"}, 415, "X-Layout"),
    "pairs that lie": ("decode", b"", {"X-Shape": "1,24", "X-Layout": "csr", "X-Pairs": "9"}, 422, "say more"),
    "offsets that fall": (
        "decode", struct.pack("<3q2i2f", 0, 3, 2, 1, 2, 1, 1), {"X-Shape": "2,24", "X-Layout": "csr", "X-Pairs": "2"},
        422, "belong together",
    ),
    "a latent beyond": (
        "decode", struct.pack("<2qif", 0, 1, 24, 1), {"X-Shape": "1,24", "X-Layout": "csr", "X-Pairs": "1"}, 422,
        "0 to 23",
    ),
    "text": ("encode", b"hello", {"content-type": "text/plain"}, 415, "Content-Type"),
    "a pickle": ("encode", b"\x80\x04.", {"content-type": "application/x-python-pickle"}, 415, "Content-Type"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_bytes__are_the_callers_error(service: Service, name: str) -> None:
    operation, body, headers, status, part = BAD_BYTES[name]
    answer = post(service, "sae", operation, body, {"content-type": "application/octet-stream"} | headers)
    assert (answer.status, part in answer.json()["detail"]) == (status, True), answer.body


def _floats(rows: list) -> pa.Array:
    return pa.array(rows, type=pa.list_(pa.float32(), 10))


BAD_ARROW = {
    "no stream": (b"x" * 100, 400, "no Arrow"),
    "a stream cut short": (_table({"resid_post.9": _floats([ROW])})[:-60], 400, "no Arrow"),
    "another column": (_table({"resid_post.8": _floats([ROW])}), 422, "resid_post.9"),
    "a column more": (_table({"resid_post.9": _floats([ROW]), "x": pa.nulls(1)}), 422, "columns"),
    "doubles": (_table({"resid_post.9": pa.array([ROW], type=pa.list_(pa.float64(), 10))}), 422, "float"),
    "a null row": (_table({"resid_post.9": _floats([ROW, None])}), 422, "nulls"),
    "a null number": (_table({"resid_post.9": _floats([[None, *ROW[1:]]])}), 422, "nulls"),
    "compressed": (
        _table({"resid_post.9": _floats([ROW] * 99)}, options=pa.ipc.IpcWriteOptions(compression="zstd")), 415,
        "compressed",
    ),
    "no rows": (_table({"resid_post.9": _floats([])}), 422, "no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARROW)
def test_bad_arrow__is_the_callers_error(service: Service, name: str) -> None:
    body, status, part = BAD_ARROW[name]
    answer = post(service, "sae", "encode", body, {"content-type": arrow.MEDIA_TYPE})
    assert (answer.status, part in answer.json()["detail"]) == (status, True), answer.body


def test_arrow__with_flipped_bytes_never_fails_on_our_side(service: Service) -> None:
    good = bytearray(_table({"resid_post.9": _floats([ROW] * 3)}))
    for at in range(0, len(good), 3):
        flipped = bytes(good[:at]) + bytes([good[at] ^ 0xFF]) + bytes(good[at + 1 :])
        assert post(service, "sae", "encode", flipped, {"content-type": arrow.MEDIA_TYPE}).status in (
            200,
            400,
            413,
            415,
            422,
        )


def test_limits__of_numbers_hold_for_answers(service: Service, published) -> None:
    tight = make_service(published, LIMITS.model_copy(update={"numbers": 100}))
    rows = make_rows(service.dictionary("sae")).tolist()
    assert post(tight, "sae", "encode", {"rows": rows}).status == 413
    assert post(tight, "sae", "encode?top_k=1", {"rows": rows}).status == 200
    assert "send 10 rows" in post(tight, "sae", "reconstruct", {"rows": rows[:11]}).json()["detail"]
    assert post(tight, "sae", "reconstruct", {"rows": rows[:10]}).status == 200


def test_listing__filters_and_pages(service: Service) -> None:
    def listed(query: str = "") -> dict:
        return call(service.app, "GET", f"/v1/dictionaries?{query}", BEARER).json()

    everything = [entry["id"] for entry in listed()["dictionaries"]]
    assert everything == sorted(f"suite.{kind}" for kind in KINDS)
    assert {entry["id"] for entry in listed("kind=clt")["dictionaries"]} == {"suite.clt", "suite.skip_clt"}
    assert {entry["id"] for entry in listed("site=attn_out")["dictionaries"]} == {"suite.attn_sae"}
    assert listed("layer=0")["total"] == 2
    assert listed("model=google/gemma-3-1b")["total"] == 0
    paged, after = [], ""
    while after is not None:
        page = listed(f"limit=3&after={after}")
        paged += [entry["id"] for entry in page["dictionaries"]]
        after = page["next"]
    assert paged == everything
    one = call(service.app, "GET", "/v1/dictionaries/suite.clt", BEARER).json()
    assert call(service.app, "GET", f"/v1/dictionaries/{one['digest']}", BEARER).json() == one
    assert Entry.model_validate(one) == service.entry("clt")


def test_open_routes_and_metrics(service: Service) -> None:
    assert call(service.app, "GET", "/healthz").json() == {"status": "ok"}
    assert call(service.app, "GET", "/readyz").json() == {"status": "ready"}
    post(service, "sae", "encode", {"rows": [ROW] * 7})
    scraped = call(service.app, "GET", "/metrics", {"authorization": f"Bearer {ADMIN}"}).body.decode()
    assert 'scopeworks_requests_total{route="/v1/dictionaries/{name}/encode",status="200"}' in scraped
    assert 'scopeworks_rows_total{operation="encode"}' in scraped
    assert call(service.app, "GET", "/no/such").status == 401
    assert call(service.app, "GET", "/no/such", BEARER).json()["detail"] == "there is no such path"
    assert call(service.app, "DELETE", "/v1/dictionaries", BEARER).status == 405


def test_dictionary_that_vanished__is_told(service: Service, tmp_path) -> None:
    import shutil

    root = tmp_path / "published"
    shutil.copytree(service.root, root)
    fresh = make_service(root)
    shutil.rmtree(root / "suite" / "sae")
    assert post(fresh, "sae", "encode", {"rows": [ROW]}).status == 409
    fresh.catalog.refresh()
    assert post(fresh, "sae", "encode", {"rows": [ROW]}).status == 404


def test_catalog__is_read_while_it_serves(service: Service, tmp_path) -> None:
    """The application itself looks again, from its start on."""
    import shutil

    async def scenario() -> list[int]:
        fresh = make_service(tmp_path)
        statuses = []
        async with fresh.app.router.lifespan_context(fresh.app):
            shutil.copytree(service.root / "suite", tmp_path / "suite")
            for _ in range(40):
                await asyncio.sleep(0.1)
                body = json.dumps({"rows": [ROW]}).encode()
                request = scope("POST", "/v1/dictionaries/suite.sae/encode", BEARER)
                statuses.append((await exchange(fresh.app, request, parts(body))).status)
                if statuses[-1] == 200:
                    break
        return statuses

    assert asyncio.run(scenario())[-1] == 200
