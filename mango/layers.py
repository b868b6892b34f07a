"""A layer is one parameter tensor: what it is called, what kind it is, how deep it sits."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mango.features import KINDS
from mango.rules import rule_for

# Tried in order on the lower-case name; attention before plain projections, which share the word "proj".
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("norm", r"norm|\bln_|\bln\d|\bbn\d?|batch_?norm"),
    ("embedding", r"emb|wte|wpe"),
    ("attention_in", r"qkv|in_proj|c_attn|\b[qkv]_proj|query|\bkey\b|value_proj|\bw[qkv]\b"),
    ("attention_out", r"attn.*(proj|out)|attention.*(proj|out|dense)|out_proj|o_proj|\bwo\b"),
    ("recurrent", r"weight_ih|weight_hh|lstm|gru|rnn"),
    ("head", r"head|classifier|fc_out|decoder\.weight|logits"),
    ("mlp_down", r"down|fc2|linear2|mlp.*c_proj|mlp\.2\b|output\.dense"),
    ("mlp_up", r"\bup|up_proj|gate|fc1|linear1|c_fc|mlp\.0\b|intermediate"),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One agent. `depth` is its position among the model's layers in [0, 1]."""

    index: int
    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    depth: float
    rule: str = "adamw"                    # that moves it

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {KINDS}")


def kind_of(name: str, shape: Sequence[int], last: bool = False) -> str:
    """The kind of a tensor from its name; without a telling name from its shape and order.

    >>> kind_of("blocks.0.attn.qkv.weight", (384, 128)), kind_of("stem.weight", (16, 3, 3, 3))
    ('attention_in', 'conv')
    """
    if len(shape) > 2:
        return "conv"
    for kind, pattern in _PATTERNS:
        if re.search(pattern, name.lower()):
            return kind
    if len(shape) < 2:
        return "norm"
    return "head" if last else "linear"


def describe(names: Sequence[str], shapes: Sequence[tuple[int, ...]], rules: Sequence[str] = ()) -> list[Layer]:
    """Layers in model order, with the rule of each one's group (AdamW where none is given).

    The last matrix counts as the head where no name says otherwise.
    """
    matrices = [i for i, shape in enumerate(shapes) if len(shape) == 2]
    last = matrices[-1] if len(matrices) > 1 else -1
    span = max(1, len(names) - 1)
    layers = []
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        kind = kind_of(name, shape, last=i == last)
        rule = rule_for(rules[i] if rules else "adamw", tuple(shape), kind)
        layers.append(Layer(i, name, kind, tuple(shape), math.prod(shape), i / span, rule))
    return layers
