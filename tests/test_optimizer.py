"""MANGO trains as AdamW does, at every rung, and every byte stays within the budget after every call."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.config import FULL, LADDER, NVEC
from mango.state import StorageOptions, TensorState, predicted_bytes


def network(seed: int = 0, width: int = 48) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))


def batch(step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 16, generator=torch.Generator().manual_seed(step))
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3:6].sum(1).sin(), x[:, 7] - x[:, 8]], 1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return (model(x) - y).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, check: Callable[[], None] = lambda: None) -> float:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
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
     {"weight_decay": -0.1}, {"weight_decay": float("inf")}, {"policy_update_freq": 0}, {"policy_update_freq": 2.5}, {"min_numel": 0},
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
    if rung in ("m8v4", "m8v8", "m16v8", "m16v16"):
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
        loss_of(model, 0).backward()
        assert all(p.grad is None for p in model.parameters())
        report = optimizer.memory_report()
        sizes.append(report["gradients"])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    layers = sum(layer.numel for layer in optimizer.layers)
    assert sizes[0] - sizes[4] == layers * 4 - layers // 4                      # small tensors are held as they are


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
    assert abs((applied == 0).double().mean().item() - sparsity) <= 1 / param.numel()


@pytest.mark.parametrize("config", [{"sparsity": 0.9}, {"gradient_bits": 4}, {"gradient_bits": 2, "sparsity": 0.5}, {"gradient_bits": 8}], ids=str)
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
        applied += found
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
        assert optimizer.state_bytes() / n <= 4 and optimizer.state_bytes() <= optimizer.planned_bytes() <= optimizer.memory_budget

    train(model, optimizer, 30, check)


class Meter:
    """Measures the optimizer's bytes at every instant at which something is stored."""

    def __init__(self, optimizer: MANGO, monkeypatch: pytest.MonkeyPatch) -> None:
        self.optimizer, self.peak, self.samples = optimizer, 0, 0
        for codec in {type(c) for table in (_tables()) for c in table}:
            monkeypatch.setattr(codec, "encode", self._measured(codec.encode))

    def _measured(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(codec: Any, *args: Any, **kwargs: Any) -> Any:
            enc = encode(codec, *args, **kwargs)
            self.samples += 1
            self.peak = max(self.peak, self.optimizer.state_bytes())
            return enc

        return wrapper


def _tables() -> list[list[Any]]:
    from mango.codecs import CODECS

    return [list(CODECS.values())]


def reachable_bytes(root: Any, skip: set[int]) -> int:
    """Bytes of all distinct storages reachable from an object, but those of tensors to skip and of single numbers."""
    seen, storages, todo = set(skip), dict[int, int](), [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if thing.dim():
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            todo += list(thing.values())
        elif isinstance(thing, list | tuple | set | frozenset):
            todo += list(thing)
        elif type(thing).__module__.startswith("mango"):
            names = [n for kind in type(thing).__mro__ for n in getattr(kind, "__slots__", ())]
            todo += list(getattr(thing, "__dict__", {}).values()) + [getattr(thing, n) for n in names if hasattr(thing, n)]
    return sum(storages.values())


@pytest.mark.parametrize("policy", ["random", "water-filling", "adaptive", "scheduled"])
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.7])
def test_a16_the_budget_holds_at_every_instant(policy: str, release: bool, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured inside every encoding too: while gradients arrive, while states are stored, while configs change."""
    model = network(width=96)
    optimizer = MANGO(
        model.named_parameters(), memory_budget=share + 0.2 * release, policy=policy, policy_update_freq=3, release_gradients=release, total_steps=40
    )
    meter = Meter(optimizer, monkeypatch)
    train(model, optimizer, 40, lambda: None)
    assert meter.samples > 100 and meter.peak <= optimizer.memory_budget
    assert optimizer.memory_report()["total"] == optimizer.state_bytes() <= optimizer.memory_budget


@given(choices=st.lists(st.lists(st.tuples(*(st.integers(0, n - 1) for n in NVEC)), min_size=3, max_size=3), min_size=1, max_size=4),
       share=st.floats(0.2, 1.3), release=st.booleans(), mid_backward=st.booleans())  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_c5_any_choices_stay_within_the_budget_while_they_are_put_in_force(
    choices: list[list[tuple[int, ...]]], share: float, release: bool, mid_backward: bool
) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Conv1d(4, 128, 3), nn.Embedding(70, 16))
    params = [p for p in model.parameters()]
    optimizer = MANGO(params, memory_budget=share + 0.25 * release, policy="hold", policy_update_freq=2, release_gradients=release)
    with pytest.MonkeyPatch.context() as patch:
        meter = Meter(optimizer, patch)
        for step, choice in enumerate(choices):
            sum((p * torch.randn_like(p)).sum() for p in params).backward()         # type: ignore[union-attr]
            if mid_backward:
                applied = optimizer.apply(torch.tensor(choice))
            optimizer.step()
            applied = optimizer.apply(torch.tensor(choice))
            assert applied == optimizer.applied and optimizer.state_bytes() <= optimizer.memory_budget
            for target in optimizer.targets:
                state = optimizer.state[target.param]["tensor"]
                config = FULL if target.layer is None else applied[target.layer]
                assert state.config == config and state.nbytes <= predicted_bytes(state.shape, config, optimizer.options)
            optimizer.zero_grad()
            assert step >= 0 and all(p.isfinite().all() for p in params)
        assert meter.peak <= optimizer.memory_budget


@given(before=st.tuples(*(st.integers(0, n - 1) for n in NVEC)), after=st.tuples(*(st.integers(0, n - 1) for n in NVEC)),
       shape=st.sampled_from([(24, 60), (60, 24), (8, 6, 3, 3), (1500,), (1, 1200), (5, 300)]), feedback=st.booleans())  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a16_transcoding_never_takes_more_than_the_larger_of_before_and_after(
    before: tuple[int, ...], after: tuple[int, ...], shape: tuple[int, ...], feedback: bool
) -> None:
    options = StorageOptions(error_feedback=feedback)
    old, new = CompressionConfig.from_action(before), CompressionConfig.from_action(after)
    param = Parameter(torch.zeros(shape))
    optimizer = MANGO([param], policy=old, error_feedback=feedback, min_numel=1)
    for step in range(2):
        gradients([param], step)
        optimizer.step()
    state: TensorState = optimizer.state[param]["tensor"]
    assert state.nbytes == predicted_bytes(shape, old, options)
    fixed = optimizer.state_bytes() - state.nbytes
    with pytest.MonkeyPatch.context() as patch:
        meter = Meter(optimizer, patch)
        optimizer.apply(new)
    assert state.nbytes == predicted_bytes(shape, new, options)
    assert meter.peak <= fixed + max(predicted_bytes(shape, old, options), predicted_bytes(shape, new, options))
    assert all(enc.decode().isfinite().all() for enc in state.encoded.values())
    optimizer.step()
    assert param.isfinite().all() and state.nbytes == predicted_bytes(shape, new, options)


def test_transcoding_keeps_the_moments() -> None:
    param = Parameter(torch.zeros(64, 64))
    optimizer = MANGO([param], policy="hold")
    for step in range(5):
        gradients([param], step)
        optimizer.step()
    exp_avg, exp_avg_sq = (x.clone() for x in optimizer.state[param]["tensor"].moments())
    for config, bound in ((LADDER[8], 2.0**-7), (LADDER[7], 2e-2), (LADDER[6], 0.1)):
        optimizer.apply(config)
        now = optimizer.state[param]["tensor"].moments()
        assert (now[0] - exp_avg).norm() <= bound * exp_avg.norm() and (now[1] - exp_avg_sq).norm() <= bound * exp_avg_sq.norm()


@pytest.mark.parametrize("release", [False, True])
def test_a18_components_sum_to_every_byte_that_can_be_reached(release: bool) -> None:
    """Nothing is kept anywhere but what is counted: the object graph is searched for tensors."""
    model = network(width=96)
    optimizer = MANGO(model.named_parameters(), policy="hold", policy_update_freq=3, release_gradients=release)
    optimizer.apply([LADDER[1], CompressionConfig(gradient_bits=4, sparsity=0.9, momentum_bits=4, variance_bits=4)][: len(optimizer.layers)]
                    + [LADDER[3]] * (len(optimizer.layers) - 2))  # fmt: skip
    train(model, optimizer, 10)
    if release:
        loss_of(model, 1).backward()
    report = optimizer.memory_report()
    parts = ("momentum", "variance", "residual", "gradients", "statistics", "scales", "indices", "projector")
    assert report["total"] == sum(report[part] for part in parts) == optimizer.state_bytes()
    assert all(report[part] > 0 for part in parts if part not in ("gradients", "indices"))
    assert (report["gradients"] > 0) == (report["indices"] > 0) == release
    tables = {id(optimizer.allocator.rung_bytes)}                                 # the price list: 8 bytes per layer and rung
    skip = tables | {id(p) for p in model.parameters()} | {id(optimizer.policy)}
    assert reachable_bytes(optimizer, skip) == optimizer.state_bytes()
    assert report["budget"] == optimizer.memory_budget and report["adamw"] == 8 * sum(p.numel() for p in model.parameters())
    assert [layer["bytes"] for layer in report["layers"]] == optimizer.layer_bytes().tolist() or release


def test_a25_somebody_s_own_compressor_is_called_and_its_result_applied() -> None:
    from mango.compression import GradientCompressor

    class MyCustomCompressor(GradientCompressor):
        calls: list[tuple[int, float]] = []

        def compress(
            self, tensor: Tensor, bits: int, sparsity_ratio: float, importance_scores: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            self.calls.append((bits, sparsity_ratio))
            compressed = tensor.sign() * tensor.abs().mean()
            return compressed, tensor - compressed

    param = Parameter(torch.zeros(40, 40))
    optimizer = MANGO([param], compressor=MyCustomCompressor(), policy=CompressionConfig(gradient_bits=8, sparsity=0.5), betas=(0.0, 0.0))
    gradients([param], 0)
    assert param.grad is not None
    raw = param.grad.clone()
    optimizer.step()
    assert MyCustomCompressor.calls == [(8, 0.5)]
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
    gradient = optimizer.compress_gradient(optimizer.targets[0])
    assert gradient is not None and param.grad is not None
    assert 0 < (gradient - param.grad).norm() < 0.01 * param.grad.norm() and not param.any()
    optimizer.update_parameter(optimizer.targets[0], gradient)
    assert torch.allclose(param, -0.1 * gradient.sign(), atol=1e-4)


@pytest.mark.parametrize("config", [*LADDER.rungs[2:-1], CompressionConfig(momentum_bits=32, variance_bits=4)], ids=lambda c: c.name)
def test_no_update_exceeds_ten_learning_rates_and_zero_second_moments_do_not_move(config: CompressionConfig) -> None:
    """Gradients that burst and vanish are the worst case for stored second moments."""
    param = Parameter(torch.zeros(64, 64))
    optimizer = MANGO([param], lr=0.01, policy=config)
    silent = torch.zeros(64, 64, dtype=torch.bool)
    silent[:8], silent[:, :8] = True, True                                       # whole rows and columns, so that factors see zeros too
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


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e13])
def test_d1_a_subspace_works_at_any_gradient_scale(scale: float) -> None:
    torch_seed = torch.Generator().manual_seed(0)
    low_rank = torch.randn(64, 4, generator=torch_seed) @ torch.randn(4, 48, generator=torch_seed)
    param = Parameter(torch.zeros(64, 48))
    optimizer = MANGO([param], lr=1e-2, eps=1e-8 * scale, policy=CompressionConfig(rank=8, variance_bits=32))
    for _ in range(60):                                                          # past a refresh of the projector
        param.grad = low_rank * scale
        optimizer.step()
    cosine = nn.functional.cosine_similarity(param.flatten(), low_rank.flatten(), dim=0)
    assert param.isfinite().all() and param.abs().max() <= 60 * 0.1 and cosine < -0.5


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_d1_the_projector_s_error_is_within_ten_percent_of_the_best_of_its_rank(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    u, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(96, 64, generator=generator))
    spectrum = 2.0 ** -torch.arange(64)
    matrix = u @ torch.diag(spectrum) @ v.T
    param = Parameter(torch.zeros(64, 96))
    optimizer = MANGO([param], policy=CompressionConfig(rank=rank))
    param.grad = matrix.clone()
    optimizer.step()
    p = optimizer.state[param]["tensor"].encoded["projector"].decode()
    best = spectrum[rank:].norm()
    assert (matrix - p @ (p.T @ matrix)).norm() <= 1.1 * best + 2.0**-7 * spectrum.norm() * (best < 2.0**-7)


def test_d1_a_zero_gradient_at_a_refresh_keeps_the_subspace() -> None:
    param = Parameter(torch.zeros(64, 48))
    optimizer = MANGO([param], policy=CompressionConfig(rank=4))
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(64, 4, generator=generator) @ torch.randn(4, 48, generator=generator)
    for _ in range(50):
        param.grad = low_rank.clone()
        optimizer.step()
    before, _ = (x.clone() for x in optimizer.state[param]["tensor"].moments())
    param.grad = torch.zeros(64, 48)
    optimizer.step()
    after, _ = optimizer.state[param]["tensor"].moments()
    assert (after - 0.9 * before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (16, 8, 3, 3), (2000,)])
def test_d2_factors_take_the_bytes_of_their_bits(shape: tuple[int, ...]) -> None:
    rows, columns = (1, shape[0]) if len(shape) == 1 else (shape[0], int(torch.tensor(shape[1:]).prod()))
    small, large = min(rows, columns), max(rows, columns)
    for rank in (1, 4, 8):
        r = min(rank, small)
        sizes = []
        for bits in (16, 8, 4):
            param = Parameter(torch.zeros(shape))
            optimizer = MANGO([param], policy=CompressionConfig(rank=rank, factor_bits_p=bits, factor_bits_q=bits, variance_bits=0))
            gradients([param], 0)
            optimizer.step()
            encoded = optimizer.state[param]["tensor"].encoded
            sizes.append(encoded["projector"].nbytes + encoded["exp_avg"].nbytes)
            codes = -(-small * r * bits // 8) + -(-large * r * bits // 8)
            assert codes <= sizes[-1] <= codes + (0 if bits == 16 else 2 * (small * r // 64 + large * r // 64 + 2))
        assert sizes == sorted(sizes, reverse=True)


def test_d2_eight_bit_factors_err_less_than_four_bit_ones() -> None:
    errors = []
    for bits in (8, 4):
        param = Parameter(torch.zeros(64, 64))
        optimizer = MANGO([param], policy=CompressionConfig(rank=8, factor_bits_p=bits, factor_bits_q=bits), policy_update_freq=1)
        generator = torch.Generator().manual_seed(0)
        param.grad = torch.randn(64, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
        optimizer.step()
        errors.append(float(optimizer.layer_errors()))
    assert errors[0] < 0.1 and errors[0] < errors[1]
