"""Every base rule moves as its reference does: torch's own optimizers where there is one, the paper's algorithm otherwise."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.config import FULL
from mango.rules import NOT_FOR_MUON, Hyper, check_hyper, muon_pace, orthogonal, rule_for
from tests.rungs import M2V0, M4V0, M4V4, M8V8

SHAPES: list[tuple[int, ...]] = [(40, 48), (96, 16), (8, 6, 5, 5), (1300,), (12,)]
RULES = ("adamw", "adam", "sgd", "lion", "muon")
COMPRESSED = [M8V8, M4V4, M4V0, M2V0, CompressionConfig(momentum_bits=6, variance_bits=8)]


def params_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def feed(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1 + step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def follow(mine: list[Parameter], one: MANGO, theirs: list[Parameter], other: torch.optim.Optimizer, tolerance: float) -> None:
    """Thirty steps side by side, with one gradient that is zero and one that is tiny among them."""
    for step in range(30):
        scale = {7: 0.0, 11: 1e-9}.get(step, 1.0)
        feed(mine, step, scale)
        feed(theirs, step, scale)
        one.step()
        other.step()
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).abs().max() <= tolerance, step


@pytest.mark.parametrize("momentum", [0.9, 0.0, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_is_torch_s(momentum: float, weight_decay: float, maximize: bool) -> None:
    mine, theirs = params_of(SHAPES), params_of(SHAPES)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": weight_decay, "maximize": maximize}
    one = MANGO(mine, rule="sgd", momentum=momentum, policy=FULL, **options)
    follow(mine, one, theirs, torch.optim.SGD(theirs, momentum=momentum, **options), 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.95, 0.5)])
@pytest.mark.parametrize(("rule", "reference"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_are_torch_s(weight_decay: float, betas: tuple[float, float], rule: str, reference: Any) -> None:
    mine, theirs = params_of(SHAPES), params_of(SHAPES)
    options: dict[str, Any] = {"lr": 3e-3, "weight_decay": weight_decay, "betas": betas}
    follow(mine, MANGO(mine, rule=rule, policy=FULL, **options), theirs, reference(theirs, foreach=False, **options), 1e-6)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2, word for word."""

    def __init__(self, params: list[Parameter], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = beta1 * m + (1 - beta1) * p.grad
                p.sub_(group["lr"] * (torch.sign(c) + group["weight_decay"] * p))
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.5)])
def test_lion_is_the_paper_s(weight_decay: float, betas: tuple[float, float]) -> None:
    mine, theirs = params_of(SHAPES), params_of(SHAPES)
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": weight_decay, "betas": betas}
    one = MANGO(mine, rule="lion", policy=FULL, **options)
    follow(mine, one, theirs, Lion(theirs, **options), 30 * 2.0**-23 * 4)  # of entries below 4, the last bit in every step


@pytest.mark.parametrize("shape", [(40, 48), (96, 16), (64, 64)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_torch_s_with_the_size_of_adamw_s_updates(shape: tuple[int, int], weight_decay: float) -> None:
    """Both orthogonalise in bfloat16, and scale the matrix differently before: an entry of an update (0.2 rms in learning
    rates, a few times that at most) differs by some units of 2^-8 of it, and 30 of them add up like a random walk."""
    mine, theirs = params_of([shape]), params_of([shape])
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": weight_decay, "momentum": 0.95}
    one = MANGO(mine, rule="muon", policy=FULL, **options)
    other = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(30):
        feed(mine, step)
        feed(theirs, step)
        before = [p.detach().clone() for p in (mine[0], theirs[0])]
        one.step()
        other.step()  # type: ignore[no-untyped-call]
        moves = [p.detach() - b for p, b in zip((mine[0], theirs[0]), before, strict=True)]
        assert (moves[0] - moves[1]).norm() < 0.03 * moves[1].norm()
    assert (mine[0] - theirs[0]).norm() < 0.03 * (theirs[0] - params_of([shape])[0]).norm()


@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (50, 50)])
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e20])
def test_orthogonal_matrices_have_singular_values_about_one_at_any_scale(shape: tuple[int, int], scale: float) -> None:
    """Newton-Schulz with these coefficients settles between 0.7 and 1.2 (Jordan et al. 2024), for values that are not lost."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix * scale))
    known = torch.linalg.svdvals(matrix)
    assert float(values.max()) < 1.3 and (values[known > 0.1 * known.max()] > 0.6).all()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert float((u.T @ orthogonal(matrix * scale) @ v.T).diagonal().min()) > 0.3 or min(shape) == max(shape)
    assert not orthogonal(torch.zeros(shape)).any()


def test_muon_kernels_are_matrices_of_their_rows() -> None:
    mine, flat = params_of([(8, 6, 5, 5)]), params_of([(8, 150)])
    with torch.no_grad():
        flat[0].copy_(mine[0].view(8, 150))
    one, other = MANGO(mine, rule="muon", policy=FULL), MANGO(flat, rule="muon", policy=FULL)
    for step in range(3):
        feed(mine, step)
        assert mine[0].grad is not None
        flat[0].grad = mine[0].grad.view(8, 150).clone()
        one.step()
        other.step()
    assert torch.equal(mine[0].view(8, 150), flat[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("config", [FULL, *COMPRESSED], ids=lambda c: c.name)
def test_a_zero_gradient_moves_nothing_at_first_and_keeps_all_finite(rule: str, config: CompressionConfig) -> None:
    params = params_of(SHAPES)
    before = [p.detach().clone() for p in params]
    optimizer = MANGO(params, rule=rule, policy=config)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    feed(params, 0)
    optimizer.step()
    assert all(p.isfinite().all() and not torch.equal(a, p) for a, p in zip(before, params, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("config", [FULL, *COMPRESSED], ids=lambda c: c.name)
@pytest.mark.parametrize("scale", [1e-9, 1e3])
def test_updates_at_any_scale_of_gradients_are_those_at_scale_one(rule: str, config: CompressionConfig, scale: float) -> None:
    """SGD's in proportion; eps scales along with Adam's. A power of two keeps every code, and hence every update."""
    factor = 2.0 ** round(math.log2(scale))
    moved = []
    for by in (1.0, factor):
        params = [Parameter(torch.zeros(48, 40))]
        optimizer = MANGO(params, rule=rule, policy=config, eps=1e-8 * by, lr=0.01 / (by if rule == "sgd" else 1.0))
        for step in range(20):
            feed(params, step, by)
            optimizer.step()
        moved.append(params[0].detach())
    cosine = nn.functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0)
    exact = config.variance_bits != 4 and rule != "muon"     # logarithms and bfloat16 matrix products round anew
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < (1e-5 if exact else 0.03)
    assert float(cosine) > 0.999


@pytest.mark.parametrize("rule", RULES)
def test_compressed_moments_follow_full_ones(rule: str) -> None:
    """At 8 bits within a few per cent of the whole way; Lion's signs flip where its interpolation is about zero."""
    ends = []
    for config in (FULL, M8V8):
        params = [Parameter(torch.zeros(48, 40))]
        optimizer = MANGO(params, rule=rule, policy=config, lr=0.01)
        for step in range(40):
            feed(params, step)
            optimizer.step()
        ends.append(params[0].detach())
    assert (ends[0] - ends[1]).norm() < (0.1 if rule == "lion" else 0.05) * ends[0].norm()


def test_a_group_may_have_its_own_rule() -> None:
    shapes: list[tuple[int, ...]] = [(40, 48), (1300,)]
    mine, theirs = params_of(shapes), params_of(shapes)
    groups = [{"params": mine[:1], "rule": "sgd", "lr": 0.1, "momentum": 0.5}, {"params": mine[1:], "rule": "lion", "lr": 1e-3}]
    one = MANGO(groups, policy=FULL)
    references = [torch.optim.SGD(theirs[:1], lr=0.1, momentum=0.5), Lion(theirs[1:], 1e-3, (0.9, 0.999), 0.0)]
    for step in range(10):
        feed(mine, step)
        feed(theirs, step)
        one.step()
        for reference in references:
            reference.step()
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(mine, theirs, strict=True))
    assert [layer.rule for layer in one.layers] == ["sgd", "lion"]
    assert all("exp_avg_sq" not in one.state[p]["tensor"].encoded for p in mine)


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    named: dict[str, tuple[int, ...]] = {
        "embed.weight": (50, 40), "layers.0.fc.weight": (40, 40), "layers.0.norm.weight": (1200,), "layers.0.fc.bias": (40,),
        "layers.1.conv.weight": (8, 8, 5, 5), "head.weight": (30, 40),
    }  # fmt: skip
    params = {name: Parameter(torch.randn(shape)) for name, shape in named.items()}
    optimizer = MANGO(list(params.items()), rule="muon", policy=FULL)
    rules = {target.name: target.rule for target in optimizer.targets}
    assert rules == {
        "embed.weight": "adamw", "layers.0.fc.weight": "muon", "layers.0.norm.weight": "adamw", "layers.0.fc.bias": "adamw",
        "layers.1.conv.weight": "muon", "head.weight": "adamw",
    }  # fmt: skip
    feed(list(params.values()), 0)
    optimizer.step()
    for name, param in params.items():
        assert ("exp_avg_sq" in optimizer.state[param]["tensor"].encoded) == (rules[name] == "adamw")


def test_which_rule_a_tensor_gets() -> None:
    for rule in RULES:
        if rule != "muon":
            assert rule_for(rule, (40, 40), "linear") == rule_for(rule, (3,), "norm") == rule
    assert rule_for("muon", (40, 40), "linear") == rule_for("muon", (4, 4, 3, 3), "conv") == "muon"
    assert rule_for("muon", (40,), "linear") == rule_for("muon", (), "other") == "adamw"
    assert all(rule_for("muon", (40, 40), kind) == "adamw" for kind in NOT_FOR_MUON)


@pytest.mark.parametrize("bad", [{"rule": "adagrad"}, {"momentum": 1.0}, {"momentum": -0.1}], ids=str)
def test_unknown_rules_and_momenta_out_of_range_are_refused_in_words(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        MANGO([Parameter(torch.zeros(3))], **bad)
    optimizer = MANGO([Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=next(iter(bad))):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(3))], **bad})


def test_momentum_is_the_rule_s_own_unless_given() -> None:
    group = MANGO([Parameter(torch.zeros(3))], lr=torch.tensor(0.5), rule="sgd").param_groups[0]
    check_hyper(group)
    assert [Hyper.of(group, rule).momentum for rule in ("sgd", "muon")] == [0.9, 0.9]
    assert Hyper.of(group | {"momentum": 0.0}, "sgd").momentum == 0.0 and Hyper.of(group, "adamw").lr == 0.5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("config", [FULL, *COMPRESSED], ids=lambda c: c.name)
def test_every_rule_trains_at_every_precision(rule: str, config: CompressionConfig) -> None:
    """A least-squares problem: a third of the loss is gone after 60 steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 40, generator=generator)
    y = x @ torch.randn(40, 40, generator=generator) / 6

    def loss_of(weight: Tensor) -> Tensor:
        return (x @ weight - y).square().mean()

    weight = Parameter(torch.zeros(40, 40))
    optimizer = MANGO([weight], rule=rule, policy=config, lr={"sgd": 1.0, "lion": 3e-3}.get(rule, 1e-2))
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(weight).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(loss_of(weight.detach())) < 0.66 * float(y.square().mean())


def moved_by(config: CompressionConfig, steps: int = 1, **options: Any) -> list[Tensor]:
    """The updates of one matrix under Muon."""
    params, found = params_of([(48, 64)]), []
    optimizer = MANGO(params, lr=0.01, rule="muon", policy=config, error_feedback=False, **options)
    for step in range(steps):
        before = params[0].detach().clone()
        feed(params, step)
        optimizer.step()
        found.append(params[0].detach() - before)
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("bits", [0, 2, 4, 8])
def test_muons_rate_follows_its_format(momentum: float, bits: int) -> None:
    config = CompressionConfig(momentum_bits=bits, variance_bits=0)
    (paced,), (plain,) = (moved_by(config, momentum=momentum, match_lr=matched) for matched in (True, False))
    torch.testing.assert_close(paced, muon_pace(momentum, bits) * plain, atol=1e-6, rtol=1e-4)


def test_the_rate_stays_where_nothing_of_the_direction_was_lost() -> None:
    for config in (FULL, CompressionConfig(momentum_bits=16), CompressionConfig(rank=4)):
        for paced, plain in zip(moved_by(config, 3), moved_by(config, 3, match_lr=False), strict=True):
            assert torch.equal(paced, plain)
    start, still = params_of([(48, 64)])[0], CompressionConfig(momentum_bits=0)
    decayed = (moved_by(still, match_lr=matched, weight_decay=0.5)[0] for matched in (True, False))
    paced, plain = (one + 0.005 * start.detach() for one in decayed)               # decay goes by the rate, not by the pace
    torch.testing.assert_close(paced, muon_pace(0.9, 0) * plain, atol=1e-6, rtol=1e-4)


def test_a_paced_update_goes_about_as_far_as_full_precision_where_gradients_are_noisy() -> None:
    """A fixed direction under noise fifteen times its norm: without a moment Muon falls far behind, with its pace less so."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(32, 2, generator=generator) @ torch.randn(2, 48, generator=generator)
    signal /= signal.norm()
    noises = [torch.randn(32, 48, generator=generator) * 15 / math.sqrt(32 * 48) for _ in range(200)]

    def way(config: CompressionConfig, **options: Any) -> float:
        param = Parameter(torch.zeros(32, 48))
        optimizer = MANGO([param], lr=0.01, rule="muon", policy=config, error_feedback=False, **options)
        for noisy in noises:
            param.grad = -(signal + noisy)
            optimizer.step()
        return float((param.detach() * signal).sum())

    none = CompressionConfig(momentum_bits=0)
    full, plain, paced = way(FULL), way(none, match_lr=False), way(none)
    assert plain < 0.5 * full and 1.8 * plain < paced < 1.1 * full
