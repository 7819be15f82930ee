"""End-to-end finetuning: each staged dictionary learns on, with the real model in the loop (`sae.end_to_end`)."""

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from torch import Tensor, nn

from cluster import gemma
from cluster.calibrate import SiteScale, kept
from cluster.console import say
from cluster.recipe import EndToEnd, Recipe
from cluster.tokens import Sequences, Span
from sae import artifact, hooks
from sae.end_to_end import Finetuned, Output, loss
from sae.fold import Scales
from sae.sites import Site
from sae.spec import DictionarySpec


def finetune(
    recipe: Recipe, settings: EndToEnd, staged: dict[str, Path], scales: dict[str, SiteScale], tokens_path: Path
) -> None:
    """Puts the finetuned weights of every dictionary in the place of the staged ones, one Ray task each."""
    harvest = recipe.harvest
    resources = {"num_cpus": harvest.cpus, "num_gpus": harvest.gpus_for_whole}
    task = _finetune.options(**resources, label_selector=harvest.label_selector)
    waiting = {
        task.remote(recipe, settings, spec, staged[spec.id], scales, tokens_path): spec for spec in recipe.specs()
    }
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        before, after = ray.get(done)
        say(f"end to end: {waiting.pop(done).id}: KL {before:.4f} -> {after:.4f} nats a token")


@ray.remote
def _finetune(
    recipe: Recipe,
    settings: EndToEnd,
    spec: DictionarySpec,
    folder: Path,
    scales: dict[str, SiteScale],
    tokens_path: Path,
) -> tuple[float, float]:
    """Mean KL over the first and the last tenth of the steps."""
    torch.set_num_threads(max(1, int(recipe.harvest.cpus)))
    loop = Loop(recipe, settings, spec, folder, scales)
    tokens = Sequences(recipe, tokens_path, loop.device)
    divergences = [
        loop.step(tokens.read(first, settings.sequences))
        for first in range(0, settings.tokens // recipe.corpus.context, settings.sequences)
    ]
    config = artifact.read(folder)[1]
    shutil.rmtree(folder)
    artifact.write(folder, loop.dictionary.published(), config)
    artifact.seal(folder)
    tenth = max(1, len(divergences) // 10)
    return float(np.mean(divergences[:tenth])), float(np.mean(divergences[-tenth:]))


class Loop:
    """One dictionary, the model, and Adam."""

    def __init__(
        self, recipe: Recipe, settings: EndToEnd, spec: DictionarySpec, folder: Path, scales: dict[str, SiteScale]
    ):
        self.settings, self.spec = settings, spec
        self.device = torch.device("cuda" if recipe.harvest.gpus_for_whole else "cpu")
        self.model = gemma.load(recipe.model, self.device)
        self.limits = {s.key: recipe.harvest.outlier_norm * scales[s.key].median_norm for s in spec.sites}
        factors = Scales(*([scales[site.key].scale for site in sites] for sites in (spec.reads, spec.writes)))
        published = artifact.read(folder)[0].to(self.device)
        self.dictionary = Finetuned(published, factors, spec.autoencodes, spec.training.jumprelu)
        self.optimiser = torch.optim.Adam(
            self.dictionary.learned(), lr=self.settings.learning_rate, betas=spec.training.adam_betas, fused=True
        )

    def step(self, span: Span) -> float:
        """One Adam step on some sequences; the mean KL(p ‖ p̂) in nats a token."""
        output, kl = self.forward(span)
        self.optimiser.zero_grad()
        loss(output, kl, self.settings.beta, self.spec.l0, self.spec.training.jumprelu).backward()
        self.optimiser.step()
        return kl.item()

    def forward(self, span: Span) -> tuple[Output, Tensor]:
        """What the dictionary makes of the kept rows of some sequences, and the mean KL(p ‖ p̂) with it."""
        captured: dict[Site, Tensor] = {}

        def keep(site: Site, tensor: Tensor) -> None:
            captured[site] = tensor

        with torch.no_grad(), hooks.hooked(self.model, {site: partial(keep, site) for site in self.spec.sites}):
            clean_ND = self._hidden(span)
        norms = {site.key: tensor.float().norm(dim=-1) for site, tensor in captured.items()}
        positions = kept(span.eligible, norms, self.limits).flatten().nonzero()[:, 0]

        def rows(sites: Iterable[Site]) -> Tensor:
            return torch.cat([captured[site].flatten(0, 1)[positions].float() for site in sites], dim=1)

        output = self.dictionary(rows(self.spec.reads), rows(self.spec.writes))
        parts = output.rebuilt_BD.split(self.dictionary.shape.write_widths, dim=1)
        edits: dict[Site, hooks.Edit] = {
            site: partial(hooks.splice, positions, part) for site, part in zip(self.spec.writes, parts, strict=True)
        }
        with hooks.hooked(self.model, edits):
            return output, self._divergence(clean_ND, self._hidden(span))

    def _hidden(self, span: Span) -> Tensor:
        """The last hidden state of every token that is no padding [N, D]."""
        hidden_BTD: Tensor = hooks.trunk(self.model)(span.ids).last_hidden_state
        return hidden_BTD[span.real]

    def _divergence(self, clean_ND: Tensor, spliced_ND: Tensor) -> Tensor:
        """Mean over tokens of KL(p ‖ p̂) of the next-token distributions."""
        head = self.model.get_submodule("lm_head")
        p, q = (nn.functional.log_softmax(head(hidden).float(), dim=-1) for hidden in (clean_ND, spliced_ND))
        return nn.functional.kl_div(q, p.detach(), log_target=True, reduction="batchmean")
