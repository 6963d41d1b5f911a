"""Which images of two sets are partners."""

import pytest

from qdiff.evaluation.pairs import few, numbers_of, pair_up


@pytest.mark.parametrize(
    ("names", "others", "partners", "unused"),
    [
        (["0.png", "1.png", "10.png"], ["sample_000000.png", "sample_000001.png", "sample_000010.png"], (0, 1, 2), ()),
        (["0.png", "2.png"], ["0.png", "1.png", "2.png"], (0, 2), (1,)),
        (["0.png", "1.png", "2.png"], ["0.png", "1.png", "3.png"], (0, 1, None), (2,)),
        (["1.png", "2.png"], ["0", "1"], (1, None), (0,)),  # an array's places are numbers from 0
        (["cat.png", "dog.jpg"], ["dog.png", "cat.png"], (1, 0), ()),
        (["cat_1.png", "dog_1.png"], ["dog_1.png", "cat_1.png"], (1, 0), ()),  # numbers alone would say nothing
        (["cat.png"], ["0"], (None,), (0,)),
        (["0.png", "grid.png"], ["0.png", "1.png"], (0, None), (1,)),
        (["0.jpg", "0.png"], ["0.png", "0.jpg"], (1, 0), ()),
    ],
)
def test_partners(names, others, partners, unused):
    found = pair_up(names, others)
    assert found.partners == partners and found.unused == unused
    assert found.alone == tuple(i for i, partner in enumerate(partners) if partner is None)


def test_numbers():
    assert numbers_of(["a_007.png", "a_10.png"]) == (7, 10)
    assert numbers_of(["1.png", "01.png"]) is numbers_of(["a1.png", "b2.png"]) is numbers_of(["a.png"]) is None


def test_few_names():
    assert few(["a", "b", "c"]) == "a, b, c" and few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
