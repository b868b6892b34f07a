"""The byte budget: how it is said, the knapsack, and what is impossible."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mango import MANGO
from mango.allocation import Allocator, released
from mango.budget import FREE_SHARE, MemoryBudget, free_memory, parse_budget
from mango.config import FULL, LADDER, NVEC, CompressionConfig
from mango.layers import describe
from mango.state import StorageOptions, predicted_bytes

quick = settings(max_examples=80, deadline=None)


@pytest.mark.parametrize(
    ("said", "meant"),
    [(123, 123), ("64KiB", 65536), ("6GiB", 6 * 2**30), ("1.5 MB", 1_500_000), (" 10b ", 10), (0.25, 250), (1.0, 1000),
     (np.int64(99), 99), (np.float32(0.5), 500)],
)  # fmt: skip
def test_a16_a_budget_is_bytes_a_size_or_a_fraction_of_adamw(said: int | float | str, meant: int) -> None:
    assert parse_budget(said, adamw_bytes=1000) == meant


@pytest.mark.parametrize("bad", ["6 parsecs", "GiB", "-1MB", "", 0, -5, 0.0, -0.5, float("nan"), float("inf"), True, "64"])
def test_a16_an_unreadable_budget_says_what_is_allowed(bad: int | float | str) -> None:
    with pytest.raises(ValueError, match=r"memory_budget=.*give bytes \(int\), a size"):
        parse_budget(bad, adamw_bytes=1000)


def test_a17_without_a_budget_it_is_the_documented_share_of_free_memory() -> None:
    optimizer = MANGO([torch.nn.Parameter(torch.zeros(64, 64))])
    free = free_memory(torch.device("cpu"))
    assert 0.5 * FREE_SHARE * free < optimizer.memory_budget < 2 * FREE_SHARE * free and FREE_SHARE == 0.5
    assert free > 1 << 20


tables = st.integers(1, 4).flatmap(
    lambda layers: st.integers(2, 5).flatmap(
        lambda rungs: st.tuples(
            st.lists(st.lists(st.integers(-50, 50), min_size=rungs, max_size=rungs), min_size=layers, max_size=layers),
            st.lists(st.lists(st.integers(1, 99), min_size=rungs, max_size=rungs), min_size=layers, max_size=layers),
            st.floats(0, 1),
        )
    )
)


@given(tables)
@quick
def test_c5_the_knapsack_is_within_the_budget_and_one_step_of_the_best(
    table: tuple[list[list[int]], list[list[int]], float],
) -> None:
    scores, nbytes = np.array(table[0], dtype=np.float64), np.array(table[1], dtype=np.int64)
    least, most = int(nbytes.min(1).sum()), int(nbytes.max(1).sum())
    budget = MemoryBudget(least + round(table[2] * (most - least)))
    layers = np.arange(len(scores))
    pick = budget.allocate(scores, nbytes)
    assert nbytes[layers, pick].sum() <= budget.total
    best = max(
        sum(scores[layer, choice] for layer, choice in enumerate(choices))
        for choices in itertools.product(range(scores.shape[1]), repeat=len(scores))
        if sum(nbytes[layer, choice] for layer, choice in enumerate(choices)) <= budget.total
    )
    one_step = (scores.max(1) - scores.min(1)).max()
    assert best - one_step <= scores[layers, pick].sum() <= best
    if budget.total >= most:
        assert (scores[layers, pick] == scores.max(1)).all()


def test_c5_bytes_go_where_they_gain_most() -> None:
    scores, nbytes = np.array([[0.0, 1.0], [0.0, 10.0]]), np.array([[1, 5], [1, 5]])
    budget = MemoryBudget(8)
    assert budget.allocate(scores, nbytes).tolist() == [0, 1]
    assert budget.price == pytest.approx(0.25)  # the step that did not fit: 1 / 4 per byte


def test_c5_forbidden_rungs_are_never_taken_and_ties_cost_nothing() -> None:
    scores, nbytes = np.array([[-np.inf, 0.0, 5.0], [3.0, 3.0, 3.0]]), np.array([[1, 4, 9], [2, 1, 7]])
    assert MemoryBudget(8).allocate(scores, nbytes).tolist() == [1, 1]
    assert MemoryBudget(99).allocate(scores, nbytes).tolist() == [2, 1]
    with pytest.raises(ValueError, match="least feasible is 5 bytes"):
        MemoryBudget(4).allocate(scores, nbytes)


def literal_greedy(scores: np.ndarray, nbytes: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """The knapsack word by word: every hull step of every layer in one list, then the best single change again and again."""
    layers, price = np.arange(len(scores)), 0.0
    cost = np.where(np.isneginf(scores), 10**12, nbytes)
    pick = np.where(cost == cost.min(1, keepdims=True), scores, -np.inf).argmax(1)
    left, steps = budget - int(nbytes[layers, pick].sum()), []
    for layer, at in enumerate(pick):
        while True:
            extra, gain = nbytes[layer] - nbytes[layer, at], scores[layer] - scores[layer, at]
            slope = np.where((extra > 0) & (gain > 0), gain / np.where(extra > 0, extra, 1), -np.inf)
            if slope.max() <= 0:
                break
            at = int(slope.argmax())
            steps.append((float(slope[at]), layer, at, int(extra[at])))
    blocked: set[int] = set()
    for slope_, layer, choice, more in sorted(steps, key=lambda step: -step[0]):
        if layer not in blocked and more > left:
            blocked.add(layer)
            price = max(price, slope_)
        elif layer not in blocked:
            pick[layer], left = choice, left - more
    while True:
        extra = nbytes - nbytes[layers, pick][:, None]
        gain = np.where(extra <= left, scores - scores[layers, pick][:, None], -np.inf)
        layer, choice = divmod(int(gain.argmax()), scores.shape[1])
        if gain[layer, choice] <= 0:
            return pick, price
        left -= int(extra[layer, choice])
        pick[layer] = choice


def ladders(kind: str, layers: int, rungs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and bytes (L, R): at random, concave along random bytes, or a ladder over layers of all sizes."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.random((layers, rungs)), rng.integers(1, 10**6, (layers, rungs))
    if kind == "concave":
        falling = -rng.random((layers, 1)) * 2.0 ** -np.arange(rungs)
        return falling, np.sort(rng.integers(1, 10**6, (layers, rungs)), 1)
    sizes = 2 ** rng.integers(10, 24, (layers, 1))
    if kind == "giants":                                                   # that do not fit while thousands of small steps do
        sizes = np.where(np.arange(layers)[:, None] < 3, 10**8, rng.integers(900, 1100, (layers, 1)))
    return -rng.lognormal(0, 2, (layers, 1)) / np.arange(1, rungs + 1), sizes * np.arange(1, rungs + 1)


@pytest.mark.parametrize("kind", ["random", "concave", "sizes", "giants"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("layers", "rungs"), [(1, 1), (40, 5), (700, 16)])
def test_c5_the_fast_knapsack_is_the_literal_greedy(kind: str, share: float, layers: int, rungs: int) -> None:
    """Few layers are sorted whole, many are bracketed by prices first: the same choices and the same price."""
    scores, nbytes = ladders(kind, layers, rungs, seed=layers)
    scores[np.random.default_rng(1).random(scores.shape) < 0.1 * (rungs > 1)] = -np.inf
    scores[:, 0] = np.where(np.isneginf(scores).all(1), 0.0, scores[:, 0])
    least = int(np.where(np.isneginf(scores), 10**12, nbytes).min(1).sum())
    budget = MemoryBudget(least + round(share * int(nbytes.max(1).sum() - least)))
    pick, price = literal_greedy(scores, nbytes, budget.total)
    assert budget.allocate(scores, nbytes).tolist() == pick.tolist()
    assert budget.price == price


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_c5_layers_that_all_tie_fill_the_budget_to_the_last_step(share: float) -> None:
    rungs = np.arange(1, 17)
    scores, nbytes = np.tile(-1 / rungs, (1000, 1)), np.tile(1024 * rungs, (1000, 1))
    budget = MemoryBudget(1024 * 1000 + round(share * 15 * 1024 * 1000))
    pick = budget.allocate(scores, nbytes)
    spent = int(nbytes[np.arange(1000), pick].sum())
    assert 0 <= budget.total - spent < 1024 and int(pick.max() - pick.min()) <= 1
    assert pick.tolist() == sorted(pick.tolist(), reverse=True)            # ties go to the first layers


@given(
    st.integers(1, 6).flatmap(
        lambda rungs: st.lists(
            st.tuples(
                st.lists(st.one_of(st.integers(-5, 5).map(float), st.just(-math.inf)), min_size=rungs, max_size=rungs).filter(
                    lambda row: max(row) > -math.inf
                ),
                st.lists(st.integers(1, 9), min_size=rungs, max_size=rungs),
            ),
            min_size=1,
            max_size=4,
        )
    ),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_c5_no_single_change_that_fits_improves_and_brute_force_is_one_step_away(
    rows: list[tuple[list[float], list[int]]], share: float
) -> None:
    scores, nbytes = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=np.int64)
    layers, open_ = np.arange(len(rows)), ~np.isneginf(scores)
    least = int(np.where(open_, nbytes, 10**6).min(1).sum())
    budget = MemoryBudget(least + round(share * max(0, int(nbytes.max(1).sum()) - least)))
    pick = budget.allocate(scores, nbytes)
    spent, got = int(nbytes[layers, pick].sum()), float(scores[layers, pick].sum())
    assert spent <= budget.total and open_[layers, pick].all()
    others = (nbytes - nbytes[layers, pick][:, None] <= budget.total - spent) & (scores > scores[layers, pick][:, None])
    assert not others.any()
    every = itertools.product(*(np.flatnonzero(row).tolist() for row in open_))
    best = max(
        sum(scores[layer, choice] for layer, choice in enumerate(choices))
        for choices in every
        if sum(nbytes[layer, choice] for layer, choice in enumerate(choices)) <= budget.total
    )
    step = max(row[allowed].max() - row[allowed].min() for row, allowed in zip(scores, open_, strict=True))
    assert best - step <= got <= best


def test_c5_a_layer_that_may_take_nothing_is_named() -> None:
    scores = np.array([[0.0, 1.0], [-np.inf, -np.inf]])
    with pytest.raises(ValueError, match=r"every choice of layer 1 is forbidden \(-inf\); allow one"):
        MemoryBudget(99).allocate(scores, np.ones((2, 2), dtype=np.int64))


def test_c5_allocation_leaves_its_arguments_alone() -> None:
    scores, nbytes = ladders("sizes", 600, 8, seed=0)
    before = scores.copy(), nbytes.copy()
    MemoryBudget(int(nbytes.max(1).sum()) // 2).allocate(scores, nbytes)
    assert (scores == before[0]).all() and (nbytes == before[1]).all()


def test_no_layers_need_no_bytes() -> None:
    assert MemoryBudget(1).allocate(np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64)).shape == (0,)


def test_a16_an_impossible_budget_names_the_least_feasible_bytes_and_those_suffice() -> None:
    def build(budget: int) -> MANGO:
        return MANGO([torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(10))], memory_budget=budget)

    with pytest.raises(
        ValueError, match=r"memory_budget of 100 bytes is impossible: the least feasible is [\d,]+ bytes"
    ) as caught:
        build(100)
    least = int(str(caught.value).split("feasible is ")[1].split(" ")[0].replace(",", ""))
    optimizer = build(least)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state_bytes() == least
    with pytest.raises(ValueError, match="impossible"):
        build(least - 1)


def test_a16_a_fixed_config_that_does_not_fit_is_refused_with_its_bytes() -> None:
    with pytest.raises(ValueError, match=r"fixed config 'full' needs [\d,]+ bytes, more than the memory_budget of 20,000"):
        MANGO([torch.nn.Parameter(torch.ones(64, 64))], memory_budget=20_000, policy=FULL)


SHAPES = ((64, 48), (16, 8, 3, 3), (4096,), (2, 1024), (128, 16))
configs = st.tuples(*(st.integers(0, n - 1) for n in NVEC)).map(CompressionConfig.from_action)


@given(
    wanted=st.lists(configs, min_size=len(SHAPES), max_size=len(SHAPES)),
    share=st.floats(0, 1),
    feedback=st.booleans(),
    release=st.booleans(),
)
@quick
def test_c5_random_allocations_are_cut_to_the_budget(
    wanted: list[CompressionConfig], share: float, feedback: bool, release: bool
) -> None:
    """What fits stays as it was wanted; what does not is given back by whole rungs, and never more than was asked."""
    layers = describe([f"layer{i}" for i in range(len(SHAPES))], list(SHAPES))
    options = StorageOptions(error_feedback=feedback, release_gradients=release)
    ladder = released(LADDER) if release else LADDER
    least = sum(min(predicted_bytes(shape, rung, options) for rung in ladder) for shape in SHAPES)
    full = sum(predicted_bytes(shape, FULL, options) for shape in SHAPES)
    budget = MemoryBudget(least + round(share * (full - least)) + 1000, fixed=1000)
    allocator = Allocator(layers, ladder, options, budget)
    applied = allocator.resolve(wanted, [FULL] * len(SHAPES), lambda: torch.zeros(len(SHAPES), 64))
    asked, got = allocator.nbytes(wanted), allocator.nbytes(applied)
    assert sum(got) <= budget.available
    if sum(asked) <= budget.available:
        assert applied == wanted
    cheapest = [min(predicted_bytes(shape, rung, options) for rung in ladder) for shape in SHAPES]
    for new, old, floor, config, want in zip(got, asked, cheapest, applied, wanted, strict=True):
        assert config == want or (config in ladder.rungs and (new < old or new == floor))


def test_budget_kinds_of_bytes_are_all_in_the_prediction() -> None:
    """Bytes per parameter of a 256 x 256 matrix, by hand: codes, scales per block, factors, projector."""
    n, shape = 256 * 256, (256, 256)

    def of(**knobs: float) -> int:
        return predicted_bytes(shape, CompressionConfig.from_dict(knobs), StorageOptions())

    assert of() == 8 * n
    assert of(momentum_bits=8, variance_bits=8) == n + 2 * n // 128 + n + 4 * n // 256
    assert of(momentum_bits=4, variance_bits=0) == n // 2 + 2 * n // 64 + 4 * 512
    assert of(momentum_bits=2, variance_bits=4) == n // 4 + 2 * n // 64 + n // 2 + 6 * n // 128
    assert of(gradient_bits=4) == 8 * n + n + 2 * n // 128  # the residual at 8 bits
    assert of(rank=4, factor_bits_p=16, factor_bits_q=16, variance_bits=32) == 2 * 256 * 4 + 2 * 256 * 4 + 4 * 256 * 4
