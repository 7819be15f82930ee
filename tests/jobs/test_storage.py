"""A sweep whose results are kept in a bucket: its server dies, its machine dies, and another machine goes on."""

import hashlib
import re
import time
import uuid
from pathlib import Path

import pytest

from cluster.store import S3Store
from tests.s3_server import SECRET

pytestmark = pytest.mark.chaos
WAIT = 900  # seconds, of which a busy machine needs many


@pytest.fixture
def sweep(tiny_recipe: dict) -> dict:
    """Three dictionaries of two ranks in 480 steps."""
    grids = [
        {"layers": [0], "activations": ["batch_topk", "jumprelu"], "widths": [64], "l0s": [8]},
        {"kind": "clt", "layers": [0, 1, 2, 3], "activations": ["batch_topk"], "widths": [64], "l0s": [8]},
    ]
    stream = tiny_recipe["stream"] | {"batch_rows": 128}
    return tiny_recipe | {"sweep": grids, "stream": stream, "fit": tiny_recipe["fit"] | {"report_every_steps": 40}}


def digests(params: dict[str, bytes]) -> dict[str, str]:
    return {place: hashlib.sha256(content).hexdigest() for place, content in params.items() if "/params" in place}


def test_server_and_machine_die__another_machine_resumes_with_the_same_weights(
    sweep: dict, run_job, s3, s3_server, tmp_path: Path
) -> None:
    calm = run_job(sweep | {"output": str(tmp_path / "calm")})
    assert calm.wait(WAIT) == 0, calm.text
    root = calm.output / "published"
    expected = digests({path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.safetensors")})
    assert len(expected) == 2 + 4

    url = f"s3://runs/{uuid.uuid4().hex}"
    kept = sweep | {"storage": url}
    slow = sweep["fit"] | {"report_every_steps": 1}  # a report takes 0.1 s: there is time for all that happens
    first = run_job(kept | {"output": str(tmp_path / "first"), "fit": slow})
    first.wait_for_step(14, WAIT)
    s3_server.kill()
    time.sleep(3)
    assert first.process.poll() is None, first.text
    s3_server.start()
    store = S3Store(url)
    manifests = store.names("checkpoints/")
    first.wait_for_step(first.step + 10, WAIT)
    while not [
        name for name in store.names("checkpoints/") if name not in manifests and name.endswith("manifest.json")
    ]:
        assert first.process.poll() is None, first.text  # a checkpoint is committed after the outage
        time.sleep(0.1)
    intruder = run_job(kept | {"output": str(tmp_path / "intruder")})
    assert intruder.wait(WAIT) == 2
    assert f"error: storage: {url} is in use by process {first.process.pid}" in intruder.text
    first.kill()

    second = run_job(kept | {"output": str(tmp_path / "second")})
    assert second.wait(WAIT) == 0, second.text
    assert int(re.search(r"resuming at step (\d+)", second.text)[1]) >= 10
    names = store.names()
    assert (
        digests({name.removeprefix("published/"): store.read(name) for name in names if "/params" in name}) == expected
    )
    for name in names:
        if name.endswith("manifest.json"):
            store.folder(name.removesuffix("/manifest.json"), tmp_path / uuid.uuid4().hex)  # it verifies
    assert {name.split("/")[0] for name in names} == {
        "calibration", "mlflow", "owner", "published", "recipe", "report", "tokens"}  # fmt: skip
    for place in re.findall(r'"path": "(.*)"', store.read("report/summary.json").decode()):
        assert f"{place.removeprefix(url)[1:]}/manifest.json" in names
    assert float(re.search(r"held the fit up for ([\d.]+)%", second.text)[1]) < 5

    third = run_job(kept | {"output": str(tmp_path / "third")})
    assert third.wait(WAIT) == 0, third.text
    assert "finished before" in third.text
    assert f"published  {url}/published" in third.text

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 50
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert not [name for name in store.names() if SECRET.encode() in store.read(name)]
