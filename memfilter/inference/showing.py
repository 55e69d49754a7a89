"""Scores of words, to look at: a coloured line, bars, a chart, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from memfilter.files import atomic
from memfilter.inference.significance import Word
from memfilter.text import printable

WIDTH = 40  # characters of the longest bar
# from pale to dark red, of the 256 colours of a terminal; black or white writing on them
_SHADES = ((231, 16), (224, 16), (217, 16), (210, 16), (203, 16), (196, 231), (160, 231), (124, 231))


def shares(words: Sequence[Word]) -> list[float]:
    """Of the largest score, in [0, 1]; 0 for words that are cut off, and for those without which the norm is larger."""
    scores = [max(word.score or 0, 0) for word in words]
    largest = max(scores, default=0) or 1
    return [score / largest for score in scores]


def coloured(words: Sequence[Word], colour: bool = True) -> str:
    """The prompt in a line, the darker a word the more hangs on it; without colours, what hangs most on is in brackets."""
    if not colour:
        return " ".join(f"[{printable(w.text)}]" if s > 0.5 else printable(w.text) for w, s in zip(words, shares(words), strict=True))
    shown = []
    for word, share in zip(words, shares(words), strict=True):
        back, front = _SHADES[min(int(share * len(_SHADES)), len(_SHADES) - 1)]
        shown.append(f"\033[48;5;{back}m\033[38;5;{front}m{printable(word.text)}\033[0m")
    return " ".join(shown)


def bars(words: Sequence[Word]) -> str:
    """A line for each word: text, score, bar."""
    width = min(max(len(printable(word.text)) for word in words), 30)
    lines = []
    for word, share in zip(words, shares(words), strict=True):
        score = "cut off" if word.score is None else f"{word.score:.4g}"
        lines.append(f"{printable(word.text)[:width]:<{width}}  {score:>9}  {'█' * round(share * WIDTH)}")
    return "\n".join(lines)


def write_words(words: Sequence[Word], prompt: str, out: Path) -> None:
    """Words with their tokens to a .json file, or the bars to a .png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        return _draw(words, out)
    content = {
        "prompt": prompt,
        "words": [
            {"text": w.text, "score": w.score, "tokens": [{"text": text, "score": score} for text, score in w.tokens]}
            for w in words
        ],
    }
    with atomic(out) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _draw(words: Sequence[Word], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.6 + 0.3 * len(words)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(words)), [word.score or 0 for word in words], color="#c92a2a")
    # a caption is text, not mathematics
    axis.set_yticks(range(len(words)), [printable(word.text)[:40].replace("$", r"\$") for word in words])
    axis.invert_yaxis()
    axis.set_xlabel("significance score")
    axis.spines[["top", "right"]].set_visible(False)
    with atomic(out) as partial:
        figure.savefig(partial, dpi=150, format="png")
