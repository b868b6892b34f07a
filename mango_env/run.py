"""A training run under compression: a seeded workload, the optimizer, and a clock of decisions.

Everything that looks at training runs (the environments, the collectors, the evaluation) drives this one class:
`observe`, `apply` a choice, `advance` one interval, until `done`. It can be saved and forked bit-exactly.
"""

import copy
import math
import operator
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.config import CompressionConfig
from mango.layers import Layer
from mango.optimizer import MANGO
from mango.rules import CHOICES
from mango_env.schedules import check_schedule, rate_factor
from mango_env.workloads import Workload, make_workload, workload_name
from mango_env.workloads.base import WorkloadBuilder

DEFAULT_LR = 2e-3
DEFAULT_INTERVAL = 10       # optimizer steps per decision
DIVERGED = 5.0              # a run diverged when an interval's mean loss exceeds this many times its first loss (of at least 1)
RUN_RULES = CHOICES         # base rules
HYPER = ("betas", "eps", "weight_decay", "maximize", "momentum", "matrix_lr_scale")


@dataclass(frozen=True, slots=True, eq=False)
class Interval:
    """What happened between two decisions, all of it measured."""

    start: int                                               # optimizer steps done before it
    stop: int                                                # optimizer steps done after it
    losses: NDArray[np.float64]                              # (stop - start,) training losses as they were, maybe not finite
    loss: float                                              # their mean over the finite ones, always finite
    last_loss: float                                         # the last finite one
    previous_loss: float                                     # mean of the interval before (of the first one: the first loss)
    first_loss: float                                        # the run's first loss
    diverged: bool
    error: str | None                                        # what the workload or optimizer raised, if it did
    bytes: NDArray[np.int64]                                 # (L,) state bytes at the end of the interval
    errors: NDArray[np.float32]                              # (L,) relative error that storing the state added, at the last probe
    adamw_bytes: NDArray[np.int64]                           # (L,) AdamW's state bytes
    state_bytes_peak: int                                    # largest state bytes after any step of it or after its decision
    decisions_left: int                                      # decisions that the horizon has after this one
    seconds: float                                           # wall clock of the interval
    step_seconds: float                                      # of which inside loss, backward and the optimizer's step


@dataclass(slots=True)
class UnderWay:
    """An interval that is not over."""

    start: int
    began: float                                             # seconds, of `time.perf_counter`
    losses: list[Tensor] = field(default_factory=list)
    error: str | None = None
    inside: float = 0.0                                      # seconds of loss, backward and the optimizer's steps


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A run's whole state at one moment, detached from it. It can be restored any number of times."""

    t: int
    owner: Any                                               # the model that `workload` refers to
    tensors: dict[str, Tensor]                               # parameters and buffers
    optimizer: dict[str, Any]
    workload: Any
    random: list[Tensor]
    clock: dict[str, Any]


class TrainingRun:
    """One seeded training of `workload` by MANGO, decided from outside.

    `workload`: a name, `"module:function"` or a callable `f(seed)`; `horizon`: optimizer steps (None: the workload's
    own `steps`); `interval`: optimizer steps per decision; `memory_budget`: a fraction of AdamW's state bytes, a string
    such as "64KiB", or bytes; `lr`: None takes the workload's own, or 2e-3; `schedule`: of the rate, see
    `mango_env.schedules`; `max_grad_norm`: gradients are scaled to that global l2 norm at most; `policy`: "hold" waits
    for `apply`, anything else that MANGO takes decides by itself;
    `optimizer_options` go to MANGO.

    While it works, the run borrows torch's global generators (the CPU's and those of the model's devices) and gives them
    back as they were: dropout and the like repeat with the seed and neither disturb nor notice the process around them.

    >>> run = TrainingRun("digits_mlp", seed=0, horizon=20, interval=10)
    >>> run.advance().stop
    10
    """

    def __init__(
        self,
        workload: str | WorkloadBuilder,
        seed: int,
        *,
        horizon: int | None = None,
        interval: int = DEFAULT_INTERVAL,
        memory_budget: float | int | str | None = 0.25,
        lr: float | None = None,
        rule: str = "adamw",
        schedule: str = "constant",
        max_grad_norm: float | None = None,
        policy: Any = "hold",
        workload_kwargs: Mapping[str, Any] | None = None,
        optimizer_options: Mapping[str, Any] | None = None,
    ) -> None:
        if rule not in RUN_RULES:
            raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RUN_RULES)}")
        self.spec, self._options = workload, dict(optimizer_options or {})
        self._budget, self._policy = memory_budget, policy
        self.seed, self.rule = whole_number("seed", seed, None), rule
        self.interval, self.schedule = whole_number("interval", interval), check_schedule(schedule)
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm={max_grad_norm!r} must be a positive number, or None for gradients as they are")
        self.max_grad_norm = max_grad_norm
        self.workload_kwargs = dict(workload_kwargs or {})
        # Model initialisation often draws from the global generator: it starts from the run's seed as well.
        self._random = [torch.Generator().manual_seed(self.seed).get_state()]
        with self._own_randomness():
            self.workload: Workload = make_workload(workload, self.seed, **self.workload_kwargs)
        self.model = self.workload.model
        self.workload_name = workload_name(workload)
        self.horizon = whole_number("horizon", self.workload.steps if horizon is None else horizon)
        self.lr = float(lr if lr is not None else getattr(self.workload, "lr", DEFAULT_LR))
        self.optimizer = MANGO(
            self.model.named_parameters(),
            lr=self.lr,
            memory_budget=memory_budget,
            policy=copy.deepcopy(policy),
            policy_update_freq=self.interval,
            total_steps=self.horizon,
            seed=self.seed,
            rule=rule,
            **self._options,
        )
        if not self.layers:
            raise ValueError(f"workload {self.workload_name!r} has no parameter tensor large enough to be compressed")
        self.adamw_layer_bytes = np.array([8 * layer.numel for layer in self.layers], np.int64)
        self.t = 0
        self.diverged = False
        self._first = self._previous = math.nan
        self._peak = self.optimizer.state_bytes()
        self._random += [torch.Generator(device).manual_seed(self.seed).get_state() for device in self._cuda_devices]

    @property
    def hyper(self) -> dict[str, Any]:
        """Those of the optimizer's options that change training at full precision too: an uncompressed twin shares them."""
        return {name: self._options[name] for name in HYPER if name in self._options}

    @property
    def layers(self) -> list[Layer]:
        """The agents, in model order."""
        return self.optimizer.layers

    @property
    def budget(self) -> int:
        """Bytes that the optimizer may keep."""
        return self.optimizer.memory_budget

    @property
    def done(self) -> bool:
        return self.diverged or self.t >= self.horizon

    @property
    def decisions_left(self) -> int:
        """Intervals that the horizon still has room for, the last one maybe shorter."""
        return -(-(self.horizon - self.t) // self.interval)

    def observe(self) -> NDArray[np.float32]:
        """The observation of every layer (L, 64), inside the ranges of `FEATURES`."""
        return self.optimizer.observe().numpy()

    def apply(self, choice: Any) -> list[CompressionConfig]:
        """Propose configs (see `MANGO.apply`); returns what is in force after the budget, one per layer."""
        with self._own_randomness():
            applied = self.optimizer.apply(choice)
        self._peak = max(self._peak, self.optimizer.state_bytes())
        return applied

    def advance(self) -> Interval:
        """Train for one interval under the configs in force.

        Never raises for what the run does: a workload that raises, a loss that is not finite or too large ends it
        with `diverged`. Calling it when the run is over is a `ValueError`.
        """
        under_way = self.begin()
        with self._own_randomness():
            try:
                for _ in range(self.steps_ahead):
                    entered = time.perf_counter()
                    self.optimizer.zero_grad()
                    loss = self.workload.loss()
                    loss.backward()                          # type: ignore[no-untyped-call]
                    self.take_step(under_way, loss.detach(), entered)
            except Exception as problem:  # noqa: BLE001     whatever a user's workload raises ends the run, not the program
                under_way.error = describe_error(problem)
        return self.end(under_way)

    @property
    def steps_ahead(self) -> int:
        """Optimizer steps of the next interval."""
        return min(self.interval, self.horizon - self.t)

    def begin(self) -> "UnderWay":
        """An interval to fill with `take_step` and to `end`: `advance` in parts, for whoever computes gradients elsewhere."""
        if self.done:
            raise ValueError(f"the run is over ({'diverged' if self.diverged else 'horizon'} at step {self.t}); start a new one")
        return UnderWay(self.t, time.perf_counter())

    def take_step(self, under_way: "UnderWay", loss: Tensor, entered: float) -> None:
        """The optimizer's step on gradients that are there; `loss` belongs to them, `entered`: when computing it began."""
        under_way.losses.append(loss)
        self.optimizer.observe_loss(loss)
        self._set_rate()
        if self.max_grad_norm is not None:
            self.optimizer.clip_grad_norm(self.max_grad_norm)
        self.optimizer.step()
        under_way.inside += time.perf_counter() - entered
        self.t += 1
        self._peak = max(self._peak, self.optimizer.state_bytes())

    def _set_rate(self) -> None:
        if self.schedule != "constant":
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate_factor(self.schedule, self.t, self.horizon)

    def end(self, under_way: "UnderWay") -> Interval:
        """What happened since `begin`."""
        start, tensors, error = under_way.start, under_way.losses, under_way.error
        # One transfer per interval: asking for every loss as it comes would synchronise the device at every step.
        losses = torch.stack(tensors).double().cpu().numpy().reshape(-1) if tensors else np.empty(0)
        finite = losses[np.isfinite(losses)]
        if math.isnan(self._first) and len(finite):
            self._first = self._previous = float(finite[0])
        first = 0.0 if math.isnan(self._first) else self._first
        limit = DIVERGED * max(abs(first), 1.0)
        loss = min(max(float(finite.mean()), -1e30), 1e30) if len(finite) else limit
        self.diverged = error is not None or len(finite) < len(losses) or loss > limit
        previous = loss if math.isnan(self._previous) else self._previous
        peak, self._previous = self._peak, loss
        self._peak = self.optimizer.state_bytes()
        return Interval(
            start=start,
            stop=self.t,
            losses=losses,
            loss=loss,
            last_loss=float(finite[-1]) if len(finite) else loss,
            previous_loss=previous,
            first_loss=first,
            diverged=self.diverged,
            error=error,
            bytes=self.optimizer.layer_bytes().numpy().astype(np.int64),
            errors=self.optimizer.layer_errors().numpy().astype(np.float32),
            adamw_bytes=self.adamw_layer_bytes,
            state_bytes_peak=peak,
            decisions_left=-(-(self.horizon - start) // self.interval) - 1,
            seconds=time.perf_counter() - under_way.began,
            step_seconds=under_way.inside,
        )

    def evaluate(self) -> dict[str, float]:
        """The workload's held-out measures, at least `val_loss`. Leaves the run as it was."""
        with self._own_randomness(keep=False):
            return {name: float(value) for name, value in self.workload.evaluate().items()}

    def evaluate_or_error(self) -> tuple[dict[str, float], str | None]:
        """`evaluate`, or what it raised: a run's trajectory is sound even where its held-out measure fails."""
        try:
            return self.evaluate(), None
        except Exception as problem:  # noqa: BLE001         whatever a user's workload raises
            return {}, describe_error(problem)

    def snapshot(self) -> Snapshot:
        """The whole state, copied: weights, buffers, optimizer, data position, generators, clock."""
        return Snapshot(
            t=self.t,
            owner=self.model,
            tensors={name: tensor.detach().clone() for name, tensor in _tensors(self.model)},
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
            workload=_save_workload(self.workload),
            random=[state.clone() for state in self._random],
            clock={name: getattr(self, name) for name in ("diverged", "_first", "_previous", "_peak")},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from `snapshot`, taken of this run or of one with the same arguments; bit-exact."""
        with torch.no_grad():
            for name, tensor in _tensors(self.model):
                tensor.copy_(snapshot.tensors[name])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))
        _load_workload(self.workload, snapshot)
        self._random = [state.clone() for state in snapshot.random]
        self.t = snapshot.t
        for name, value in snapshot.clock.items():
            setattr(self, name, value)

    def fork(self) -> "TrainingRun":
        """An independent run in the same state: one state can be tried under several choices."""
        other = TrainingRun(
            self.spec,
            self.seed,
            horizon=self.horizon,
            interval=self.interval,
            memory_budget=self._budget,
            lr=self.lr,
            rule=self.rule,
            schedule=self.schedule,
            max_grad_norm=self.max_grad_norm,
            policy=self._policy,
            workload_kwargs=self.workload_kwargs,
            optimizer_options=self._options,
        )
        other.restore(self.snapshot())
        return other

    @property
    def _cuda_devices(self) -> list[torch.device]:
        return sorted({p.device for p in self.model.parameters() if p.device.type == "cuda"}, key=str)

    @contextmanager
    def _own_randomness(self, keep: bool = True) -> Iterator[None]:
        """torch's global generators hold the run's state inside the block, and their own again after it."""
        devices = self._cuda_devices if len(self._random) > 1 else []
        outer = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
        _set_random(self._random, devices)
        try:
            yield
        finally:
            if keep:
                self._random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
            _set_random(outer, devices)


def whole_number(name: str, value: Any, least: int | None = 1) -> int:
    """`value` as an int; `ValueError` where it is none or below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number") from None
    if isinstance(value, bool) or (least is not None and number < least):
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    return number


def describe_error(problem: Exception) -> str:
    """One line, as `error` fields hold it."""
    return f"{type(problem).__name__}: {problem}"


def _set_random(states: list[Tensor], devices: list[torch.device]) -> None:
    torch.set_rng_state(states[0])
    for state, device in zip(states[1:], devices, strict=True):
        torch.cuda.set_rng_state(state, device)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers, also those that a state dict leaves out."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _parts(model: torch.nn.Module) -> list[Any]:
    return [*model.modules(), *(tensor for _, tensor in _tensors(model))]


def _save_workload(workload: Workload) -> Any:
    """The data position: what the workload saves of itself, else a copy of its attributes without the model."""
    if hasattr(workload, "state_dict"):
        return copy.deepcopy(workload.state_dict())
    advice = "give it state_dict() and load_state_dict()"
    hidden = [n for n, v in vars(workload).items() if isinstance(v, types.FunctionType) and v.__closure__]
    if hidden:
        raise ValueError(f"a {type(workload).__name__} with functions that hold state ({hidden}) cannot be copied; {advice}")
    try:
        return copy.deepcopy(vars(workload), {id(part): part for part in _parts(workload.model)})
    except TypeError as problem:
        raise ValueError(f"a {type(workload).__name__} cannot be copied ({problem}); {advice}") from problem


def _load_workload(workload: Workload, snapshot: Snapshot) -> None:
    if hasattr(workload, "load_state_dict"):
        workload.load_state_dict(copy.deepcopy(snapshot.workload))
        return
    # References to the model that was saved become references to this one.
    memo = {id(old): new for old, new in zip(_parts(snapshot.owner), _parts(workload.model), strict=True)}
    vars(workload).update(copy.deepcopy(snapshot.workload, memo))
