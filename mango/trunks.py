"""What comes before the heads of a policy network: the normaliser of observations, and the trunks.

A trunk includes its normaliser, so whoever copies the trunk's weights (into a d3rlpy encoder or an SB3 features extractor)
copies the statistics too. Weights are drawn from a generator that comes in, never from the global one.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango.features import FEATURE_DIM, FEATURES

OBSERVATION_CLIP = 10.0                                  # normalised features stay within +-10 standard deviations
_DEEPEST = 32                                            # layers of a trunk

State = tuple[Tensor, Tensor]                            # what a trunk with memory carries; rows of the batch in dimension 1


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


class Memoryless(nn.Module):
    """A trunk that carries nothing from one decision to the next."""

    has_memory = False
    state_names: tuple[str, ...] = ()

    def step(self, obs: Tensor, state: State | None = None) -> tuple[Tensor, None]:
        """Features and no state: the same signature for every trunk."""
        return self(obs), None


class MlpTrunk(Memoryless):
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


class TreeTrunk(Memoryless):
    """Normaliser, then a decision tree. Observations (..., F) to the leaf that they end in, one-hot (..., 2^depth).

    Question i asks whether a normalised feature is above a threshold, and leads to question 2 i + 1 (no) or 2 i + 2 (yes). So a
    head has one column of weights per leaf. Questions are set (`train_policy.tree.network_of`) and do not train; heads do.

    >>> TreeTrunk(depth=3)(torch.zeros(5, 64)).sum(1)
    tensor([1., 1., 1., 1., 1.])
    """

    feature: Tensor                                      # (2^depth - 1,) which one is asked for; float, as all of a file
    threshold: Tensor                                    # (2^depth - 1,)

    def __init__(
        self,
        depth: int = 4,
        *,
        feature_dim: int = FEATURE_DIM,
        generator: torch.Generator | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        check_size("feature_dim", feature_dim)
        self.features_dim = 2 ** check_size("depth", depth, 10)
        self.settings: dict[str, Any] = {"depth": depth, "feature_dim": feature_dim}
        self.depth = depth
        self.normaliser = Normaliser(feature_dim, device)
        for name in ("feature", "threshold"):
            self.register_buffer(name, torch.zeros(self.features_dim - 1, dtype=torch.float32, device=device))

    @property
    def asks(self) -> bool:
        """Whether its questions were set: those of a new tree are all the same."""
        return bool(self.feature.any() or self.threshold.any())

    def forward(self, obs: Tensor) -> Tensor:
        normed = self.normaliser(obs)
        feature = self.feature.long().clamp(0, normed.shape[-1] - 1)
        at = torch.zeros(normed.shape[:-1], dtype=torch.int64, device=normed.device)
        for _ in range(self.depth):
            asked = normed.gather(-1, feature[at].unsqueeze(-1)).squeeze(-1)
            at = 2 * at + 1 + (asked > self.threshold[at]).long()
        return F.one_hot(at - len(feature), self.features_dim).to(normed.dtype)


class LstmTrunk(nn.Module):
    """Normaliser, then an LSTM. (B, F) or (B, T, F) to (B, [T,] hidden_dim); state (h, c), each (num_layers, B, hidden_dim)."""

    has_memory = True
    state_names: tuple[str, ...] = ("h", "c")            # what the state's tensors are called where they are saved

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
        features, state = self.lstm(self.normaliser(_as_sequence(obs)), state)
        return (features if obs.dim() == 3 else features.squeeze(1)), state


class TinyFormer(nn.Module):
    """Normaliser, then one transformer block applied `num_layers` times to a layer's past decisions.

    (B, F) or (B, T, F) to (B, [T,] hidden_dim). A decision attends to itself and to the `window - 1` decisions before it, of
    its own row alone. The applications share their weights and differ by a learned vector that is added to their input
    (Dehghani et al. 2019, sec. 2.1); the heads share keys and values (Shazeer 2019, sec. 3), which keeps what is carried
    small; positions are known by distance alone, each with a key of its own (Shaw et al. 2018, sec. 3.2). With the
    defaults a whole `PolicyNetwork` has fewer than 100,000 parameters.

    State (keys, values), each (num_layers, B, decisions kept, hidden_dim / num_heads): it grows to `window - 1` decisions.

    >>> trunk = TinyFormer()
    >>> features, state = trunk.step(torch.zeros(5, 64))
    >>> features.shape, state[0].shape
    (torch.Size([5, 128]), torch.Size([6, 5, 1, 32]))
    """

    has_memory = True
    state_names: tuple[str, ...] = ("keys", "values")

    def __init__(
        self,
        hidden_dim: int = 128,
        num_layers: int = 6,
        num_heads: int = 4,
        window: int = 128,
        *,
        feature_dim: int = FEATURE_DIM,
        generator: torch.Generator | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        check_size("feature_dim", feature_dim)
        self.features_dim = check_size("hidden_dim", hidden_dim)
        if hidden_dim % check_size("num_heads", num_heads):
            raise ValueError(f"hidden_dim={hidden_dim} is not a multiple of num_heads={num_heads}")
        self.settings: dict[str, Any] = {
            "hidden_dim": hidden_dim,
            "num_layers": check_size("num_layers", num_layers, _DEEPEST),
            "num_heads": num_heads,
            "window": check_size("window", window),
            "feature_dim": feature_dim,
        }
        generator = generator or torch.Generator().manual_seed(0)
        self.num_layers, self.num_heads, self.window, head_dim = num_layers, num_heads, window, hidden_dim // num_heads
        small = (2 * num_layers) ** -0.5                 # the sum of all applications' outputs is about as large as their input
        self.normaliser = Normaliser(feature_dim, device)
        self.embed = linear(feature_dim, hidden_dim, 1.0, generator, device)
        self.depth = _normal(num_layers, hidden_dim, hidden_dim**-0.5, generator, device)
        self.distance_keys = _normal(window, head_dim, 1.0, generator, device)       # large: distances tell from the start
        self.attention_norm = nn.LayerNorm(hidden_dim, device=device, dtype=torch.float32)
        self.query = linear(hidden_dim, hidden_dim, 1.0, generator, device)
        self.key_value = linear(hidden_dim, 2 * head_dim, 1.0, generator, device)
        self.attention_out = linear(hidden_dim, hidden_dim, small, generator, device)
        self.mlp_norm = nn.LayerNorm(hidden_dim, device=device, dtype=torch.float32)
        self.mlp_in = linear(hidden_dim, hidden_dim, 2**0.5, generator, device)
        self.mlp_out = linear(hidden_dim, hidden_dim, small, generator, device)
        self.out_norm = nn.LayerNorm(hidden_dim, device=device, dtype=torch.float32)

    def forward(self, obs: Tensor) -> Tensor:
        return self.step(obs)[0]

    def step(self, obs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Features, and keys and values of the last `window - 1` decisions; `state=None` starts without a past."""
        x = self.embed(self.normaliser(_as_sequence(obs)))                     # (B, T, D)
        steps, past = x.shape[1], 0 if state is None else state[0].shape[2]
        ages = torch.arange(past, past + steps, device=x.device)[:, None] - torch.arange(past + steps, device=x.device)
        hidden = (ages < 0) | (ages >= self.window)                            # (T, S): the future, and what is too old
        ages = ages.clamp(0, self.window - 1)
        kept = []
        for application in range(self.num_layers):
            x = x + self.depth[application]
            normed = self.attention_norm(x)
            keys, values = self.key_value(normed).chunk(2, -1)                 # (B, T, head_dim) each
            if state is not None:
                keys, values = torch.cat([state[0][application], keys], 1), torch.cat([state[1][application], values], 1)
            x = x + self.attention_out(self._attend(normed, keys, values, ages, hidden))
            x = x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))))
            oldest = max(0, past + steps - (self.window - 1))
            kept.append((keys[:, oldest:], values[:, oldest:]))
        features: Tensor = self.out_norm(x)
        carried = (torch.stack([keys for keys, _ in kept]), torch.stack([values for _, values in kept]))
        return (features if obs.dim() == 3 else features.squeeze(1)), carried

    def _attend(self, normed: Tensor, keys: Tensor, values: Tensor, ages: Tensor, hidden: Tensor) -> Tensor:
        """What decisions (B, T, D) read from S keys and values (B, S, head_dim): (B, T, D)."""
        queries = self.query(normed).unflatten(-1, (self.num_heads, -1))                           # (B, T, heads, head_dim)
        by_age = (queries @ self.distance_keys.T).transpose(1, 2)                                  # (B, heads, T, window)
        queries = queries.transpose(1, 2)        # after `by_age`: of strided queries matmul's rounding depends on requires_grad
        by_age = by_age.gather(-1, ages.expand(*queries.shape[:2], *ages.shape))                   # (B, heads, T, S)
        scores = (queries @ keys.transpose(1, 2).unsqueeze(1) + by_age) * queries.shape[-1] ** -0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        found: Tensor = weights @ values.unsqueeze(1)                                              # (B, heads, T, head_dim)
        return found.transpose(1, 2).flatten(2)


def _as_sequence(obs: Tensor) -> Tensor:
    """Observations (B, F) or (B, T, F) as (B, T, F)."""
    if obs.dim() not in (2, 3):
        raise ValueError(f"a trunk with memory reads observations (B, F) or (B, T, F); got {tuple(obs.shape)}")
    return obs if obs.dim() == 3 else obs.unsqueeze(1)


def _normal(rows: int, columns: int, std: float, generator: torch.Generator, device: str) -> nn.Parameter:
    """A parameter (rows, columns) drawn from `generator`; on "meta" nothing is drawn."""
    table = torch.empty(rows, columns, dtype=torch.float32, device=device)
    return nn.Parameter(table if device == "meta" else nn.init.normal_(table, 0.0, std, generator=generator))


Trunk = MlpTrunk | LstmTrunk | TinyFormer | TreeTrunk
TRUNKS: dict[str, type[MlpTrunk] | type[LstmTrunk] | type[TinyFormer] | type[TreeTrunk]] = {
    "mlp": MlpTrunk, "lstm": LstmTrunk, "tinyformer": TinyFormer, "tree": TreeTrunk,
}  # fmt: skip
