"""`sst2_classifier`: a small transformer that tells good from bad film reviews. Held out: for the final evaluation alone."""

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import Shared, check_positive, data_file, read_pairs
from mango_env.workloads.transformer import Block
from mango_env.workloads.words import PADDING, RESERVED, encode_sentences, frequent_words, trim

SOURCE = (
    "It is a table compressed by gzip, lines of sentence<TAB>label under that heading, the labels 0 and 1; "
    "make it from glue_data/SST-2 of github.com/eyalbd2/Reproducing-AutoPrompt"
)
HEADING = ("sentence", "label")
CLASSES = 2
WEIGHT_STD, EMBEDDING_STD = 0.06, 0.1


@dataclass(frozen=True, slots=True, eq=False)
class SentenceData(Shared):
    """Labelled sentences as word numbers, padded at the end."""

    train_x: Tensor                                                            # (N, T) int32
    train_y: Tensor                                                            # (N,) int64
    val_x: Tensor                                                              # (M, T) int32
    val_y: Tensor                                                              # (M,) int64

    def inputs(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows (B, T) as indices on the device of `weight`, no longer than the longest sentence among them."""
        return trim(rows).long().to(weight.device)


@lru_cache(maxsize=2)
def load_sst2(train: Path, val: Path, words: int, context: int) -> SentenceData:
    """Sentences cut to `context` words; the vocabulary holds the `words` most frequent ones of the training set."""
    (train_text, train_y), (val_text, val_y) = (
        ([sentence.split() for sentence in sentences], labels) for sentences, labels in map(labelled_sentences, (train, val))
    )
    vocabulary = frequent_words(train_text, words)
    train_x, val_x = (encode_sentences(text, vocabulary, context) for text in (train_text, val_text))
    return SentenceData(train_x, train_y, val_x, val_y)


def labelled_sentences(path: Path) -> tuple[list[str], Tensor]:
    """Sentences with their labels, 0 or 1."""
    heading, *pairs = read_pairs(path)
    if heading != HEADING or not pairs or {label for _, label in pairs} - {"0", "1"}:
        raise ValueError(f"{path} is no table with the heading sentence<TAB>label and the labels 0 and 1; get it anew")
    return [sentence for sentence, _ in pairs], torch.tensor([int(label) for _, label in pairs])


class SentenceClassifier(nn.Module):
    """`depth` blocks that look both ways, and a head on the mean over the words of a sentence; padding is never read."""

    def __init__(self, words: int, width: int, depth: int, heads: int, context: int, classes: int) -> None:
        super().__init__()
        check_positive(words=words, width=width, depth=depth, heads=heads)
        self.embed = nn.Embedding(words + RESERVED, width, padding_idx=PADDING)
        self.blocks = nn.ModuleList(Block(width, heads, context, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, rows: Tensor) -> Tensor:                                 # (B, T) int64
        word = rows != PADDING                                                 # (B, T)
        x = self.embed(rows)
        for block in self.blocks:
            x = block(x, word[:, None, None])
        kept = word.unsqueeze(2).to(x.dtype)                                   # (B, T, 1)
        logits: Tensor = self.head((self.norm(x) * kept).sum(1) / kept.sum(1))  # (B, classes)
        return logits


@register_workload("sst2_classifier")
def sst2_classifier(
    seed: int,
    *,
    steps: int = 400,
    batch: int = 64,
    words: int = 8000,
    context: int = 32,
    width: int = 48,
    depth: int = 2,
    heads: int = 4,
    lr: float = 2e-3,
) -> Classification:
    """Sentiment of sentences of at most 32 words, about 441,000 parameters, most of them in the embedding.

    Held out: no policy is trained on it, it is for the final evaluation.
    """
    check_positive(words=words, context=context)
    files = (data_file(f"sst2_{part}.tsv.gz", "sst2_classifier", SOURCE) for part in ("train", "dev"))
    data = load_sst2(*files, words, context)
    factory = partial(SentenceClassifier, words, width, depth, heads, context, CLASSES)
    return Classification(factory, data, seed, steps=steps, batch=batch, lr=lr, std=WEIGHT_STD, embedding_std=EMBEDDING_STD)
