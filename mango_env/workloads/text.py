"""`source_lm`, `shakespeare_lm` and `books_lm`: a small character transformer on plain text.

`source_lm` reads the Python standard library's own source, so it needs no download; its text differs a little
between Python versions, its vocabulary never does. Wider and deeper models are a matter of options.
"""

import math
import sysconfig
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.data import TextData, check_positive, data_file, drawing, evaluating, load_state, read_text, save_state
from mango_env.workloads.initialise import build
from mango_env.workloads.transformer import Block

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))                          # and UNKNOWN for anything else
UNKNOWN = len(CHARACTERS)
VOCABULARY = len(CHARACTERS) + 1
# Modules that are one file of real code in CPython 3.11 to 3.13; about 2 million characters.
TRAIN_MODULES = (
    "_pydecimal", "argparse", "ast", "bdb", "calendar", "codecs", "configparser", "contextlib", "dataclasses",
    "difflib", "dis", "doctest", "enum", "ftplib", "functools", "gzip", "imaplib", "inspect", "ipaddress", "locale",
    "mailbox", "optparse", "os", "pdb", "pickle", "pickletools", "platform", "plistlib", "pstats", "pydoc", "random",
    "shutil", "smtplib", "socket", "ssl", "subprocess", "tarfile", "tempfile", "threading", "tokenize", "traceback",
    "turtle", "typing", "uuid",
)  # fmt: skip
VAL_MODULES = ("fractions", "heapq", "selectors", "statistics", "textwrap", "weakref")
LEAST_CHARACTERS = 50_000                                                      # of each part, for a run to mean something
SHAKESPEARE = "tinyshakespeare.txt"
SHAKESPEARE_SOURCE = "It is data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn, unchanged"
BOOKS = {"books_train.txt.gz": 4_000_000, "books_valid.txt.gz": 400_000}       # the characters read of each
BOOKS_SOURCE = (
    "It is English novels as plain text, compressed by gzip, some books or parts of books for training and others for "
    "validation; make it from the repositories of github.com/GITenberg"
)
EMBEDDING_STD = 0.1                                                            # measured: 0.02 costs AdamW 0.05 nats in 300 steps
VAL_WINDOWS = 256                                                              # windows of `context` characters in evaluate()


def encode_text(text: str) -> Tensor:
    """Symbol numbers (N,) uint8 of a text: positions in `CHARACTERS`, `UNKNOWN` for the rest."""
    table = np.full(128, UNKNOWN, np.uint8)
    for number, character in enumerate(CHARACTERS):
        table[ord(character)] = number
    code_points = np.frombuffer(text.encode("utf-32-le", errors="replace"), np.uint32)
    return torch.from_numpy(table[np.minimum(code_points, 127)])


@lru_cache(maxsize=1)
def load_source() -> TextData:
    """The text of `TRAIN_MODULES` and `VAL_MODULES` of the running Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    return TextData(_read_modules(folder, TRAIN_MODULES), _read_modules(folder, VAL_MODULES))


def _read_modules(folder: Path, names: tuple[str, ...]) -> Tensor:
    files = [path for path in (folder / f"{name}.py" for name in names) if path.is_file()]
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    if len(text) < LEAST_CHARACTERS:
        raise FileNotFoundError(
            f"workload 'source_lm' reads the source of the standard library in {folder} and found {len(text):,} characters "
            f"in {len(files)} of {len(names)} modules; it needs {LEAST_CHARACTERS:,}. Use a Python that has its .py files"
        )
    return encode_text(text)


@lru_cache(maxsize=2)
def load_text(path: Path) -> TextData:
    """A plain text file: the first 90 % for training, the rest held out."""
    symbols = _long_enough(encode_text(path.read_text(encoding="utf-8", errors="replace")), path)
    cut = len(symbols) * 9 // 10
    return TextData(symbols[:cut], symbols[cut:])


@lru_cache(maxsize=2)
def load_books(train: Path, val: Path) -> TextData:
    """The first 4 M characters of a compressed text for training, the first 400,000 of another held out."""
    parts = zip((train, val), BOOKS.values(), strict=True)
    return TextData(*(_long_enough(encode_text(read_text(path, size)), path) for path, size in parts))


def _long_enough(symbols: Tensor, path: Path) -> Tensor:
    if len(symbols) < LEAST_CHARACTERS:
        raise ValueError(f"{path} has {len(symbols):,} characters; a text workload needs {LEAST_CHARACTERS:,}")
    return symbols


def shakespeare(reader: str) -> TextData:
    """Tiny Shakespeare from `$MANGO_DATA`, for the workload or program `reader`."""
    return load_text(data_file(SHAKESPEARE, reader, SHAKESPEARE_SOURCE))


def books(reader: str) -> TextData:
    """The novels from `$MANGO_DATA`, for the workload or program `reader`."""
    return load_books(*(data_file(name, reader, BOOKS_SOURCE) for name in BOOKS))


class Transformer(nn.Module):
    """A decoder in GPT-2's order of norms; embedding and head are separate matrices."""

    def __init__(self, width: int, depth: int, heads: int, context: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, context) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, symbols: Tensor) -> Tensor:                              # (B, T) int64
        x = self.embed(symbols)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))                               # (B, T, V)
        return logits


class LanguageModel:
    """Next-symbol prediction on windows drawn at random; `val_loss` is in nats per symbol, on evenly spaced windows.

    `network(context=..., **sizes)` makes the model: symbols (B, T) to logits (B, T, V), of which none sees a later symbol.
    Its parameters are of `dtype`. A `stochastic` one draws in its forward pass (dropout): then from the workload's generator.
    """

    def __init__(
        self, data: TextData, seed: int, network: Callable[..., nn.Module] = Transformer,
        dtype: torch.dtype = torch.float32, stochastic: bool = False, /, *,
        steps: int, batch: int, context: int, lr: float, val_windows: int = VAL_WINDOWS, embedding_std: float = EMBEDDING_STD,
        **sizes: int,
    ) -> None:  # fmt: skip
        check_positive(steps=steps, batch=batch, context=context, val_windows=val_windows, **sizes)
        if context >= min(len(data.train), len(data.val)):
            raise ValueError(f"context={context} is longer than a text: {len(data.train)} and {len(data.val)} symbols")
        self._generator = torch.Generator().manual_seed(seed)
        self.model = build(partial(network, context=context, **sizes), self._generator, 0.02, embedding_std, dtype)
        self.steps = steps
        self.batch = batch
        self.lr = lr
        self.samples_per_step = batch
        self.tokens_per_step = batch * context
        self._stochastic = stochastic
        self._data = data
        self._context = context
        self._val_windows = val_windows

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that read as many symbols as the training text has."""
        return max(1, len(self._data.train) // self.tokens_per_step)

    def loss(self) -> Tensor:
        starts = torch.randint(len(self._data.train) - self._context, (self.batch,), generator=self._generator)
        with drawing(self.model, self._generator, self._stochastic):
            return self._cross_entropy(self._windows(self._data.train, starts))

    def evaluate(self) -> dict[str, float]:
        last = len(self._data.val) - self._context - 1
        starts = torch.linspace(0, last, self._val_windows, dtype=torch.float64).long()
        windows = self._windows(self._data.val, starts)
        with evaluating(self.model):
            losses = [float(self._cross_entropy(part)) * len(part) for part in torch.split(windows, self.batch)]
        val_loss = sum(losses) / self._val_windows
        return {"val_loss": val_loss, "val_bits_per_character": val_loss / math.log(2)}

    def state_dict(self) -> dict[str, Any]:
        return save_state(self._generator)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(state, self._generator)

    def _windows(self, text: Tensor, starts: Tensor) -> Tensor:
        return text[starts[:, None] + torch.arange(self._context + 1)].long()  # (B, T + 1): each symbol and its next

    def _cross_entropy(self, windows: Tensor) -> Tensor:
        windows = windows.to(next(self.model.parameters()).device)
        logits = self.model(windows[:, :-1]).float()                           # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


class TokenModel(LanguageModel):
    """The same of words or parts of words; `val_loss` is in nats per token, `val_perplexity` its exponential."""

    def evaluate(self) -> dict[str, float]:
        val_loss = super().evaluate()["val_loss"]
        return {"val_loss": val_loss, "val_perplexity": math.exp(min(val_loss, 700.0))}


@register_workload("source_lm")
def source_lm(
    seed: int,
    *,
    steps: int = 300,
    batch: int = 16,
    context: int = 64,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    lr: float = 3e-3,
) -> LanguageModel:
    """A transformer of two layers on the standard library's source, about 113,000 parameters."""
    sizes = {"batch": batch, "context": context, "width": width, "depth": depth, "heads": heads}
    return LanguageModel(load_source(), seed, steps=steps, lr=lr, **sizes)


@register_workload("shakespeare_lm")
def shakespeare_lm(
    seed: int,
    *,
    steps: int = 500,
    batch: int = 16,
    context: int = 64,
    width: int = 96,
    depth: int = 2,
    heads: int = 4,
    lr: float = 2e-3,
) -> LanguageModel:
    """The same transformer, wider, on Tiny Shakespeare from `$MANGO_DATA`."""
    sizes = {"batch": batch, "context": context, "width": width, "depth": depth, "heads": heads}
    return LanguageModel(shakespeare("shakespeare_lm"), seed, steps=steps, lr=lr, **sizes)


@register_workload("books_lm")
def books_lm(
    seed: int,
    *,
    steps: int = 500,
    batch: int = 16,
    context: int = 64,
    width: int = 96,
    depth: int = 2,
    heads: int = 4,
    lr: float = 2e-3,
) -> LanguageModel:
    """The same transformer on English novels from `$MANGO_DATA`, about 242,000 parameters."""
    sizes = {"batch": batch, "context": context, "width": width, "depth": depth, "heads": heads}
    return LanguageModel(books("books_lm"), seed, steps=steps, lr=lr, **sizes)
