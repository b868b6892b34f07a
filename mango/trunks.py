"""What comes before the heads of a policy network: the normaliser of observations, and the trunks.

A trunk includes its normaliser, so whoever copies the trunk's weights (into a d3rlpy encoder or an SB3 features extractor)
copies the statistics too. Weights are drawn from a generator that comes in, never from the global one.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mango.features import FEATURE_DIM, FEATURES

OBSERVATION_CLIP = 10.0                                  # normalised features stay within +-10 standard deviations
_DEEPEST = 32                                            # layers of a trunk

State = tuple[Tensor, Tensor]                            # LSTM (h, c), each (num_layers, B, hidden_dim)


class Normaliser(nn.Module):
    """(x - mean) / std, clipped to +-10; a NaN counts as the mean.

    Until it is fitted, the ranges of the feature table stand in for it (features fall into [-1, 1]).
    """

    mean: Tensor                                         # (F,)
    std: Tensor                                          # (F,)

    def __init__(self, feature_dim: int, device: str) -> None:
        super().__init__()
        table = feature_dim == FEATURE_DIM
        low = torch.tensor([f.low for f in FEATURES] if table else [-1.0] * feature_dim, dtype=torch.float32, device=device)
        high = torch.tensor([f.high for f in FEATURES] if table else [1.0] * feature_dim, dtype=torch.float32, device=device)
        self.register_buffer("mean", (low + high) / 2)
        self.register_buffer("std", (high - low) / 2)

    def fit(self, obs: Tensor) -> None:
        """Mean and standard deviation of observations (..., F).

        A feature that (almost) never varied is scaled by its whole range: it must not shout when it first does.
        """
        rows = obs.detach().reshape(-1, obs.shape[-1]).double()
        if rows.shape[-1] != self.mean.numel() or rows.shape[0] < 1:
            raise ValueError(f"the normaliser needs observations (N, {self.mean.numel()}), N >= 1; got {tuple(obs.shape)}")
        if not bool(rows.isfinite().all()):
            raise ValueError("the normaliser needs finite observations; got NaN or infinity")
        unfitted = Normaliser(self.mean.numel(), "cpu").std.double().to(rows.device)
        std = rows.std(0, correction=0)
        std = torch.where(std > 2e-3 * unfitted, std, 2 * unfitted)
        self.mean.copy_(rows.mean(0))
        self.std.copy_(std)

    def forward(self, obs: Tensor) -> Tensor:
        scaled = (obs.to(self.mean.dtype) - self.mean) / self.std
        return scaled.nan_to_num(nan=0.0).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)


def check_size(what: str, size: object, largest: int = 8192) -> int:
    """`size` where it is an integer in 1..largest; a policy file cannot ask for more."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= largest:
        raise ValueError(f"{what}={size!r} is not an integer in 1..{largest}")
    return size


def linear(inputs: int, outputs: int, gain: float, generator: torch.Generator, device: str) -> nn.Linear:
    """An orthogonal layer with zero bias, drawn from `generator`: torch's own constructor would draw from the global one."""
    layer = nn.Linear(inputs, outputs, device="meta", dtype=torch.float32)
    if device != "meta":
        layer.to_empty(device=device)
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        nn.init.zeros_(layer.bias)
    return layer


class MlpTrunk(nn.Module):
    """Normaliser, then fully connected layers. Observations (..., F) to features (..., hidden[-1])."""

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        *,
        feature_dim: int = FEATURE_DIM,
        generator: torch.Generator | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        if activation not in ("relu", "tanh"):
            raise ValueError(f"unknown activation {activation!r}; known: relu, tanh")
        sizes = [check_size("feature_dim", feature_dim), *(check_size("hidden width", n) for n in hidden)]
        if not 2 <= len(sizes) <= _DEEPEST + 1:
            raise ValueError(f"hidden has {len(sizes) - 1} layers; 1..{_DEEPEST} are allowed")
        generator = generator or torch.Generator().manual_seed(0)
        gain = nn.init.calculate_gain("relu" if activation == "relu" else "tanh")
        self.settings: dict[str, Any] = {"hidden": sizes[1:], "activation": activation, "feature_dim": feature_dim}
        self.features_dim = sizes[-1]
        self.normaliser = Normaliser(feature_dim, device)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [linear(inputs, outputs, gain, generator, device), nn.ReLU() if activation == "relu" else nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, obs: Tensor) -> Tensor:
        features: Tensor = self.layers(self.normaliser(obs))
        return features

    def step(self, obs: Tensor, state: State | None = None) -> tuple[Tensor, None]:
        """Features and no state: the same signature for every trunk."""
        return self(obs), None


class LstmTrunk(nn.Module):
    """Normaliser, then an LSTM whose state is carried per layer. (B, F) or (B, T, F) to (B, [T,] hidden_dim)."""

    def __init__(
        self,
        hidden_dim: int = 128,
        num_layers: int = 2,
        *,
        feature_dim: int = FEATURE_DIM,
        generator: torch.Generator | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        check_size("feature_dim", feature_dim)
        self.features_dim = check_size("hidden_dim", hidden_dim)
        self.settings: dict[str, Any] = {
            "hidden_dim": hidden_dim,
            "num_layers": check_size("num_layers", num_layers, _DEEPEST),
            "feature_dim": feature_dim,
        }
        self.normaliser = Normaliser(feature_dim, device)
        self.lstm = nn.LSTM(feature_dim, hidden_dim, num_layers, batch_first=True, device="meta", dtype=torch.float32)
        if device != "meta":
            self.lstm.to_empty(device=device)
            generator = generator or torch.Generator().manual_seed(0)
            bound = hidden_dim**-0.5
            for name, weight in self.lstm.named_parameters():
                if "weight" in name:
                    nn.init.uniform_(weight, -bound, bound, generator=generator)
                    continue
                nn.init.zeros_(weight)
                if "bias_hh" in name:                    # remember by default (Jozefowicz et al. 2015, sec. 2.1)
                    nn.init.ones_(weight[hidden_dim : 2 * hidden_dim])

    def forward(self, obs: Tensor) -> Tensor:
        return self.step(obs)[0]

    def step(self, obs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Features and the state after the last step; `state=None` starts from zeros."""
        if obs.dim() not in (2, 3):
            raise ValueError(f"an LSTM reads observations (B, F) or (B, T, F); got {tuple(obs.shape)}")
        sequence = self.normaliser(obs if obs.dim() == 3 else obs.unsqueeze(1))
        features, state = self.lstm(sequence, state)
        return (features if obs.dim() == 3 else features.squeeze(1)), state


Trunk = MlpTrunk | LstmTrunk
TRUNKS: dict[str, type[MlpTrunk] | type[LstmTrunk]] = {"mlp": MlpTrunk, "lstm": LstmTrunk}
