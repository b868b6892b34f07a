"""Policies that need no training. All see the observation (L, 64) of `mango.features` and answer per layer.

A policy either scores every rung of the ladder (`scores`), and the budget picks the best affordable combination; or it
acts, naming a config per layer, and the budget takes back what does not fit, where that costs least.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from mango.config import FULL, KNOBS, LADDER, NVEC, CompressionConfig, Ladder
from mango.features import FEATURE_INDEX

# What a policy may answer: knob indices (L, K), a config per layer, one config (or dict of knobs) for all, None to hold.
Choice = Tensor | Sequence[CompressionConfig] | CompressionConfig | Mapping[str, Any] | None


@runtime_checkable
class Policy(Protocol):
    def act(self, obs: Tensor) -> Choice: ...

    def reset(self) -> None: ...


@runtime_checkable
class ScoringPolicy(Policy, Protocol):
    def scores(self, obs: Tensor) -> Tensor:
        """A score per layer and rung (L, R), higher is better."""
        ...


POLICIES: dict[str, Callable[..., Policy]] = {}


def register_policy(name: str) -> Callable[[type[Any]], type[Any]]:
    def add(cls: type[Any]) -> type[Any]:
        if name in POLICIES:
            raise ValueError(f"policy {name!r} is already registered by {POLICIES[name]!r}")
        POLICIES[name] = cls
        return cls

    return add


def feature(obs: Tensor, name: str) -> Tensor:
    """One column (L,) of an observation (L, 64)."""
    return obs[:, FEATURE_INDEX[name]]


def as_action(configs: Sequence[CompressionConfig]) -> Tensor:
    """Knob indices (L, K) int64 of a config per layer."""
    return torch.tensor([config.to_action() for config in configs], dtype=torch.int64).reshape(-1, len(KNOBS))


def best_scored(scores: Tensor, ladder: Ladder) -> Tensor:
    """Knob indices (L, K) of each layer's best-scored rung, as if there were no budget; of equals the cheapest (first)."""
    return as_action([ladder[int(rung)] for rung in scores.argmax(1)])


SMALL = CompressionConfig(momentum_bits=4, variance_bits=0)


@register_policy("fixed")
class FixedPolicy:
    """The same config for every layer, always.

    >>> FixedPolicy(momentum_bits=8).config.name
    'm8v32'
    """

    def __init__(self, config: CompressionConfig | Mapping[str, Any] | None = None, **knobs: Any) -> None:
        if config is not None and knobs:
            raise ValueError(f"give a config or knobs, not both; got {config} and {knobs}")
        given = knobs if config is None else config
        self.config = given if isinstance(given, CompressionConfig) else CompressionConfig.from_dict(given)

    @property
    def initial(self) -> CompressionConfig:
        return self.config

    def act(self, obs: Tensor) -> CompressionConfig:
        return self.config

    def reset(self) -> None:
        """Nothing is remembered."""


@register_policy("scheduled")
class ScheduledPolicy:
    """From `start` to `end` along the ladder, evenly over training (the observation's `progress` tells how far it is)."""

    def __init__(
        self,
        start: CompressionConfig = FULL,
        end: CompressionConfig = SMALL,
        ladder: Ladder = LADDER,
    ) -> None:
        self.start, self.end, self.ladder = start, end, ladder

    @property
    def initial(self) -> CompressionConfig:
        return self.start

    def act(self, obs: Tensor) -> CompressionConfig:
        progress = float(feature(obs, "progress")[0]) if len(obs) else 0.0
        if progress <= 0 or progress >= 1:
            return self.start if progress <= 0 else self.end
        first, last = self.ladder.nearest(self.start), self.ladder.nearest(self.end)
        return self.ladder[round(first + progress * (last - first))]

    def reset(self) -> None:
        """Nothing is remembered."""


def phases(obs: Tensor) -> Tensor:
    """Training phase of each layer (L,): 0 early (noisy, unsettled), 1 middle (falling), 2 converged (flat, late).

    Early: no step seen yet, or successive gradients still agree with the momentum less than chance noise would allow
    while the first tenth of training lasts. Converged: little movement per step, or the last fifth of training.
    """
    progress, moving = feature(obs, "progress"), feature(obs, "update_ratio")
    settled = (moving < -3.5) | (progress > 0.8)
    unseen = feature(obs, "grad_rms") <= -20                 # no step yet
    begun = (progress > 0) & (progress <= 0.1)               # progress stays 0 where the length of training is unknown
    early = ((feature(obs, "grad_trend").abs() > 1.0) & ~settled) | unseen | begun
    return torch.where(early, 0, torch.where(settled, 2, 1))


@register_policy("adaptive")
class AdaptivePolicy:
    """A heuristic over phases: full precision early, 8 bits while the loss falls, 4 bits and factors once converged.

    Also callable on a feature dict, as its earlier public form `AdaptiveCompressionPolicy` was.
    """

    BY_PHASE = (FULL, CompressionConfig(momentum_bits=8, variance_bits=8), SMALL)

    def act(self, obs: Tensor) -> list[CompressionConfig]:
        return [self.BY_PHASE[int(phase)] for phase in phases(obs)]

    def __call__(self, features: Mapping[str, Any]) -> list[CompressionConfig]:
        return self.act(features["layers"])

    def reset(self) -> None:
        """Nothing is remembered."""

    reset_hidden_state = reset


@register_policy("random")
class RandomPolicy:
    """A random rung per layer, kept for a geometric number of decisions (`persistence`: probability of keeping it)."""

    def __init__(self, seed: int = 0, persistence: float = 0.8, ladder: Ladder = LADDER) -> None:
        if not 0 <= persistence < 1:
            raise ValueError(f"persistence={persistence} is not a probability in [0, 1)")
        self.ladder, self.persistence = ladder, persistence
        self.generator = Generator().manual_seed(seed)
        self.rungs: Tensor | None = None

    def act(self, obs: Tensor) -> list[CompressionConfig]:
        drawn = torch.randint(len(self.ladder), (len(obs),), generator=self.generator)
        keep = torch.rand(len(obs), generator=self.generator) < self.persistence
        self.rungs = drawn if self.rungs is None or len(self.rungs) != len(obs) else torch.where(keep, self.rungs, drawn)
        return [self.ladder[int(rung)] for rung in self.rungs]

    def reset(self) -> None:
        self.rungs = None

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "rungs": self.rungs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        self.rungs = state["rungs"]


@register_policy("water-filling")
class WaterFillingPolicy:
    """Least total update error per byte: scores every rung by minus the squared error that it would add.

    The errors were measured on each layer's own moments (features `error_*`); a layer weighs as many parameters as it
    has. Errors are not alike, so their squares are weighted: rounding the first moment is noise that averages out (1);
    a coarse second moment rescales steps, which costs less (`VARIANCE`); directions outside a subspace are never taken,
    which costs more (`SUBSPACE`). To keep no first moment costs a fixed amount (`WITHOUT_MOMENTUM`). The weights reproduce
    the order of the rungs by loss in `benchmarks/ladder.py`.
    Errors below `tolerance` count as none, so bytes that buy nothing are not spent.
    """

    VARIANCE = 0.1
    SUBSPACE = 16.0
    WITHOUT_MOMENTUM = 2.0

    def __init__(self, tolerance: float = 0.01, ladder: Ladder = LADDER) -> None:
        self.tolerance, self.ladder = tolerance, ladder

    def scores(self, obs: Tensor) -> Tensor:
        error = torch.stack([self.squared_error(obs, rung) for rung in self.ladder], 1)        # (L, R)
        return -(10 ** feature(obs, "numel"))[:, None] * error.clamp(min=self.tolerance**2)

    @classmethod
    def squared_error(cls, obs: Tensor, config: CompressionConfig) -> Tensor:
        """Predicted squared relative error (L,) of the update under a config: its parts, weighted, in quadrature."""

        def measured(name: str) -> Tensor:
            return 10 ** (2 * feature(obs, name))

        nothing = torch.zeros(len(obs))
        if config.rank:
            known = feature(obs, "error_rank_1") if config.rank < 8 else feature(obs, "error_rank_8")
            moment, bits = cls.SUBSPACE * known.square(), config.factor_bits_q
        else:
            moment, bits = nothing, config.momentum_bits
        fixed = {32: 0.0, 16: 4e-6, 6: 2.7e-3, 0: cls.WITHOUT_MOMENTUM}          # geometric levels err alike on any spread: 0.052
        moment = moment + (nothing + fixed[bits] if bits in fixed else measured(f"error_momentum_{bits}"))
        if config.variance_bits == 32:
            return moment
        variance = nothing + 4e-6 if config.variance_bits == 16 else measured(f"error_variance_{config.variance_bits}")
        return moment + cls.VARIANCE * variance

    def act(self, obs: Tensor) -> Tensor:
        return best_scored(self.scores(obs), self.ladder)

    def reset(self) -> None:
        """Nothing is remembered."""


@register_policy("hold")
class HoldPolicy:
    """Decides nothing: configs change only through `MANGO.apply`, as the environment does."""

    def act(self, obs: Tensor) -> None:
        return None

    def reset(self) -> None:
        """Nothing is remembered."""


class CallablePolicy:
    """Somebody's own object: called with a dict of features, answering with a dict of knobs (or anything in `Choice`)."""

    def __init__(self, inner: Callable[[dict[str, Any]], Choice]) -> None:
        self.inner = inner

    def act(self, obs: Tensor) -> Choice:
        return self.inner({name: feature(obs, name) for name in FEATURE_INDEX} | {"layers": obs})   # over the count of that name

    def reset(self) -> None:
        reset = getattr(self.inner, "reset_hidden_state", None)
        if reset is not None:
            reset()


def random_action(layers: int, generator: Generator) -> Tensor:
    """Uniform knob indices (L, K)."""
    return torch.stack([torch.randint(n, (layers,), generator=generator) for n in NVEC], 1)


AdaptiveCompressionPolicy = AdaptivePolicy
FixedCompressionPolicy = FixedPolicy
