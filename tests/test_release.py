"""Released gradients: held encoded, they clip, accumulate and scale as gradients in `p.grad` do, within the budget."""

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import Parameter

from mango import MANGO, CompressionConfig, noise
from mango.codecs import Encoded
from mango.config import FULL, LADDER
from mango.release import give_back
from mango.state import StorageOptions, TensorState
from tests.test_state import Meter

M8V8 = CompressionConfig(momentum_bits=8, variance_bits=8)
G8 = CompressionConfig(gradient_bits=8, momentum_bits=8, variance_bits=8)
G4 = CompressionConfig(gradient_bits=4, momentum_bits=4, variance_bits=4)


class Tied(nn.Module):
    """An embedding that is the output layer too, between them a frozen layer and one of small tensors."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(60, 32)
            self.frozen, self.norm, self.hidden = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 60, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.head(torch.tanh(self.hidden(self.norm(self.frozen(self.embedding(x))))))
        return hidden


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randint(0, 60, (32,), generator=torch.Generator().manual_seed(step))
    loss: Tensor = nn.functional.cross_entropy(model(x).float(), (x + 1) % 60)
    return loss


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def held(optimizer: MANGO) -> dict[str, Encoded]:
    """What is held, by the names of the tensors."""
    states = {t.name: optimizer.state.get(t.param, {}).get("tensor") for t in optimizer.targets}
    return {name: state.encoded["held"] for name, state in states.items() if state is not None and "held" in state.encoded}


def made(release: bool, config: CompressionConfig = FULL, **more: Any) -> tuple[Tied, MANGO]:
    model = Tied()
    arguments: dict[str, Any] = {"lr": 1e-2, "policy": config, "policy_update_freq": 5, "release_gradients": release} | more
    return model, MANGO(model.named_parameters(), **arguments)


def go(model: nn.Module, optimizer: MANGO, steps: range, micro: int = 1, clip: float | None = None) -> list[float]:
    """Train; losses of all passes and norms of all steps, in order."""
    told = []
    for step in steps:
        optimizer.zero_grad()
        for part in range(micro):
            loss = loss_of(model, step * micro + part) / micro
            backward(loss)
            told.append(loss.item())
            assert optimizer.held is None or all(p.grad is None for p in model.parameters())
        if clip is not None:
            told.append(float(optimizer.clip_grad_norm(clip)))
        optimizer.step()
    return told


@pytest.mark.parametrize("config", [FULL, M8V8, LADDER[1]], ids=lambda c: c.name)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05, 1e9])
def test_at_32_bits_losses_norms_and_parameters_are_bit_equal_to_plain_mode_s(
    config: CompressionConfig, micro: int, clip: float | None
) -> None:
    (model, optimizer), (twin, plain) = made(True, config), made(False, config)
    assert go(model, optimizer, range(12), micro, clip) == go(twin, plain, range(12), micro, clip)
    assert same(model, twin) and torch.equal(optimizer.layer_errors(), plain.layer_errors())


@pytest.mark.parametrize(("config", "gap"), [(G8, 0.01), (G4, 0.02), (CompressionConfig(gradient_bits=4, sparsity=0.9), 0.06)])
@pytest.mark.parametrize("feedback", [True, False])
def test_at_fewer_bits_training_is_close_to_plain_mode_s(config: CompressionConfig, gap: float, feedback: bool) -> None:
    """Held-out loss after most of the way down: what is missing, as a fraction of that way."""
    (model, optimizer), (twin, plain) = made(True, config, error_feedback=feedback), made(False)
    start = loss_of(twin, 5000).item()
    go(model, optimizer, range(40), micro=2, clip=1.0)
    go(twin, plain, range(40), micro=2, clip=1.0)
    ours, theirs = (sum(loss_of(m, 1000 + i).item() for i in range(10)) / 10 for m in (model, twin))
    assert theirs < 0.1 * start and ours - theirs < gap * start


def test_the_norm_is_torch_s_and_clipping_between_micro_batches_scales_what_came_before() -> None:
    for clip in (0.05, 1e9):
        (model, optimizer), (twin, plain) = made(True), made(False)
        for step in range(3):
            backward(loss_of(model, step))
            backward(loss_of(twin, step))
            parameters = [p for p in twin.parameters() if p.grad is not None]
            expected = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
            assert float(optimizer.clip_grad_norm(clip)) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        plain.step()
        assert same(model, twin)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_gives_torch_s_norm_and_its_consequences(value: float) -> None:
    pairs = (made(True), made(False))
    for model, optimizer in pairs:
        go(model, optimizer, range(3))
        for step in (3, 4):
            loss = loss_of(model, step)
            backward(loss + model.hidden.weight[0, 0] * value if step == 3 else loss)
        norm = float(optimizer.clip_grad_norm(1.0))
        assert math.isnan(norm) == math.isnan(value) and not math.isfinite(norm)
        optimizer.step()
        go(model, optimizer, range(5, 8))
    assert same(pairs[0][0], pairs[1][0]) and pairs[0][1].skipped == pairs[1][1].skipped > 0


def scaled_run(release: bool, poisoned: int | None = None, unscale: bool = True, dtype: torch.dtype = torch.float16) -> Any:
    """Mixed precision with a scaler: the model, its optimizer, losses, and the scale after each step."""
    model, optimizer = made(release)
    scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    losses, scales, norms = [], [], []
    for step in range(10):
        optimizer.zero_grad()
        for part in range(2):
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_of(model, 2 * step + part) / 2
            if step == poisoned and part == 0:
                loss = loss + model.hidden.weight[0, 0] * math.inf
            backward(scaler.scale(loss))
            losses.append(loss.item())
        if unscale:
            scaler.unscale_(optimizer)
            norms.append(float(optimizer.clip_grad_norm(0.1)))
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) == (step == poisoned)
        scaler.update()
        scales.append(scaler.get_scale())
    return model, optimizer, losses, scales, norms


@pytest.mark.parametrize("poisoned", [None, 0, 5])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_d14_a_scaler_sees_held_gradients_as_it_sees_plain_ones(
    poisoned: int | None, unscale: bool, dtype: torch.dtype
) -> None:
    """torch's own scaler: unscaled once, infinities skip the step and halve the scale, finite steps double it."""
    model, optimizer, losses, scales, norms = scaled_run(True, poisoned, unscale, dtype)
    twin, plain, *expected = scaled_run(False, poisoned, unscale, dtype)
    finite = [x for x in losses if math.isfinite(x)]
    assert [finite, scales, norms] == [[x for x in expected[0] if math.isfinite(x)], *expected[1:]]
    assert same(model, twin) and optimizer.steps == plain.steps == 10 - (poisoned is not None)
    changes = {b / a for a, b in zip([2.0**12, *scales], scales, strict=False)}
    assert changes == {1.0, 2.0} | ({0.5} if poisoned is not None else set())
    assert [len(optimizer.param_groups), len(optimizer.param_groups[0]["params"])] == [1, len(optimizer.targets)]


def test_d14_mixed_precision_with_held_gradients_matches_float32_s_loss() -> None:
    model = scaled_run(True)[0]
    twin, plain = made(False)
    go(twin, plain, range(10), micro=2, clip=0.1)
    ours, theirs = (sum(loss_of(m, 1000 + i).item() for i in range(10)) for m in (model, twin))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_a_scaler_that_finds_no_gradients_says_so_as_with_plain_ones() -> None:
    for release in (True, False):
        _, optimizer = made(release)
        scaler = GradScaler("cpu")
        scaler.scale(torch.ones(()))
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.step(optimizer)


def test_tied_parameters_are_held_once_and_frozen_ones_never() -> None:
    model, optimizer = made(True)
    backward(loss_of(model, 0))
    assert set(held(optimizer)) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(t.param is model.head.weight for t in optimizer.targets) == 1


def test_parameters_unfrozen_and_frozen_in_mid_run_go_as_in_plain_mode() -> None:
    pairs = (made(True), made(False))
    for model, optimizer in pairs:
        go(model, optimizer, range(3))
        model.frozen.requires_grad_(True)
        go(model, optimizer, range(3, 6), micro=2, clip=0.5)
        model.frozen.requires_grad_(False)
        go(model, optimizer, range(6, 8))
        model.frozen.requires_grad_(True)
        go(model, optimizer, range(8, 10))
    assert same(pairs[0][0], pairs[1][0])


def test_a_gradient_that_came_before_the_hook_is_taken_all_the_same() -> None:
    pairs = (made(True), made(False))
    for model, optimizer in pairs:
        go(model, optimizer, range(2))
        model.frozen.requires_grad_(True)
        optimizer.zero_grad(set_to_none=False)
        model.frozen.weight.grad = torch.full((32, 32), 0.1)                # by hand, beside what backward brings
        backward(loss_of(model, 2))
        norm = float(optimizer.clip_grad_norm(0.1))
        assert norm > 3
        optimizer.step()
    assert same(pairs[0][0], pairs[1][0])


def test_a_group_added_in_mid_accumulation_leaves_what_is_held() -> None:
    pairs = (made(True), made(False))
    for model, optimizer in pairs:
        more = nn.Linear(40, 40)
        more.load_state_dict({"weight": torch.ones(40, 40), "bias": torch.zeros(40)})
        backward(loss_of(model, 0) / 2)
        optimizer.clip_grad_norm(0.1)
        optimizer.add_param_group({"params": list(more.parameters()), "param_names": ["more.weight", "more.bias"]})
        backward(loss_of(model, 1) / 2 + more(torch.ones(1, 40)).sum())
        optimizer.step()
        model.more = more
    assert same(pairs[0][0], pairs[1][0])


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("config", [FULL, G8, G4], ids=lambda c: c.name)
@pytest.mark.parametrize("broken", [False, True])
def test_copies_in_mid_accumulation_go_on_as_the_original_would(how: str, config: CompressionConfig, broken: bool) -> None:
    """What is held, the clipping asked for and a gradient that was not finite come along."""

    def finish(model: Tied, optimizer: MANGO) -> Tied:
        backward(loss_of(model, 11))
        optimizer.step()
        go(model, optimizer, range(12, 15), micro=2)
        return model

    model, optimizer = made(True, config)
    go(model, optimizer, range(4))
    backward(loss_of(model, 10) + (model.hidden.weight[0, 0] * math.nan if broken else 0))
    if not broken:
        optimizer.clip_grad_norm(0.1)
    if how == "state_dict":
        twin, other = made(True, config)
        twin.load_state_dict(model.state_dict())
        backward(loss_of(twin, 99))                                         # of another run: replaced
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        twin, other = COPIES[how]((model, optimizer))
    assert set(held(other)) == set(held(optimizer))
    assert same(finish(twin, other), finish(model, optimizer)) and other.skipped == optimizer.skipped == broken


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("the pass failed")


@pytest.mark.parametrize("config", [FULL, G8, G4], ids=lambda c: c.name)
@pytest.mark.parametrize("held_before", [False, True])
def test_an_exception_in_the_middle_of_a_backward_leaves_a_usable_state(
    config: CompressionConfig, held_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was held of the failed pass is dropped on zero_grad, and at 32 bits nothing remains of it."""
    (model, optimizer), (twin, other) = made(True, config, memory_budget=1.6), made(True, config, memory_budget=1.6)
    meter = Meter(optimizer, monkeypatch)
    for one, its in ((model, optimizer), (twin, other)):
        go(one, its, range(3))
    if held_before:
        backward(loss_of(model, 50))
    inner = model.embedding.forward
    monkeypatch.setattr(model.embedding, "forward", lambda x: _Fails.apply(inner(x)))  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="the pass failed"):
        backward(loss_of(model, 51))
    monkeypatch.setattr(model.embedding, "forward", inner)
    assert "hidden.weight" in held(optimizer)                               # the pass had come this far
    optimizer.zero_grad()
    assert not held(optimizer)
    go(model, optimizer, range(3, 8))
    go(twin, other, range(3, 8))
    if config == FULL:
        assert same(model, twin)
    assert all(p.isfinite().all() for p in model.parameters()) and meter.peak <= optimizer.memory_budget


def test_an_exception_while_a_gradient_is_stored_breaks_its_step_unless_it_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = TensorState.hold_gradient
    for drops in (True, False):
        model, optimizer = made(True)
        go(model, optimizer, range(2))
        with monkeypatch.context() as patch:

            def fails(state: TensorState, grad: Tensor, key: int) -> bool:
                if state.shape == (60, 32):
                    raise MemoryError("no room")
                return hold(state, grad, key)

            patch.setattr(TensorState, "hold_gradient", fails)
            with pytest.raises(MemoryError, match="no room"):
                backward(loss_of(model, 2))
        before = model.embedding.weight.detach().clone()
        if drops:
            optimizer.zero_grad()
        optimizer.step()
        assert torch.equal(before, model.embedding.weight) and optimizer.skipped == (not drops)
        assert model.embedding.weight.grad is None and not held(optimizer)
        go(model, optimizer, range(3, 5))
        assert not torch.equal(before, model.embedding.weight) and model.embedding.weight.isfinite().all()


def test_a_dropped_gradient_leaves_no_residual_of_its_own() -> None:
    """A pass that overflowed on its way (finite, but of any size) must not be felt by the next step."""
    model, optimizer = made(True, G4)
    go(model, optimizer, range(2))
    backward(loss_of(model, 2) * 1e10)
    optimizer.zero_grad()
    residuals = [s["tensor"].encoded["residual"].decode() for s in optimizer.state.values() if "residual" in s["tensor"].encoded]
    assert residuals and all(not r.any() for r in residuals)
    go(model, optimizer, range(3, 10))
    assert loss_of(model, 100).item() < loss_of(Tied(), 100).item()


@pytest.mark.parametrize("config", [FULL, G8, G4, CompressionConfig(gradient_bits=2, sparsity=0.9)], ids=lambda c: c.name)
@pytest.mark.parametrize("feedback", [True, False])
def test_held_bytes_are_counted_and_within_the_budget_between_micro_batches_too(
    config: CompressionConfig, feedback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = made(True, config, error_feedback=feedback)[1]
    model, optimizer = made(True, config, error_feedback=feedback, memory_budget=probe.planned_bytes())
    meter = Meter(optimizer, monkeypatch)
    go(model, optimizer, range(7), micro=3, clip=0.1)
    without = optimizer.state_bytes()
    backward(loss_of(model, 90))
    stored = sum(encoded.nbytes for encoded in held(optimizer).values())
    assert stored > 0 and optimizer.state_bytes() == without + stored == optimizer.memory_report()["total"]
    frozen = [t for t in optimizer.targets if not t.param.requires_grad]
    assert optimizer.state_bytes() <= optimizer.planned_bytes() == optimizer.memory_budget and frozen
    assert meter.samples > 100 and meter.peak <= optimizer.memory_budget


def test_clipping_and_stepping_have_one_dense_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes: what held gradients were decoded to never exceeds the largest gradient."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(64, 64)) for _ in range(6)] + [Parameter(torch.randn(16, 64)) for _ in range(6)]
    optimizer = MANGO(params, policy=CompressionConfig(gradient_bits=8), release_gradients=True, error_feedback=False)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    decode = Encoded.decode

    def watched(encoded: Encoded) -> Tensor:
        nonlocal most
        dense = decode(encoded)
        if encoded.codec == "signed8":                                      # gradients alone are: moments are in float32
            alive.append(weakref.ref(dense))
            most = max(most, sum(t.numel() for t in (ref() for ref in alive) if t is not None))
        return dense

    monkeypatch.setattr(Encoded, "decode", watched)
    gc.disable()                                                            # freed by reference counts, not by luck
    try:
        for _ in range(3):
            for _ in range(2):
                backward(sum((p.square().sum() for p in params), torch.zeros(())))
            optimizer.clip_grad_norm(0.1)
            optimizer.step()
    finally:
        gc.enable()
    assert len(alive) == 3 * 3 * len(params) and most == 64 * 64


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_accumulated_sums_are_unbiased_where_nothing_is_fed_back(bits: int) -> None:
    """Means over keys of a sum of three passes, re-encoded in each: six standard errors of them, and the scales' rounding.

    2 bits have levels at 1.5 times the block's root mean square, and cut what lies beyond: there one pass of entries that
    are all of a size is held, and none does.
    """
    options = StorageOptions(error_feedback=False, release_gradients=True)
    config = CompressionConfig(gradient_bits=bits)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(8, 64, generator=generator) for _ in range(3)]
    if bits == 2:
        grads = [grads[0].sign()]
    count, total, squares = 600, torch.zeros(8, 64), torch.zeros(8, 64)
    for run in range(count):
        state = TensorState((8, 64), config, options)
        for number, grad in enumerate(grads):
            assert state.hold_gradient(grad, noise.step_key(run, 0, 0) + 0x10000 * number)
        dense = state.encoded["held"].decode()
        total, squares = total + dense, squares + dense.square()
    mean = total / count
    error = mean - torch.stack(grads).sum(0)
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    scale_rounding = 2.0**-8 * len(grads) * torch.stack(grads).abs().max()  # bfloat16's, of the scale of each pass
    assert (error.abs() <= 6 * deviation / math.sqrt(count) + scale_rounding).all()
    assert error.mean().abs() <= 6 * deviation.mean() / math.sqrt(count * error.numel()) + scale_rounding / 8
    if bits < 16:
        assert deviation.mean() > 0


@pytest.mark.parametrize("config", [G8, G4, CompressionConfig(gradient_bits=4, sparsity=0.9)], ids=lambda c: c.name)
def test_with_feedback_what_was_taken_and_what_is_carried_over_sum_to_the_true_gradients(config: CompressionConfig) -> None:
    """But for the rounding of the residuals, one per pass, at 16 bits of the largest residual."""
    options = StorageOptions(error_feedback=True, residual_bits=16, release_gradients=True)
    state = TensorState((32, 64), config, options)
    state.create(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    true, taken, largest = torch.zeros(32, 64), torch.zeros(32, 64), 0.0
    for step in range(5):
        for part in range(3):
            grad = torch.randn(32, 64, generator=generator)
            true += grad
            assert state.hold_gradient(grad, noise.step_key(0, 0, step) + 0x10000 * part)
            largest = max(largest, float(state.encoded["residual"].decode().abs().max()))
        taken += state.encoded.pop("held").decode()
    assert (taken + state.encoded["residual"].decode() - true).abs().max() <= 15 * largest * 2.0**-7 and taken.any()


def test_freed_memory_is_given_back_after_so_many_bytes_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every small tensor; by the C library where it has `malloc_trim`, and without harm where it has not."""
    give_back()
    monkeypatch.setattr("mango.release._malloc_trim", lambda: None)
    give_back()
    calls: list[int] = []
    monkeypatch.setattr("mango.release.give_back", lambda: calls.append(1))
    monkeypatch.setattr("mango.release.TRIM_AFTER", 3 * 4 * 64 * 64)            # every third time that one is held or taken
    model = nn.Linear(64, 64, bias=False)
    optimizer = MANGO(model.parameters(), policy=G4, release_gradients=True, memory_budget=1.0)
    for step in range(7):
        backward(model(torch.ones(1, 64)).sum())
        assert len(calls) == (2 * step + 1) // 3
        optimizer.step()
        assert len(calls) == (2 * step + 2) // 3
