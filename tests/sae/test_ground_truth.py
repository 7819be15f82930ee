"""Rows made from a known dictionary: training finds it again, for every activation and kind."""

import pytest
import torch
from torch import Tensor

from sae.spec import DictionarySpec, Options, Training
from sae.step import TrainingDictionary

D, FEATURES, OFTEN = 48, 80, 0.01
LEARNING = {"learning_rate": 3e-3, "jumprelu": {"bandwidth": 0.03, "coefficient": 0.1}}


class World:
    """Features with random directions: some common, some rare, a quarter of them firing only beside another."""

    def __init__(self, n: int = FEATURES, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.directions = torch.nn.functional.normalize(torch.randn(n, D, generator=generator))
        self.frequency = torch.logspace(-2.7, -0.9, n)  # 0.2 % to 13 % of the rows
        self.parent = torch.randint(0, n, (n,), generator=generator)
        self.follows = torch.rand(n, generator=generator) < 0.25

    def codes(self, n_rows: int, seed: int) -> Tensor:
        """How strongly each feature fires on each row. [rows, features]"""
        generator = torch.Generator().manual_seed(seed)
        free = torch.rand(n_rows, len(self.frequency), generator=generator) < self.frequency
        beside = free[:, self.parent] & (torch.rand(free.shape, generator=generator) < 0.5)
        fires = torch.where(self.follows, beside, free)
        return fires * (0.5 + torch.rand(free.shape, generator=generator))

    def seen(self) -> Tensor:
        """Features that fire on at least 1 % of the rows: what a short run can learn."""
        return (self.codes(20_000, seed=999) > 0).float().mean(0) >= OFTEN


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1).mean().sqrt()


def train(
    kind: str, activation: str, rows, layers=(0,), width=128, l0=5, steps=800, options=None
) -> TrainingDictionary:
    torch.set_num_threads(1)
    spec = DictionarySpec(
        id="x", kind=kind, site="resid_post", layers=layers, activation=activation, width=width, l0=l0, seed=0,
        folder="x", options=options or Options(auxk={}, dead_after_rows=20_000), training=Training(**LEARNING),
    )  # fmt: skip
    widths = {site.key: D for site in spec.sites}
    dictionary = TrainingDictionary(spec, widths, torch.device("cpu"))
    for step in range(steps):
        dictionary.step(*rows(step), progress=(step + 1) / steps)
    return dictionary


def best_cosines(learned_FD: Tensor, true_GD: Tensor) -> Tensor:
    normalise = torch.nn.functional.normalize
    return (normalise(true_GD) @ normalise(learned_FD).T).amax(1)


@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk", "jumprelu", "gated"])
def test_sae__recovers_correlated_and_rare_features(activation: str) -> None:
    world = World()
    l0 = round((world.codes(20_000, seed=999) > 0).float().sum(1).mean().item())

    def rows(step: int):
        x = unit(world.codes(512, step) @ world.directions)
        return x, x

    dictionary = train("sae", activation, rows, l0=l0)
    found = best_cosines(dictionary.weights("w_dec")[0], world.directions[world.seen()])
    assert world.seen().sum() > FEATURES / 2
    assert found.mean() >= 0.9


def mlp_rows(world: World, linear: Tensor | None = None):
    """x, and y = Σ relu(a·x − 0.25)·b over the active features, with a linear part if one is given."""
    out = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(5)))

    def rows(step: int):
        codes = world.codes(512, step)
        x = codes @ world.directions
        y = torch.relu(x @ world.directions.T - 0.25) * (codes > 0) @ out
        return unit(x), unit(y if linear is None else y + x @ linear)

    return out, rows


def test_transcoder__recovers_a_sparse_mlp() -> None:
    world = World()
    out, rows = mlp_rows(world)
    dictionary = train("transcoder", "batch_topk", rows)
    assert best_cosines(dictionary.weights("w_dec")[0], out[world.seen()]).mean() >= 0.9


def test_skip_transcoder__leaves_the_linear_part_to_the_skip() -> None:
    """Sparse latents can carry it as well, so the two share it; with the skip the error is far lower."""
    world = World()
    linear = 0.5 * torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(6))).Q
    _, rows = mlp_rows(world, linear)
    fvu = {}
    for affine in (False, True):
        options = Options(affine=affine, auxk={}, dead_after_rows=20_000)
        dictionary = train("transcoder", "batch_topk", rows, options=options)
        fvu[affine] = dictionary.sums.take()["fvu"]
    skip = dictionary.weights("w_skip")[0]
    assert torch.nn.functional.cosine_similarity(skip.flatten(), linear.flatten(), dim=0) > 0.5
    assert fvu[True] < 0.8 * fvu[False], fvu


def test_causal_crosscoder__puts_each_feature_at_its_first_layer() -> None:
    """A feature appears at one of three layers and stays, along other directions at each."""
    world, layers = World(n=60), 3
    generator = torch.Generator().manual_seed(6)
    directions = torch.nn.functional.normalize(torch.randn(60, layers, D, generator=generator), dim=2)
    first = torch.arange(60) % layers

    def rows(step: int):
        codes = world.codes(512, step)
        parts = [unit((codes * (first <= layer)) @ directions[:, layer]) for layer in range(layers)]
        x = torch.cat(parts, dim=1)
        return x, x

    dictionary = train("crosscoder", "batch_topk", rows, layers=(0, 1, 2), width=150, l0=4)
    normalise, decoders = torch.nn.functional.normalize, dictionary.weights("w_dec")
    at_home = []
    for feature in world.seen().nonzero()[:, 0].tolist():
        # How well each layer's latents write all that the feature writes: a later layer's cannot write the first.
        target = directions[feature, first[feature] :].flatten()
        scores = []
        for layer, decoder in enumerate(decoders):
            start = (first[feature].item() - layer) * D
            part = decoder[:, max(0, start) :]
            reach = target[max(0, -start) :]
            scores.append((normalise(part) @ reach).max().item() / target.norm().item())
        at_home.append(max(range(layers), key=scores.__getitem__) == first[feature])
    assert sum(at_home) / len(at_home) >= 0.9
