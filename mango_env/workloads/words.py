"""Sentences as numbers: the most frequent words of a text, and rows of word numbers padded to one length."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PADDING, UNKNOWN, START, END = range(4)                                        # the numbers that are no word's
RESERVED = 4


def frequent_words(sentences: Iterable[Sequence[str]], size: int) -> dict[str, int]:
    """Numbers of the `size` most frequent words, by falling frequency; words of equal frequency in alphabetical order.

    >>> frequent_words([["so", "it", "is"], ["it", "is", "good"]], 3)
    {'is': 4, 'it': 5, 'good': 6}
    """
    counts = Counter(word for words in sentences for word in words)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate(ranked[:size], RESERVED)}


def encode_sentences(
    sentences: Iterable[Sequence[str]], vocabulary: dict[str, int], length: int, *, marked: bool = False
) -> Tensor:
    """Word numbers (N, length) int32, cut or padded at the end; an empty sentence is one unknown word.

    `marked` puts `START` before and `END` after every sentence, also after one that was cut.

    >>> encode_sentences([["it", "was"], []], {"it": 4}, 3).tolist()
    [[4, 1, 0], [1, 0, 0]]
    """
    room = length - 2 if marked else length
    if room < 1:
        raise ValueError(f"rows of {length} have no room for a word")
    rows = [[vocabulary.get(word, UNKNOWN) for word in words[:room]] or [UNKNOWN] for words in sentences]
    if marked:
        rows = [[START, *row, END] for row in rows]
    return torch.tensor([row + [PADDING] * (length - len(row)) for row in rows], dtype=torch.int32)


def trim(rows: Tensor) -> Tensor:
    """Rows (B, T) without the columns at the end in which nothing but padding is."""
    return rows[:, : int((rows != PADDING).sum(1).max())]
