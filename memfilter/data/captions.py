"""Captions that are changed each time they are shown: what others do against memorization while training.

Every change is drawn from (seed, position in the stream), as everything is that touches a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

from memfilter.config import MitigationConfig
from memfilter.data.sampler import word_draws


def caption_change(config: MitigationConfig, tokenizer) -> Callable[[str, int, int], str] | None:
    """(caption, seed, position) -> the caption as it is shown there; None where captions stay as they are.

    Args:
        tokenizer: of the text encoder, whose tokens are the random words: those that it reads as one token, which is not special,
            when they stand by themselves.
    """
    if not (config.random_tokens or config.repeated_words or config.random_caption):
        return None
    words = _single_tokens(tokenizer)
    return partial(_changed, config, lambda share: words[int(share * len(words))])


@lru_cache(maxsize=1)
def _single_tokens(tokenizer) -> list[str]:
    """One for every token, without those that are read as several when they stand by themselves, or as the end of the text."""
    words, special = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))], set(tokenizer.all_special_ids)
    read = tokenizer(words, add_special_tokens=False)["input_ids"]
    return [word for word, tokens in zip(words, read, strict=True) if len(tokens) == 1 and tokens[0] not in special]


def _changed(
    config: MitigationConfig, word_at: Callable[[float], str], caption: str, seed: int, position: int
) -> str:
    words, draw = caption.split(), word_draws(seed, position)
    if not words:  # the empty prompt, or a blank one: there is nothing to change
        return caption
    if draw.random() < config.random_caption:
        words = [word_at(draw.random()) for _ in words]
    for _ in range(config.repeated_words):
        word = words[draw.integers(len(words))]
        words.insert(draw.integers(len(words) + 1), word)
    for _ in range(config.random_tokens):
        words.insert(draw.integers(len(words) + 1), word_at(draw.random()))
    return " ".join(words)
