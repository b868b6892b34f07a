"""The per-layer view of training runs as a Stable-Baselines3 `VecEnv`: one slot per layer, one weight-shared policy for all.

This module loads SB3; `import mango_env` does not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mango.config import LADDER, NVEC
from mango.features import FEATURE_INDEX, KINDS
from mango_env.adapters import quiet_gym
from mango_env.env import HIGHS, LOWS, Budget, MangoEnv, config_of
from mango_env.reward import Reward
from mango_env.run import DEFAULT_INTERVAL, whole_number
from mango_env.workloads.base import WorkloadBuilder

quiet_gym()                                                  # SB3 looks for the dead `gym`, which would print its notice
try:
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices
except ImportError as problem:
    raise ImportError('LayerVecEnv needs stable-baselines3: pip install "mango-optim[train]"') from problem

Spec = str | WorkloadBuilder
StepReturn = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]
Driver = Callable[[NDArray[np.float32]], NDArray[np.int64]]
_STATIC = [FEATURE_INDEX[name] for name in ("depth", "numel", "aspect", *(f"kind_{kind}" for kind in KINDS))]


class LayerVecEnv(VecEnv):
    """Live training runs seen layer by layer: each slot is one layer of one run.

    Observation Box(64); action MultiDiscrete over `KNOBS`, or Discrete over `LADDER` with `actions="rung"`. Runs are
    pinned to workloads in turn (run i trains `workload[i % len]`), so every run has exactly as many slots as its model has
    layers: no layer is duplicated and none is left out, which would bias the policy towards or away from it.
    `slots_per_run` caps the slots of a run with many layers: every episode draws which of its layers learn. The others
    are decided by `driver(observations) -> actions` (the current policy, say); without one each copies the learning
    layer that resembles it most in kind, size, depth and shape.

    The slots of a run share its episodes: they are done together, `infos` carry `terminal_observation`, the next run
    starts in the same step, and `TimeLimit.truncated` is False, because the horizon is part of what is observed.
    `memory_budget` may be a list, from which every episode draws. Attributes and methods reach the `MangoEnv` of a slot.
    """

    def __init__(
        self,
        workload: Spec | Sequence[Spec] = "digits_mlp",
        *,
        n_runs: int | None = None,
        slots_per_run: int | None = None,
        horizon: int | None = 200,
        interval: int = DEFAULT_INTERVAL,
        memory_budget: Budget | Sequence[Budget] = 0.25,
        reward: Reward | Mapping[str, Any] | None = None,
        actions: str = "knobs",
        lr: float | None = None,
        rule: str = "adamw",
        schedule: str = "constant",
        max_grad_norm: float | None = None,
        workload_kwargs: Mapping[str, Any] | None = None,
        seeds: int | Sequence[int] = 16,
        seed: int | None = None,
        optimizer_options: Mapping[str, Any] | None = None,
        driver: Driver | None = None,
    ) -> None:
        workloads = [workload] if isinstance(workload, str) or callable(workload) else list(workload)
        n_runs = len(workloads) if n_runs is None else whole_number("n_runs", n_runs)
        if not workloads or n_runs < len(workloads):
            raise ValueError(f"n_runs={n_runs} cannot cover {len(workloads)} workloads; give at least one run to each")
        self.envs = [
            MangoEnv(
                workloads[i % len(workloads)],
                horizon=horizon,
                interval=interval,
                memory_budget=memory_budget,
                reward=reward,
                lr=lr,
                rule=rule,
                schedule=schedule,
                max_grad_norm=max_grad_norm,
                workload_kwargs=workload_kwargs,
                actions=actions,
                seeds=seeds,
                optimizer_options=optimizer_options,
            )
            for i in range(n_runs)
        ]
        self.actions, self.driver = actions, driver
        cap = None if slots_per_run is None else whole_number("slots_per_run", slots_per_run)
        self._counts = [min(len(env.layers), cap or len(env.layers)) for env in self.envs]
        self._firsts = [sum(self._counts[:i]) for i in range(n_runs)]
        self._learning = [np.arange(count) for count in self._counts]       # the layers behind each run's slots
        self._owner = [i for i, count in enumerate(self._counts) for _ in range(count)]
        self._chosen: NDArray[np.int64] | None = None
        action_space: spaces.Space[Any] = spaces.MultiDiscrete(list(NVEC)) if actions == "knobs" else spaces.Discrete(len(LADDER))
        super().__init__(sum(self._counts), spaces.Box(LOWS, HIGHS, dtype=np.float32), action_space)
        if seed is not None:
            self.seed(seed)

    def reset(self) -> NDArray[np.float32]:
        """Start a new run in every place."""
        rows = []
        for i, first in enumerate(self._firsts):
            self._restart(i, self._seeds[first], self._options[first])
            rows.append(self._rows(i))
        self._reset_seeds()
        self._reset_options()
        return np.concatenate(rows)

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._chosen = np.asarray(actions).reshape(self.num_envs, -1)

    def step(self, actions: NDArray[np.int64]) -> StepReturn:
        """`step_async` and `step_wait` in one."""
        self.step_async(actions)
        return self.step_wait()

    def step_wait(self) -> StepReturn:
        """Train every run for one interval; returns observations (S, 64), rewards (S,), dones (S,), infos."""
        if self._chosen is None:
            raise ValueError("step_wait() without step_async(actions)")
        chosen, self._chosen = self._chosen, None
        rows: list[NDArray[np.float32]] = []
        rewards = np.zeros(self.num_envs, np.float32)
        dones = np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = []
        for i, (env, first, count) in enumerate(zip(self.envs, self._firsts, self._counts, strict=True)):
            slots = slice(first, first + count)
            terms, shared = env.step_layers([config_of(row, self.actions) for row in self._complete(i, chosen[slots])])
            rewards[slots] = terms.rewards[self._learning[i]]
            infos += [self._info(i, int(layer), shared) for layer in self._learning[i]]
            if env.over:
                dones[slots] = True
                for info, last in zip(infos[first:], self._rows(i), strict=True):
                    info["terminal_observation"] = last
                self._restart(i, None, {})
            rows.append(self._rows(i))
        return np.concatenate(rows), rewards, dones, infos

    def _complete(self, i: int, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Actions for all layers of run i (L, K) from those of its slots."""
        observation, learning = self.envs[i].observation, self._learning[i]
        if len(learning) == len(observation):
            return chosen
        actions = np.empty((len(observation), chosen.shape[1]), np.int64)
        others = np.setdiff1d(np.arange(len(observation)), learning)
        if self.driver is not None:
            actions[others] = np.asarray(self.driver(observation[others])).reshape(len(others), -1)
        else:
            static = observation[:, _STATIC]
            distance = np.abs(static[others, None] - static[None, learning]).sum(2)
            actions[others] = chosen[distance.argmin(1)]
        actions[learning] = chosen
        return actions

    def _restart(self, i: int, seed: int | None, options: dict[str, Any]) -> None:
        env, count, slots = self.envs[i], self._counts[i], range(self._firsts[i], self._firsts[i] + self._counts[i])
        _, info = env.reset(seed=seed, options=options or None)
        layers = len(env.layers)
        if layers < count:
            raise ValueError(f"this seed gave {layers} layers for {count} slots; give slots_per_run={layers} or fewer")
        self._learning[i] = np.sort(env.np_random.choice(layers, count, replace=False)) if count < layers else np.arange(count)
        for slot in slots:
            self.reset_infos[slot] = dict(info)

    def _rows(self, i: int) -> NDArray[np.float32]:
        return self.envs[i].observation[self._learning[i]]

    def _info(self, i: int, layer: int, shared: Mapping[str, Any]) -> dict[str, Any]:
        """What the slot of one layer reports; the arrays over layers become its own numbers."""
        info = {k: v for k, v in shared.items() if k not in ("reward_layers", "applied", "bytes", "errors")}
        info |= {"run": i, "layer_index": layer, "layer_name": self.envs[i].layers[layer].name, "TimeLimit.truncated": False}
        if "applied" in shared:
            info |= {
                "applied": shared["applied"][layer],
                "bytes": int(shared["bytes"][layer]),
                "compression_error": float(shared["errors"][layer]),
            }
        return info

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds for the next `reset`, one per slot; a run takes that of its first slot."""
        base = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        self._seeds = [base + slot for slot in range(self.num_envs)]
        return self._seeds

    def close(self) -> None:
        for env in self.envs:
            env.close()                                      # type: ignore[no-untyped-call]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(env, attr_name) for env in self._targets(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        for env in self._targets(indices):
            setattr(env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of the runs behind `indices`: once per run, its answer repeated for each of the run's slots."""
        answers: dict[int, Any] = {}
        for env in self._targets(indices):
            if id(env) not in answers:
                answers[id(env)] = getattr(env, method_name)(*method_args, **method_kwargs)
        return [answers[id(env)] for env in self._targets(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None) -> list[bool]:
        """No: the runs behind the slots are bare."""
        return [isinstance(env, wrapper_class) for env in self._targets(indices)]

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        return [None] * self.num_envs

    def _targets(self, indices: VecEnvIndices) -> list[MangoEnv]:
        chosen: Iterable[int] = self._get_indices(indices)
        return [self.envs[self._owner[slot]] for slot in chosen]
