"""Runs of one architecture side by side: one forward and one backward pass for all of them, an optimizer for each.

Small models spend their time in calling operations, not in computing, so `torch.func.vmap` over stacked parameters pays
(`benchmarks/collection.py`). Losses and gradients agree with those of a run by itself to float32's rounding, not to the bit.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from mango_env.run import Interval, TrainingRun, UnderWay, describe_error
from mango_env.workloads.base import BatchableWorkload


def batchable(run: TrainingRun) -> bool:
    """Whether the run may share its passes with others: its workload says so, and nothing else needs `backward` itself."""
    workload, options = run.workload, run.optimizer.options
    declared = isinstance(workload, BatchableWorkload) and workload.batchable
    return declared and not options.release_gradients and options.compressor is None


class BatchedRuns:
    """Runs of one workload with the same options, horizon and interval; seeds, budgets, rules and rates may differ.

    Each stays a `TrainingRun` to observe, decide for, evaluate, fork and save; only `advance` is done here, for all at once.
    The parameters of a run become views of the stacks, in which its optimizer writes.

    >>> runs = BatchedRuns([TrainingRun("digits_mlp", seed, horizon=20, interval=10) for seed in range(2)])
    >>> [interval.stop for interval in runs.advance()]
    [10, 10]
    """

    def __init__(self, runs: Sequence[TrainingRun]) -> None:
        """Raises ValueError for runs that are not alike, or cannot be batched."""
        self.runs = list(runs)
        if not self.runs:
            raise ValueError("there is no run to batch")
        alone = next((run for run in self.runs if not batchable(run)), None)
        if alone is not None:
            raise ValueError(f"a run of {alone.workload_name!r} cannot be batched: its workload does not declare it (batchable),"
                             " or its gradients are released or compressed by somebody else's code")  # fmt: skip
        if len({_alike(run) for run in self.runs}) > 1:
            raise ValueError("runs in a batch share their workload with its options, horizon, interval and step")
        self._workloads: list[Any] = [run.workload for run in self.runs]
        self._model = copy.deepcopy(self.runs[0].model)          # whose own parameters are never used
        models = [dict(run.model.named_parameters()) for run in self.runs]
        self._stacks = {name: torch.stack([model[name].detach() for model in models]) for name in models[0]}  # (R, ...)
        for name, stack in self._stacks.items():
            stack.requires_grad_(models[0][name].requires_grad)
            if stack.requires_grad:
                stack.grad = torch.zeros_like(stack)
            for model, part in zip(models, stack.detach().unbind(), strict=True):
                model[name].data = part
        self._gradients = [
            [(model[name], stack.grad[i]) for name, stack in self._stacks.items() if stack.grad is not None]
            for i, model in enumerate(models)
        ]

    def advance(self) -> list[Interval | None]:
        """Train every run that is not over for one interval, as `TrainingRun.advance` does; None for those that are over."""
        going = [i for i, run in enumerate(self.runs) if not run.done]
        if not going:
            raise ValueError("all runs are over; start new ones")
        if len({self.runs[i].t for i in going}) > 1:
            raise ValueError("a run of this batch was advanced by itself: they are at different steps")
        under_way = {i: self.runs[i].begin() for i in going}
        for i in going:
            for param, gradient in self._gradients[i]:
                param.grad = gradient
        for _ in range(self.runs[going[0]].steps_ahead):
            unharmed = {i: one for i, one in under_way.items() if one.error is None}
            if unharmed:
                self._step(unharmed)
        return [run.end(under_way[i]) if i in under_way else None for i, run in enumerate(self.runs)]

    def _step(self, under_way: dict[int, UnderWay]) -> None:
        began = time.perf_counter()
        try:
            losses = self._losses(list(under_way))
        except Exception as problem:  # noqa: BLE001         as in `TrainingRun.advance`, and of no one run
            for one in under_way.values():
                one.error = describe_error(problem)
            return
        share = (time.perf_counter() - began) / len(under_way)
        for i, one in under_way.items():
            try:
                self.runs[i].take_step(one, losses[i], time.perf_counter() - share)
            except Exception as problem:  # noqa: BLE001
                one.error = describe_error(problem)

    def _losses(self, going: list[int]) -> Sequence[Tensor]:
        """Losses (R,) of the next step, gradients in place. Runs that are over compute along on the data of another one."""
        fresh = {i: self._workloads[i].next_batch() for i in going}
        data = [fresh.get(i, fresh[going[0]]) for i in range(len(self.runs))]
        for stack in self._stacks.values():
            if stack.grad is not None:
                stack.grad.zero_()
        losses: Tensor = vmap(self._loss)(self._stacks, *(torch.stack(parts) for parts in zip(*data, strict=True)))
        losses.sum().backward()                              # type: ignore[no-untyped-call]
        return losses.detach().unbind()

    def _loss(self, parameters: dict[str, Tensor], *data: Tensor) -> Tensor:
        def model(*inputs: Any) -> Tensor:
            outputs: Tensor = functional_call(self._model, parameters, inputs)
            return outputs

        loss: Tensor = self._workloads[0].batch_loss(model, *data)
        return loss


def _alike(run: TrainingRun) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(param.shape)) for name, param in run.model.named_parameters())
    return run.workload_name, repr(run.workload_kwargs), shapes, run.horizon, run.interval, run.t
