"""A probe: what the statistics need of a layer's dense tensors at the end of an interval, and how it is got cheaply."""

import math

import torch
from torch import Tensor

from mango.codecs import head, safe
from mango.rules import RULES, Hyper, advance_moments
from mango.state import TensorState, direction
from mango.statistics import WINDOW, GradientStatistics

Window = tuple[Tensor, Tensor | None]


def window_of(state: TensorState) -> Window:
    """The first entries of both moments, decoded: (n,) each; None where there is no second."""
    exp_avg, exp_avg_sq = state.encoded.get("exp_avg"), state.encoded.get("exp_avg_sq")
    second = None if exp_avg_sq is None else head(exp_avg_sq, WINDOW)
    if exp_avg is None:
        return torch.zeros(min(WINDOW, math.prod(state.shape)), device=state.device), second
    return head(exp_avg, WINDOW), second


def probe_fused(
    statistics: GradientStatistics, layer: int, state: TensorState, before: Window, gradient: Tensor, hyper: Hyper,
    *, param_norm: float, moved: float, alignment: float, coding: Tensor, loss_change: float,
) -> None:  # fmt: skip
    """After a fused update, which shows no dense moments: the error of storing is found on a window of the tensor.

    `before`: the window before the update; `coding`: relative error of coding the gradient.
    """
    exp_avg, exp_avg_sq = before
    hyper = hyper if state.has_momentum else hyper.without_momentum()
    start = gradient.reshape(-1)[: exp_avg.numel()].float()
    if exp_avg_sq is not None:
        advance_moments(start, exp_avg, exp_avg_sq, hyper.betas)                    # in place
    else:
        RULES[state.rule].direction(start, exp_avg, None, hyper, state.step)       # in place as well
    ideal = direction(exp_avg, exp_avg_sq)
    moments, entries = state.moments(), exp_avg.numel()
    stored = moments[0].reshape(-1)[:entries] if state.config.has_momentum else exp_avg
    stored_sq = None if moments[1] is None else moments[1].reshape(-1)[:entries]
    storing = (direction(stored, stored_sq) - ideal).norm() / safe(ideal.norm())
    residual = state.encoded["residual"].decode().norm() if "residual" in state.encoded else ideal.new_zeros(())
    sizes, distance, cosine = torch.tensor([param_norm, moved, alignment], device=ideal.device).unbind()
    statistics.probe(
        layer, state.config, grad=gradient, moments=moments, window=before, param_norm=sizes, moved=distance,
        error=torch.hypot(storing, coding), alignment=cosine, residual_norm=residual, loss_change=loss_change,
    )  # fmt: skip


def probe_dense(
    statistics: GradientStatistics, layer: int, state: TensorState, moments: Window, gradient: Tensor, param: Tensor,
    *, moved: Tensor, coding: Tensor, loss_change: float,
) -> None:  # fmt: skip
    """After an update in PyTorch, which hands out the dense moments before they were stored."""
    error = torch.hypot(state.error(gradient, *moments), coding)
    residual = state.encoded["residual"].decode().norm() if "residual" in state.encoded else gradient.new_zeros(())
    alignment = (moments[0] * gradient).sum() / safe(moments[0].norm() * gradient.norm())
    statistics.probe(
        layer, state.config, grad=gradient, moments=moments, window=moments, param_norm=param.norm(), moved=moved, error=error,
        alignment=alignment, residual_norm=residual, loss_change=loss_change,
    )  # fmt: skip
