"""Rollouts: the model's own answers to the prompts of a chat corpus, sampled once and stored as its tokens.

Ray Data actors answer blocks of prompts, a fixed range of `harvest.sequences` of them. A block's sampling is seeded
by (seed, side, block), so that the answers do not depend on actors, timing or crashes.
"""

import hashlib

import numpy as np
import torch
from ray.data import ActorPoolStrategy
from torch import Tensor

from cluster import gemma
from cluster.chat import Template
from cluster.harvest import BLOCK, blocks
from cluster.recipe import Recipe
from cluster.recipe import Rollouts as Settings
from cluster.tokens import ASSISTANT, PADDING

END_OF_TURN = "<end_of_turn>"


class Answerer:
    """Ray Data UDF: block numbers → the block's conversations with their answers. Owns one model."""

    def __init__(self, recipe: Recipe, settings: Settings, side: str, tokens: np.ndarray, roles: np.ndarray):
        torch.set_num_threads(max(1, int(recipe.harvest.cpus)))
        self.device = torch.device("cuda" if recipe.harvest.gpus else "cpu")
        self.model = gemma.load(recipe.model, self.device)
        tokenizer = Template(recipe.model).tokenizer
        self.stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
        self.padding = tokenizer.pad_token_id
        self.settings, self.seed, self.side = settings, recipe.seed, side
        self.sequences, self.tokens, self.roles = recipe.harvest.sequences, tokens, roles

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        block = int(batch[BLOCK][0])
        here = slice(block * self.sequences, (block + 1) * self.sequences)
        tokens, roles = self.tokens[here].copy(), self.roles[here].copy()
        answers = self._answer(block, torch.from_numpy(tokens).long(), torch.from_numpy(roles != PADDING))
        for conversation, said, answer in zip(tokens, roles, answers, strict=True):
            start = int((said != PADDING).sum())
            conversation[start : start + len(answer)] = answer
            said[start : start + len(answer)] = ASSISTANT
        return {"tokens": tokens, "roles": roles}

    @torch.no_grad()
    def _answer(self, block: int, tokens: Tensor, real: Tensor) -> list[np.ndarray]:
        """The new tokens of each prompt [sequences, T], up to the one that ends the turn."""
        longest = int(real.sum(1).max())
        # The answers begin at one column: prompts are padded on their left.
        shifts = longest - real.sum(1)
        columns = torch.arange(longest) - shifts[:, None]
        mask = columns >= 0
        prompts = tokens.gather(1, columns.clamp(min=0)).masked_fill(~mask, self.padding)
        torch.manual_seed(_seed(self.seed, self.side, block))
        settings = self.settings
        sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        generated = self.model.generate(  # type: ignore[operator]
            input_ids=prompts.to(self.device),
            attention_mask=mask.long().to(self.device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=settings.temperature > 0,
            eos_token_id=self.stops,
            pad_token_id=self.padding,
            **(sampling if settings.temperature > 0 else {}),
        )
        return [self._until_stop(answer) for answer in generated[:, longest:].cpu().numpy()]

    def _until_stop(self, answer: np.ndarray) -> np.ndarray:
        ends = np.isin(answer, self.stops).nonzero()[0]
        return answer[: ends[0] + 1] if len(ends) else answer


def _seed(seed: int, side: str, block: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {side} {block}".encode()).digest()[:8], "big") >> 1


def answer(
    recipe: Recipe, settings: Settings, side: str, tokens: np.ndarray, roles: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and their roles, each [sequences, context], with the answers in the place of their padding."""
    n_blocks = -(-len(tokens) // recipe.harvest.sequences)
    answered = blocks(0, n_blocks).map_batches(
        Answerer,
        fn_constructor_args=(recipe, settings, side, tokens, roles),
        batch_size=1,
        num_cpus=recipe.harvest.cpus,
        num_gpus=recipe.harvest.gpus,
        compute=ActorPoolStrategy(size=recipe.harvest.actors),
    )
    batches = list(answered.iter_batches(batch_size=None, batch_format="numpy"))
    tokens, roles = (np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "roles"))
    return tokens, roles
