"""What to do with one parameter tensor: the menus of choices, one choice, and the short list of good choices.

A policy acts on `KNOBS` (one index per knob and layer) or on a `Ladder` (one rung per layer). Both end in a
`CompressionConfig`, the only thing that the optimizer obeys.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

KNOBS_VERSION = 2                                        # files carry it; loading compares it
KNOBS: dict[str, tuple[float, ...]] = {                  # the order is the action layout
    "gradient_bits": (32, 16, 8, 6, 4, 2),               # bits per value of the gradient
    "momentum_bits": (32, 16, 8, 6, 4, 2, 0),            # bits per value of the first moment; 0: there is none
    "variance_bits": (32, 16, 8, 4, 0),                  # bits per value of the second moment; 0: row and column factors
    "sparsity": (0.0, 0.5, 0.9, 0.99),                   # fraction of gradient entries dropped
    "rank": (0, 1, 4, 8, 32, 128),                       # rank of the moments' subspace; 0: full
    "factor_bits_p": (16, 8, 4),                         # bits per value of the projector P, where rank > 0
    "factor_bits_q": (16, 8, 4),                         # bits per value of the first moment in the subspace, where rank > 0
}
NVEC: tuple[int, ...] = tuple(len(menu) for menu in KNOBS.values())
MAX_SPARSITY = 0.99
_ALIASES = {"sparsity_ratio": "sparsity"}                # the earlier public name


_NAME = re.compile(                                      # of a config, see `CompressionConfig.name`
    r"(?:g(?P<gradient_bits>\d+))?(?:s(?P<sparsity>0\.\d+))?"
    r"(?:m(?P<momentum_bits>\d+)v(?P<variance_bits>\d+)"
    r"|r(?P<rank>\d+)p(?P<factor_bits_p>\d+)q(?P<factor_bits_q>\d+)v(?P<low_rank_variance_bits>\d+))?"
)


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """What to do with one parameter tensor. The default is full precision.

    Bits and rank come from the menus in `KNOBS`; `sparsity` may be any fraction in [0, 0.99].
    With `rank` > 0 the moments live in a rank-`rank` subspace: `factor_bits_p` stores the projector,
    `factor_bits_q` the first moment, `variance_bits` the second, and `momentum_bits` is not used.

    >>> CompressionConfig(momentum_bits=8, variance_bits=8).name
    'm8v8'
    >>> CompressionConfig(momentum_bits=5)
    Traceback (most recent call last):
    ...
    ValueError: momentum_bits=5 is not on the menu (32, 16, 8, 6, 4, 2, 0)
    """

    gradient_bits: int = 32
    momentum_bits: int = 32
    variance_bits: int = 32
    sparsity: float = 0.0
    rank: int = 0
    factor_bits_p: int = 16
    factor_bits_q: int = 16

    def __post_init__(self) -> None:
        for knob, menu in KNOBS.items():
            value = getattr(self, knob)
            if knob == "sparsity":
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SPARSITY:
                    raise ValueError(f"sparsity={value!r} is not a fraction in [0, {MAX_SPARSITY}]")
            elif isinstance(value, bool) or value not in menu:
                raise ValueError(f"{knob}={value!r} is not on the menu {menu}")

    @property
    def name(self) -> str:
        """A short name that says what differs from full precision: 'full', 'm8v8', 'm4v0', 'r4p8q8v0', 'g4s0.9m8v32'."""
        parts = [] if self.gradient_bits == 32 else [f"g{self.gradient_bits}"]
        parts += [f"s{self.sparsity:g}"] if self.sparsity else []
        if self.rank:
            parts.append(f"r{self.rank}p{self.factor_bits_p}q{self.factor_bits_q}v{self.variance_bits}")
        elif (self.momentum_bits, self.variance_bits) != (32, 32) or parts:
            parts.append(f"m{self.momentum_bits}v{self.variance_bits}")
        return "".join(parts) or "full"

    @classmethod
    def from_name(cls, name: str) -> "CompressionConfig":
        """The config that `name` is the name of.

        >>> CompressionConfig.from_name("r4p8q4v0").rank
        4
        """
        found = _NAME.fullmatch(name)
        given = {} if found is None else {
            knob.removeprefix("low_rank_"): text for knob, text in found.groupdict().items() if text is not None
        }
        if not given and name != "full":
            raise ValueError(f"{name!r} is no name of a config; names are such as full, m8v0, g4m8v8, r4p8q8v0")
        return cls.from_dict({knob: float(text) if knob == "sparsity" else int(text) for knob, text in given.items()})

    @property
    def sparsity_ratio(self) -> float:
        """The earlier public name of `sparsity`."""
        return self.sparsity

    @property
    def has_momentum(self) -> bool:
        """Whether a first moment is kept; without one the rule steps along the gradient itself."""
        return self.rank > 0 or self.momentum_bits > 0

    @property
    def compresses_gradient(self) -> bool:
        return self.gradient_bits < 32 or self.sparsity > 0

    def to_action(self) -> tuple[int, ...]:
        """Indices into `KNOBS`, one per knob (K,); a sparsity between two menu entries takes the nearest."""
        return _action_of(self)

    @classmethod
    def from_action(cls, action: Sequence[int]) -> "CompressionConfig":
        """The config at the given indices into `KNOBS` (K,)."""
        if len(action) != len(KNOBS):
            raise ValueError(f"an action has one index per knob, {len(KNOBS)} ({', '.join(KNOBS)}); got {len(action)}")
        values: dict[str, Any] = {}
        for (knob, menu), index in zip(KNOBS.items(), action, strict=True):
            if not 0 <= int(index) < len(menu):
                raise ValueError(f"action index {int(index)} for {knob} is outside 0..{len(menu) - 1}")
            values[knob] = menu[int(index)]
        return cls(**values)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, choice: Mapping[str, Any]) -> "CompressionConfig":
        """From a dict of knobs; missing ones keep full precision, `sparsity_ratio` is accepted for `sparsity`."""
        named = {_ALIASES.get(key, key): value for key, value in choice.items()}
        unknown = sorted(set(named) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown knobs {unknown}; known: {list(KNOBS)}")
        values: dict[str, Any] = {k: float(v) if k == "sparsity" else int(v) for k, v in named.items()}
        return cls(**values)


@lru_cache(maxsize=1 << 14)
def _action_of(config: CompressionConfig) -> tuple[int, ...]:
    return tuple(min(range(len(menu)), key=lambda i: abs(menu[i] - getattr(config, knob))) for knob, menu in KNOBS.items())


FULL = CompressionConfig()


@dataclass(frozen=True)
class Ladder:
    """A short list of configs, ordered by bytes, the cheapest first: the discrete action space of one layer.

    >>> LADDER.nearest(CompressionConfig(momentum_bits=8, variance_bits=8)) == LADDER.index("m8v8")
    True
    """

    rungs: tuple[CompressionConfig, ...]

    def __post_init__(self) -> None:
        if len(self.rungs) < 2 or len(set(self.rungs)) != len(self.rungs):
            raise ValueError(f"a ladder has at least two different rungs; got {[r.name for r in self.rungs]}")

    def __len__(self) -> int:
        return len(self.rungs)

    def __iter__(self) -> Iterator[CompressionConfig]:
        return iter(self.rungs)

    def __getitem__(self, rung: int) -> CompressionConfig:
        return self.rungs[rung]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(r.name for r in self.rungs)

    def index(self, rung: str | int) -> int:
        """The position of a rung given by name or by position."""
        if isinstance(rung, str) and not rung.lstrip("-").isdigit():
            if rung not in self.names:
                raise ValueError(f"unknown rung {rung!r}; the ladder has {', '.join(self.names)}")
            return self.names.index(rung)
        if not 0 <= int(rung) < len(self.rungs):
            raise ValueError(f"rung {rung} is outside 0..{len(self.rungs) - 1}")
        return int(rung)

    def nearest(self, config: CompressionConfig) -> int:
        """The rung whose knobs are closest to `config`: by rank first, then by distance over the menus."""
        known = self._nearest.get(config)
        if known is not None:
            return known
        action = config.to_action()

        def distance(rung: CompressionConfig) -> tuple[bool, int]:
            other = rung.to_action()
            return (rung.rank > 0) != (config.rank > 0), sum(abs(a - b) for a, b in zip(action, other, strict=True))

        return self._nearest.setdefault(config, min(range(len(self.rungs)), key=lambda i: distance(self.rungs[i])))

    @cached_property
    def _nearest(self) -> dict[CompressionConfig, int]:
        """Rungs that were asked for: a configuration is recorded at every decision of every layer."""
        return {}

    def to_json(self) -> str:
        return json.dumps([r.to_dict() for r in self.rungs])

    @classmethod
    def from_json(cls, text: str) -> "Ladder":
        return cls(tuple(CompressionConfig.from_dict(rung) for rung in json.loads(text)))


# Ordered by bytes per parameter of a 512 x 512 matrix; measured, chosen and written by `benchmarks/ladder.py`.
_TABLE = json.loads(Path(__file__).with_name("ladder.json").read_text(encoding="utf-8"))
LADDER = Ladder(tuple(CompressionConfig.from_dict(rung["config"]) for rung in _TABLE["rungs"]))
