"""A Gemma 3 that reads texts: their tokens, the rows at its sites, and answers in which chosen latents are changed.

T positions of one text, D site width. Answers are computed in pairs, the steered one and the unsteered one beside it,
as the two rows of one batch.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.sites import STATIC_TOKENS, Site
from serve.passes import Type, open_passes
from serve.problems import Problem
from serve.steering import Steering

LONGEST_TOKEN = 32  # characters; a text with more of them for each token allowed is refused unread
HELD_BACK = "�"  # what a token that ends within a character decodes to


class Prompt(NamedTuple):
    """A text, or a conversation."""

    text: str | None
    messages: tuple[dict[str, str], ...] = ()


class Token(NamedTuple):
    """One position."""

    id: int
    text: str
    masked: bool
    """Whether dictionaries are not trained on its rows: the begin of a text, and what opens every chat."""


class Reading(NamedTuple):
    """What one pass over a text gave."""

    tokens: list[Token]
    rows: dict[str, np.ndarray]
    """By site: float32 [T', D], of the positions that are not masked."""


class Sampling(NamedTuple):
    """How an answer is drawn."""

    new_tokens: int
    temperature: float
    """0: the likeliest token each time."""
    seed: int


class Step(NamedTuple):
    """What one more token adds to both answers; an answer that has ended adds nothing."""

    steered: str
    plain: str


class Texts:
    """One model and its tokenizer. Not for several threads at once."""

    def __init__(self, folder: str, dtype: Type, longest: int, ranks: int = 1):
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.passes = open_passes(folder, dtype, ranks)
        self.device, model = self.passes.device, self.passes.model
        self.longest = longest
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.layers = model.config.get_text_config().num_hidden_layers

    def read(self, prompt: Prompt, sites: list[Site]) -> Reading:
        """Problem if the text is too long, or a conversation that this model has no form for."""
        tokens = self._tokens(prompt, answer=False)
        kept = torch.tensor([not token.masked for token in tokens])
        if not kept.any():
            return Reading(tokens, {})
        captured = self.passes.capture(_ids(tokens), sites)
        return Reading(tokens, {site.key: rows[0, kept].float().cpu().numpy() for site, rows in captured.items()})

    def answer(self, prompt: Prompt, steering: Steering, sampling: Sampling) -> Iterator[Step]:
        """Problem as `read` has it. The draws of both answers are of the same random numbers, so that where they
        differ it is for the latents that were changed."""
        tokens = self._tokens(prompt, answer=True)
        ids, masked = _ids(tokens).expand(2, -1), torch.tensor([token.masked for token in tokens])
        noise = torch.Generator().manual_seed(sampling.seed)
        written = [_Written(self.tokenizer), _Written(self.tokenizer)]
        with self.passes.answer() as following:
            for _ in range(sampling.new_tokens):
                chosen = _draw(following(ids, steering.edits(masked)), sampling.temperature, noise)
                yield Step(*(one.add(int(id), self.ends) for one, id in zip(written, chosen, strict=True)))
                if all(one.ended for one in written):
                    return
                ids, masked = chosen[:, None], torch.zeros(1, dtype=torch.bool)

    def _tokens(self, prompt: Prompt, *, answer: bool) -> list[Token]:
        if prompt.text is not None:
            self._check(len(prompt.text), self.longest * LONGEST_TOKEN, "characters")
            ids, masked = self.tokenizer(prompt.text)["input_ids"], 1
            if ids[:1] != [self.tokenizer.bos_token_id]:
                ids = [self.tokenizer.bos_token_id, *ids]
        else:
            ids, masked = self._chat(prompt, answer), STATIC_TOKENS
        self._check(len(ids), self.longest, "tokens")
        return [Token(id, self.tokenizer.decode([id]), n < masked) for n, id in enumerate(ids)]

    def _chat(self, prompt: Prompt, answer: bool) -> list[int]:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise Problem(422, "messages: this service's model has no chat template: send a text")
        self._check(sum(len(one["content"]) for one in prompt.messages), self.longest * LONGEST_TOKEN, "characters")
        try:
            text = self.tokenizer.apply_chat_template(
                list(prompt.messages), tokenize=False, add_generation_prompt=answer
            )
        except TemplateError as error:
            raise Problem(422, f"messages: {' '.join(str(error).split())[:200]}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check(self, count: int, most: int, unit: str) -> None:
        if count > most:
            raise Problem(413, f"a text has at most {most} {unit}, and this one has {count}")


class _Written:
    """An answer as it grows; characters come out whole."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.told, self.ended = "", False

    def add(self, id: int, ends: set[int]) -> str:
        self.ended = self.ended or id in ends
        if self.ended:
            return ""
        self.ids.append(id)
        text = self.tokenizer.decode(self.ids)
        if text.endswith(HELD_BACK):
            return ""
        new, self.told = text[len(self.told) :], text
        return str(new)


def _ids(tokens: list[Token]) -> Tensor:
    return torch.tensor([[token.id for token in tokens]])


def _draw(logits: Tensor, temperature: float, noise: torch.Generator) -> Tensor:
    """A token for each of both: the largest of logits/temperature plus Gumbel noise, which is a draw of the softmax
    (Maddison et al. 2014)."""
    if temperature == 0:
        return logits.argmax(1)
    uniform = torch.rand(logits.shape[1], generator=noise).clamp(1e-20, 1 - 1e-7)
    return (logits / temperature - (-uniform.log()).log()).argmax(1)
