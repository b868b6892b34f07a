"""One call for many tensors: decode, update, encode, statistics. What the CPU kernels do not cover takes its own way.

Covered: the rules AdamW, Adam, SGD and Lion on float32 and bfloat16 parameters whose moments are in full space. Not
covered, and done tensor by tensor in PyTorch: subspaces, Muon, other dtypes, parameters that are not contiguous.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from mango import native, noise
from mango.codecs import matrix_shape
from mango.rules import Hyper
from mango.state import Target, TensorState
from mango.statistics import GradientStatistics


class Work(NamedTuple):
    """One tensor's update at one step."""

    target: Target
    state: TensorState
    gradient: Tensor                         # to apply
    fresh: bool                              # nothing of it was looked at: the fused update checks it and takes its statistics
    coding: Tensor                           # relative error of coding the gradient


@dataclass(frozen=True, slots=True)
class Moves:
    """What one fused call found, by tensor: (n,) each. Norms of updates and moments only where they were asked for."""

    finite: NDArray[np.bool_]
    grad_norm: NDArray[np.float64]
    moved: NDArray[np.float64]
    param_norm: NDArray[np.float64]
    alignment: NDArray[np.float64]                           # cosine of first moment and gradient

    def on_host(self) -> "Moves":
        """Itself: nothing has to be waited for."""
        return self


class FusedUpdate:
    """Updates tensors by the CPU kernels. Keeps one row per tensor, filled anew when its state was stored anew."""

    def __init__(self, targets: Sequence[Target], statistics: GradientStatistics, seed: int) -> None:
        self._row = {target: i for i, target in enumerate(targets)}
        self._jobs: NDArray[Any] = np.zeros(len(targets), native.JOB)
        self._versions = [-1] * len(targets)
        self._layers = np.array([-1 if target.layer is None else target.layer for target in targets], np.int64)
        self._skipped = 0
        self._keys = np.array([noise.step_key(seed, i, 0) for i in range(len(targets))], dtype=np.uint32)
        self._statistics, self._count = statistics, statistics.count.numpy()
        self._batch: _Batch | None = None                                          # of the last step

    @staticmethod
    def covers(target: Target, state: TensorState) -> bool:
        """Whether the tensor's update can be fused, whatever its gradient is."""
        param = target.local
        if not (param.is_cpu and param.dtype in native.PARAM_TYPES and param.is_contiguous() and param.shape == state.shape):
            return False                                                            # a shape that was changed since is an error
        known = not state.config.rank and state.rule in native.RULES and param.numel() > 0
        return known and type(param) in (Parameter, Tensor) and native.load() is not None

    @staticmethod
    def accepts(gradient: Tensor) -> bool:
        """Whether the kernels can read this gradient."""
        return gradient.layout == torch.strided and gradient.dtype in native.PARAM_TYPES and gradient.is_contiguous()

    def run(self, work: Sequence[Work], step: int, measure: bool) -> Moves:
        """Update each tensor by its gradient; those that are not finite are left as they are.

        Gradients are such as `accepts` takes. Statistics are taken of the fresh ones.
        """
        batch = self._batch
        if batch is None or not batch.is_of(work):
            batch = self._batch = self._batch_of(work)
        jobs, types = batch.jobs, native.PARAM_TYPES
        params = [w.target.local for w in work]
        jobs["param"] = [param.data_ptr() for param in params]
        jobs["param_type"] = [types[param.dtype] for param in params]               # `model.to(dtype)` changes it
        jobs["grad"] = [w.gradient.data_ptr() for w in work]
        jobs["grad_type"] = [types[w.gradient.dtype] for w in work]
        jobs["key"] = batch.keys + np.uint32(step * 0x9E3779B9 & 0xFFFFFFFF)
        batch.set_hyper(work)
        jobs["sample_count"] = batch.sample_count * batch.fresh
        jobs["window"][batch.sampled] = self._count[batch.sampled_layers] + 1.0
        jobs["measure"] = measure
        native.update(jobs)
        torch.autograd.graph.increment_version(params)                             # backward through old weights is an error
        return self._results(work, batch, measure)

    def _batch_of(self, work: Sequence[Work]) -> "_Batch":
        rows = np.array([self._row[w.target] for w in work])
        for row, w in zip(rows.tolist(), work, strict=True):
            if self._versions[row] != w.state.version:
                self._fill(row, w.target, w.state)
                self._versions[row] = w.state.version
        return _Batch(work, self._jobs[rows], self._layers[rows], self._keys[rows])

    def _results(self, work: Sequence[Work], batch: "_Batch", measure: bool) -> Moves:
        jobs = batch.jobs
        codes = jobs["finite"]
        if codes.max() > 1:
            raise MemoryError("the CPU kernels could not allocate their scratch space")
        finite, norms = codes == 1, np.sqrt(jobs["grad_sq"])
        if finite.all():
            for w in work:
                w.state.step += 1
            took, layers = batch.observed, batch.observed_layers
        else:
            for w, good in zip(work, finite.tolist(), strict=True):
                w.state.step += good
            self._skipped += len(work) - int(finite.sum())
            took = batch.observed & finite
            layers = batch.layers[took]
        if len(layers):
            self._statistics.took(layers, norms[took])
        if not measure:
            nothing = np.zeros(len(work))
            return Moves(finite, norms, nothing, nothing, nothing)
        with np.errstate(invalid="ignore", divide="ignore"):
            alignment = np.nan_to_num(jobs["momentum_grad"] / (np.sqrt(jobs["momentum_sq"]) * norms))
        return Moves(finite, norms, np.sqrt(jobs["moved_sq"]), np.sqrt(jobs["param_sq"]), alignment)

    def settle(self) -> int:
        """How many gradients were left out since the last time."""
        skipped, self._skipped = self._skipped, 0
        return skipped

    def _fill(self, row: int, target: Target, state: TensorState) -> None:
        """What stays until the state is stored anew: sizes, formats, addresses."""
        job = self._jobs[row]
        exp_avg, exp_avg_sq = state.encoded.get("exp_avg"), state.encoded.get("exp_avg_sq")
        by_chance, v_by_chance = state.chances
        job["numel"], job["columns"] = math.prod(state.shape), matrix_shape(state.shape)[1]
        job["rule"] = native.RULES[state.rule]
        job["m_format"], job["m_chance"] = native.FORMAT_NONE, by_chance
        if exp_avg is not None:
            job["m_format"] = native.format_number(exp_avg.codec)
            job["m_codes"], job["m_scale"], job["m_low"] = native.part_pointers(exp_avg.parts)
        if exp_avg_sq is not None:
            job["v_format"], job["v_chance"] = native.format_number(exp_avg_sq.codec), v_by_chance
            job["v_codes"], job["v_scale"], job["v_low"] = native.part_pointers(exp_avg_sq.parts)
        else:
            job["v_format"] = native.FORMAT_NONE
        if state.correction is not None:
            job["correction"], job["correction_bits"] = state.correction.data_ptr(), 8 * state.correction.element_size()
        if target.layer is not None:
            tables = self._statistics
            offset, count, stride = tables.sample(target.layer)
            job["sample_stride"], job["sample_count"] = stride, count
            for name in ("mean", "square", "previous"):
                job[f"sample_{name}"] = tables.tensors[name].data_ptr() + 4 * offset
            job["cosine"] = tables.cosine.data_ptr() + 4 * target.layer


class _Batch:
    """The jobs of tensors that are updated together. They stay from step to step, as long as nothing is stored anew."""

    def __init__(self, work: Sequence[Work], jobs: NDArray[Any], layers: NDArray[np.int64], keys: NDArray[np.uint32]) -> None:
        self.jobs, self.layers, self.keys = jobs, layers, keys
        self._states, self._versions = [w.state for w in work], [w.state.version for w in work]
        self._fresh = [w.fresh for w in work]
        self.fresh = np.array(self._fresh)                                          # (n,) statistics are taken in the update
        self.sample_count = jobs["sample_count"].copy()
        self.sampled = self.fresh & (jobs["sample_stride"] > 0)
        self.sampled_layers = layers[self.sampled]
        self.observed = self.fresh & (layers >= 0)
        self.observed_layers = layers[self.observed]
        kinds: dict[tuple[int, str, bool], int] = {}
        places = [(id(w.target.group), w.state.rule, w.state.has_momentum) for w in work]
        self._kind = np.array([kinds.setdefault(place, len(kinds)) for place in places])  # (n,)
        self._first = [places.index(kind) for kind in kinds]                        # a tensor of each kind
        self._numbers: list[tuple[float, ...]] = []                                 # of each kind, at the last step
        self._beta1 = self._beta2 = np.empty(0)

    def is_of(self, work: Sequence[Work]) -> bool:
        """Whether these are the same tensors, stored where they were."""
        states = self._states
        return (
            len(work) == len(states)
            and all(w.state is state for w, state in zip(work, states, strict=True))
            and [w.state.version for w in work] == self._versions
            and [w.fresh for w in work] == self._fresh
        )

    def set_hyper(self, work: Sequence[Work]) -> None:
        """Put the groups' numbers and the bias corrections of this step into the jobs."""
        jobs, numbers = self.jobs, [_numbers(work[i]) for i in self._first]
        if numbers != self._numbers:
            self._numbers = numbers
            lr, self._beta1, self._beta2, eps, decay, scale = np.array(numbers)[self._kind].T
            jobs["lr"], jobs["beta1"], jobs["beta2"], jobs["eps"], jobs["weight_decay"] = lr, self._beta1, self._beta2, eps, decay
            jobs["scale"] = scale
        steps = np.array([w.state.step + 1 for w in work])
        jobs["correction1"], jobs["correction2"] = 1 - self._beta1**steps, 1 - self._beta2**steps


def _numbers(work: Work) -> tuple[float, ...]:
    """Learning rate, betas, eps, weight decay, and the sign of the gradient."""
    group, state = work.target.group, work.state
    hyper = Hyper.of(group, state.rule)
    hyper = hyper if state.has_momentum else hyper.without_momentum()
    beta1 = hyper.momentum if state.rule == "sgd" else hyper.betas[0]
    return hyper.lr, beta1, hyper.betas[1], hyper.eps, hyper.weight_decay, -1.0 if group["maximize"] else 1.0
