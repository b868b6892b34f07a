"""`Mango/TrainingRun-v0`: one training run as one Gymnasium episode, one decision per step for every layer of the model."""

import copy
import math
import operator
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mango.config import LADDER, NVEC, CompressionConfig
from mango.features import FEATURE_DIM, FEATURES, LAYER_FEATURES
from mango.layers import Layer
from mango_env.energy import Energy, metered, no_driver
from mango_env.reward import Reward, RewardTerms
from mango_env.run import DEFAULT_INTERVAL, Interval, TrainingRun, describe_error, whole_number
from mango_env.twin import Twin, costed_twin_of, score, twin_of
from mango_env.workloads.base import WorkloadBuilder

Budget = float | int | str
Observation = dict[str, NDArray[Any]]
ACTIONS = ("knobs", "rung")
LOWS = np.array([feature.low for feature in FEATURES], np.float32)
HIGHS = np.array([feature.high for feature in FEATURES], np.float32)
GLOBALS = slice(len(LAYER_FEATURES), FEATURE_DIM)


class MangoEnv(gym.Env[Observation, NDArray[np.int64]]):
    """A training run whose compression is decided from outside.

    One step is `interval` optimizer steps under the configs that the action proposes, as far as the byte budget allows;
    an episode is `horizon` optimizer steps (None: the workload's own). Reaching the horizon terminates, since progress
    is observed; so does divergence, with `info["diverged"]` and a penalty. The environment itself never truncates.
    `step` and `reset` never raise for what a run does: `info["error"]` says it.

    Observation: `layers` (Lmax, 64) float32, rows beyond the model's layers are zero; `global` (15,) the features that
    all layers share; `mask` (Lmax,) 1 where there is a layer. Action: `actions="knobs"` 7 indices into `KNOBS` per
    layer, layer by layer; `actions="rung"` one rung of `LADDER` per layer. Entries beyond the model's layers are ignored.

    Each episode draws, from `np_random` alone, the run's seed out of `seeds` (a number n means 0..n-1; a small pool lets
    the uncompressed twins be trained once) and its budget out of `memory_budget` where that is a list.
    `reset(options={"run_seed": 3, "memory_budget": 0.5})` sets either. `timings=True` adds `seconds` and
    `overhead_frac` to `info`, which is otherwise equal in two runs of one seed.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # type: ignore[misc]

    def __init__(
        self,
        workload: str | WorkloadBuilder = "digits_mlp",
        horizon: int | None = 200,
        interval: int = DEFAULT_INTERVAL,
        memory_budget: Budget | Sequence[Budget] = 0.25,
        reward: Reward | Mapping[str, Any] | None = None,
        max_layers: int | None = None,
        lr: float | None = None,
        rule: str = "adamw",
        schedule: str = "constant",
        max_grad_norm: float | None = None,
        workload_kwargs: Mapping[str, Any] | None = None,
        actions: str = "knobs",
        seeds: int | Sequence[int] = 16,
        timings: bool = False,
        optimizer_options: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        if actions not in ACTIONS:
            raise ValueError(f"actions={actions!r} is not one of {ACTIONS}")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode={render_mode!r} is not one of {self.metadata['render_modes']}")
        self.workload, self.actions, self.timings, self.render_mode = workload, actions, timings, render_mode
        self.reward = reward if isinstance(reward, Reward) else Reward.from_json(reward or {})
        if self.reward.energy_weight and (problem := no_driver()) is not None:
            raise ValueError(f"energy_weight={self.reward.energy_weight}: power is unavailable, {problem}; set it to 0")
        self.budgets: tuple[Budget, ...] = (memory_budget,) if isinstance(memory_budget, Budget) else tuple(memory_budget)
        self.seeds = tuple(seeds) if isinstance(seeds, Sequence) else tuple(range(whole_number("seeds", seeds)))
        if not self.budgets or not self.seeds:
            raise ValueError("memory_budget and seeds need at least one entry to draw from")
        self._arguments: dict[str, Any] = {
            "horizon": horizon,
            "interval": interval,
            "lr": lr,
            "rule": rule,
            "schedule": schedule,
            "max_grad_norm": max_grad_norm,
            "workload_kwargs": workload_kwargs,
            "optimizer_options": optimizer_options,
        }
        self.layers = self._check_budgets()
        count = len(self.layers)
        self.max_layers = count if max_layers is None else whole_number("max_layers", max_layers)
        if self.max_layers < count:
            raise ValueError(f"max_layers={max_layers}, but workload {workload!r} has {count} layers to decide for")
        self.observation_space = spaces.Dict(
            {
                "layers": spaces.Box(np.tile(LOWS, (self.max_layers, 1)), np.tile(HIGHS, (self.max_layers, 1)), dtype=np.float32),
                "global": spaces.Box(LOWS[GLOBALS], HIGHS[GLOBALS], dtype=np.float32),
                "mask": spaces.MultiBinary(self.max_layers),
            }
        )
        choices = list(NVEC) if actions == "knobs" else [len(LADDER)]
        self.action_space: spaces.Space[NDArray[Any]] = spaces.MultiDiscrete(choices * self.max_layers)
        self.run: TrainingRun | None = None
        self.twin: Twin | None = None
        self.observation = np.zeros((count, FEATURE_DIM), np.float32)
        self.error: str | None = None
        self._history: list[tuple[list[CompressionConfig], Interval]] = []
        self.over = True
        self._seconds = self._step_seconds = 0.0

    def _check_budgets(self) -> list[Layer]:
        """Build a run for every budget: a bad argument must fail here, and not in the middle of a long collection."""
        for budget in self.budgets:
            layers = TrainingRun(self.workload, self.seeds[0], memory_budget=budget, **self._arguments).layers
        return layers

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start the next run. `options`: `run_seed` and `memory_budget` in place of what would be drawn."""
        super().reset(seed=seed)
        options = options or {}
        unknown = sorted(set(options) - {"run_seed", "memory_budget"})
        if unknown:
            raise ValueError(f"unknown options {unknown}; known: run_seed, memory_budget")
        # Both are drawn in any case, so that options do not shift what later episodes draw.
        run_seed = self.seeds[int(self.np_random.integers(len(self.seeds)))]
        budget = self.budgets[int(self.np_random.integers(len(self.budgets)))]
        run_seed = whole_number("run_seed", options.get("run_seed", run_seed), None)
        budget = options.get("memory_budget", budget)
        self.over, self._history, self.error = False, [], None
        self._seconds = self._step_seconds = 0.0
        self.run = self.twin = None
        try:
            self.run = TrainingRun(self.workload, run_seed, memory_budget=budget, **self._arguments)
            if len(self.run.layers) > self.max_layers:
                raise ValueError(f"seed {run_seed} gave {len(self.run.layers)} layers, max_layers is {self.max_layers}")
            self.twin = self._new_twin(self.run)
            self.layers, self.observation = self.run.layers, self.run.observe()
        except Exception as problem:  # one seed of a user's workload may fail; then the first step ends the episode
            if "memory_budget" in options and isinstance(problem, ValueError):
                raise                                        # an impossible budget is the caller's mistake
            self.run, self.error = None, describe_error(problem)
        return self._observed(), self._reset_info(run_seed)

    def step(self, action: NDArray[np.int64]) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Propose one choice per layer and train for one interval under what the budget makes of it."""
        choice = self.decode(action)
        terms, info = self.step_layers(choice)
        return self._observed(), terms.reward, self.over, False, info

    def decode(self, action: NDArray[np.int64]) -> list[CompressionConfig]:
        """The configs that a flat action proposes, one per layer of the model."""
        flat = np.asarray(action)
        if not self.action_space.contains(flat):
            raise ValueError(
                f"action of shape {flat.shape} and type {flat.dtype} is not in {self.action_space}: "
                f"{'7 knob indices' if self.actions == 'knobs' else '1 rung'} for each of {self.max_layers} layers"
            )
        per_layer = flat.reshape(self.max_layers, -1)[: len(self.layers)]
        return [config_of(row, self.actions) for row in per_layer]

    def step_layers(self, choice: list[CompressionConfig]) -> tuple[RewardTerms, dict[str, Any]]:
        """The step itself, with the rewards of every layer: what `step` and `LayerVecEnv` share."""
        if self.over:
            raise gym.error.ResetNeeded("the episode is over (or none was started): call reset()")
        began = time.perf_counter()
        applied: list[CompressionConfig] | None = None
        if self.run is None:
            self.over = True
            return self._lost_episode()
        try:
            applied = self.run.apply(choice)
        except Exception as problem:  # noqa: BLE001         the choice is valid, so this is the run's own failure
            self.over, self.error = True, describe_error(problem)
            return self._lost_episode()
        with metered() if self.reward.energy_weight else nullcontext(Energy()) as used:
            interval = self.run.advance()
        self.error, self.over = interval.error, self.run.done
        self._history.append((applied, interval))
        terms = score(self.reward, interval, self.twin, used.joules)
        self.observation = self._observe_run(self.run)
        info = self._step_info(self.run, applied, interval, terms)
        self._seconds += time.perf_counter() - began
        self._step_seconds += interval.step_seconds
        if self.timings:
            info |= {"seconds": self._seconds, "overhead_frac": self.overhead_frac}
        return terms, info

    @property
    def overhead_frac(self) -> float:
        """Wall clock of this episode's steps outside forward, backward and optimizer, over that inside them."""
        return self._seconds / self._step_seconds - 1 if self._step_seconds > 0 else 0.0

    def fork(self) -> "MangoEnv":
        """An independent environment in the same state, generators included."""
        other = copy.copy(self)
        other.run = self.run.fork() if self.run is not None else None
        other._history = list(self._history)
        other.layers = other.run.layers if other.run is not None else self.layers
        other.np_random = copy.deepcopy(self.np_random)
        other.action_space, other.observation_space = copy.deepcopy((self.action_space, self.observation_space))
        return other

    def render(self) -> str | NDArray[np.uint8] | None:      # type: ignore[override]
        """"ansi": one line of text. "rgb_array": the episode's decisions so far as an image."""
        if self.render_mode is None:
            gym.logger.warn("render() was called, but the environment was made without render_mode; give 'ansi' or 'rgb_array'")
            return None
        return self._line() if self.render_mode == "ansi" else self._image()

    def _line(self) -> str:
        if self.run is None:
            return f"t=0 {self.error or 'not started'}"
        if not self._history:
            return f"t=0/{self.run.horizon}"
        applied, interval = self._history[-1]
        configs = ", ".join(f"{name} x{count}" for name, count in Counter(config.name for config in applied).items())
        state = f" {self.error or 'diverged'}" if interval.diverged else ""
        return (
            f"t={interval.stop}/{self.run.horizon} loss={interval.loss:.4g} "
            f"bytes={interval.state_bytes_peak}/{self.run.budget} [{configs}]{state}"
        )

    def _image(self) -> NDArray[np.uint8]:
        """A row per layer, a column per decision (8 x 8 pixels each): the lighter, the fewer bytes; blue is yet to come."""
        columns = len(self._history) + (self.run.decisions_left if self.run is not None else 1)
        cells = np.tile(np.array([24, 32, 72], np.uint8), (len(self.layers), columns, 1))
        for column, (_, interval) in enumerate(self._history):
            cells[:, column] = (255 * (1 - interval.bytes / interval.adamw_bytes).clip(0, 1)).astype(np.uint8)[:, None]
        return cells.repeat(8, 0).repeat(8, 1)

    def _observe_run(self, run: TrainingRun) -> NDArray[np.float32]:
        try:
            return run.observe()
        except Exception as problem:  # noqa: BLE001         a run that failed half way may have no statistics to show
            self.error, self.over = describe_error(problem), True
            return self.observation

    def _observed(self) -> Observation:
        count = len(self.observation)
        layers = np.zeros((self.max_layers, FEATURE_DIM), np.float32)
        layers[:count] = self.observation
        mask = np.zeros(self.max_layers, np.int8)
        mask[:count] = 1
        return {"layers": layers, "global": self.observation[0, GLOBALS].copy(), "mask": mask}

    def _reset_info(self, run_seed: int) -> dict[str, Any]:
        info: dict[str, Any] = {"run_seed": int(run_seed), "diverged": False}
        if self.run is not None:
            info |= {"budget": self.run.budget, "horizon": self.run.horizon, "layers": len(self.layers)}
        return info | ({"error": self.error} if self.error else {})

    def _step_info(
        self, run: TrainingRun, applied: list[CompressionConfig], interval: Interval, terms: RewardTerms
    ) -> dict[str, Any]:
        info: dict[str, Any] = {
            "t": interval.stop,
            "loss": interval.loss,
            "reward_components": terms.components(),
            "reward_layers": terms.rewards,
            "applied": np.array([config.to_action() for config in applied], np.int64),
            "bytes": interval.bytes,
            "errors": interval.errors,
            "budget": run.budget,
            "state_bytes_peak": interval.state_bytes_peak,
            "diverged": interval.diverged,
        }
        if self.over:
            measures, problem = run.evaluate_or_error()
            info["evaluation"] = measures
            info["val_loss"] = finite(measures.get("val_loss", math.nan))
            self.error = self.error or problem
        return info | ({"error": self.error} if self.error else {})

    def _new_twin(self, run: TrainingRun) -> Twin | None:
        if self.reward.costly:
            return costed_twin_of(run, self.reward.costly)
        return twin_of(run) if self.reward.loss == "twin" else None

    def _lost_episode(self) -> tuple[RewardTerms, dict[str, Any]]:
        """Score a run that could not be started or decided for: every decision that it still had is lost."""
        count = len(self.layers)
        lost = self.run.decisions_left if self.run is not None else 1
        adamw = np.array([8 * layer.numel for layer in self.layers], np.int64)
        terms = self.reward.terms(
            loss=0.0, reference=None, first=0.0, layer_bytes=adamw, adamw_bytes=adamw, errors=np.zeros(count), lost_decisions=lost
        )
        info = {"t": self.run.t if self.run is not None else 0, "diverged": True, "error": self.error}
        return terms, info | {"reward_components": terms.components(), "reward_layers": terms.rewards}


def config_of(action: NDArray[np.int64] | Sequence[int], actions: str) -> CompressionConfig:
    """One layer's action as a config: 7 knob indices, or one rung."""
    indices = [operator.index(i) for i in action]
    return CompressionConfig.from_action(indices) if actions == "knobs" else LADDER[indices[0]]


def finite(value: float) -> float:
    """`value`, with NaN as infinity: a held-out loss that is not a number is as bad as one can be."""
    return math.inf if math.isnan(value) else value
