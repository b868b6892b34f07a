"""Published allocators: the dynamic programme against trying everything, and precision where gradients are large."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from mango import MANGO, CompressionConfig, Ladder
from mango.allocators import (
    CELLS,
    WITHOUT_MOMENTUM,
    ErrorConstrainedPolicy,
    Floats,
    Ints,
    SensitivityPolicy,
    available_bytes,
    l2_error,
    layer_bytes,
    least_bytes,
    smallest_error,
)
from mango.budget import MemoryBudget
from mango.features import FEATURE_INDEX, FEATURES
from mango.policies import WaterFillingPolicy
from tests.rungs import M4V0, M8V8

COSTS = st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=4, max_size=4)
SIZES = st.lists(st.lists(st.integers(1, 50), min_size=3, max_size=3), min_size=4, max_size=4)


def observation(layers: int, **features: float | list[float]) -> Tensor:
    table = torch.zeros(layers, len(FEATURES))
    for name, value in features.items():
        table[:, FEATURE_INDEX[name]] = torch.as_tensor(value)
    return table


def everything(errors: Floats, nbytes: Ints) -> tuple[Floats, Ints]:
    """Summed error and bytes (C,) of every combination."""
    rows = np.arange(len(errors))
    combinations = [list(c) for c in itertools.product(range(errors.shape[1]), repeat=len(errors))]
    return np.array([errors[rows, c].sum() for c in combinations]), np.array([nbytes[rows, c].sum() for c in combinations])


def trained(policy: object, budget: float = 0.3, scales: tuple[float, ...] = (1.0, 1.0, 1.0), **options: object) -> MANGO:
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 64), (64, 64), (96, 130))
    optimizer = MANGO([Parameter(torch.ones(s)) for s in (*shapes, (10,))], policy=policy, memory_budget=budget,
                      policy_update_freq=2, strict=True, **options)  # type: ignore[arg-type]  # fmt: skip
    for _ in range(4):
        for param, scale in zip(optimizer.param_groups[0]["params"], (*scales, 1.0), strict=True):
            param.grad = scale * torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


@given(costs=COSTS, sizes=SIZES)
@settings(max_examples=60, deadline=None)
def test_the_dynamic_programme_is_as_cheap_as_the_best_combination(costs: list[list[int]], sizes: list[list[int]]) -> None:
    cost, nbytes = np.array(costs), np.array(sizes)
    errors, spent = everything(cost.astype(np.float64), nbytes)
    total, _ = least_bytes(cost, nbytes, limit=130)
    for bound in (0, 7, 33, 60, 119, 130):
        allowed = spent[errors <= bound]
        assert total[bound] == (allowed.min() if len(allowed) else np.inf)


@given(costs=COSTS, sizes=SIZES, share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_error_found_is_the_smallest_there_is(costs: list[list[int]], sizes: list[list[int]], share: float) -> None:
    errors, nbytes = np.array(costs, dtype=np.float64), np.array(sizes)
    all_errors, spent = everything(errors, nbytes)
    available = int(spent.min() + share * (spent.max() - spent.min()))
    picks = smallest_error(errors, nbytes, available)
    rows = np.arange(4)
    assert nbytes[rows, picks].sum() <= available
    best = all_errors[spent <= available].min()
    bound = 4 * 30                                       # at most; each layer is rounded up to a cell of it
    assert best <= errors[rows, picks].sum() <= best + 4 * bound / CELLS


def test_four_layers_by_hand() -> None:
    """Two thirds of the bytes: the two layers that lose most are kept, the others are made small."""
    errors = np.array([[9.0, 1, 0], [1, 0.5, 0], [8, 1, 0], [1, 0.5, 0]])
    nbytes = np.array([[1, 4, 8]] * 4)
    assert smallest_error(errors, nbytes, available=10).tolist() == [1, 0, 1, 0]
    assert smallest_error(errors, nbytes, available=32).tolist() == [2, 2, 2, 2]
    assert smallest_error(errors, nbytes, available=4).tolist() == [0, 0, 0, 0]
    assert smallest_error(errors, nbytes, available=0).tolist() == [0, 0, 0, 0]        # nothing fits: the least there is


def test_a_bound_of_zero_still_takes_the_cheapest_without_error() -> None:
    errors, nbytes = np.array([[1.0, 0, 0], [0, 0, 0]]), np.array([[1, 3, 9], [1, 3, 9]])
    assert smallest_error(errors, nbytes, available=20).tolist() == [1, 0]


def test_one_terrible_choice_does_not_blur_the_others() -> None:
    """The only uniform choice that fits is a million times worse; small layers are told apart all the same."""
    errors = np.array([[1e9, 100, 0], [900, 3, 2], [900, 3, 1]])
    nbytes = np.array([[1, 100, 900], [1, 5, 6], [1, 5, 6]])
    assert smallest_error(errors, nbytes, available=111).tolist() == [1, 1, 2]


def test_bytes_and_budget_are_read_from_the_observation() -> None:
    for rule in ("adamw", "muon"):
        optimizer = trained("error-constrained", rule=rule)
        obs = optimizer.observe()
        assert layer_bytes(obs, optimizer.ladder).tolist() == optimizer.allocator.rung_bytes.tolist()
        left = optimizer.budget.available - available_bytes(obs)
        assert 0 <= left <= 2e-5 * optimizer.memory_budget + 1


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.8])
def test_what_the_error_constraint_asks_for_fits_without_a_cut(budget: float) -> None:
    optimizer = trained("error-constrained", budget)
    asked = ErrorConstrainedPolicy(optimizer.ladder).act(optimizer.observe())
    assert optimizer.allocator.fits(asked) and optimizer.state_bytes() <= optimizer.memory_budget


def test_errors_are_plain_l2_and_variances_count_where_there_are_any() -> None:
    obs = observation(2, error_momentum_8=-2, error_variance_8=-1, error_momentum_4=-0.5, rule_muon=[0, 1])
    assert l2_error(obs, M8V8).tolist() == pytest.approx([1e-4 + 1e-2, 1e-4])
    assert l2_error(obs, CompressionConfig(momentum_bits=6)).tolist() == pytest.approx([1e-4 * 16] * 2)
    assert l2_error(obs, CompressionConfig()).tolist() == [0, 0]
    assert l2_error(obs, CompressionConfig(momentum_bits=0)).tolist() == pytest.approx([WITHOUT_MOMENTUM] * 2)


def test_without_a_moment_the_error_is_that_of_independent_gradients() -> None:
    generator, mean, found = torch.Generator().manual_seed(0), torch.zeros(20_000), 0.0
    for _ in range(200):
        grad = torch.randn(20_000, generator=generator)
        mean = 0.9 * mean + 0.1 * grad
        found = float((grad - mean).square().sum() / mean.square().sum())
    assert found == pytest.approx(WITHOUT_MOMENTUM, rel=0.05)          # three times its sd, sqrt(2 * 2 / 20,000)


def test_sensitivity_weighs_errors_by_squared_gradient_norm() -> None:
    ladder = Ladder((M4V0, M8V8))
    obs = observation(3, grad_norm=[0, 1, -20], numel=[4, 4, 5], error_momentum_4=-1, error_variance_0=-1)
    scores = SensitivityPolicy(ladder).scores(obs)
    error = WaterFillingPolicy.squared_error(obs, M4V0).double()
    assert (scores[:, 0] / -error).tolist() == pytest.approx([0.01, 1, 0])
    unseen = SensitivityPolicy(ladder).scores(observation(2, grad_norm=-20, numel=[4, 5], error_momentum_4=-1))
    assert (unseen[1] / unseen[0]).tolist() == pytest.approx([10, 10])


def test_the_layer_with_the_larger_gradient_gets_the_bytes() -> None:
    errors = {"error_momentum_4": -1, "error_momentum_8": -2, "error_variance_0": -1, "error_variance_8": -2}
    obs = observation(2, grad_norm=[0, 1], numel=4, **errors)
    scores = SensitivityPolicy(Ladder((M4V0, M8V8))).scores(obs).numpy()
    assert MemoryBudget(total=30).allocate(scores, np.array([[6, 20], [6, 20]])).tolist() == [0, 1]
    quiet, loud, _ = trained("sensitivity", scales=(0.01, 10.0, 0.01)).layer_bytes().tolist()
    assert loud > 1.5 * quiet
    first, second, _ = trained("water-filling", scales=(0.01, 10.0, 0.01)).layer_bytes().tolist()
    assert first == second                               # Adam's update does not depend on the size of gradients
