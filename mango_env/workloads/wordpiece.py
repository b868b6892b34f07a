"""BERT's tokens (Devlin et al. 2019): words without case and accents, cut into the longest pieces of a vocabulary."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

UNKNOWN, START, SEPARATOR = "[UNK]", "[CLS]", "[SEP]"
LONGEST = 100                                                                  # letters of a word; a longer one is unknown
IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))  # each is a word by itself


class WordPieces:
    """Text to numbers of the lines of a vocabulary file; 0 is padding."""

    def __init__(self, file: Path) -> None:
        pieces = file.read_text(encoding="utf-8").splitlines()
        self.numbers = {piece: number for number, piece in enumerate(pieces)}
        if self.numbers.get("[PAD]") != 0 or not {UNKNOWN, START, SEPARATOR} <= set(self.numbers):
            raise ValueError(f"{file} is no vocabulary of BERT: it begins with [PAD] and has {UNKNOWN}, {START}, {SEPARATOR}")
        self.size = len(pieces)
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Numbers of a text's pieces."""
        found: list[int] = []
        for word in words_of(text):
            if word not in self._known:
                self._known[word] = self._pieces(word)
            found += self._known[word]
        return found

    def rows(self, texts: Iterable[tuple[str, ...]], length: int) -> Tensor:
        """Rows (N, length) int32: a start, each part with a separator after it, padding; parts are cut alike to fit."""
        start, separator = self.numbers[START], self.numbers[SEPARATOR]
        rows = []
        for parts in texts:
            room = (length - 1) // len(parts) - 1
            if room < 1:
                raise ValueError(f"rows of {length} have no room for {len(parts)} texts")
            row = [start]
            for part in parts:
                row += [*self.encode(part)[:room], separator]
            rows.append(row + [0] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.int32)

    def _pieces(self, word: str) -> list[int]:
        if len(word) > LONGEST:
            return [self.numbers[UNKNOWN]]
        found, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            stop = next((stop for stop in range(len(word), start, -1) if mark + word[start:stop] in self.numbers), None)
            if stop is None:
                return [self.numbers[UNKNOWN]]
            found.append(self.numbers[mark + word[start:stop]])
            start = stop
        return found


def words_of(text: str) -> list[str]:
    """Words in lower case without accents; each punctuation mark and ideograph is one by itself.

    >>> words_of("Déjà vu, isn't it?")
    ['deja', 'vu', ',', 'isn', "'", 't', 'it', '?']
    """
    letters = []
    for letter in unicodedata.normalize("NFD", "".join(map(_cleaned, text)).lower()):
        if unicodedata.category(letter) != "Mn":
            letters.append(f" {letter} " if _stands_alone(letter) else letter)
    return "".join(letters).split()


def _cleaned(letter: str) -> str:
    if letter in "\t\n\r":
        return " "
    category = unicodedata.category(letter)
    if letter in "\0\ufffd" or category in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return " " if category == "Zs" else letter


def _stands_alone(letter: str) -> bool:
    code = ord(letter)
    if code < 128:
        return letter.isprintable() and not letter.isalnum() and letter != " "
    return unicodedata.category(letter).startswith("P") or any(low <= code <= high for low, high in IDEOGRAPHS)
