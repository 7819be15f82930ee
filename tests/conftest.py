"""A tiny random Gemma 3 with a tokenizer, a small corpus, and recipes on them: what most tests run on."""

import json
import os
import random
import secrets
import shutil
import socket
from pathlib import Path

import pytest

from cluster import session

session.set_environment()
os.environ["HF_HUB_OFFLINE"] = "1"

WORDS = [
    "".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=3 + n % 5)) for n in range(200)
]  # the tiny model's whole vocabulary, besides its special tokens
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def free_port() -> int:
    """One that nobody listens at, below those that the system gives connections and above those of Ray's workers: what
    is told to listen there may start seconds later."""
    while True:
        port = secrets.randbelow(11_000) + 21_000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(SPECIAL + WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


# Of the form of Gemma 3's: a system text opens the first user's turn, and turns must alternate.
CHAT_TEMPLATE = """{{ bos_token }}
{%- set told = messages[0]['role'] == 'system' -%}
{%- for message in (messages[1:] if told else messages) -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- messages[0]['content'] + '\\n\\n' if told and loop.first else '' }}
{{- message['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{{ '<start_of_turn>model\\n' if add_generation_prompt else '' }}"""


def write_chat_tokenizer(folder: Path) -> None:
    """The tiny tokenizer with turn marks, a token for a line's end, and a chat template."""
    from tokenizers import AddedToken, Regex, pre_tokenizers
    from transformers import AutoTokenizer

    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spaces, lines = pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, lines])
    marks = [AddedToken(mark, special=True, normalized=False) for mark in ("<start_of_turn>", "<end_of_turn>")]
    tokenizer.add_tokens([*marks, "user", "model", AddedToken("\n", normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def tiny_config(**changes):
    from transformers import Gemma3TextConfig

    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "sliding_window": 16,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return Gemma3TextConfig(**settings | changes)


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory) -> Path:
    """A Hugging Face folder of a random 4-layer Gemma 3, 32 wide."""
    import torch
    from transformers import Gemma3ForCausalLM

    folder = tmp_path_factory.mktemp("tiny-gemma")
    torch.manual_seed(0)
    Gemma3ForCausalLM(tiny_config()).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def grouped_gemma(tmp_path_factory) -> Path:
    """Another, with two groups of heads, so that each of two ranks that share it has attention to do."""
    import torch
    from transformers import Gemma3ForCausalLM

    folder = tmp_path_factory.mktemp("grouped-gemma")
    torch.manual_seed(2)
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2)
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_documents(path: Path, count: int, seed: int) -> Path:
    """JSON lines of random words."""
    chosen = random.Random(seed)
    texts = [" ".join(chosen.choices(WORDS, k=chosen.randint(20, 120))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    """About 84,000 tokens in 1,200 documents."""
    return write_documents(tmp_path_factory.mktemp("corpus") / "documents.jsonl", 1200, seed=1)


@pytest.fixture
def tiny_recipe(tiny_gemma: Path, documents: Path, tmp_path: Path) -> dict:
    """Six dictionaries of the tiny model; about 120 steps in 15 windows."""
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "model": {"name": str(tiny_gemma), "dtype": "bfloat16"},
        "corpus": {"paths": [str(documents)], "context": 32, "train_tokens": 61_440, "heldout_tokens": 2048},
        "harvest": {"sequences": 8, "cpus": 0.5},
        "stream": {"window_sequences": 128, "batch_rows": 512},
        "sweep": [
            {"layers": [0, 2, 3], "activations": ["batch_topk"], "widths": [64], "l0s": [8]},
            {"layers": [1], "sites": ["attn_out", "mlp_in", "mlp_out"], "activations": ["jumprelu"], "widths": [64],
             "l0s": [8]},
        ],
        "fit": {"workers": 2, "cpus_per_worker": 0.5, "report_every_steps": 2, "checkpoint_every_steps": 10,
                "products": "float32"},
        "evaluation": {"loss_tokens": 512},
    }  # fmt: skip


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    from tests.s3_server import S3Server

    folder = tmp_path_factory.mktemp("s3")
    server = S3Server(folder)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def s3(s3_server):
    """A client of the S3 server, and for the length of a module the environment through which AWS clients find it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3_server.environment.items():
            patch.setenv(key, value)
        yield s3_server.client()
