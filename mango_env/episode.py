"""One layer of one training run, from its first decision to its last: what the trajectory store holds.

`observations` has one row more than everything else, the one seen after the last decision, so row t + 1 is always
the next observation of row t.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mango.config import KNOBS, NVEC
from mango.features import FEATURE_DIM
from mango_env.reward import Reward

Array = NDArray[Any]

# name -> (meaning, unit): one value per decision. Stored as float32, `rung` as int16.
INFOS: dict[str, tuple[str, str]] = {
    "loss": ("training loss, mean over the interval after the decision", "nats or the workload's own"),
    "bytes": ("state bytes that the layer occupied", "bytes"),
    "error": ("relative l2 error that storing the state added", "1"),
    "behavior_logp": ("log probability of the action under the policy that took it (0 where it is deterministic)", "nats"),
    "rung": ("nearest rung of the ladder", "index"),
    "reward_loss": ("loss term of the reward, unweighted", "1"),
    "reward_memory": ("memory term of the reward, unweighted", "1"),
    "reward_error": ("error term of the reward, unweighted", "1"),
}
# name -> (type, meaning): facts that hold for the whole episode
ATTRIBUTES: dict[str, tuple[type, str]] = {
    "run_id": (str, "one training run; with layer_index it names the episode"),
    "layer_index": (int, "position of the layer among the run's layers"),
    "layer_name": (str, "name of the parameter tensor"),
    "layer_kind": (str, "kind of the layer, see mango.features.KINDS"),
    "n_layers": (int, "number of layers of the run"),
    "workload": (str, "what was trained"),
    "policy": (str, "who decided"),
    "seed": (int, "seed of the run"),
    "budget_bytes": (int, "memory budget of the run"),
    "adamw_bytes": (int, "bytes that AdamW's state would have taken in the run"),
    "horizon": (int, "optimizer steps of the run"),
    "interval": (int, "optimizer steps per decision"),
    "lr": (float, "learning rate"),
    "rule": (str, "base rule of the optimizer"),
    "numel": (int, "number of values of the layer"),
    "reward": (str, "weights of the reward, JSON"),
    "mango_version": (str, "version that recorded the episode"),
}
RESERVED = ("total_steps", "complete", "digest", "id")       # attributes that the store itself writes
FLAGS = ("terminations", "truncations")
_INT64 = 2**63


def info_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(np.int16 if name == "rung" else np.float32)


@dataclass(frozen=True, eq=False)
class Episode:
    """What one layer saw, what was applied to it and what came of it, for T decisions.

    Arrays are converted to the dtypes below where that keeps their kind. The last step, and no earlier one, is
    terminated (horizon reached or diverged) or truncated (stopped from outside). Beyond `INFOS` and `ATTRIBUTES`,
    which must be there, further per-decision numbers and further scalars are kept as they are.

    Raises ValueError or TypeError for wrong lengths, shapes, dtypes, non-finite values and indices off the menu.
    """

    observations: Array                     # (T + 1, 64) float32
    actions: Array                          # (T, 7) int8, indices into KNOBS of what was *applied*
    rewards: Array                          # (T,) float32
    terminations: Array                     # (T,) bool
    truncations: Array                      # (T,) bool
    infos: Mapping[str, Array]              # each (T,) float32, rung int16
    attributes: Mapping[str, Any]           # scalars, see ATTRIBUTES

    def __post_init__(self) -> None:
        actions = _array("actions", self.actions, "iu", np.dtype(np.int64))
        if actions.ndim != 2 or len(actions) < 1 or actions.shape[1] != len(KNOBS):
            raise ValueError(f"actions have shape {actions.shape}; an episode has (T, {len(KNOBS)}) with T >= 1")
        steps = len(actions)
        outside = np.argwhere((actions < 0) | (actions >= np.asarray(NVEC)))
        if len(outside):
            t, k = (int(i) for i in outside[0])
            raise ValueError(f"actions[{t}] has index {int(actions[t, k])} for {tuple(KNOBS)[k]}, outside 0..{NVEC[k] - 1}")
        converted = {
            "observations": _numbers("observations", self.observations, "f", np.dtype(np.float32), (steps + 1, FEATURE_DIM)),
            "actions": actions.astype(np.int8),
            "rewards": _numbers("rewards", self.rewards, "fiu", np.dtype(np.float32), (steps,)),
            **{name: _flags(name, getattr(self, name), steps) for name in FLAGS},
        }
        if not converted["terminations"][-1] and not converted["truncations"][-1]:
            raise ValueError("the last step is neither terminated nor truncated; an episode ends with one of them")
        missing = [name for name in INFOS if name not in self.infos]
        if missing:
            raise ValueError(f"infos lack {missing}; an episode has {list(INFOS)}")
        infos = {
            name: _numbers(f"infos[{name!r}]", array, "i" if name == "rung" else "fiu", info_dtype(name), (steps,))
            for name, array in self.infos.items()
        }
        if infos["rung"].min() < 0:
            raise ValueError(f"infos['rung'] has {int(infos['rung'].min())}; a rung is an index >= 0")
        for name, array in converted.items():
            object.__setattr__(self, name, array)
        object.__setattr__(self, "infos", dict(sorted(infos.items())))
        object.__setattr__(self, "attributes", _attributes(self.attributes))

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def key(self) -> tuple[str, int]:
        """What names the episode: its run and its layer."""
        return self.attributes["run_id"], self.attributes["layer_index"]

    @property
    def terminated(self) -> bool:
        """Whether the episode came to its own end; otherwise it was stopped from outside."""
        return bool(self.terminations[-1])

    @property
    def returns(self) -> float:
        """The undiscounted sum of rewards."""
        return float(self.rewards.sum(dtype=np.float64))

    @property
    def reward(self) -> Reward:
        """The weights that the rewards were made with."""
        return Reward.from_json(self.attributes["reward"])

    def rescored(self, reward: Reward) -> "Episode":
        """The same episode with rewards recomputed from the logged terms under other weights."""
        terms = (self.infos[f"reward_{term}"] for term in ("loss", "memory", "error"))
        return replace(self, rewards=reward.combine(*terms), attributes={**self.attributes, "reward": reward.to_json()})

    def digest(self) -> str:
        """Hash of everything in it: equal for equal content, wherever and in whatever order it is stored."""
        h = hashlib.blake2b(digest_size=16)
        arrays = {name: getattr(self, name) for name in ("observations", "actions", "rewards", *FLAGS)}
        for name, array in {**arrays, **{f"infos/{n}": a for n, a in self.infos.items()}}.items():
            h.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            h.update(np.ascontiguousarray(array).view(np.uint8).data)
        h.update(json.dumps(self.attributes, sort_keys=True).encode())
        return h.hexdigest()


def _array(name: str, value: Any, kinds: str, dtype: np.dtype[Any]) -> Array:
    """`value` as `dtype` where its kind is one of `kinds` (numpy's letters)."""
    array = np.asarray(value)
    if array.dtype.kind not in kinds:
        wanted = {"f": "floats", "fiu": "numbers", "iu": "integers", "i": "integers", "b": "booleans"}[kinds]
        raise TypeError(f"{name} are {array.dtype}; they must be {wanted}, they are stored as {dtype}")
    return np.ascontiguousarray(array, dtype)


def _numbers(name: str, value: Any, kinds: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    with np.errstate(over="ignore"):                          # what overflows float32 is reported as not finite below
        array = _array(name, value, kinds, dtype)
    if array.shape != shape:
        raise ValueError(f"{name} have shape {array.shape}; {shape} is needed (T decisions, T + 1 observations)")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name}{list(first)} is {array[first]}; values must be finite: clip them before recording")
    return array


def _flags(name: str, value: Any, steps: int) -> Array:
    array = _array(name, value, "b", np.dtype(bool))
    if array.shape != (steps,):
        raise ValueError(f"{name} have shape {array.shape}; {(steps,)} is needed, one flag per decision")
    if array[:-1].any():
        raise ValueError(f"{name}[{int(array.argmax())}] is set before the last of {steps} steps; an episode ends once")
    return array


def _attributes(given: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    missing = [name for name in ATTRIBUTES if name not in given]
    if missing:
        raise ValueError(f"attributes lack {missing}; an episode has {list(ATTRIBUTES)}")
    reserved = [name for name in RESERVED if name in given]
    if reserved:
        raise ValueError(f"attributes {reserved} are written by the store itself; leave them out")
    return {name: _scalar(name, value.item() if isinstance(value, np.generic) else value) for name, value in given.items()}


def _scalar(name: str, value: Any) -> Any:
    """An attribute as the scalar that the table of attributes asks for, any scalar where it says nothing."""
    kind: Any = ATTRIBUTES[name][0] if name in ATTRIBUTES else str | int | float | bool
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"attribute {name}={value!r} must be {getattr(kind, '__name__', 'a string, number or boolean')}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"attribute {name}={value!r} must be finite")
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise ValueError(f"attribute {name}={value!r} does not fit 64 bits")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"attribute {name}={value!r} has a zero byte, which HDF5 strings cannot hold")
    return value
