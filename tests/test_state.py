"""Stored state: bytes at every instant, transcoding, everything counted, subspaces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from mango import MANGO, CompressionConfig, native
from mango.codecs import CODECS
from mango.config import FULL, NVEC
from mango.state import StorageOptions, TensorState, predicted_bytes
from tests.rungs import R8


def network(seed: int = 0, width: int = 48) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    (model(x) - x[:, :4].square()).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def gradients(params: list[Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) * scale


class Meter:
    """Measures the optimizer's bytes at every instant at which something is stored."""

    def __init__(self, optimizer: MANGO, monkeypatch: pytest.MonkeyPatch) -> None:
        self.optimizer, self.peak, self.samples = optimizer, 0, 0
        for codec in {type(c) for c in CODECS.values()}:
            monkeypatch.setattr(codec, "encode", self._measured(codec.encode))
        for kernel in ("encode", "update"):
            monkeypatch.setattr(native, kernel, self._measured(getattr(native, kernel)))

    def _measured(self, store: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            stored = store(*args, **kwargs)
            self.samples += 1
            self.peak = max(self.peak, self.optimizer.state_bytes())
            return stored

        return wrapper


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
        model.named_parameters(),
        memory_budget=share + 0.2 * release,
        policy=policy,
        policy_update_freq=3,
        release_gradients=release,
        total_steps=40,
    )
    meter = Meter(optimizer, monkeypatch)
    train(model, optimizer, 40)
    assert meter.samples > 40 and meter.peak <= optimizer.memory_budget
    assert optimizer.memory_report()["total"] == optimizer.state_bytes() <= optimizer.memory_budget


ACTIONS = st.tuples(*(st.integers(0, n - 1) for n in NVEC))


@given(choices=st.lists(st.lists(ACTIONS, min_size=3, max_size=3), min_size=1, max_size=4),
       share=st.floats(0.2, 1.3), release=st.booleans(), mid_backward=st.booleans())  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_c5_any_choices_stay_within_the_budget_while_they_are_put_in_force(
    choices: list[list[tuple[int, ...]]], share: float, release: bool, mid_backward: bool
) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Conv1d(4, 128, 3), nn.Embedding(70, 16))
    params = list(model.parameters())
    optimizer = MANGO(
        params, memory_budget=share + 0.25 * release, policy="hold", policy_update_freq=2, release_gradients=release
    )
    with pytest.MonkeyPatch.context() as patch:
        meter = Meter(optimizer, patch)
        for step, choice in enumerate(choices):
            sum((p * torch.randn_like(p)).sum() for p in params).backward()  # type: ignore[union-attr]
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


@given(before=ACTIONS, after=ACTIONS,
       shape=st.sampled_from([(24, 60), (60, 24), (8, 6, 3, 3), (1500,), (1, 1200), (5, 300)]),
       feedback=st.booleans())  # fmt: skip
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
    blocks = exp_avg_sq.view(-1, 128)
    # the widest of 15 steps in log from the least to the largest: by chance an error has half a gap's deviation at most
    gap = float(((blocks.amax(1) / blocks.amin(1)) ** (1 / 14)).max()) - 1
    for bits, bound in (((16, 8), 2.0**-7), ((8, 8), 2e-2), ((8, 4), 2e-2 + gap / 2)):
        optimizer.apply(CompressionConfig(momentum_bits=bits[0], variance_bits=bits[1]))
        now = optimizer.state[param]["tensor"].moments()
        assert (now[0] - exp_avg).norm() <= min(bound, 2e-2) * exp_avg.norm()
        assert (now[1] - exp_avg_sq).norm() <= bound * exp_avg_sq.norm()
    assert bound < 0.3


@pytest.mark.parametrize("release", [False, True])
def test_a18_components_sum_to_every_byte_that_can_be_reached(release: bool) -> None:
    """Nothing is kept anywhere but what is counted: the object graph is searched for tensors."""
    model = network(width=96)
    optimizer = MANGO(model.named_parameters(), policy="hold", policy_update_freq=3, release_gradients=release)
    sparse = CompressionConfig(gradient_bits=4, sparsity=0.9, momentum_bits=4, variance_bits=4)
    optimizer.apply([R8, sparse])
    train(model, optimizer, 10)
    if release:
        backward(model, 1)
    report = optimizer.memory_report()
    parts = ("momentum", "variance", "residual", "gradients", "statistics", "scales", "indices", "projector")
    assert report["total"] == sum(report[part] for part in parts) == optimizer.state_bytes()
    assert all(report[part] > 0 for part in parts if part not in ("gradients", "indices"))
    assert (report["gradients"] > 0) == (report["indices"] > 0) == release
    tables = {id(optimizer.allocator.rung_bytes)}  # the price list: 8 bytes per layer and rung
    skip = tables | {id(p) for p in model.parameters()} | {id(optimizer.policy)}
    assert reachable_bytes(optimizer, skip) == optimizer.state_bytes()
    assert report["budget"] == optimizer.memory_budget and report["adamw"] == 8 * sum(p.numel() for p in model.parameters())
    assert [layer["bytes"] for layer in report["layers"]] == optimizer.layer_bytes().tolist() or release


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e13])
def test_d1_a_subspace_works_at_any_gradient_scale(scale: float) -> None:
    torch_seed = torch.Generator().manual_seed(0)
    low_rank = torch.randn(64, 4, generator=torch_seed) @ torch.randn(4, 48, generator=torch_seed)
    param = Parameter(torch.zeros(64, 48))
    optimizer = MANGO([param], lr=1e-2, eps=1e-8 * scale, policy=CompressionConfig(rank=8, variance_bits=32))
    for _ in range(60):  # past a refresh of the projector
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
            optimizer = MANGO(
                [param], policy=CompressionConfig(rank=rank, factor_bits_p=bits, factor_bits_q=bits, variance_bits=0)
            )
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
