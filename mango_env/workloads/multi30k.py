"""`multi30k_translation`: captions from German to English, word by word. Held out: for the final evaluation alone."""

import re
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.data import Batches, Shared, check_positive, data_file, evaluating, load_state, read_pairs, save_state
from mango_env.workloads.initialise import build
from mango_env.workloads.transformer import Block, DecoderBlock
from mango_env.workloads.words import END, PADDING, RESERVED, START, UNKNOWN, encode_sentences, frequent_words, trim

SOURCE = (
    "It is a table compressed by gzip, lines of German<TAB>English without a heading; "
    "make it from data/task1/raw of github.com/multi30k/dataset"
)
WORD = re.compile(r"\w+|[^\w\s]")                                              # or a single sign
WEIGHT_STD, EMBEDDING_STD = 0.06, 0.1                                         # measured: 0.02 costs 0.2 nats in 250 steps
EVALUATION_BATCH = 256                                                         # sentences per forward pass of evaluate()


@dataclass(frozen=True, slots=True, eq=False)
class TranslationData(Shared):
    """Pairs of sentences as word numbers, padded at the end; a number stands for one word in each language."""

    train_source: Tensor                                                       # (N, T) int32
    train_target: Tensor                                                       # (N, T + 1) int32, from START to END
    val_source: Tensor                                                         # (M, T) int32
    val_target: Tensor                                                         # (M, T + 1) int32
    val_references: tuple[str, ...]                                            # (M,) the translations, with every word
    target_words: tuple[str, ...]                                              # by number, the reserved ones among them


@lru_cache(maxsize=2)
def load_multi30k(train: Path, val: Path, source_words: int, target_words: int, context: int) -> TranslationData:
    """Lower-case sentences of at most `context` words; the vocabularies are of the training set's most frequent words."""
    sides = [_sentences(path) for path in (train, val)]
    rows = []
    for side, size in enumerate((source_words, target_words)):
        vocabulary = frequent_words(sides[0][side], size)
        # What the decoder reads and what it is to say are the target without its last and its first column.
        length = context + side
        rows.append([encode_sentences(part[side], vocabulary, length, marked=bool(side)) for part in sides])
    references = tuple(" ".join(words) for words in sides[1][1])
    names = ("",) * UNKNOWN + ("<unk>",) + ("",) * (RESERVED - UNKNOWN - 1) + tuple(vocabulary)
    return TranslationData(rows[0][0], rows[1][0], rows[0][1], rows[1][1], references, names)


def _sentences(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    pairs = read_pairs(path)
    german, english = ([WORD.findall(pair[side].lower()) for pair in pairs] for side in (0, 1))
    return german, english


class Translator(nn.Module):
    """An encoder that looks both ways and a decoder that looks back and at the encoder's last layer, `depth` blocks each."""

    def __init__(self, source_words: int, target_words: int, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        check_positive(width=width, depth=depth, heads=heads)
        self.embed_source = nn.Embedding(source_words + RESERVED, width, padding_idx=PADDING)
        self.encoder = nn.ModuleList(Block(width, heads, context, causal=False) for _ in range(depth))
        self.norm_source = nn.LayerNorm(width)
        self.embed_target = nn.Embedding(target_words + RESERVED, width, padding_idx=PADDING)
        self.decoder = nn.ModuleList(DecoderBlock(width, heads, context) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, target_words + RESERVED, bias=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:               # (B, S), (B, T) int64
        word = (source != PADDING)[:, None, None]                              # (B, 1, 1, S)
        memory = self.embed_source(source)
        for block in self.encoder:
            memory = block(memory, word)
        memory = self.norm_source(memory)
        # The target's padding stands after its words, and a causal decoder's words never read what stands after them.
        x = self.embed_target(target)
        for block in self.decoder:
            x = block(x, memory, word)
        logits: Tensor = self.head(self.norm(x))                               # (B, T, V)
        return logits


class Translation:
    """The next word of a translation, given the ones before; losses are in nats per word or sign, the end being one."""

    def __init__(self, data: TranslationData, seed: int, *, steps: int, batch: int, lr: float, **sizes: int) -> None:
        check_positive(steps=steps, batch=batch)
        self._generator = torch.Generator().manual_seed(seed)
        self.model = build(partial(Translator, **sizes), self._generator, WEIGHT_STD, EMBEDDING_STD)
        self.steps = steps
        self.batch = batch
        self.lr = lr
        self.samples_per_step = batch
        self._data = data
        self._batches = Batches(len(data.train_source), batch, self._generator)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every training pair once; an incomplete last batch is dropped."""
        return len(self._data.train_source) // self.batch

    def loss(self) -> Tensor:
        index = self._batches.next()
        total, count = self._cross_entropy(self._data.train_source[index], self._data.train_target[index])
        return total / count

    def evaluate(self) -> dict[str, float]:
        total, count = 0.0, 0
        sources, targets = (torch.split(rows, EVALUATION_BATCH) for rows in (self._data.val_source, self._data.val_target))
        with evaluating(self.model):
            for source, target in zip(sources, targets, strict=True):
                loss, words = self._cross_entropy(source, target)
                total, count = total + float(loss), count + words
        return {"val_loss": total / count}

    def translate(self, limit: int | None = None) -> list[str]:
        """Each of the first `limit` held-out sentences (None: all) said by always taking the likeliest next word."""
        found = []
        with evaluating(self.model):
            for part in torch.split(self._data.val_source[:limit], EVALUATION_BATCH):
                found += [self._sentence(row) for row in self._greedy(trim(part).long()).tolist()]
        return found

    def references(self, limit: int | None = None) -> list[str]:
        """The translations that `translate` is measured by."""
        return list(self._data.val_references[:limit])

    def _greedy(self, source: Tensor) -> Tensor:
        """Word numbers (B, T) from `START` on, for sources (B, S); what stands behind an `END` means nothing."""
        source = source.to(next(self.model.parameters()).device)
        said = torch.full((len(source), 1), START, device=source.device)
        longest = self._data.val_target.shape[1] - 1
        while said.shape[1] <= longest and not (said == END).any(1).all():
            scores = self.model(source, said)[:, -1]                           # (B, V)
            scores[:, [PADDING, START]] = -torch.inf
            said = torch.cat([said, scores.argmax(1, keepdim=True)], 1)
        return said

    def _sentence(self, numbers: list[int]) -> str:
        stop = numbers.index(END) if END in numbers else len(numbers)
        return " ".join(self._data.target_words[number] for number in numbers[1:stop])

    def state_dict(self) -> dict[str, Any]:
        return save_state(self._generator, self._batches)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(state, self._generator, self._batches)

    def _cross_entropy(self, source: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """The sum over the words of the target, and their number."""
        device = next(self.model.parameters()).device
        source, target = (trim(rows).long().to(device) for rows in (source, target))
        logits = self.model(source, target[:, :-1]).float()                    # (B, T, V)
        told = target[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1), told, ignore_index=PADDING, reduction="sum"), int((told != PADDING).sum())


@register_workload("multi30k_translation")
def multi30k_translation(
    seed: int,
    *,
    steps: int = 500,
    batch: int = 32,
    source_words: int = 2500,
    target_words: int = 2000,
    context: int = 32,
    width: int = 64,
    depth: int = 1,
    heads: int = 4,
    lr: float = 3e-3,
) -> Translation:
    """An encoder and a decoder of one block on captions of at most 32 words, about 534,000 parameters.

    Held out: no policy is trained on it, it is for the final evaluation.
    """
    sizes = {"source_words": source_words, "target_words": target_words, "context": context}
    check_positive(**sizes)
    files = (data_file(f"multi30k_{part}.de-en.tsv.gz", "multi30k_translation", SOURCE) for part in ("train", "valid"))
    data = load_multi30k(*files, **sizes)
    return Translation(data, seed, steps=steps, batch=batch, lr=lr, width=width, depth=depth, heads=heads, **sizes)
