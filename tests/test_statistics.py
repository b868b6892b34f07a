"""The statistics that policies see, against slow and obvious references on the same gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.features import FEATURE_INDEX, FEATURES, KINDS
from mango.statistics import GradientStatistics, sample_stride


def make(shapes: list[tuple[int, ...]], freq: int = 10, **options: Any) -> tuple[list[Parameter], MANGO]:
    params = [Parameter(torch.zeros(shape)) for shape in shapes]
    return params, MANGO(params, policy_update_freq=freq, min_numel=1, **({"policy": "hold"} | options))


def feed(params: list[Parameter], optimizer: MANGO, gradients: list[Tensor]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()
    optimizer.step()


def column(optimizer: MANGO, name: str) -> Tensor:
    return optimizer.observe()[:, FEATURE_INDEX[name]]


def draws(shape: tuple[int, ...], count: int, seed: int = 0, mean: float = 0.3) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) + mean


def test_b1_gradient_norm_of_every_tensor() -> None:
    shapes: list[tuple[int, ...]] = [(30, 20), (16,), (4, 3, 2, 2)]
    params, optimizer = make(shapes)
    gradients = [draws(shape, 1, i)[0] for i, shape in enumerate(shapes)]
    feed(params, optimizer, gradients)
    norms = torch.stack([g.norm() for g in gradients])
    assert torch.allclose(optimizer.statistics.norm, norms, rtol=1e-6)
    assert torch.allclose(column(optimizer, "grad_norm"), norms.log10(), atol=1e-5)
    rms = norms / torch.tensor([g.numel() for g in gradients]).sqrt()
    assert torch.allclose(column(optimizer, "grad_rms"), rms.log10(), atol=1e-5)


@pytest.mark.parametrize("window", [2, 7, 10])
def test_b2_gradient_variance_is_of_the_gradients_not_of_their_norms(window: int) -> None:
    """All of a small tensor is sampled, so the streamed variance is exact."""
    params, optimizer = make([(4, 4)])
    series = draws((4, 4), window) * 1e-3
    series = series / series.flatten(1).norm(dim=1)[:, None, None]  # equal norms: their variance is zero
    for gradient in series:
        feed(params, optimizer, [gradient])
    expected = series.flatten(1).var(0).mean()
    assert torch.allclose(optimizer.statistics.variance(), expected[None], rtol=1e-5)
    if window < 10:
        assert torch.allclose(column(optimizer, "grad_variance"), expected.log10(), atol=1e-5)


def test_b2_variance_of_a_big_tensor_is_estimated_on_spread_samples() -> None:
    """256 of 65,536 entries: the mean of chi-square variances is within 6 standard errors, sqrt(2 / (256 * 9)) each."""
    params, optimizer = make([(256, 256)])
    for gradient in draws((256, 256), 10):
        feed(params, optimizer, [gradient])
    assert abs(float(optimizer.statistics.variance()) - 1) < 6 * math.sqrt(2 / (256 * 9))


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (100, 1000), (1, 4096), (3, 70000), (513, 64)])
def test_samples_reach_all_columns_and_the_whole_tensor(rows: int, columns: int) -> None:
    stride, count = sample_stride(rows * columns, columns)
    places = torch.arange(count) * stride
    assert 16 <= count <= 256 and places.max() < rows * columns and places.max() > 0.5 * rows * columns
    assert len((places % columns).unique()) >= min(count, columns) // 2  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("config", [CompressionConfig(), CompressionConfig(momentum_bits=16, variance_bits=16)])
def test_b3_momentum_alignment_is_the_cosine(config: CompressionConfig) -> None:
    params, optimizer = make([(20, 30)], freq=5, policy=config)
    series = draws((20, 30), 5)
    for gradient in series:
        feed(params, optimizer, [gradient])
    exp_avg = torch.zeros(20, 30)
    for gradient in series:
        exp_avg.lerp_(gradient, 0.1)
    expected = torch.nn.functional.cosine_similarity(exp_avg.flatten(), series[-1].flatten(), dim=0)
    tolerance = 1e-5 if config.momentum_bits == 32 else 2.0**-8  # bfloat16 moments before the last step
    assert abs(float(column(optimizer, "momentum_alignment")) - float(expected)) < tolerance


def test_b4_curvature_on_a_quadratic_matches_the_analytic_value() -> None:
    """f = c/2 |x|^2: the change over the squared distance, from the two last positions, in closed form."""
    c = 3.0
    x = Parameter(torch.linspace(1, 2, 20))
    optimizer = MANGO([x], lr=0.01, policy="hold", policy_update_freq=4, min_numel=1)
    path, losses = [], []
    for _ in range(4):

        def closure() -> float:
            optimizer.zero_grad()
            loss = c / 2 * x.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        path.append(x.detach().clone())
        losses.append(optimizer.step(closure))
    expected = (losses[3] - losses[2]) / float((path[3] - path[2]).square().sum())
    found = float(column(optimizer, "curvature"))
    assert found == pytest.approx(math.copysign(math.log10(1 + abs(expected)), expected), rel=1e-4)
    along = c / 2 * float((path[3] + path[2]) @ (path[3] - path[2])) / float((path[3] - path[2]).square().sum())
    assert expected == pytest.approx(along, rel=1e-3)


def test_b5_progress_is_the_true_fraction_of_training() -> None:
    params, optimizer = make([(4, 4)], freq=250, total_steps=500)
    seen = []
    optimizer.register_decision_hook(lambda decision: seen.append(float(decision.observation[0, FEATURE_INDEX["progress"]])))
    for gradient in draws((4, 4), 500):
        feed(params, optimizer, [gradient])
    assert seen == [0.5, 1.0]
    assert float(column(make([(4, 4)])[1], "progress")) == 0.0  # unknown length


def test_b6_depth_count_and_kind_are_in_the_observation() -> None:
    names = ["conv.weight", "wte.weight", "norm.weight", "fc.weight"]  # the last matrix is the head
    shapes = [(8, 4, 3, 3), (50, 8), (32,), (16, 8)]
    params = [Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = MANGO(zip(names, params, strict=True), min_numel=1)
    table = optimizer.observe()
    one_hot = table[:, [FEATURE_INDEX[f"kind_{kind}"] for kind in KINDS]]
    assert [KINDS[int(i)] for i in one_hot.argmax(1)] == ["conv", "embedding", "norm", "head"] and (one_hot.sum(1) == 1).all()
    assert torch.allclose(table[:, FEATURE_INDEX["depth"]], torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert torch.allclose(10 ** table[:, FEATURE_INDEX["numel"]], torch.tensor([p.numel() for p in params]).float(), rtol=1e-5)
    assert [layer.name for layer in optimizer.layers] == names


def test_b9_importance_peaks_at_one_and_orders_by_gradient_norm() -> None:
    params, optimizer = make([(8, 8)] * 4)
    feed(params, optimizer, [torch.ones(8, 8) * scale for scale in (0.1, 3.0, 0.0, 1.0)])
    importance = column(optimizer, "importance")
    assert importance.max() == 1 and importance.min() >= 0 and importance.argsort().tolist() == [2, 0, 3, 1]


def test_b10_running_norms_match_the_closed_form() -> None:
    params, optimizer = make([(8, 8)])
    series = draws((8, 8), 60)
    for gradient in series:
        feed(params, optimizer, [gradient])
    norms = series.flatten(1).norm(dim=1).double()
    weights = 0.01 * 0.99 ** torch.arange(59, -1, -1).double()
    assert float(optimizer.statistics.running_norm) == pytest.approx(float((weights * norms).sum()), rel=1e-5)
    corrected = float((weights * norms).sum() / weights.sum())
    assert float(column(optimizer, "grad_trend")) == pytest.approx(math.log(float(norms[-1]) / corrected), abs=1e-4)


def test_b15_statistics_take_the_same_bytes_after_a_thousand_steps() -> None:
    params, optimizer = make([(16, 16), (40,)], freq=50)
    assert optimizer.statistics.nbytes == GradientStatistics.predicted_bytes(optimizer.layers)
    feed(params, optimizer, [draws((16, 16), 1)[0], draws((40,), 1)[0]])
    statistics, total = optimizer.statistics.nbytes, optimizer.state_bytes()
    gradients = [[draws((16, 16), 1, i)[0], draws((40,), 1, i)[0]] for i in range(7)]
    for step in range(1000):
        feed(params, optimizer, gradients[step % 7])
    assert optimizer.statistics.nbytes == statistics and optimizer.state_bytes() == total
    held = optimizer.statistics.__dict__
    assert not held["_taken"] and not held["_pending"]  # nothing dense is kept between steps


def test_successive_cosines_and_noise_scale_match_their_definitions() -> None:
    params, optimizer = make([(4, 4)], freq=8)
    series = draws((4, 4), 16)
    for gradient in series[:15]:
        feed(params, optimizer, [gradient])
    flat = series[:15].flatten(1)
    cosines = torch.nn.functional.cosine_similarity(flat[7:14], flat[8:15])  # the window began with the 9th gradient
    assert float(column(optimizer, "grad_cosine")) == pytest.approx(float(cosines.mean()), abs=1e-5)
    window = flat[8:]
    variance, mean_square = window.var(0).mean(), window.mean(0).square().mean()
    signal = mean_square - variance / len(window)
    assert float(column(optimizer, "noise_scale")) == pytest.approx(float((variance / signal).log10()), abs=1e-4)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e12])
def test_cosines_do_not_depend_on_the_scale(scale: float) -> None:
    params, optimizer = make([(32, 32)], freq=4)
    for _ in range(4):
        feed(params, optimizer, [torch.ones(32, 32) * scale])
    assert float(column(optimizer, "grad_cosine")) == pytest.approx(1, abs=1e-5)


def test_log_normal_fit_of_gradient_magnitudes() -> None:
    params, optimizer = make([(64, 64)], freq=1)
    logs = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 5
    feed(params, optimizer, [logs.exp() * torch.where(logs > -5, 1.0, -1.0)])
    assert float(column(optimizer, "log_abs_mean")) == pytest.approx(float(logs.mean()), abs=1e-4)
    assert float(column(optimizer, "log_abs_std")) == pytest.approx(float(logs.std()), abs=1e-3)


def test_stable_rank_and_rank_errors_of_known_matrices() -> None:
    params, optimizer = make([(64, 64), (64, 64)], freq=1)
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(64, 1, generator=generator) @ torch.randn(1, 64, generator=generator)
    feed(params, optimizer, [one, torch.eye(64)])
    assert column(optimizer, "error_rank_1")[0] < 1e-2 and column(optimizer, "error_rank_8")[0] < 1e-2
    assert float(column(optimizer, "error_rank_1")[1]) == pytest.approx(math.sqrt(63 / 64), abs=0.01)
    assert column(optimizer, "stable_rank")[0] < 0.05 and column(optimizer, "stable_rank")[1] > 0.9


def test_format_errors_fall_with_bits_and_were_measured() -> None:
    params, optimizer = make([(64, 64)], freq=20)
    for gradient in draws((64, 64), 20):
        feed(params, optimizer, [gradient])
    errors = [float(column(optimizer, f"error_momentum_{bits}")) for bits in (8, 4, 2)]
    assert errors == sorted(errors) and -3 < errors[0] < -1.5 and -1.5 < errors[1] < -0.6 and -0.6 < errors[2] < 0.3
    assert column(optimizer, "error_variance_8") < column(optimizer, "error_variance_4")


def test_the_error_in_force_is_that_of_storing() -> None:
    """At full precision nothing is lost; at lower bits more is."""
    found = []
    for config in (
        CompressionConfig(),
        CompressionConfig(momentum_bits=8, variance_bits=8),
        CompressionConfig(momentum_bits=2, variance_bits=0),
    ):
        params, optimizer = make([(64, 64)], freq=10, policy=config)
        for gradient in draws((64, 64), 10):
            feed(params, optimizer, [gradient])
        found.append(float(optimizer.layer_errors()))
    assert found[0] == 0 and 0 < found[1] < 0.05 < found[2] < 2


def test_maximising_has_the_same_compression_error_as_minimising() -> None:
    errors = []
    for maximize in (False, True):
        params, optimizer = make([(64, 64)], freq=5, policy=CompressionConfig(gradient_bits=8), maximize=maximize)
        for gradient in draws((64, 64), 5):
            feed(params, optimizer, [-gradient if maximize else gradient])
        errors.append(float(optimizer.layer_errors()))
    assert errors[0] == pytest.approx(errors[1]) and errors[0] < 0.1


EXTREMES: dict[str, Tensor] = {
    "zeros": torch.zeros(40, 40),
    "tiny": torch.full((40, 40), 1e-38),
    "huge": torch.full((40, 40), 1e16),
    "one entry": torch.eye(40)[:1].T @ torch.eye(40)[:1] * 1e5,
    "nan": torch.full((40, 40), torch.nan),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("loss", [0.0, -3.0, 1e30, math.nan, math.inf])
def test_observations_are_finite_and_within_their_ranges_from_the_start(name: str, loss: float) -> None:
    params, optimizer = make([(40, 40), (7,)], freq=3, memory_budget=0.6, policy=None, total_steps=5)
    low, high = torch.tensor([f.low for f in FEATURES]), torch.tensor([f.high for f in FEATURES])

    def check() -> None:
        table = optimizer.observe()
        assert table.shape == (2, 64) and table.dtype == torch.float32 and table.device.type == "cpu"
        assert table.isfinite().all() and (table >= low).all() and (table <= high).all()

    check()
    for _ in range(7):
        optimizer.observe_loss(loss)
        feed(params, optimizer, [EXTREMES[name], torch.ones(7)])
        check()


def test_a_layer_without_gradients_is_left_out_and_does_not_disturb_others() -> None:
    params, optimizer = make([(4, 4), (4, 4)], freq=10)
    series = draws((4, 4), 6)
    for gradient in series:
        params[0].grad, params[1].grad = gradient.clone(), None
        optimizer.step()
    assert torch.allclose(optimizer.statistics.variance()[0], series.flatten(1).var(0).mean(), rtol=1e-5)
    assert optimizer.statistics.norm[1] == 0 and optimizer.statistics.running_norm[1] == 0
