"""`books_words`: a small transformer on the words of English novels, most of whose parameters are embedding and head."""

import re
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from mango_env.workloads.base import register_workload
from mango_env.workloads.data import TextData, check_positive, data_file, read_text
from mango_env.workloads.text import BOOKS, BOOKS_SOURCE, TokenModel, Transformer
from mango_env.workloads.words import RESERVED, UNKNOWN, frequent_words

WORD = re.compile(r"[a-z]+|[^a-z\s]")                                          # words without case, and each other sign


@lru_cache(maxsize=2)
def load_words(train: Path, val: Path, words: int) -> TextData:
    """The text of `books_lm` as numbers of the `words` most frequent words of its training part."""
    train_text, val_text = (
        WORD.findall(read_text(path, size).lower()) for path, size in zip((train, val), BOOKS.values(), strict=True)
    )
    vocabulary = frequent_words([train_text], words)
    return TextData(*(_numbers(text, vocabulary) for text in (train_text, val_text)))


def _numbers(text: list[str], vocabulary: dict[str, int]) -> Tensor:
    return torch.tensor([vocabulary.get(word, UNKNOWN) for word in text], dtype=torch.int16)


@register_workload("books_words")
def books_words(
    seed: int,
    *,
    steps: int = 400,
    batch: int = 16,
    context: int = 32,
    words: int = 4000,
    width: int = 48,
    depth: int = 2,
    heads: int = 4,
    lr: float = 3e-3,
) -> TokenModel:
    """Two layers on the 4,000 most frequent words of English novels from `$MANGO_DATA`, about 440,000 parameters."""
    check_positive(words=words)
    data = load_words(*(data_file(name, "books_words", BOOKS_SOURCE) for name in BOOKS), words)
    network = partial(Transformer, vocabulary=words + RESERVED)
    sizes = {"batch": batch, "context": context, "width": width, "depth": depth, "heads": heads}
    return TokenModel(data, seed, network, steps=steps, lr=lr, **sizes)
