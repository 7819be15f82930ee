"""A row has the same bits alone and in any batch, by one thread or two, for every kind of dictionary."""

import pytest
import torch

from sae.dictionary import Dictionary
from tests.published import KINDS, make_dictionary, make_spec

SIZES = (1, 2, 3, 4, 5, 8, 15, 33, 64, 129, 250)


@pytest.fixture(params=KINDS)
def dictionary(request: pytest.FixtureRequest) -> Dictionary:
    """Wide enough for the CPU's products to be blocked, and for MKL's to depend on the number of rows."""
    return make_dictionary(make_spec(request.param, width=384), d=160)


def rows(dictionary: Dictionary) -> torch.Tensor:
    return torch.randn(256, dictionary.shape.d_in, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("packed", [False, True])
def test_row__has_the_same_bits_in_any_batch(dictionary: Dictionary, packed: bool) -> None:
    x_BD = rows(dictionary)
    f_BF = dictionary.encode(x_BD)
    y_BD = dictionary.decode(f_BF, x_BD)
    used = dictionary.packed() if packed else dictionary
    for size in SIZES:
        part = slice(5, 5 + size)
        assert torch.equal(used.encode(x_BD[part]), f_BF[part]), size
        assert torch.equal(used.decode(f_BF[part], x_BD[part]), y_BD[part]), size


def test_threads__do_not_matter(dictionary: Dictionary) -> None:
    x_BD, before = rows(dictionary), torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            f_BF = dictionary.encode(x_BD)
            answers.append((f_BF, dictionary.decode(f_BF, x_BD)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*answers, strict=True))


def test_products__are_right(dictionary: Dictionary) -> None:
    x_BD, double = rows(dictionary), _in_double(dictionary)
    f_BF = dictionary.encode(x_BD)
    torch.testing.assert_close(f_BF.double(), double.encode(x_BD.double()), rtol=1e-5, atol=1e-5)
    y_BD = double.decode(f_BF.double(), x_BD.double())
    torch.testing.assert_close(dictionary.decode(f_BF, x_BD).double(), y_BD, rtol=1e-5, atol=1e-4)


def test_gradients__pass(dictionary: Dictionary) -> None:
    x_BD = rows(dictionary).requires_grad_()
    dictionary.decode(dictionary.encode(x_BD), x_BD).sum().backward()
    assert x_BD.grad is not None
    assert x_BD.grad.count_nonzero()


def _in_double(dictionary: Dictionary) -> Dictionary:
    """Computed by plain products, which `sae.rows` leaves alone in float64."""
    w_enc, w_dec, w_skip = (
        [w.double() for w in part] for part in (dictionary.w_enc, dictionary.w_dec, dictionary.w_skip)
    )
    vectors = (part.double() for part in (dictionary.b_enc_F, dictionary.threshold_F, dictionary.b_dec_D))
    b_enc_F, threshold_F, b_dec_D = vectors
    return Dictionary(dictionary.shape, w_enc, b_enc_F, threshold_F, w_dec, b_dec_D, w_skip, dictionary.k)
