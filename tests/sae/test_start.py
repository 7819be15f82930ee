"""Starting from published dictionaries: the same function, and single layers joined."""

import pytest
import torch

from sae.dictionary import Dictionary
from sae.fold import Scales
from sae.shape import Shape
from sae.start import StartError, choose, finetune, join
from sae.step import TrainingDictionary
from tests.sae.specs import KINDS, SITE_WIDTHS, make_rows, make_spec
from tests.sae.test_step import SCALES, raw, started


def scales_of(spec) -> Scales:
    return Scales([SCALES[site.key] for site in spec.reads], [SCALES[site.key] for site in spec.writes])


def fresh(spec, start) -> TrainingDictionary:
    dictionary = TrainingDictionary(spec, SITE_WIDTHS, torch.device("cpu"))
    dictionary.take_over(start)
    return dictionary


@pytest.mark.parametrize(
    ("activation", "source"), [("jumprelu", "jumprelu"), ("gated", "jumprelu"), ("batch_topk", "batch_topk")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_finetune__starts_at_the_published_function(kind: str, activation: str, source: str) -> None:
    spec = make_spec(kind, activation)
    published = started(make_spec(kind, source)).folded(SCALES)
    dictionary = fresh(spec, finetune(published, Shape.of(spec, SITE_WIDTHS), scales_of(spec), spec.autoencodes))
    for w_dec in dictionary.weights("w_dec"):
        torch.testing.assert_close(w_dec.norm(dim=1), torch.ones(len(w_dec)))
    again = dictionary.folded(SCALES)
    x = raw(spec, make_rows(spec, seed=7)[0], spec.reads)
    expected = published.decode(published.encode(x), x)
    torch.testing.assert_close(again.decode(again.encode(x), x), expected, rtol=1e-3, atol=0.05)


def test_finetune__a_relu_has_the_published_latents_active() -> None:
    spec = make_spec("sae", "relu")
    published = started(make_spec("sae", "jumprelu")).folded(SCALES)
    again = fresh(spec, finetune(published, Shape.of(spec, SITE_WIDTHS), scales_of(spec), autoencodes=True)).folded(
        SCALES
    )
    x = raw(spec, make_rows(spec, seed=7)[0], spec.reads)
    assert ((again.encode(x) > 0) == (published.encode(x) > 0)).float().mean() > 0.999


def test_finetune__keeps_the_weights_through_the_first_batch_and_goes_on_from_their_l0() -> None:
    spec = make_spec("sae", "jumprelu", training={"l0_decay_fraction": 0.5, "learning_rate": 1e-9})
    published = started(make_spec("sae", "jumprelu", l0=15)).folded(SCALES)
    dictionary = fresh(spec, finetune(published, Shape.of(spec, SITE_WIDTHS), scales_of(spec), autoencodes=True))
    before = {name: value.clone() for name, value in dictionary.parameters.items()}
    x, y = make_rows(spec, seed=3)
    dictionary.step(x, y, progress=1e-6)
    for name, value in dictionary.parameters.items():
        torch.testing.assert_close(value, before[name], msg=name)
    measured = (published.encode(raw(spec, x, spec.reads)) > 0).sum(1).float().mean()
    assert dictionary.l0_start == pytest.approx(measured.item(), rel=0.02)


def test_finetune__another_shape_is_refused() -> None:
    published = started(make_spec("sae", "jumprelu", width=24)).folded(SCALES)
    spec = make_spec("sae", "jumprelu")
    with pytest.raises(StartError, match="24 latents"):
        finetune(published, Shape.of(spec, SITE_WIDTHS), scales_of(spec), autoencodes=True)


def test_choose__takes_prefixes_and_strikes_what_repeats_an_earlier_layer() -> None:
    directions = torch.eye(8)
    first = directions[[0, 1, 2, 3]]
    later = directions[[4, 1, 5, 0, 6]]  # its second and fourth latents read what the first layer's wrote
    taken = choose([first, later], [first, later], width=3)
    assert taken[0].tolist() == [0, 1, 2]
    assert taken[1].tolist() == [0, 2, 4]


@pytest.mark.parametrize("kind", ["causal_crosscoder", "clt", "skip_clt"])
def test_join__latents_fire_as_those_they_come_from(kind: str, monkeypatch) -> None:
    for key in SITE_WIDTHS:
        monkeypatch.setitem(SITE_WIDTHS, key, 7)  # what is compared across layers lies in one residual stream
    spec = make_spec(kind, "jumprelu", width=30)
    single = {"causal_crosscoder": "sae", "clt": "transcoder", "skip_clt": "skip_transcoder"}[kind]
    singles, parts = [], []
    for layer in spec.layers:
        one = started(make_spec(single, "jumprelu", width=20).model_copy(update={"layers": (layer,)}))
        singles.append(one.folded(SCALES))
    dictionary = fresh(spec, join(singles, Shape.of(spec, SITE_WIDTHS), scales_of(spec), spec.autoencodes))
    x = raw(spec, make_rows(spec, seed=7)[0], spec.reads)
    joined = dictionary.folded(SCALES)
    fires = joined.encode(x) > 0
    for columns, one in zip(joined.shape.read_columns, singles, strict=True):
        parts.append(one.encode(x[:, columns]) > 0)
    share = spec.width // len(spec.layers)
    assert torch.equal(fires[:, :share], parts[0][:, :share]), "the first layer's prefix, untouched"
    for layer, part in enumerate(parts):
        mine = fires[:, layer * share : (layer + 1) * share].sum(0).tolist()
        assert set(mine) <= set(part.sum(0).tolist()), "each later latent is one of its layer's"
    assert len(dictionary.weights("w_skip")) == (len(spec.layers) if "skip" in kind else 0)


def test_join__a_latent_writes_to_later_layers_what_the_one_like_it_writes_there(monkeypatch) -> None:
    for key in SITE_WIDTHS:
        monkeypatch.setitem(SITE_WIDTHS, key, 7)
    spec = make_spec("causal_crosscoder", "jumprelu", width=9)
    directions, away = torch.eye(7)[:3], torch.eye(7)[3:6]
    singles = []
    for layer in spec.layers:
        # Latent 0 of layer 0 points along what latent 1 of layer 1 reads, by half; nothing else is alike.
        reads = directions if layer != 1 else away.clone()
        if layer == 1:
            reads[1] = (directions[0] + 3**0.5 * away[1]) / 2
        writes = directions if layer == 0 else away.flip(0)
        zeros = torch.zeros(3)
        shape = Shape.layered(3, [7], [7], 1)
        singles.append(Dictionary(shape, [reads.T.contiguous()], zeros, zeros, [writes], torch.zeros(7)))
    ones = Scales([1.0] * 3, [1.0] * 3)
    joined = join(singles, Shape.of(spec, SITE_WIDTHS), ones, autoencodes=True)
    torch.testing.assert_close(joined.w_dec[0][0], torch.cat([directions[0], 0.5 * away[1], away[2]]))
    torch.testing.assert_close(joined.w_dec[2], away.flip(0))


def test_join__one_dictionary_a_layer_is_needed() -> None:
    spec = make_spec("clt", "jumprelu")
    with pytest.raises(StartError, match="give one a layer"):
        join([], Shape.of(spec, SITE_WIDTHS), scales_of(spec), autoencodes=False)
