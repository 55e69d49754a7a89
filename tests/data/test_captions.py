from collections import Counter

import pytest
from scipy import stats
from transformers import CLIPTokenizer

from memfilter.config import MitigationConfig
from memfilter.data.captions import caption_change
from memfilter.pipelines import model_dir

CAPTION = "a red fox on a green meadow"
WORDS = CAPTION.split()


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(model_dir("scenes") / "tokenizer")


def is_within(words: list[str], others: list[str]) -> bool:
    """Whether all words stand among the others in their order."""
    left = iter(others)
    return all(word in left for word in words)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_random_tokens_stand_between_the_words_and_are_as_many_for_the_encoder(tokenizer, count):
    change = caption_change(MitigationConfig(random_tokens=count), tokenizer)
    plain, special = tokenizer(CAPTION)["input_ids"], {*tokenizer.all_special_ids}
    for position in range(200):
        shown = change(CAPTION, 3, position)
        assert len(shown.split(" ")) == len(WORDS) + count and is_within(WORDS, shown.split(" "))
        tokens = tokenizer(shown)["input_ids"]
        assert len(tokens) == len(plain) + count and not special & {*tokens[1:-1]}


def test_place_of_a_token_is_uniform_and_drawn_anew_from_seed_and_position(tokenizer):
    change = caption_change(MitigationConfig(random_tokens=1), tokenizer)
    letters = "0 1 2 3"  # no tokens of their own
    shown = [change(letters, 3, position) for position in range(2000)]
    assert shown == [change(letters, 3, position) for position in range(2000)]
    assert shown != [change(letters, 4, position) for position in range(2000)]
    places, tokens = Counter(), Counter()
    for words in map(str.split, shown):
        place = next((i for i, word in enumerate(words) if word != str(i)), 4)
        places[place] += 1
        tokens[words[place]] += 1
    assert stats.chisquare([places[i] for i in range(5)]).pvalue > 1e-3
    vocabulary = {word for i in range(len(tokenizer)) if len(tokenizer.tokenize(word := tokenizer.decode([i]).strip())) == 1}
    assert len(tokens) > 0.9 * len(vocabulary - {*tokenizer.all_special_tokens}) > 300


def test_words_are_repeated_from_the_caption(tokenizer):
    change = caption_change(MitigationConfig(repeated_words=3), tokenizer)
    seen = Counter()
    for position in range(300):
        shown = change(CAPTION, 0, position).split(" ")
        more = Counter(shown) - Counter(WORDS)
        assert more.total() == 3 and set(more) <= set(WORDS) and is_within(WORDS, shown)
        seen += more
    assert set(seen) == set(WORDS)


def test_share_of_the_captions_is_random_tokens_as_many_as_it_has_words(tokenizer):
    change = caption_change(MitigationConfig(random_caption=0.4), tokenizer)
    shown = [change(CAPTION, 1, position) for position in range(1000)]
    left = sum(caption == CAPTION for caption in shown)
    assert stats.binomtest(left, 1000, 0.6).pvalue > 1e-3
    assert {len(caption.split(" ")) for caption in shown} == {len(WORDS)}


@pytest.mark.parametrize("caption", ["", "  \n"])
def test_nothing_asked_is_nothing_done_and_a_caption_without_words_stays(tokenizer, caption):
    assert caption_change(MitigationConfig(embedding_noise=0.1, deduplicate=True), tokenizer) is None
    config = MitigationConfig(random_tokens=2, repeated_words=2, random_caption=1.0)
    assert caption_change(config, tokenizer)(caption, 0, 0) == caption
