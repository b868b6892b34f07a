"""MANGO trains as AdamW does, at every rung, and every byte stays within the budget after every call."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.config import FULL, LADDER


def network(seed: int = 0, width: int = 48) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))


def batch(step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 16, generator=torch.Generator().manual_seed(step))
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3:6].sum(1).sin(), x[:, 7] - x[:, 8]], 1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    loss: Tensor = (model(x) - y).square().mean()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, check: Callable[[], None] = lambda: None) -> float:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        check()
    with torch.no_grad():
        return sum(loss_of(model, 10_000 + i).item() for i in range(10)) / 10


def gradients(params: list[Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) * scale


def test_a2_the_signature_is_the_promised_one() -> None:
    found = inspect.signature(MANGO).parameters
    promised = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "memory_budget": None, "policy_net": None,
                "error_feedback": True, "policy_update_freq": 100}  # fmt: skip
    assert list(found)[:9] == ["params", *promised]
    assert {name: found[name].default for name in promised} == promised
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(found.values())[9:])


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1.0}, {"lr": float("nan")}, {"eps": -1e-8}, {"betas": (1.0, 0.999)}, {"betas": (0.9, -0.1)}, {"betas": (0.9,)},
     {"weight_decay": -0.1}, {"weight_decay": float("inf")}, {"policy_update_freq": 0}, {"policy_update_freq": 2.5},
     {"min_numel": 0},
     {"residual_bits": 3}, {"policy": FULL, "policy_net": FULL}],
    ids=str,
)  # fmt: skip
def test_a3_hyper_parameters_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        MANGO([Parameter(torch.zeros(3))], **bad)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.95, 0.5)])
def test_a4_full_precision_is_torch_s_adamw_bit_for_bit(weight_decay: float, betas: tuple[float, float]) -> None:
    mine, theirs = network(), network()
    train(mine, MANGO(mine.parameters(), lr=3e-3, betas=betas, weight_decay=weight_decay, policy=FULL), 200)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=3e-3, betas=betas, weight_decay=weight_decay, foreach=False), 200)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6


def test_a4_full_precision_without_decay_is_torch_s_adam() -> None:
    mine, theirs = network(), network()
    train(mine, MANGO(mine.parameters(), lr=3e-3, policy=FULL), 200)
    train(theirs, torch.optim.Adam(theirs.parameters(), lr=3e-3), 200)
    assert max((a - b).abs().max().item() for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)) < 1e-6


@pytest.fixture(scope="module")
def adamw_loss() -> tuple[float, float]:
    """(before, after) 300 steps of torch's AdamW."""
    model = network()
    before = train(model, torch.optim.SGD(model.parameters(), lr=0.0), 0)
    return before, train(model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0), 300)


@pytest.mark.parametrize("rung", LADDER.names)
def test_a5_every_rung_trains_and_full_moments_train_like_adamw(rung: str, adamw_loss: tuple[float, float]) -> None:
    model = network()
    optimizer = MANGO(model.parameters(), lr=3e-3, policy=LADDER[LADDER.index(rung)])
    after = train(model, optimizer, 300)
    gained = (adamw_loss[0] - after) / (adamw_loss[0] - adamw_loss[1])
    assert gained > (0.5 if LADDER[LADDER.index(rung)].rank == 1 else 0.8 if LADDER[LADDER.index(rung)].rank else 0.93)
    if rung in ("m6v8", "m8v8", "m16v8", "m16v16"):
        assert gained > 0.98


def test_a5_decisions_change_what_is_stored() -> None:
    model = network()
    optimizer = MANGO(model.parameters(), policy="random", policy_update_freq=10)
    seen: set[tuple[CompressionConfig, int, str]] = set()

    def log() -> None:
        state = optimizer.state[optimizer.param_groups[0]["params"][2]]["tensor"]
        seen.add((optimizer.applied[0], state.nbytes, state.encoded["exp_avg"].codec))

    train(model, optimizer, 150, log)
    assert len({config for config, _, _ in seen}) > 2 and len({nbytes for _, nbytes, _ in seen}) > 2
    assert len({codec for _, _, codec in seen}) > 1


@pytest.mark.parametrize("feedback", [True, False])
def test_a6_every_gradient_precision_trains_and_held_bytes_fall_with_it(feedback: bool, adamw_loss: tuple[float, float]) -> None:
    sizes = []
    for bits in (32, 16, 8, 4, 2):
        model = network()
        config = CompressionConfig(gradient_bits=bits)
        optimizer = MANGO(model.parameters(), lr=3e-3, policy=config, error_feedback=feedback, release_gradients=True)
        after = train(model, optimizer, 300)
        assert (adamw_loss[0] - after) / (adamw_loss[0] - adamw_loss[1]) > 0.8
        optimizer.zero_grad()
        loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is None for p in model.parameters())
        report = optimizer.memory_report()
        sizes.append(report["gradients"])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    layers = sum(layer.numel for layer in optimizer.layers)
    assert sizes[0] - sizes[4] == layers * 4 - layers // 4  # small tensors are held as they are


def test_a7_bytes_of_the_first_moment_per_parameter() -> None:
    n = 512 * 256
    for bits, expected in ((32, 4.0), (16, 2.0), (8, 1.0 + 2 / 128), (4, 0.5 + 2 / 64), (2, 0.25 + 2 / 64)):
        param = Parameter(torch.zeros(512, 256))
        optimizer = MANGO([param], policy=CompressionConfig(momentum_bits=bits))
        gradients([param], 0)
        optimizer.step()
        assert optimizer.state[param]["tensor"].encoded["exp_avg"].nbytes == n * expected
        report = optimizer.memory_report()
        assert report["variance"] == 4 * n and report["momentum"] + report["scales"] == n * expected


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_a8_the_fraction_of_zeros_in_the_applied_gradient(sparsity: float) -> None:
    param = Parameter(torch.zeros(50, 40))
    optimizer = MANGO([param], policy=CompressionConfig(sparsity=sparsity))
    gradients([param], 0)
    optimizer.steps += 1
    applied = optimizer.compress_gradient(optimizer.targets[0])
    assert applied is not None
    assert abs((applied.gradient == 0).double().mean().item() - sparsity) <= 1 / param.numel()


@pytest.mark.parametrize(
    "config", [{"sparsity": 0.9}, {"gradient_bits": 4}, {"gradient_bits": 2, "sparsity": 0.5}, {"gradient_bits": 8}], ids=str
)
def test_a13_applied_gradients_sum_to_the_true_ones_within_the_residual(config: dict[str, float]) -> None:
    """sum of applied + residual = sum of true, up to half a bin of the 8-bit residual per step (levels c^2 / 127^2)."""
    param = Parameter(torch.zeros(40, 40))
    optimizer = MANGO([param], policy=CompressionConfig.from_dict(config), policy_update_freq=1000)
    true, applied, slack = torch.zeros(40, 40), torch.zeros(40, 40), 0.0
    for step in range(50):
        gradients([param], step)
        assert param.grad is not None
        true += param.grad
        found = optimizer.compress_gradient(optimizer.targets[0])
        assert found is not None
        applied += found.gradient
        residual = optimizer.state[param]["tensor"].encoded["residual"].decode()
        largest = residual.abs().max()
        half_bin = (residual.abs() * largest).sqrt() / 127 + largest / 127**2 + 2.0**-8 * residual.abs()
        slack += float(half_bin.norm()) * 1.01
        assert (true - applied - residual).norm() <= slack + 1e-4


def test_a13_without_feedback_there_are_no_buffer_bytes() -> None:
    for feedback in (True, False):
        param = Parameter(torch.zeros(40, 40))
        optimizer = MANGO([param], policy=CompressionConfig(gradient_bits=4), error_feedback=feedback)
        gradients([param], 0)
        optimizer.step()
        assert ("residual" in optimizer.state[param]["tensor"].encoded) == feedback
        assert (optimizer.memory_report()["residual"] == 1600) == feedback


def test_a16_four_bytes_per_parameter_hold_at_every_step() -> None:
    model = network(width=64)
    n = sum(p.numel() for p in model.parameters())
    optimizer = MANGO(model.parameters(), memory_budget=4 * n, policy_update_freq=5)

    def check() -> None:
        assert (
            optimizer.state_bytes() / n <= 4 and optimizer.state_bytes() <= optimizer.planned_bytes() <= optimizer.memory_budget
        )

    train(model, optimizer, 30, check)


def test_a25_somebody_s_own_compressor_is_called_and_its_result_applied() -> None:
    from mango.compression import GradientCompressor

    calls: list[tuple[int, float]] = []

    class MyCustomCompressor(GradientCompressor):
        def compress(
            self, tensor: Tensor, bits: int, sparsity_ratio: float, importance_scores: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            calls.append((bits, sparsity_ratio))
            compressed = tensor.sign() * tensor.abs().mean()
            return compressed, tensor - compressed

    param = Parameter(torch.zeros(40, 40))
    optimizer = MANGO(
        [param], compressor=MyCustomCompressor(), policy=CompressionConfig(gradient_bits=8, sparsity=0.5), betas=(0.0, 0.0)
    )
    gradients([param], 0)
    assert param.grad is not None
    raw = param.grad.clone()
    optimizer.step()
    assert calls == [(8, 0.5)]
    exp_avg, _ = optimizer.state[param]["tensor"].moments()
    assert torch.allclose(exp_avg, raw.sign() * raw.abs().mean())
    residual = optimizer.state[param]["tensor"].encoded["residual"].decode()
    error = raw - exp_avg
    assert (residual - error).norm() < 0.02 * error.norm()


def test_a29_the_three_steps_of_an_update_work_alone() -> None:
    param = Parameter(torch.zeros(40, 40))
    optimizer = MANGO([param], policy=CompressionConfig(gradient_bits=16), lr=0.1)
    gradients([param], 0)
    assert optimizer.collect_features().shape == (1, 64)
    optimizer.steps += 1
    work = optimizer.compress_gradient(optimizer.targets[0])
    assert work is not None and param.grad is not None
    assert 0 < (work.gradient - param.grad).norm() < 0.01 * param.grad.norm() and not param.any()
    optimizer.update_parameter(work)
    assert torch.allclose(param, -0.1 * work.gradient.sign(), atol=1e-4)


@pytest.mark.parametrize(
    "config", [*LADDER.rungs[2:-1], CompressionConfig(momentum_bits=32, variance_bits=4)], ids=lambda c: c.name
)
def test_no_update_exceeds_ten_learning_rates_and_zero_second_moments_do_not_move(config: CompressionConfig) -> None:
    """Gradients that burst and vanish are the worst case for stored second moments."""
    param = Parameter(torch.zeros(64, 64))
    optimizer = MANGO([param], lr=0.01, policy=config)
    silent = torch.zeros(64, 64, dtype=torch.bool)
    silent[:8], silent[:, :8] = True, True  # whole rows and columns, so that factors see zeros too
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        before = param.detach().clone()
        size = 10.0 ** torch.randint(-6, 4, (64, 64), generator=generator)
        param.grad = (torch.randn(64, 64, generator=generator) * size * (step % 7 != 3)).masked_fill(silent, 0.0)
        optimizer.step()
        moved = (param.detach() - before).abs()
        assert moved.max() <= 0.1 * (1 + 1e-5) and moved.isfinite().all()
        assert not moved[silent].any()


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
def test_updates_at_eight_bits_follow_adamw_s_at_any_gradient_scale(scale: float) -> None:
    """Norms within 2 %; eps scales along, since Adam itself is not free of scale below it."""
    mine, theirs = Parameter(torch.zeros(96, 96)), Parameter(torch.zeros(96, 96))
    optimizer = MANGO([mine], lr=1e-3, eps=1e-8 * scale, policy=CompressionConfig(momentum_bits=8, variance_bits=8))
    reference = torch.optim.AdamW([theirs], lr=1e-3, eps=1e-8 * scale, weight_decay=0)
    for step in range(60):
        before = mine.detach().clone(), theirs.detach().clone()
        gradients([mine], step, scale)
        gradients([theirs], step, scale)
        optimizer.step()
        reference.step()
        moved, expected = mine.detach() - before[0], theirs.detach() - before[1]
        assert abs(float(moved.norm() / expected.norm()) - 1) < 0.02
    assert (mine - theirs).norm() < 0.05 * theirs.norm()
