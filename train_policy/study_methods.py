"""What a study can train with, by name: torch's optimizers, MANGO with its policies, and what others register."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mango.config import CompressionConfig
from mango_env.run import DEFAULT_LR
from mango_env.workloads import Workload

SGD_LR_FACTOR = 25.0                                     # SGD with momentum wants a larger rate than Adam's 2e-3: 0.05
LEARNED = "mango_learned"
COMPARED = ("adam", "adamw", "sgd", "mango_adaptive", LEARNED)


class Trainer(Protocol):
    """An optimizer on a workload's model, with its own way to take a step."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """Forward, backward and update; the loss, where it was computed."""
        ...


Start = Callable[[Workload, float | None, int], Trainer]  # workload, learning rate (None: the method's own), steps of the run


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train: MANGO in a run of decisions, or whatever `start` gives."""

    name: str
    what: str
    start: Start | None = None                           # None: MANGO with the policy and options below
    policy: Any = None                                   # as MANGO takes it; None: water-filling
    options: Mapping[str, Any] = field(default_factory=dict)
    lacks: Callable[[], str | None] = lambda: None       # why it cannot run on this machine, in one line; None: it can

    @property
    def budgeted(self) -> bool:
        return self.start is None


@dataclass(frozen=True, slots=True)
class TorchTrainer:
    """An optimizer in float32."""

    optimizer: torch.optim.Optimizer

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        self.optimizer.zero_grad()
        found = loss()
        found.backward()                                 # type: ignore[no-untyped-call]
        self.optimizer.step()
        return found.detach()                            # left where it is, so that a GPU is not waited for at each step


def rate(workload: Workload, learning_rate: float | None, factor: float = 1.0) -> float:
    """The learning rate that was asked for, or the workload's own times a factor."""
    return factor * float(getattr(workload, "lr", DEFAULT_LR)) if learning_rate is None else learning_rate


def adam(workload: Workload, learning_rate: float | None, steps: int) -> Trainer:
    return TorchTrainer(torch.optim.Adam(workload.model.parameters(), lr=rate(workload, learning_rate)))


def adamw(workload: Workload, learning_rate: float | None, steps: int) -> Trainer:
    return TorchTrainer(torch.optim.AdamW(workload.model.parameters(), lr=rate(workload, learning_rate), weight_decay=0))


def sgd(workload: Workload, learning_rate: float | None, steps: int) -> Trainer:
    lr = rate(workload, learning_rate, SGD_LR_FACTOR)
    return TorchTrainer(torch.optim.SGD(workload.model.parameters(), lr=lr, momentum=0.9))


REGISTERED: dict[str, Method] = {}                       # beside those of `methods`


def register_method(method: Method) -> None:
    """Make a method known to single studies; the table of `methods` comes first and keeps its names."""
    if method.name in REGISTERED or method.name in methods():
        raise ValueError(f"method {method.name!r} is already known")
    REGISTERED[method.name] = method


def methods(policy: str = "demo") -> dict[str, Method]:
    """Every method of this package that a single study can run, by name."""
    eight = CompressionConfig(momentum_bits=8, variance_bits=8)
    coarse = replace(eight, gradient_bits=4)
    free: dict[str, Any] = {"memory_budget": None}
    table = [
        Method("adam", "torch.optim.Adam", adam),
        Method("adamw", "torch.optim.AdamW", adamw),
        Method("sgd", "torch.optim.SGD, momentum 0.9", sgd),
        Method("mango_full", "MANGO at full precision, no limit", policy=CompressionConfig(), options=free),
        Method("mango_8bit", "MANGO, 8-bit moments everywhere, no limit", policy=eight, options=free),
        Method("mango_adaptive", "MANGO, the phase heuristic", policy="adaptive"),
        Method("mango_scheduled", "MANGO, from full precision down the ladder", policy="scheduled"),
        Method("mango_water_filling", "MANGO, least error per byte", policy="water-filling"),
        Method("mango_random", "MANGO, random rungs", policy="random"),
        Method(LEARNED, f"MANGO, the frozen policy {policy!r}", policy=policy),
        Method("mango_g4", "4-bit gradients with error feedback, 8-bit moments, no limit", policy=coarse, options=free),
        Method("mango_g4_no_ef", "4-bit gradients without error feedback, 8-bit moments, no limit", policy=coarse,
               options={"error_feedback": False} | free),
    ]  # fmt: skip
    return {method.name: method for method in table}


def find_method(name: str, policy: str) -> Method:
    """The method of a name, ours or registered; ValueError with the known ones, or with why it cannot run here."""
    table = methods(policy) | REGISTERED
    if name not in table:
        more = "" if REGISTERED else "; in a checkout, python main.py --mode single knows the baselines of experiments/ too"
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(table)}{more}")
    if (reason := table[name].lacks()) is not None:
        raise ValueError(f"the optimizer {name!r} cannot run here: {reason}")
    return table[name]
