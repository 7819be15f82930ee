"""Texts read and answered by the ranks of one model: python -m tests.serve.two_ranks FOLDER RANKS REPORT

With more than one, a follower is killed in the end, and what the first rank says then is reported too.
"""

import sys
from itertools import zip_longest
from pathlib import Path

import torch

from sae.dictionary import Dictionary
from sae.sites import Site
from serve.passes import Ranks
from serve.steering import Change, Latent, Steering
from serve.texts import Prompt, Sampling, Texts
from tests.published import make_dictionary, make_spec
from tests.serve.texts import HEADS, TEXT, D

SITES = [Site(layer, name) for layer in (0, 2) for name in ("attn_out", "mlp_in", "mlp_out", "resid_post")]


def steering() -> Steering:
    """Of a site that is cut over the ranks, and of two that are not."""
    heads, plain = (make_dictionary(make_spec(kind), d=d) for kind, d in (("attn_sae", HEADS), ("sae", D)))
    return Steering(
        [
            _latent(Change("", 1, "clamp", 2e3), heads, Site(1, "attn_out")),
            _latent(Change("", 2, "ablate"), plain, Site(1, "resid_post")),
            _latent(Change("", 3, "add", 1e3), plain, Site(2, "mlp_out")),
        ]
    )


def _latent(change: Change, dictionary: Dictionary, site: Site) -> Latent:
    return Latent(change, dictionary, [site], [site])


def main(folder: str, ranks: int, report: Path) -> None:
    torch.set_num_threads(1)
    texts = Texts(folder, "float32", 64, ranks)
    prompt = Prompt(TEXT)
    read = texts.read(prompt, SITES)
    orders = [(prompt, steering(), Sampling(8, 1e-3, 0)), (Prompt(TEXT[:40]), steering(), Sampling(5, 1.0, 3))]
    found = {"rows": read.rows, "answers": list(zip_longest(*(texts.answer(*order) for order in orders)))}
    abandoned = texts.answer(prompt, steering(), Sampling(8, 0.0, 0))
    next(abandoned)
    abandoned.close()
    found |= {"again": texts.read(prompt, SITES).rows, "healthy": texts.passes.healthy}
    if isinstance(texts.passes, Ranks):
        follower = texts.passes.followers[0]
        follower.kill()
        follower.wait()
        found["bereft"] = texts.passes.healthy
    torch.save(found, report)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
