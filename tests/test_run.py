"""Promises of `TrainingRun`, `Reward` and the uncompressed twin."""

import itertools
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango.config import FULL, LADDER, CompressionConfig
from mango.features import FEATURE_INDEX, FEATURES
from mango_env import twin as twins
from mango_env.reward import LOSS_CLIP, Reward
from mango_env.run import Interval, TrainingRun
from mango_env.twin import Twin, read_twin, score, twin_of, write_twin

LOW = np.array([f.low for f in FEATURES], np.float32)
HIGH = np.array([f.high for f in FEATURES], np.float32)
EIGHT, FOUR, TWO = (CompressionConfig(gradient_bits=b, momentum_bits=b, variance_bits=max(b, 4)) for b in (8, 4, 2))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Twins go to a folder of the test's own, and memory forgets them."""
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path / "cache"))
    twins._remembered.cache_clear()
    yield tmp_path / "cache" / "twins"
    twins._remembered.cache_clear()


class Regression:
    """A user's workload without a state dict: its own generator, dropout from torch's global one, a running buffer."""

    steps = 60

    def __init__(self, seed: int, lr: float | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 32))
        self.weights = list(self.model.parameters())        # a second reference to the model's tensors
        self.count = 0
        if lr is not None:
            self.lr = lr

    def loss(self) -> Tensor:
        self.count += 1
        x = torch.randn(16, 32, generator=self.generator)
        penalty = 1e-4 * sum(w.square().sum() for w in self.weights)
        return F.mse_loss(self.model(x), x.roll(1, 1)) + penalty

    def evaluate(self) -> dict[str, float]:
        return {"val_loss": float(self.weights[0].detach().square().mean()), "count": self.count}


class Faulty(Regression):
    """Raises, or gives a loss that is no number, from its third step on."""

    def __init__(self, seed: int, fault: str = "raise") -> None:
        super().__init__(seed)
        self.fault = fault

    def loss(self) -> Tensor:
        loss = super().loss()
        if self.count < 4:
            return loss
        if self.fault == "raise":
            raise RuntimeError("the disk is on fire")
        return loss * {"nan": math.nan, "inf": math.inf, "large": 1e6}[self.fault]


def small(seed: int = 0, **options: Any) -> TrainingRun:
    return TrainingRun(Regression, seed, **{"horizon": 40, "interval": 5, "memory_budget": 0.6, **options})


def bits(run: TrainingRun) -> list[bytes]:
    return [t.detach().numpy().tobytes() for t in (*run.model.parameters(), *run.model.buffers())]


def same(a: Interval, b: Interval) -> bool:
    def facts(i: Interval) -> tuple[Any, ...]:
        arrays = (i.losses.tobytes(), i.bytes.tobytes(), i.errors.tobytes())
        return (*arrays, i.start, i.stop, i.loss, i.previous_loss, i.state_bytes_peak)

    return facts(a) == facts(b)


def decide(run: TrainingRun, step: int) -> list[CompressionConfig]:
    return run.apply([LADDER[(step + i) % len(LADDER)] for i in range(len(run.layers))])


def test_a_run_learns_and_counts_its_steps() -> None:
    run = TrainingRun("digits_mlp", 0, horizon=45, interval=10)
    intervals = []
    while not run.done:
        intervals.append(run.advance())
    assert [(i.start, i.stop) for i in intervals] == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 45)]
    assert [len(i.losses) for i in intervals] == [10, 10, 10, 10, 5]
    assert [i.decisions_left for i in intervals] == [4, 3, 2, 1, 0]
    assert intervals[-1].loss < 0.5 * intervals[0].first_loss
    assert intervals[0].previous_loss == intervals[0].first_loss == intervals[0].losses[0]
    assert intervals[2].previous_loss == intervals[1].loss == pytest.approx(intervals[1].losses.mean())
    assert {"val_loss", "val_accuracy"} <= run.evaluate().keys()
    with pytest.raises(ValueError, match="over"):
        run.advance()


def test_the_budget_holds_after_every_step_and_is_seen_by_the_peak() -> None:
    run = small(memory_budget=0.4)
    for step in range(8):
        applied = decide(run, step)
        interval = run.advance()
        assert run.optimizer.state_bytes() <= interval.state_bytes_peak <= run.budget
        assert interval.bytes.tolist() == run.optimizer.layer_bytes().tolist()
        assert applied == run.optimizer.applied
    assert run.budget == int(0.4 * run.optimizer.adamw_bytes)


def test_budgets_are_fractions_sizes_or_bytes() -> None:
    budgets = [small(memory_budget=b).budget for b in (0.5, "20KiB", 20_000)]
    assert budgets[1:] == [20 * 1024, 20_000]
    with pytest.raises(ValueError, match=r"least feasible is [0-9,]+ bytes"):
        small(memory_budget=100)


def test_bad_arguments_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="digits_mlp"):
        TrainingRun("digits_nlp", 0)
    with pytest.raises(ValueError, match="adamw"):
        small(rule="adagrad")
    with pytest.raises(ValueError, match="interval=0"):
        small(interval=0)
    with pytest.raises(ValueError, match="horizon"):
        small(horizon=-3)
    with pytest.raises(ValueError, match="seed=None"):
        TrainingRun("digits_mlp", None)           # type: ignore[arg-type]


def test_lr_is_the_argument_then_the_workloads_then_the_default() -> None:
    assert TrainingRun(Regression, 0, horizon=5).lr == 2e-3
    assert TrainingRun(Regression, 0, horizon=5, workload_kwargs={"lr": 0.01}).lr == 0.01
    assert TrainingRun(Regression, 0, horizon=5, workload_kwargs={"lr": 0.01}, lr=0.1).lr == 0.1
    assert TrainingRun(Regression, 0).horizon == Regression.steps


def test_observations_stay_in_their_ranges_and_b5_progress_is_half_at_half_time() -> None:
    run = TrainingRun("digits_mlp", 1, horizon=100, interval=10)
    for step in range(10):
        observation = run.observe()
        assert observation.shape == (len(run.layers), 64)
        assert observation.dtype == np.float32
        assert ((observation >= LOW) & (observation <= HIGH)).all()
        assert observation[:, FEATURE_INDEX["progress"]] == pytest.approx(step / 10, abs=1e-6)
        decide(run, step)
        run.advance()


def test_two_runs_of_one_seed_are_bit_equal_and_others_are_not() -> None:
    one, two, other = small(3), small(3), small(4)
    for step in range(4):
        assert one.observe().tobytes() == two.observe().tobytes()
        for run in (one, two, other):
            decide(run, step)
        first, second, third = one.advance(), two.advance(), other.advance()
        assert same(first, second)
        assert first.losses.tolist() != third.losses.tolist()
    assert bits(one) == bits(two)


def test_a_run_neither_disturbs_nor_notices_the_process_around_it() -> None:
    def trained(noise: int) -> list[bytes]:
        torch.manual_seed(noise)
        run = small()
        for _ in range(3):
            torch.rand(noise)
            run.advance()
        run.evaluate()
        return bits(run)

    before = torch.manual_seed(7).get_state()
    run = small()
    run.advance()
    run.fork().advance()
    assert torch.equal(before, torch.get_rng_state())
    assert trained(1) == trained(5)


@pytest.mark.parametrize("workload", ["digits_mlp", Regression])
def test_snapshot_and_restore_are_bit_exact(workload: Any) -> None:
    run = TrainingRun(workload, 0, horizon=60, interval=5, memory_budget=0.5)
    for step in range(3):
        decide(run, step)
        run.advance()
    saved, weights = run.snapshot(), bits(run)
    first = []
    for step in range(3, 7):
        decide(run, step)
        first.append(run.advance())
    after, observed = bits(run), run.observe()
    for _ in range(2):                                       # a snapshot serves more than once
        run.restore(saved)
        assert (bits(run), run.t, run.done) == (weights, 15, False)
        for step, expected in zip(range(3, 7), first, strict=True):
            decide(run, step)
            assert same(run.advance(), expected)
        assert bits(run) == after
        assert run.observe().tobytes() == observed.tobytes()


@pytest.mark.parametrize("workload", ["digits_mlp", Regression])
def test_a_fork_continues_bit_equally_and_independently(workload: Any) -> None:
    run = TrainingRun(workload, 0, horizon=60, interval=5, memory_budget=0.5)
    for step in range(3):
        decide(run, step)
        run.advance()
    fork, stray = run.fork(), run.fork()
    stray.apply(LADDER[0])
    stray.advance()
    for step in range(3, 7):
        assert run.observe().tobytes() == fork.observe().tobytes()
        assert decide(run, step) == decide(fork, step)
        assert same(run.advance(), fork.advance())
    assert bits(run) == bits(fork) != bits(stray)
    assert run.evaluate() == fork.evaluate()


def test_a_workload_that_hides_its_state_cannot_be_forked_silently() -> None:
    def hidden(seed: int) -> SimpleNamespace:
        model, count = nn.Linear(64, 64), [0]

        def loss() -> Tensor:
            count[0] += 1
            loss: Tensor = model(torch.ones(2, 64) * count[0]).square().mean()
            return loss

        return SimpleNamespace(model=model, steps=20, loss=loss, evaluate=lambda: {"val_loss": 0.0})

    run = TrainingRun(hidden, 0, memory_budget=1.5)
    run.advance()
    with pytest.raises(ValueError, match="state_dict"):
        run.fork()


@pytest.mark.parametrize("fault", ["raise", "nan", "inf", "large"])
def test_a_run_that_fails_ends_and_says_why(fault: str) -> None:
    run = TrainingRun(Faulty, 0, horizon=20, interval=5, memory_budget=0.5, workload_kwargs={"fault": fault})
    interval = run.advance()
    assert interval.diverged and run.diverged and run.done
    assert interval.error == ("RuntimeError: the disk is on fire" if fault == "raise" else None)
    assert math.isfinite(interval.loss) and math.isfinite(interval.last_loss)
    assert interval.decisions_left == 3
    assert np.isfinite(run.observe()).all()
    assert run.optimizer.state_bytes() <= run.budget


def test_c7_doubling_each_weight_doubles_that_term() -> None:
    measured: dict[str, Any] = {
        "loss": 1.1, "reference": 1.0, "first": 2.0, "layer_bytes": np.array([20, 60]), "adamw_bytes": np.array([80, 80]),
        "errors": np.array([0.5, 0.25]),
    }  # fmt: skip
    none: dict[str, Any] = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}
    expected = {"alpha": [-0.1, -0.1], "beta": [0.75, 0.25], "gamma": [-0.5, -0.25]}
    for weight, rewards in expected.items():
        one, two = (Reward(**{**none, weight: value}).terms(**measured).rewards for value in (1.0, 2.0))
        assert one == pytest.approx(rewards, rel=1e-6)
        assert (two == 2 * one).all()
    together = Reward(1.0, 1.0, 1.0).terms(**measured)
    assert together.rewards == pytest.approx(np.sum(list(expected.values()), 0), rel=1e-6)
    assert together.reward == pytest.approx(together.rewards.mean())


def test_c7_a_2_bit_action_raises_saved_and_raises_error() -> None:
    start = TrainingRun("digits_mlp", 0, horizon=40, interval=10, memory_budget=2.0)
    start.apply(FULL)
    start.advance()
    terms = []
    for config in (FULL, EIGHT, FOUR, TWO):
        run = start.fork()
        assert run.apply(config) == [config] * len(run.layers)
        terms.append(score(Reward(loss="raw"), run.advance(), None))
    for less, more in itertools.pairwise(terms):
        assert (more.memory > less.memory).all()
        assert (more.error > less.error).all()
    assert (terms[0].error == 0).all()


def test_rewards_can_be_recomputed_from_their_terms_under_any_weights() -> None:
    run = small()
    old, new = Reward(loss="raw"), Reward(2.0, 0.5, 0.3, loss="raw")
    for step in range(4):
        decide(run, step)
        interval = run.advance()
        logged = score(old, interval, None)
        assert (new.combine(logged.loss, logged.memory, logged.error) == score(new, interval, None).rewards).all()


def test_reward_weights_are_validated_and_travel_as_json() -> None:
    wrong: list[dict[str, Any]] = [
        {"alpha": -1.0}, {"beta": math.nan}, {"gamma": math.inf}, {"divergence_penalty": "much"}, {"loss": "val"},
    ]  # fmt: skip
    for bad in wrong:
        with pytest.raises(ValueError, match=next(iter(bad))):
            Reward(**bad)
    with pytest.raises(ValueError, match="unknown reward weights"):
        Reward.from_json({"delta": 1})
    reward = Reward(0.5, 0.25, 0.125, "raw", 3.0)
    assert Reward.from_json(reward.to_json()) == reward


def test_giving_up_is_charged_for_every_decision_that_was_lost() -> None:
    run = TrainingRun(Faulty, 0, horizon=40, interval=5, memory_budget=0.5)
    terms = score(Reward(), run.advance(), None)
    assert terms.loss == 2.0 * 8
    worst = Reward().loss_term(1e9, 1.0, 1.0)
    assert worst == LOSS_CLIP <= Reward().divergence_penalty
    assert Reward().loss_term(0.02, 0.01, 2.0) == pytest.approx(0.05)  # relative to a tenth of the first loss


def test_the_twin_is_the_same_training_at_full_precision() -> None:
    run = small(memory_budget=4.0)
    run.apply(FULL)
    losses: list[float] = []
    while not run.done:
        losses += run.advance().losses.tolist()
    twin = twin_of(run)
    assert list(twin.losses) == losses
    assert twin.evaluation == run.evaluate()
    assert twin.mean(5, 10) == pytest.approx(np.mean(losses[5:10]))
    assert twin.mean(35, 45) is None


def test_full_precision_has_no_gap_to_its_twin_and_compression_has() -> None:
    full, rough = (TrainingRun("digits_mlp", 2, horizon=60, interval=10, memory_budget=4.0) for _ in range(2))
    full.apply(FULL)
    rough.apply(LADDER[0])
    gaps = []
    while not full.done:
        assert score(Reward(), full.advance(), twin_of(full)).loss == 0.0
        gaps.append(score(Reward(), rough.advance(), twin_of(rough)).loss)
    assert gaps[-1] > 0


def test_a_twin_is_trained_once_and_then_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    original = twins.train_twin

    def counted(identity: twins.TwinIdentity) -> Twin:
        trained.append(identity.seed)
        return original(identity)

    monkeypatch.setattr(twins, "train_twin", counted)
    first = twin_of(small(0))
    assert twin_of(small(0, interval=10, memory_budget=0.5)) is first       # budget and interval are no part of it
    twins._remembered.cache_clear()
    assert twin_of(small(0)) == first
    assert trained == [0]
    twin_of(small(1))
    twin_of(small(0, lr=0.01))
    twin_of(small(0, horizon=30))
    twin_of(small(0, optimizer_options={"weight_decay": 0.5, "residual_bits": 4}))          # decay is, feedback is not
    assert trained == [0, 1, 0, 0, 0]
    twin_of(small(0, optimizer_options={"residual_bits": 4}))
    files = sorted(cache.iterdir())
    assert len(files) == 5 and {f.suffix for f in files} == {".json"}
    for file in files:
        file.write_text("{")                                 # a damaged file is made again
    twins._remembered.cache_clear()
    assert twin_of(small(0)) == first
    assert len(trained) == 6


def test_workers_that_want_the_same_twin_train_it_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes: the lock is of an open file, and neither has the twin in memory."""
    trained: list[int] = []
    original, both = twins.train_twin, threading.Barrier(2)

    def slow(identity: twins.TwinIdentity) -> Twin:
        trained.append(identity.seed)
        time.sleep(0.2)
        return original(identity)

    def wanted(run: TrainingRun) -> Twin:
        both.wait()
        return twin_of(run)

    monkeypatch.setattr(twins, "train_twin", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(wanted, [small(0), small(0)])
    assert trained == [0] and first == second
    assert [file.suffix for file in cache.iterdir()] == [".json"]


def test_a_twin_of_a_closure_is_remembered_in_memory_only(cache: Path) -> None:
    lr = 0.01
    twin_of(TrainingRun(lambda seed: Regression(seed, lr), 0, horizon=10))
    assert not cache.exists()


def test_a_twin_survives_a_folder_that_cannot_be_written_and_a_workload_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path / "file"))
    twin = twin_of(TrainingRun(Faulty, 0, horizon=10, interval=5))
    assert twin.error == "RuntimeError: the disk is on fire"
    assert len(twin.losses) == 3
    write_twin(tmp_path / "ok" / "twin.json", twin)
    assert read_twin(tmp_path / "ok" / "twin.json") == twin
    assert [p.name for p in (tmp_path / "ok").iterdir()] == ["twin.json"]
    assert read_twin(tmp_path / "none.json") is None
    assert Twin((math.nan, 1.0), {}).mean(0, 2) is None


class Quadratic:
    """f(w) = c / 2 |w - target|^2, with the weights and losses of every step kept for the test."""

    steps = 40

    def __init__(self, seed: int, c: float = 3.0) -> None:
        self.model = nn.Linear(32, 32, bias=False)
        self.target = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))
        self.c = c
        self.path: list[tuple[Tensor, float]] = []

    def loss(self) -> Tensor:
        weight = self.model.weight
        loss = self.c / 2 * (weight - self.target).square().sum()
        self.path.append((weight.detach().double().clone(), loss.item()))
        return loss

    def evaluate(self) -> dict[str, float]:
        return {"val_loss": self.path[-1][1]}


@pytest.mark.parametrize("c", [0.5, 30.0])
def test_b4_curvature_is_the_loss_change_over_the_squared_step_on_a_quadratic(c: float) -> None:
    run = TrainingRun(Quadratic, 0, interval=10, memory_budget=2.0, workload_kwargs={"c": c})
    run.apply(FULL)
    while not run.done:
        run.advance()
        assert isinstance(run.workload, Quadratic)
        (before, loss_before), (after, loss_after) = run.workload.path[-2:]
        step = after - before
        analytic = c * ((before - run.workload.target) * step).sum() / step.square().sum() + c / 2       # Taylor, exact here
        measured = (loss_after - loss_before) / float(step.square().sum())
        assert measured == pytest.approx(float(analytic), rel=1e-2)
        expected = math.copysign(math.log10(1 + abs(measured)), measured)
        assert run.observe()[0, FEATURE_INDEX["curvature"]] == pytest.approx(expected, rel=1e-3)
