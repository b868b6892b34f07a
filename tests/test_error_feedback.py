"""The modes of error feedback in the optimizer: what they apply, the bytes they keep, what survives, what excludes what."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.codecs import Codec, Encoded, encode
from mango.compression import GradientCompressor
from mango.config import FULL
from mango.formats import SIGNED, gradient_codec
from mango.policies import random_action
from mango.rules import Hyper
from mango.state import FEEDBACK, StorageOptions, TensorState, predicted_bytes

COARSE = CompressionConfig(gradient_bits=4)
SPARSE = CompressionConfig(sparsity=0.9)
MODES: dict[str, dict[str, Any]] = {
    "off": {"error_feedback": False},
    "always": {},
    "threshold": {"feedback_threshold": 0.5},
    "never": {"feedback_threshold": math.inf},
    "ef21": {"error_feedback": "ef21"},
    "marina": {"error_feedback": "marina", "exact_every": 4},
    "correction": {"momentum_correction": True},
}
KEPT = {"off": 0, "always": 1, "threshold": 1, "never": 0, "ef21": 1, "marina": 2, "correction": 2}  # slots at residual_bits
SHAPE = (40, 50)


def make(config: CompressionConfig, **options: Any) -> tuple[Parameter, MANGO]:
    param = Parameter(torch.zeros(SHAPE))
    return param, MANGO([param], lr=1e-3, policy=config, memory_budget="1MiB", **options)


def gradient(step: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(step))


def state_of(optimizer: MANGO) -> TensorState:
    state: TensorState = optimizer.state[optimizer.targets[0].param]["tensor"]
    return state


def coded(x: Tensor) -> Tensor:
    """By the codec of `SPARSE`, to nearest."""
    return encode(gradient_codec(SPARSE.gradient_bits, SPARSE.sparsity), x).decode()


def run(param: Parameter, optimizer: MANGO, steps: range) -> list[Tensor]:
    """The gradients that were applied, step by step."""
    applied = []
    for step in steps:
        param.grad = gradient(step)
        optimizer.steps += 1
        work = optimizer.compress_gradients()
        applied.append(work[0].gradient.clone())
        optimizer.update_parameters(work)
    return applied


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [32, 16, 8, 6, 4])
@pytest.mark.parametrize("config", [COARSE, SPARSE], ids=lambda c: c.name)
def test_a13_every_mode_keeps_the_bytes_that_are_predicted_and_no_others(mode: str, bits: int, config: CompressionConfig) -> None:
    param, optimizer = make(config, residual_bits=bits, **MODES[mode])
    run(param, optimizer, range(6))
    kept = KEPT[mode] * SIGNED[bits].nbytes(SHAPE)
    state = state_of(optimizer)
    assert state.nbytes == predicted_bytes(SHAPE, config, optimizer.options) == 8 * param.numel() + kept
    report = optimizer.memory_report()
    assert report["total"] == optimizer.state_bytes() == optimizer.planned_bytes()
    assert report["residual"] + report["scales"] == kept                       # codes and their scales, nothing else has any
    optimizer.apply(FULL)
    assert state.nbytes == 8 * param.numel() and not set(state.encoded) - {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [FULL, CompressionConfig(gradient_bits=16)], ids=lambda c: c.name)
def test_unbiased_codecs_need_no_feedback_and_keep_nothing(mode: str, config: CompressionConfig) -> None:
    param, optimizer = make(config, **MODES[mode])
    applied = run(param, optimizer, range(3))
    assert not set(state_of(optimizer).encoded) - {"exp_avg", "exp_avg_sq"}
    for step, found in enumerate(applied):
        assert (found - gradient(step)).abs().max() <= 2.0**-7 * gradient(step).abs().max() * (config is not FULL)


@pytest.mark.parametrize("config", [COARSE, SPARSE], ids=lambda c: c.name)
def test_a13_what_was_applied_is_what_was_true_less_the_residual(config: CompressionConfig) -> None:
    """With a float32 residual only sums are rounded; with one of 8 bits each of n steps adds a rounding of at most 1/127."""
    true = torch.stack([gradient(step) for step in range(30)]).sum(0)
    for bits, tolerance in ((32, 30 * 2.0**-22), (8, 30 * 2 / 127)):
        for mode in ("always", "threshold"):
            param, optimizer = make(config, residual_bits=bits, **MODES[mode])
            sent = torch.stack(run(param, optimizer, range(30))).sum(0)
            residual = state_of(optimizer).encoded["residual"].decode()
            assert (true - sent - residual).abs().max() <= tolerance * max(1.0, float(residual.abs().max()))


@pytest.mark.parametrize("config", [COARSE, SPARSE], ids=lambda c: c.name)
@pytest.mark.parametrize("release", [False, True])
def test_a14_a_threshold_of_inf_is_off_and_of_0_is_always_bit_for_bit(config: CompressionConfig, release: bool) -> None:
    def train(**options: Any) -> tuple[Tensor, int]:
        param, optimizer = make(config, release_gradients=release, **options)
        for step in range(12):
            (param * gradient(step)).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return param.detach().clone(), optimizer.state_bytes()

    off, never = train(error_feedback=False), train(feedback_threshold=math.inf)
    on, always, sometimes = train(), train(feedback_threshold=0.0), train(feedback_threshold=1.0)
    assert torch.equal(off[0], never[0]) and off[1] == never[1]
    assert torch.equal(on[0], always[0]) and on[1] == always[1] == sometimes[1] > off[1]
    assert not torch.equal(on[0], off[0])


def test_j2_ef21_follows_its_recursion_on_a_fixed_sequence() -> None:
    """g += C(grad - g) with the codec as C."""
    param, optimizer = make(SPARSE, error_feedback="ef21", residual_bits=32)
    estimate = torch.zeros(SHAPE)
    for step, applied in enumerate(run(param, optimizer, range(20))):
        estimate = estimate + coded(gradient(step) - estimate)
        assert torch.equal(applied, estimate)
    assert torch.equal(state_of(optimizer).encoded["estimate"].decode(), estimate)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_j2_ef21_s_estimate_reaches_a_gradient_that_stays(bits: int) -> None:
    """One entry in ten is sent at each step; what storing the estimate loses is made good at the next, so it does not add up."""
    param, optimizer = make(SPARSE, error_feedback="ef21", residual_bits=bits)
    errors = []
    for _ in range(40):
        param.grad = gradient(0)
        errors.append(float((optimizer.compress_gradients()[0].gradient - gradient(0)).norm() / gradient(0).norm()))
    assert errors[-1] < {32: 1e-6, 8: 0.02, 4: 0.15}[bits] and errors[0] > 0.5


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("config", [COARSE, SPARSE], ids=lambda c: c.name)
def test_d8_marina_is_exact_at_multiples_of_its_period(bits: int, config: CompressionConfig) -> None:
    param, optimizer = make(config, residual_bits=bits, **MODES["marina"])
    for step, applied in enumerate(run(param, optimizer, range(12))):
        assert torch.equal(applied, gradient(step)) == (step % 4 == 0)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("seed", range(5))
def test_d8_marina_s_updates_vary_less_than_without_where_gradients_change_slowly(seed: int, bits: int) -> None:
    """Gradient descent on a quadratic, codes of 4 bits by chance: the summed squared error of what is applied is its variance."""
    a = torch.randn(100, 50, generator=Generator().manual_seed(seed))
    b = a @ gradient(seed, (50, 40))
    squared = {}
    for mode in ("marina", "off"):
        param = Parameter(torch.zeros(50, 40))
        options = {"error_feedback": "marina"} if mode == "marina" else {"error_feedback": False}
        optimizer = MANGO([param], lr=0.1, rule="sgd", momentum=0.0, policy=COARSE, memory_budget="1MiB", residual_bits=bits,
                          seed=seed, **options)  # fmt: skip
        squared[mode] = 0.0
        for _ in range(60):
            true = a.T @ (a @ param.detach() - b) / 100
            param.grad = true.clone()
            optimizer.steps += 1
            work = optimizer.compress_gradients()
            squared[mode] += float((work[0].gradient - true).square().sum())
            optimizer.update_parameters(work)
    assert squared["marina"] < 0.5 * squared["off"]


def test_a15_momentum_correction_is_dgc_s_recursion_and_the_rule_has_no_momentum_after_it() -> None:
    """u = 0.9 u + g, v = v + u, C(v) moves the parameter as it is; what was sent starts again (Lin et al. 2018, sec. 3)."""
    param, optimizer = make(SPARSE, rule="sgd", residual_bits=32, momentum_correction=True)
    u, v, expected = torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE)
    for step, applied in enumerate(run(param, optimizer, range(15))):
        u = 0.9 * u + gradient(step)
        sent = coded(v + u)
        v, u = v + u - sent, u.masked_fill(sent != 0, 0.0)
        expected -= 1e-3 * sent
        assert torch.allclose(applied, sent, atol=1e-5)
    assert torch.allclose(param.detach(), expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["adamw", "lion", "muon"])
def test_a15_with_correction_a_first_moment_is_what_was_applied(rule: str) -> None:
    """So it may be left out: without one the parameter moves alike, for 4 bytes per parameter less."""
    kept, bare = SPARSE, CompressionConfig(sparsity=0.9, momentum_bits=0)
    moved = []
    for config in (kept, bare):
        param, optimizer = make(config, rule=rule, momentum_correction=True)
        run(param, optimizer, range(10))
        moved.append((param.detach().clone(), state_of(optimizer).nbytes))
    assert torch.allclose(moved[0][0], moved[1][0], rtol=1e-4, atol=1e-7) and moved[0][1] - moved[1][1] == 4 * 2000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rule", "lr"), [("sgd", 0.1), ("adamw", 0.03)])
def test_a15_at_99_percent_sparsity_correction_beats_none(rule: str, lr: float, seed: int) -> None:
    """Least squares with a decaying spectrum, batches of 32, one entry in a hundred sent: relative loss after 400 steps."""
    losses = {}
    for corrected in (True, False):
        generator = Generator().manual_seed(seed)
        a = torch.randn(400, 400, generator=generator) * torch.arange(1, 401).float().rsqrt()
        b, x = a @ torch.randn(400, generator=generator), Parameter(torch.zeros(400))
        optimizer = MANGO([x], lr=lr, rule=rule, policy=CompressionConfig(sparsity=0.99), min_numel=1, memory_budget="1MiB",
                          error_feedback=corrected, momentum_correction=corrected)  # fmt: skip
        for _ in range(400):
            batch = torch.randint(0, 400, (32,), generator=generator)
            x.grad = a[batch].T @ (a[batch] @ x.detach() - b[batch]) / 32
            optimizer.step()
        losses[corrected] = float((a @ x.detach() - b).square().mean() / b.square().mean())
    assert losses[True] < 0.3 * losses[False]                # measured: 0.014 against 0.31 (sgd), 0.026 against 0.27 (adamw)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [5, 8])
def test_a26_every_mode_resumes_bit_for_bit(mode: str, stop: int) -> None:
    param, optimizer = make(SPARSE, **MODES[mode])
    for step in range(stop):
        param.grad = gradient(step)
        optimizer.step()
    saved = io.BytesIO()
    torch.save({"model": param.detach(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    again, resumed = make(SPARSE, **MODES[mode])
    again.data.copy_(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    assert resumed.state_bytes() == optimizer.state_bytes()
    for step in range(stop, 12):
        for p, o in ((param, optimizer), (again, resumed)):
            p.grad = gradient(step)
            o.step()
        assert torch.equal(param, again)
    twin = copy.deepcopy(optimizer)
    assert twin.state_bytes() == optimizer.state_bytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("other", MODES)
def test_a_state_of_one_mode_loads_under_another(mode: str, other: str) -> None:
    """What the other keeps too survives, the rest starts from zeros, and the bytes are the other's."""
    param, optimizer = make(SPARSE, **MODES[mode])
    run(param, optimizer, range(5))
    again, loaded = make(SPARSE, **MODES[other])
    loaded.load_state_dict(optimizer.state_dict())
    state = state_of(loaded)
    assert state.nbytes == predicted_bytes(SHAPE, SPARSE, loaded.options)
    for slot in set(state.encoded) & set(state_of(optimizer).encoded):
        assert torch.equal(state.encoded[slot].decode(), state_of(optimizer).encoded[slot].decode())
    run(again, loaded, range(5, 8))
    assert again.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_survives_another_config_that_needs_it_too(mode: str) -> None:
    param, optimizer = make(SPARSE, residual_bits=32, **MODES[mode])
    run(param, optimizer, range(5))
    state = state_of(optimizer)
    kept = {slot: state.encoded[slot].decode().clone() for slot in set(state.encoded) - {"exp_avg", "exp_avg_sq"}}
    optimizer.apply(CompressionConfig(gradient_bits=4, sparsity=0.5, momentum_bits=8, variance_bits=8))
    assert len(kept) == KEPT[mode] and all(torch.equal(state.encoded[slot].decode(), dense) for slot, dense in kept.items())
    run(param, optimizer, range(5, 8))
    assert param.isfinite().all() and state.nbytes == predicted_bytes(SHAPE, state.config, optimizer.options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [8, 4])
def test_a16_the_budget_holds_at_every_instant_in_every_mode(mode: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured after every encoding: while errors are stored, while random configs come and go."""
    param = Parameter(torch.zeros(SHAPE))
    optimizer = MANGO([param], policy="hold", memory_budget=0.7, residual_bits=bits, **MODES[mode])
    peak, count, chance = 0, 0, Generator().manual_seed(0)

    def measured(codec: Codec, x: Tensor, key: int | None = None) -> Encoded:
        nonlocal peak, count
        stored = encode(codec, x, key)
        peak, count = max(peak, optimizer.state_bytes()), count + 1
        return stored

    monkeypatch.setattr("mango.state.encode", measured)
    for step in range(60):
        param.grad = gradient(step)
        optimizer.step()
        if step % 2:
            optimizer.apply(random_action(1, chance))
        assert optimizer.state_bytes() <= optimizer.planned_bytes() <= optimizer.memory_budget
    assert count > 60 and peak <= optimizer.memory_budget and param.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_zero_gradients_of_any_mode_move_nothing(mode: str) -> None:
    param, optimizer = make(CompressionConfig(gradient_bits=2, sparsity=0.99), **MODES[mode])
    for _ in range(5):
        param.grad = torch.zeros(SHAPE)
        optimizer.step()
    assert (param == 0).all()


@pytest.mark.parametrize(
    ("bad", "says"),
    [({"error_feedback": "ef22"}, "is none of False, True, 'ef21', 'marina'"),
     ({"error_feedback": None}, "is none of"),
     ({"feedback_threshold": -1.0}, ">= 0"),
     ({"feedback_threshold": math.nan}, ">= 0"),
     ({"exact_every": 0}, "exact_every=0"),
     ({"residual_bits": 5}, "residual_bits=5 is not on the menu"),
     ({"error_feedback": False, "momentum_correction": True}, "need error_feedback=True"),
     ({"error_feedback": "ef21", "feedback_threshold": 0.5}, "need error_feedback=True"),
     ({"feedback_threshold": 0.5, "momentum_correction": True}, "give no feedback_threshold"),
     ({"error_feedback": "ef21", "release_gradients": True}, "release_gradients"),
     ({"error_feedback": "marina", "release_gradients": True}, "release_gradients"),
     ({"momentum_correction": True, "release_gradients": True}, "release_gradients")],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused_in_words(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(COARSE, **bad)


def test_every_mode_has_its_slots_at_the_residual_s_bits() -> None:
    for mode, slots in FEEDBACK.items():
        options = StorageOptions(error_feedback=mode, residual_bits=4)
        extra = predicted_bytes(SHAPE, COARSE, options) - 8 * 2000
        assert extra == len(slots) * SIGNED[4].nbytes(SHAPE)


class Importance(GradientCompressor):
    """Looks at what it is given."""

    def __init__(self) -> None:
        self.scores: list[Tensor | None] = []

    def compress(
        self, tensor: Tensor, bits: int, sparsity_ratio: float, importance_scores: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.scores.append(importance_scores)
        return super().compress(tensor, bits, sparsity_ratio, importance_scores)


class Plain:
    """The published protocol, without importance."""

    def compress(self, tensor: Tensor, bits: int, sparsity_ratio: float) -> tuple[Tensor, Tensor]:
        return GradientCompressor().compress(tensor, bits, sparsity_ratio)


def test_a12_a_compressor_that_asks_for_importance_gets_the_root_mean_square_of_past_gradients() -> None:
    """It changes which entries survive: those that mattered so far are sent before those of equal size that did not."""
    asks, plain = Importance(), Plain()
    survivors = []
    for compressor in (asks, plain):
        param, optimizer = make(CompressionConfig(sparsity=0.9), error_feedback=False, compressor=compressor)
        param.grad = gradient(0).abs() + 1
        param.grad[:20] *= 10                                                  # the upper half mattered at first
        optimizer.step()
        param.grad = gradient(1).sign()
        survivors.append(optimizer.compress_gradients()[0].gradient != 0)
    assert asks.scores[0] is None and asks.scores[1] is not None
    state = TensorState(SHAPE, FULL, StorageOptions())
    state.create(torch.device("cpu"))
    assert int(survivors[0].sum()) == int(survivors[1].sum()) == 200
    scores = asks.scores[1]
    assert scores.shape == SHAPE and (scores > 0).sum() == 200                 # v of what was applied
    assert torch.equal(survivors[0], scores > 0) and not torch.equal(survivors[0], survivors[1])


@pytest.mark.parametrize("rule", ["sgd", "lion"])
def test_a12_where_the_rule_keeps_no_second_moment_there_is_no_importance(rule: str) -> None:
    asks = Importance()
    param, optimizer = make(SPARSE, compressor=asks, rule=rule)
    run(param, optimizer, range(3))
    assert asks.scores == [None] * 3


@pytest.mark.parametrize(("bits", "sparsity", "kept"), [(6, 0, 375), (4, 0, 250), (2, 0, 125), (4, 0.5, 250), (2, 0.99, 20)])
def test_a11_the_extreme_mode_of_the_published_compressor_in_the_optimizer(bits: int, sparsity: float, kept: int) -> None:
    param, optimizer = make(CompressionConfig(gradient_bits=bits, sparsity=sparsity), compressor=GradientCompressor())
    for applied in run(param, optimizer, range(4)):
        assert int((applied != 0).sum()) == kept == min(int(2000 * bits / 32), 2000 - int(2000 * sparsity))


def test_compress_gradient_works_alone() -> None:
    state = TensorState((8, 8), SPARSE, StorageOptions(residual_bits=32))
    state.create(torch.device("cpu"))
    hyper = Hyper(1e-3, (0.9, 0.999), 1e-8, 0.0, 0.9)
    g = gradient(0, (8, 8))
    assert torch.equal(state.compress_gradient(g, 0, hyper) + state.encoded["residual"].decode(), g)
