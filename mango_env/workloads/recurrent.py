"""`source_lstm` and `shakespeare_lstm`: a small character LSTM on the texts of `source_lm` and `shakespeare_lm`."""

from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.text import VOCABULARY, LanguageModel, load_source, shakespeare


class Recurrent(nn.Module):
    """`depth` LSTM layers between an embedding and a head; every window starts from a state of zeros."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, symbols: Tensor) -> Tensor:                              # (B, T) int64
        hidden, _ = self.lstm(self.embed(symbols))                             # (B, T, W)
        logits: Tensor = self.head(hidden)                                     # (B, T, V)
        return logits


def recurrent(width: int, depth: int, context: int) -> Recurrent:
    """What `LanguageModel` asks for; an LSTM reads a `context` of any length."""
    return Recurrent(width, depth)


@register_workload("source_lstm")
def source_lstm(
    seed: int, *, steps: int = 300, batch: int = 16, context: int = 64, width: int = 128, depth: int = 1, lr: float = 1e-2
) -> LanguageModel:
    """One LSTM layer on the standard library's source, about 157,000 parameters."""
    sizes = {"batch": batch, "context": context, "width": width, "depth": depth}
    return LanguageModel(load_source(), seed, recurrent, steps=steps, lr=lr, **sizes)


@register_workload("shakespeare_lstm")
def shakespeare_lstm(
    seed: int, *, steps: int = 500, batch: int = 16, context: int = 64, width: int = 128, depth: int = 2, lr: float = 8e-3
) -> LanguageModel:
    """Two LSTM layers on Tiny Shakespeare from `$MANGO_DATA`, about 289,000 parameters."""
    sizes = {"batch": batch, "context": context, "width": width, "depth": depth}
    return LanguageModel(shakespeare("shakespeare_lstm"), seed, recurrent, steps=steps, lr=lr, **sizes)
