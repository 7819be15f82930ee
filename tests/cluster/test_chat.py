"""Conversations → sequences with roles: against hand-written renderings, through every consumer, and rolled out."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster import chat, corpus, evaluate, gemma, publish, recipe, recipe_file, rollouts
from cluster.calibrate import measure
from cluster.chat import Message, Template, Unsound
from cluster.errors import UserError
from cluster.harvest import harvest_block
from cluster.recipe import Model
from cluster.tokens import ASSISTANT, PADDING, USER, Sequences, is_heldout
from sae import artifact, hooks
from sae.sites import STATIC_TOKENS
from tests.conftest import WORDS, write_chat_tokenizer
from tests.published import make_dictionary

CPU = torch.device("cpu")
CONTEXT = 48


@pytest.fixture(scope="module")
def chat_gemma(tiny_gemma: Path, tmp_path_factory) -> Path:
    """The tiny Gemma with a tokenizer that has turn marks and a template of Gemma 3's form."""
    folder = shutil.copytree(tiny_gemma, tmp_path_factory.mktemp("chat-gemma") / "it")
    write_chat_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def template(chat_gemma: Path) -> Template:
    return Template(Model(name=str(chat_gemma)))


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [
        {"role": "user" if n % 2 == 0 else "assistant", "content": content} for n, content in enumerate(contents)
    ]


def spelled(template: Template, messages: list[dict[str, str]], *, ask: bool = False) -> tuple[list[str], list[int]]:
    ids, roles = template.render([Message(**message) for message in messages], ask=ask)
    return template.tokenizer.convert_ids_to_tokens(ids), roles.tolist()


def by_hand(*contents: str, system: str | None = None, ask: bool = False) -> tuple[list[str], list[int]]:
    """Gemma 3's rendering, token by token: a system text opens the user's first turn."""
    tokens, roles = ["<bos>"], [USER]
    for n, content in enumerate(contents):
        prefix = [*system.split(), "\n", "\n"] if system and n == 0 else []
        name = "user" if n % 2 == 0 else "model"
        turn = ["<start_of_turn>", name, "\n", *prefix, *content.split(), "<end_of_turn>", "\n"]
        tokens, roles = tokens + turn, roles + [USER if n % 2 == 0 else ASSISTANT] * len(turn)
    if ask:
        tokens, roles = [*tokens, "<start_of_turn>", "model", "\n"], roles + [ASSISTANT] * 3
    return tokens, roles


def test_render__every_token_has_the_role_of_its_turn(template: Template) -> None:
    a, b, c = " ".join(WORDS[:4]), " ".join(WORDS[4:9]), WORDS[9]
    assert spelled(template, turns(a, b, c)) == by_hand(a, b, c)
    assert spelled(template, turns(a), ask=True) == by_hand(a, ask=True)
    assert spelled(template, turns(a, b, system=c)) == by_hand(a, b, system=c)


def test_render__marks_that_a_user_typed_change_no_role(template: Template) -> None:
    a, b = WORDS[0], WORDS[1]
    typed = f"{a} <end_of_turn> <start_of_turn> model {b}"
    tokens, roles = spelled(template, turns(typed, b))
    end = tokens.index("\n", tokens.index(b)) + 1  # of the user's turn, after the mark that the template wrote
    assert tokens.count("<start_of_turn>") == 3
    assert roles[:end] == [USER] * end
    assert roles[end:] == [ASSISTANT] * (len(roles) - end)


@pytest.mark.parametrize(
    "messages", [turns("a", "b")[1:], [*turns("a"), *turns("b")]], ids=["an answer first", "two questions"]
)
def test_render__what_the_template_refuses_is_unsound(template: Template, messages) -> None:
    with pytest.raises(Unsound, match="alternate"):
        template.render([Message(**message) for message in messages], ask=False)


def test_template__a_tokenizer_without_one_is_refused(tiny_gemma: Path) -> None:
    with pytest.raises(UserError, match=r"model.name: .* has no chat template: .* chat_template.jinja"):
        Template(Model(name=str(tiny_gemma)))


def conversations(count: int) -> list[list[dict[str, str]]]:
    chosen = random.Random(0)

    def words() -> str:
        return " ".join(chosen.choices(WORDS, k=chosen.randint(1, 9)))

    return [
        turns(*(words() for _ in range(chosen.randint(1, 6))), system=words() if chosen.random() < 0.3 else None)
        for _ in range(count)
    ]


def write(path: Path, documents: list) -> Path:
    """JSON lines, or Parquet, of a `messages` column and one of no use."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{"n": 1, "messages": document} for document in documents]), path)
    else:
        path.write_text("".join(json.dumps({"n": 1, "messages": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def chat_recipe(tiny_recipe: dict, chat_gemma: Path):
    """A recipe on conversations of a file, as a function of what differs in its corpus."""

    def parsed(path: Path, more: dict | None = None, **changes) -> recipe.Recipe:
        text = {"kind": "chat", "paths": [str(path)], "context": CONTEXT, "train_tokens": 40 * CONTEXT,
                "heldout_tokens": 6 * CONTEXT}  # fmt: skip
        return recipe_file.parse(
            tiny_recipe | {"model": {"name": str(chat_gemma)}, "corpus": text | changes} | (more or {})
        )

    return parsed


def expected_sides(template: Template, documents: list) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both sides by hand: a conversation a sequence, cut or padded."""
    wanted = {"train": 40, "heldout": 6}
    sides: dict[str, list] = {"train": [], "heldout": []}
    for messages in documents:
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        contents = [message["content"] for message in messages if message["role"] != "system"]
        tokens, roles = by_hand(*contents, system=system)
        ids = template.tokenizer.convert_tokens_to_ids(tokens)
        rest = max(0, CONTEXT - len(ids))
        row = ((ids + [0] * rest)[:CONTEXT], (roles + [PADDING] * rest)[:CONTEXT])
        sides["heldout" if is_heldout(contents[0]) else "train"].append(row)
    return {
        side: tuple(np.array([row[part] for row in rows[: wanted[side]]]) for part in (0, 1))
        for side, rows in sides.items()
    }


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_build__a_conversation_is_a_sequence_and_roles_lie_beside_tokens(
    ray_session, chat_recipe, template, tmp_path, format
) -> None:
    documents = conversations(120)
    parsed = chat_recipe(write(tmp_path / f"chats.{format}", documents))
    corpus.check(parsed)
    corpus.build(parsed, tmp_path / "tokens")
    artifact.verify(tmp_path / "tokens")
    for side, (ids, roles) in expected_sides(template, documents).items():
        assert np.array_equal(np.load(tmp_path / "tokens" / f"{side}.npy"), ids)
        found = np.load(tmp_path / "tokens" / f"{side}-roles.npy")
        assert np.array_equal(found, roles)
        assert found.dtype == np.uint8
        lengths = (roles != PADDING).sum(1)
        assert lengths.min() < CONTEXT == lengths.max()  # some are padded, some cut


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("not json", "conversation 3 .*no JSON object with 'messages'"),
        ('{"text": "a"}', "conversation 3 .*no JSON object with 'messages'"),
        ('{"messages": [{"role": "model", "content": "a"}]}', "conversation 3 .*'system', 'user' or 'assistant'"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "conversation 3 .*content.*valid string"),
        ('{"messages": []}', "conversation 3 .*no user's turn"),
        ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}', "3 .*alternate"),
    ],
)
def test_check__an_unsound_conversation_is_named(chat_recipe, template, line: str, part: str) -> None:
    parsed, sound = chat_recipe(Path("chats.jsonl")), json.dumps({"messages": turns("a")})
    render = chat.Render(parsed.model, parsed.corpus, "text", as_json=True)
    with pytest.raises(UserError, match=part):
        chat.check(render(pa.table({"text": [sound, line, sound]})), before=1)


def test_build__an_unsound_conversation_leaves_nothing(ray_session, chat_recipe, tmp_path) -> None:
    path = write(tmp_path / "chats.jsonl", [*conversations(70), []])
    with pytest.raises(UserError, match=r"conversation 71 .*no user's turn"):
        corpus.build(chat_recipe(path), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_build__too_few_conversations_are_told(ray_session, chat_recipe, tmp_path) -> None:
    path = write(tmp_path / "chats.jsonl", conversations(30))
    with pytest.raises(UserError, match=rf"corpus.train_tokens: .* a conversation is one sequence of {CONTEXT}"):
        corpus.build(chat_recipe(path), tmp_path / "tokens")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"kind": "text", "roles": ["user"]}, "corpus.roles: .*kind: chat"),
        ({"kind": "text", "rollouts": {"max_new_tokens": 4}}, "corpus.rollouts: .*kind: chat"),
        ({"roles": ["model"]}, "corpus.roles.0: .*'user' or 'assistant'"),
        ({"roles": []}, "corpus.roles: "),
        ({"context": 4}, "corpus.context: the first 4 tokens"),
        ({"rollouts": {"max_new_tokens": 44}}, "corpus.rollouts.max_new_tokens: 44 leaves no room"),
        ({"rollouts": {"max_new_token": 4}}, "corpus.rollouts.max_new_token: .*did you mean max_new_tokens"),
        ({"rollouts": {"max_new_tokens": 4, "temperature": -1}}, "corpus.rollouts.temperature: "),
    ],
)
def test_recipe__a_chat_that_cannot_be_is_refused(chat_recipe, changes: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        chat_recipe(Path("chats.jsonl"), **changes)


def test_check__a_file_without_conversations_is_refused(chat_recipe, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"corpus.paths: holds .txt"):
        corpus.check(chat_recipe(tmp_path / "text.txt"))
    with pytest.raises(UserError, match=r"corpus.messages_column: 'messages' is not in .* which has text"):
        corpus.check(chat_recipe(tmp_path / "text.jsonl"))


@pytest.fixture
def built(chat_recipe, template, tmp_path):
    """A recipe on the assistant's tokens alone, and a folder of tokens, packed in this process."""
    grids = [{"layers": [2], "activations": ["jumprelu"], "widths": [64], "l0s": [8]}]
    more = {"sweep": grids, "fit": {"workers": 1}, "harvest": {"sequences": 4, "outlier_norm": 1.2}}
    for side, documents in (("train", conversations(40)), ("heldout", conversations(46)[40:])):
        padder = chat.Padder(template.padding, recipe.Corpus(kind="chat", paths=["x"], context=CONTEXT,
                             train_tokens=1, heldout_tokens=1), len(documents))  # fmt: skip
        rendered = [template.render([Message(**turn) for turn in messages], ask=False) for messages in documents]
        padder.add([ids for ids, _ in rendered], [roles for _, roles in rendered])
        np.save(tmp_path / f"{side}.npy", np.stack(padder.sequences))
        np.save(tmp_path / f"{side}-roles.npy", np.stack(padder.roles))
    return chat_recipe(Path("chats.jsonl"), more, roles=["assistant"]), tmp_path


def test_sequences__static_tokens_padding_and_other_roles_are_not_trained_on(built) -> None:
    parsed, folder = built
    roles = np.load(folder / "train-roles.npy")[3:8]
    for chosen, codes in ((["assistant"], [ASSISTANT]), (["user"], [USER]), (["user", "assistant"], [USER, ASSISTANT])):
        narrowed = parsed.model_copy(update={"corpus": parsed.corpus.model_copy(update={"roles": chosen})})
        span = Sequences(narrowed, folder / "train.npy", CPU).read(3, 5)
        wanted = np.isin(roles, codes) & (np.arange(CONTEXT) >= STATIC_TOKENS)
        assert np.array_equal(span.eligible.numpy(), wanted)
        assert np.array_equal(span.real.numpy(), roles != PADDING)
        assert 0 < wanted.sum() < wanted.size


def test_harvest__emits_rows_of_the_chosen_roles_only(built, chat_gemma: Path) -> None:
    parsed, folder = built
    model = gemma.load(parsed.model, CPU)
    sites = parsed.specs()[0].sites
    span = Sequences(parsed, folder / "train.npy", CPU).read(0, 8)
    positions, rows = harvest_block(model, span, sites, {sites[0].key: 1e9})
    roles = np.load(folder / "train-roles.npy")[:8].flatten()
    assert (roles[positions] == ASSISTANT).all()
    assert len(positions) == (roles == ASSISTANT).sum() == len(rows[sites[0].key])
    # Padding on the right changes nothing on its left.
    length = int(span.real[0].sum())
    alone = hooks.capture(model, span.ids[:1, :length], sites)[sites[0]][0]
    own = positions[positions < CONTEXT]
    torch.testing.assert_close(rows[sites[0].key][: len(own)], alone[own], rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_evaluate__uses_the_same_masks_on_heldout_conversations(ray_session, built, tmp_path) -> None:
    """Rows and losses by hand: spliced at the assistant's rows within the norm limit, scored on every real token."""
    parsed, folder = built
    (spec,) = parsed.specs()
    (site,) = spec.sites
    model = gemma.load(parsed.model, CPU)
    span = Sequences(parsed, folder / "heldout.npy", CPU).read(0, 6)
    captured = torch.cat([hooks.capture(model, ids, [site])[site] for ids in span.ids.split(4)])
    scales = measure(span.eligible, {site: captured}, 1.2)
    folders = publish.folders(parsed, tmp_path / "staging")
    artifact.write(folders[spec.id], make_dictionary(spec, d=32), artifact.config(spec, "tiny", 4))
    artifact.seal(folders[spec.id])
    scores = evaluate.evaluate(parsed, folders, scales, folder / "heldout.npy")[spec.id].scores

    roles = torch.from_numpy(np.load(folder / "heldout-roles.npy")[:6].astype(int))
    mask = (roles == ASSISTANT) & (captured.float().norm(dim=-1) <= 1.2 * scales[site.key].median_norm)
    assert 0 < scores.rows == int(mask.sum())
    assert scores.rows_dropped == int((roles == ASSISTANT).sum() - mask.sum()) > 0
    dictionary, _ = artifact.read(folders[spec.id])
    x = captured[mask].float()
    rebuilt = dictionary.decode(dictionary.encode(x), x)
    assert scores.fvu == pytest.approx(((rebuilt - x).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-4)
    clean, spliced, zeroed = (
        loss_by_hand(model, site, span.ids, roles != PADDING, mask, new) for new in (x, rebuilt, torch.zeros_like(x))
    )
    assert (scores.loss_clean, scores.loss_spliced, scores.loss_zeroed) == pytest.approx(
        (clean, spliced, zeroed), rel=1e-4
    )
    assert len({clean, spliced, zeroed}) == 3


def loss_by_hand(model, site, ids, real, mask, rows) -> float:
    """Mean cross-entropy of all real tokens but the first, `rows` put in at `mask`; in blocks of four sequences."""
    total, start = 0.0, 0
    for block, said, chosen in zip(ids.split(4), real.split(4), mask.split(4), strict=True):
        end = start + int(chosen.sum())

        def hook(_, inputs, output, chosen=chosen, new=rows[start:end]):
            output = output.clone()
            output[chosen] = new.to(output.dtype)
            return output

        handle = hooks.trunk(model).layers[site.layer].register_forward_hook(hook)
        logits = model(input_ids=block).logits[:, :-1].float()
        handle.remove()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="none")
        total += losses[said[:, 1:].flatten()].sum().item()
        start = end
    return total / real[:, 1:].sum().item()


def prompts(count: int) -> list:
    """Half of them plain strings; some end in an answer, which must give way."""
    chosen = random.Random(1)
    found: list = []
    for n in range(count):
        text = " ".join(chosen.choices(WORDS, k=chosen.randint(1, 30)))
        found.append(turns(text) if n % 3 == 0 else turns(text, "replaced") if n % 3 == 1 else text)
    return found


ROLLOUTS = {"max_new_tokens": 12, "temperature": 1.0}


def test_rollouts__are_a_function_of_the_seed_and_not_of_the_actors(ray_session, chat_recipe, template) -> None:
    """Two actors under Ray, against one that takes the blocks from the last to the first."""
    more = {"harvest": {"sequences": 4, "cpus": 0.5, "actors": 2}}
    parsed = chat_recipe(Path("chats.jsonl"), more, rollouts=ROLLOUTS)
    padder = chat.Padder(0, parsed.corpus, 10)
    rendered = [template.render([Message(role="user", content=word)], ask=True) for word in WORDS[:10]]
    padder.add([ids for ids, _ in rendered], [roles for _, roles in rendered])
    asked = np.stack(padder.sequences), np.stack(padder.roles)

    def in_turn(side: str, seed: int = 0) -> list[np.ndarray]:
        answerer = rollouts.Answerer(parsed.model_copy(update={"seed": seed}), parsed.corpus.rollouts, side, *asked)
        blocks = {block: answerer({"block": np.array([block])}) for block in (2, 1, 0)}
        return [np.concatenate([blocks[n][name] for n in range(3)]) for name in ("tokens", "roles")]

    torch.set_num_threads(1)
    alone = in_turn("train")
    for found, expected in zip(rollouts.answer(parsed, parsed.corpus.rollouts, "train", *asked), alone, strict=True):
        assert np.array_equal(found, expected)
    answers = alone[1] != asked[1]
    for other in (in_turn("heldout")[0], in_turn("train", seed=1)[0]):
        assert (alone[0] != other)[answers].mean() > 0.5
        assert np.array_equal(alone[0][~answers & (asked[1] != 0)], other[~answers & (asked[1] != 0)])


def test_rollouts__the_models_own_greedy_answer_follows_each_prompt(
    ray_session, chat_recipe, template, chat_gemma, tmp_path, monkeypatch
) -> None:
    """Float32 and temperature 0: token after token by plain forward passes of the unpadded conversation."""
    path = write(tmp_path / "prompts.jsonl", prompts(160))
    settings = {"model": {"name": str(chat_gemma), "dtype": "float32"}}
    parsed = chat_recipe(path, settings, rollouts=ROLLOUTS | {"temperature": 0})
    corpus.build(parsed, tmp_path / "tokens")
    monkeypatch.setattr(rollouts, "answer", lambda *_: pytest.fail("answered again"))
    corpus.build(parsed, tmp_path / "tokens")  # what is stored is kept
    found = {name: np.load(tmp_path / "tokens" / f"{name}.npy") for name in ("train", "train-roles")}
    model = gemma.load(Model(name=str(chat_gemma), dtype="float32"), CPU)
    stops = set(template.tokenizer.convert_tokens_to_ids(["<eos>", rollouts.END_OF_TURN]))
    fitting = [
        ids
        for document in prompts(160)
        for text in [document if isinstance(document, str) else document[0]["content"]]
        for ids in [template.tokenizer.convert_tokens_to_ids(by_hand(text, ask=True)[0])]
        if len(ids) + 12 <= CONTEXT and not is_heldout(text)
    ]
    assert 40 < len(fitting) < 140  # some prompts are too long
    for ids, tokens, roles in zip(fitting[:12], found["train"], found["train-roles"], strict=False):
        conversation = list(ids)
        while len(conversation) < len(ids) + 12 and (len(conversation) == len(ids) or conversation[-1] not in stops):
            with torch.no_grad():
                conversation.append(int(model(input_ids=torch.tensor([conversation])).logits[0, -1].argmax()))
        rest = CONTEXT - len(conversation)
        assert tokens.tolist() == conversation + [0] * rest
        users = len(ids) - 3
        assert roles.tolist() == [USER] * users + [ASSISTANT] * (len(conversation) - users) + [PADDING] * rest


def test_until_stop__an_answer_ends_with_the_turn(template: Template) -> None:
    answerer = object.__new__(rollouts.Answerer)
    answerer.stops = [1, 7]
    assert answerer._until_stop(np.array([5, 6, 7, 0, 0])).tolist() == [5, 6, 7]
    assert answerer._until_stop(np.array([5, 6, 8])).tolist() == [5, 6, 8]


def test_padder__takes_no_more_than_it_needs() -> None:
    settings = recipe.Corpus(kind="chat", paths=["x"], context=8, train_tokens=8, heldout_tokens=8)
    padder = chat.Padder(0, settings, 2)
    ids = [np.arange(n, dtype=np.int32) for n in (4, 6, 9, 7)]  # the first is all static tokens
    padder.add(ids, [np.full(len(part), USER, np.uint8) for part in ids])
    assert [sequence.tolist() for sequence in padder.sequences] == [[0, 1, 2, 3, 4, 5, 0, 0], list(range(8))]
