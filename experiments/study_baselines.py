"""The baselines as methods of `main.py --mode single`: importing this module makes them known. Nothing to run by itself."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.baseline_optimizers import BASELINES
from experiments.comparison_runs import optimizer_of
from experiments.run_modes import scaler_of, train_step
from mango import MANGO
from mango_env.workloads import Workload
from train_policy.study_methods import Method, Trainer, methods, register_method


class BaselineTrainer:
    """A baseline in the precision of its runs; at its recommended rate unless told otherwise."""

    def __init__(self, name: str, workload: Workload, learning_rate: float | None, steps: int) -> None:
        self.optimizer = optimizer_of(name, workload, learning_rate, steps)
        device = next(workload.model.parameters()).device
        self.mode = BASELINES[name].amp
        self.scaler = scaler_of(self.mode, device)
        self.stance = "default" if device.type == "cuda" else "force_eager"  # on a CPU compiling takes longer than it saves

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        with torch.compiler.set_stance(self.stance):
            found = torch.tensor(train_step(self.optimizer, loss, self.scaler, self.mode))
        if isinstance(self.optimizer, MANGO):
            self.optimizer.observe_loss(found)
        return found


def start(name: str, workload: Workload, learning_rate: float | None, steps: int) -> Trainer:
    return BaselineTrainer(name, workload, learning_rate, steps)


for _name, _baseline in BASELINES.items():
    if _name not in methods():                           # adam, adamw, sgd and mango_full are a study's own
        register_method(Method(_name, _baseline.what, partial(start, _name), lacks=_baseline.requirement))
