"""Attention maps of words: pieces of a word, cut reports, and masks."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cxrvlm.attention import share_inside, to_pixels, word_maps
from cxrvlm.data import load_studies, make_tokenizer
from cxrvlm.initialisation import build_model
from cxrvlm.local import word_attention
from cxrvlm.settings import load_arm, load_settings
from cxrvlm.text import tokenize


@pytest.fixture(scope="module")
def model():
    "Random weights, and a vocabulary so small that most words are cut."
    settings = load_settings("smoke")
    tokenizer = make_tokenizer(settings, load_studies(settings)[0])
    return build_model(settings, load_arm("baseline"), tokenizer, seed=0).eval()


def test_each_word_has_the_mean_of_its_pieces(model):
    report, image = "Cardiomegaly, and Xylophones.", torch.rand(1, 96, 96)
    maps = word_maps(model, image, report, 32, 0.1)
    assert [word for word, _ in maps] == ["Cardiomegaly", ",", "and", "Xylophones", "."]
    tokens = tokenize(model.tokenizer, [report], 32)
    with torch.no_grad():
        regions, words = model.embed_images(image[None]).local[0], model.embed_texts(tokens).local[0]
    attention = word_attention(regions, words, 0.1)
    assert tokens.word_ids(0).count(3) > 1
    for number, (_, found) in enumerate(maps):
        pieces = [i for i, word in enumerate(tokens.word_ids(0)) if word == number]
        assert found.shape == (3, 3) and found.sum().item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(found.flatten(), attention[pieces].mean(0))


def test_a_report_that_is_cut_has_the_words_that_are_left(model):
    words = [word for word, _ in word_maps(model, torch.rand(1, 32, 32), "no " * 40, max_tokens=10)]
    assert words == ["no"] * 8


@given(st.integers(1, 6), st.integers(6, 20), st.integers(0, 2**31))
def test_attention_on_pixels(side, size, seed):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(side, side, generator=generator)
    attention /= attention.sum()
    assert to_pixels(attention, size).sum().item() == pytest.approx(1, abs=1e-4)
    mask = torch.rand(size, size, generator=generator) < 0.3
    inside, even = share_inside(attention, mask)
    outside, rest = share_inside(attention, ~mask)
    assert inside + outside == pytest.approx(1, abs=1e-4) and even + rest == pytest.approx(1, abs=1e-4)
    assert share_inside(torch.full((side, side), 1 / side**2), mask)[0] == pytest.approx(even, abs=1e-4)
