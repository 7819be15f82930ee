"""Texts in, features out, of all kinds from one pass; and steered answers equal those of a model edited by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae import hooks
from serve.model import site_of
from serve.steering import Change, Latent, Steering
from tests.conftest import WORDS, write_chat_tokenizer
from tests.serve.asgi import Answer
from tests.serve.conftest import LIMITS
from tests.serve.test_auth import routes, ungated
from tests.serve.texts import PLACED, READER, TEXT, Service, make_service

LIMITED = LIMITS.model_copy(update={"text_tokens": 40, "new_tokens": 12, "changes": 3, "text_dictionaries": 8})


@pytest.fixture(scope="module")
def chat_gemma(tiny_gemma: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "gemma"
    shutil.copytree(tiny_gemma, folder)
    write_chat_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def service(chat_gemma: Path, tmp_path_factory) -> Service:
    return make_service(tmp_path_factory.mktemp("texts") / "published", chat_gemma, LIMITED)


@pytest.fixture(scope="module")
def gemma(chat_gemma: Path):
    """The model and its tokenizer as a notebook loads them."""
    model = AutoModelForCausalLM.from_pretrained(chat_gemma, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(chat_gemma)


def ids_of(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])


def rows_of(model, ids: torch.Tensor, entry, first: int) -> torch.Tensor:
    sites = [site_of(part) for part in entry.reads]
    captured = hooks.capture(model, ids, sites)
    return torch.cat([captured[site][0, first:] for site in sites], dim=1)


def dense(rows: list[dict], width: int) -> torch.Tensor:
    f_BF = torch.zeros(len(rows), width)
    for n, row in enumerate(rows):
        f_BF[n, torch.tensor(row["indices"]).long()] = torch.tensor(row["values"], dtype=torch.float32)
    return f_BF


def test_text__all_kinds_from_one_pass_equal_offline(service: Service, gemma, monkeypatch) -> None:
    passes = []
    real = hooks.capture
    monkeypatch.setattr(hooks, "capture", lambda *args, **more: passes.append(args) or real(*args, **more))
    names = [f"of-texts.{kind}" for kind in PLACED]
    read = service.ask("/v1/features", {"text": TEXT, "dictionaries": names}).json()
    assert len(passes) == 1
    model, tokenizer = gemma
    ids = ids_of(tokenizer, TEXT)
    assert [token["id"] for token in read["tokens"]] == ids[0].tolist()
    assert [token["masked"] for token in read["tokens"]] == [True] + [False] * 24
    assert [token["text"] for token in read["tokens"]][1:] == TEXT.split()
    for kind, found in zip(PLACED, read["dictionaries"], strict=True):
        dictionary = service.dictionary(kind)
        expected = dictionary.encode(rows_of(model, ids, service.entry(kind), 1))
        assert (expected > 0).any()
        assert found["dictionary"] == f"of-texts.{kind}"
        assert torch.equal(dense(found["features"], 24)[1:], expected), kind
        assert found["features"][0] == {"indices": [], "values": []}


def test_chat__is_rendered_and_its_static_tokens_are_masked(service: Service, gemma) -> None:
    messages = [{"role": "user", "content": f"{WORDS[3]} {WORDS[4]}"}, {"role": "assistant", "content": WORDS[5]}]
    read = service.ask("/v1/features", {"messages": messages, "dictionaries": ["of-texts.sae"], "top_k": 2}).json()
    model, tokenizer = gemma
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert [token["id"] for token in read["tokens"]] == ids[0].tolist()
    assert [token["masked"] for token in read["tokens"]] == [n < 4 for n in range(ids.shape[1])]
    expected = service.dictionary("sae").encode(rows_of(model, ids, service.entry("sae"), 4))
    found = dense(read["dictionaries"][0]["features"], 24)[4:]
    assert (found > 0).sum(1).max() == 2
    assert torch.equal(found, expected * (found > 0))


def answers(answer: Answer) -> tuple[str, str]:
    lines = [json.loads(line) for line in answer.body.splitlines()]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    for which in ("steered", "plain"):
        assert "".join(line[which] for line in lines[:-1]) == lines[-1][which]
    return lines[-1]["steered"], lines[-1]["plain"]


def by_hand(gemma, ids: torch.Tensor, tokens: int, edit) -> str:
    """The likeliest tokens of a model with edits, from a whole pass for each."""
    model, tokenizer = gemma
    first = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            with hooks.hooked(model, edit()):
                chosen = model(ids).logits[0, -1].argmax()
            if chosen == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, chosen.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, first:])


def edits_of(service: Service, kind: str, latent: int, change: str, value: float):
    """Whole encodes and decodes of a dictionary's rows: other arithmetic than that of the service."""
    dictionary, entry = service.dictionary(kind), service.entry(kind)
    reads, writes = ([site_of(part) for part in parts] for parts in (entry.reads, entry.writes))

    def edit():
        rows, moved = {}, {}

        def difference(site):
            x_BD = torch.cat([rows.get(one, torch.zeros_like(rows[site])) for one in reads], dim=1)
            f_BF = dictionary.encode(x_BD)
            changed = f_BF.clone()
            changed[:, latent] = {
                "add": f_BF[:, latent] + value,
                "clamp": torch.tensor(value),
                "ablate": torch.tensor(0.0),
            }[change]
            delta = dictionary.decode(changed, x_BD) - dictionary.decode(f_BF, x_BD)
            return dict(zip(writes, delta.split([part.width for part in entry.writes], dim=1), strict=True))

        def at(site):
            def hook(tensor):
                rows[site] = tensor[0, 1:]
                if site not in writes:
                    return None
                moved.setdefault("all", difference(site))
                return torch.cat([tensor[:, :1], (tensor[0, 1:] + moved["all"][site])[None]], dim=1)

            return hook

        return {site: at(site) for site in [*reads, *writes]}

    return edit


CASES = [
    ("sae", "add", 30.0), ("sae", "clamp", 25.0), ("sae", "ablate", 0.0), ("attn_sae", "clamp", 40.0),
    ("transcoder", "add", -30.0), ("skip_transcoder", "clamp", 30.0), ("crosscoder", "add", 20.0),
    ("acausal_crosscoder", "add", 20.0), ("clt", "clamp", 20.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "value"), CASES)
def test_steer__equals_a_model_edited_by_hand(service: Service, gemma, kind: str, change: str, value: float) -> None:
    ids = ids_of(gemma[1], TEXT)
    f_BF = service.dictionary(kind).encode(rows_of(gemma[0], ids, service.entry(kind), 1))
    latent = int(f_BF[:, :6].sum(0).argmax())  # of the first group, which writes all
    asked = {"dictionary": f"of-texts.{kind}", "feature": latent, "change": change, "value": value}
    answer = service.ask("/v1/steer", {"text": TEXT, "changes": [asked], "new_tokens": 10})
    assert answer.status == 200, answer.body
    steered, plain = answers(answer)
    assert plain == by_hand(gemma, ids, 10, dict)
    assert steered == by_hand(gemma, ids, 10, edits_of(service, kind, latent, change, value))
    if change != "ablate":
        assert steered != plain


@pytest.mark.parametrize(("kind", "change", "value"), CASES)
def test_steering__moves_what_is_not_masked_of_the_first_sequence(
    service: Service, gemma, kind: str, change: str, value: float
) -> None:
    """All logits of one pass: of a few tokens, many a mistake would leave the likeliest as they are."""
    model, tokenizer = gemma
    ids, entry, latent = ids_of(tokenizer, TEXT), service.entry(kind), 2
    reads, writes = ([site_of(part) for part in parts] for parts in (entry.reads, entry.writes))
    changed = Latent(Change(entry.digest, latent, change, value), service.dictionary(kind), reads, writes)
    masked = torch.arange(ids.shape[1]) == 0
    with torch.no_grad():
        plain = model(ids).logits[0]
        with hooks.hooked(model, edits_of(service, kind, latent, change, value)()):
            expected = model(ids).logits[0]
        with hooks.hooked(model, Steering([changed]).edits(masked)):
            steered, beside = model(ids.expand(2, -1)).logits
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(beside, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steered[0], plain[0], rtol=1e-4, atol=1e-4)
    assert (steered[1:] - plain[1:]).abs().max() > 1e-2


def test_steer__draws_are_of_one_seed(service: Service) -> None:
    nothing = {"dictionary": "of-texts.sae", "feature": 0, "change": "add", "value": 0.0}
    body = {"text": TEXT, "changes": [nothing], "new_tokens": 12, "temperature": 2.0}
    one, again, other = (answers(service.ask("/v1/steer", body | {"seed": seed})) for seed in (5, 5, 6))
    assert one == again != other
    assert one[0] == one[1]  # nothing is changed, and both draw alike


def reads(*dictionaries: str, **prompt: object) -> tuple[str, dict]:
    return "/v1/features", (prompt or {"text": "a"}) | {"dictionaries": list(dictionaries)}


def changes(*changed: tuple[str, int, str], new_tokens: int = 2) -> tuple[str, dict]:
    asked = [{"dictionary": f"of-texts.{name}", "feature": n, "change": change} for name, n, change in changed]
    return "/v1/steer", {"text": "a", "new_tokens": new_tokens, "changes": asked}


ANSWER_FIRST, SAE = [{"role": "assistant", "content": "a"}], "of-texts.sae"
WRONG = [
    (reads(SAE, text="a", messages=ANSWER_FIRST), 422, "text, messages"),
    (reads(SAE, neither=1), 422, "neither"),
    (reads(SAE, text=None), 422, "text, messages"),
    (reads("of-texts.none"), 404, "no such dictionary"),
    (reads(), 422, "dictionaries"),
    (reads(SAE, text="a " * 41), 413, "at most 40 tokens"),
    (reads(SAE, text="a" * 2000), 413, "characters"),
    (reads(*[f"of-texts.{n}" for n in range(9)]), 413, "at most 8"),
    (reads("foreign.sae"), 422, "another model"),
    (reads(SAE, messages=ANSWER_FIRST), 422, "alternate"),
    (changes(), 422, "changes"),
    (changes(("sae", 24, "ablate")), 422, "0 to 23"),
    (changes(("sae", 2, "double")), 422, "change"),
    (changes(*[("sae", 2, "add")] * 4), 413, "at most 3"),
    (changes(("sae", 2, "add"), new_tokens=13), 413, "at most 12"),
    (changes(("acausal_crosscoder", 2, "ablate")), 422, "only add works"),
]


@pytest.mark.parametrize(("asked", "status", "says"), WRONG)
def test_wrong__is_told(service: Service, asked: tuple[str, dict], status: int, says: str) -> None:
    answer = service.ask(*asked)
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/problem+json"
    assert says in answer.json()["detail"]


def test_routes_of_texts__are_gated(service: Service) -> None:
    listed = routes(service.app)
    assert {("POST", "/v1/features"), ("POST", "/v1/steer")} <= set(listed)
    assert ungated(service.app, listed) == []


def test_steer__needs_its_scope(service: Service) -> None:
    assert service.ask("/v1/steer", {}, READER).status == 403
    assert service.ask("/v1/features", {}, READER).status == 422
