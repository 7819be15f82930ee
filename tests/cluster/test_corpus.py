"""Text → sequences: the packing rule, the held-out side, and every format from local files and a real S3 server."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster import corpus, recipe, recipe_file, sources
from cluster.corpus import Packer
from cluster.errors import UserError
from sae import artifact
from tests.conftest import WORDS

BOS = 2


def naive_packing(documents: list[list[int]], context: int) -> list[list[int]]:
    """The rule of cluster/corpus.py, token by token."""
    sequences: list[list[int]] = []
    current: list[int] = []
    for token in [token for ids in documents for token in [BOS, *ids]]:
        if not current and token != BOS:
            current = [BOS]
        current.append(token)
        if len(current) == context:
            sequences.append(current)
            current = []
    return sequences


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_packer__equals_the_rule_token_by_token_however_documents_arrive(chunk: int) -> None:
    chosen = random.Random(0)
    documents = [[chosen.randint(4, 99) for _ in range(chosen.randint(0, 40))] for _ in range(200)]
    expected = naive_packing(documents, 16)
    packer = Packer(BOS, 16, sequences=len(expected))
    for at in range(0, len(documents), chunk):
        packer.add([np.array(ids, np.int32) for ids in documents[at : at + chunk]])
    assert [sequence.tolist() for sequence in packer.sequences] == expected


def parsed(tiny_recipe: dict, paths: list[str], **changes) -> recipe.Recipe:
    return recipe_file.parse(tiny_recipe | {"corpus": tiny_recipe["corpus"] | {"paths": paths} | changes})


def built(tiny_recipe: dict, paths: list[str], folder: Path, **changes) -> dict[str, np.ndarray]:
    corpus.build(parsed(tiny_recipe, paths, **changes), folder)
    artifact.verify(folder)
    return {side: np.load(folder / f"{side}.npy") for side in corpus.SIDES}


def texts(documents: Path) -> list[str]:
    return [json.loads(line)["text"] for line in documents.read_text().splitlines()]


@pytest.fixture
def expected(documents: Path, tiny_recipe: dict) -> dict[str, np.ndarray]:
    """Both sides by the naive rule, with the tiny model's word numbers."""
    number = {word: n for n, word in enumerate(dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS]))}
    sides: dict[str, list[list[int]]] = {"train": [], "heldout": []}
    for text in texts(documents):
        lowest_tenth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < 2**64 // 10
        sides["heldout" if lowest_tenth else "train"].append([number[word] for word in text.split()])
    wanted = {side: tiny_recipe["corpus"][f"{side}_tokens"] // 32 for side in sides}
    return {side: np.array(naive_packing(ids, 32)[: wanted[side]]) for side, ids in sides.items()}


def test_build__jsonl_in_several_files_by_glob(ray_session, tiny_recipe, documents, expected, tmp_path) -> None:
    lines = documents.read_text().splitlines(keepends=True)
    for n in range(3):
        (tmp_path / f"part-{n}.jsonl").write_text("".join(lines[n * 400 : (n + 1) * 400]))
    found = built(tiny_recipe, [str(tmp_path / "part-*.jsonl")], tmp_path / "tokens")
    for side in corpus.SIDES:
        assert np.array_equal(found[side], expected[side]), side


def test_build__parquet_with_a_named_column(ray_session, tiny_recipe, documents, expected, tmp_path) -> None:
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"n": list(range(1200)), "body": texts(documents)}), path, row_group_size=100)
    found = built(tiny_recipe, [str(path)], tmp_path / "tokens", text_column="body")
    for side in corpus.SIDES:
        assert np.array_equal(found[side], expected[side]), side


def test_build__a_text_file_is_a_document(ray_session, tiny_recipe, documents, expected, tmp_path) -> None:
    for n, text in enumerate(texts(documents)):
        (tmp_path / f"{n:05d}.txt").write_text(text)
    found = built(tiny_recipe, [str(tmp_path / "*.txt")], tmp_path / "tokens")
    for side in corpus.SIDES:
        assert np.array_equal(found[side], expected[side]), side


def test_build__a_second_call_keeps_what_is_whole(ray_session, tiny_recipe, documents, tmp_path, monkeypatch) -> None:
    built(tiny_recipe, [str(documents)], tmp_path / "tokens")
    monkeypatch.setattr(corpus, "_pack", lambda recipe: pytest.fail("packed again"))
    corpus.build(parsed(tiny_recipe, [str(documents)]), tmp_path / "tokens")


def test_build__jsonl_from_s3_by_glob(s3, ray_session, tiny_recipe, documents, expected, tmp_path) -> None:
    lines = documents.read_text().splitlines(keepends=True)
    for n in range(3):
        s3.put_object(Bucket="texts", Key=f"en/part-{n}.jsonl", Body="".join(lines[n * 400 : (n + 1) * 400]).encode())
    s3.put_object(Bucket="texts", Key="de/part-0.jsonl", Body=b"{}\n")
    found = built(tiny_recipe, ["s3://texts/en/part-*.jsonl"], tmp_path / "tokens")
    for side in corpus.SIDES:
        assert np.array_equal(found[side], expected[side]), side


def test_load__reads_a_recipe_on_s3(s3, tiny_recipe) -> None:
    s3.put_object(Bucket="texts", Key="recipes/mine.yaml", Body=yaml.safe_dump(tiny_recipe).encode())
    assert recipe_file.load("s3://texts/recipes/mine.yaml") == recipe_file.parse(tiny_recipe)


@pytest.mark.parametrize(
    ("key", "body", "part"), [("gone.yaml", None, "cannot be read"), ("image.yaml", b"\xff\xd8", "cannot be read")]
)
def test_load__tells_of_a_recipe_on_s3_that_cannot_be_read(s3, key: str, body: bytes | None, part: str) -> None:
    if body:
        s3.put_object(Bucket="texts", Key=key, Body=body)
    with pytest.raises(UserError, match=part) as error:
        recipe_file.load(f"s3://texts/{key}")
    assert error.value.field == "recipe"


@pytest.mark.parametrize(
    ("path", "part"),
    [("s3://texts/nothing/*.jsonl", "matches no object"), ("s3://no-such-bucket/a.jsonl", "cannot be listed")],
)
def test_find__what_s3_lacks_is_told(s3, tiny_recipe, path: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        sources.find(parsed(tiny_recipe, [path]).corpus)
