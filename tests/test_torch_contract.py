"""MANGO is a torch optimizer: groups, schedulers, closures, hooks, dtypes and layouts work as users of torch expect."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.config import FULL
from tests.rungs import M2V0, M8V8, R8

CONFIGS = [FULL, M8V8, R8, M2V0]


def params_of(*shapes: tuple[int, ...], seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def feed(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def same(one: list[Parameter], other: list[Parameter], tolerance: float = 0.0) -> bool:
    return all((a.float() - b.float()).abs().max() <= tolerance for a, b in zip(one, other, strict=True))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    loss: Tensor = (model(x) - x[:, :4].square()).square().mean()
    return loss


def held_out(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(loss_of(model, 1000 + i).item() for i in range(20)) / 20


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_a1_groups_with_their_own_rates_and_a_scheduler_train(config: CompressionConfig) -> None:
    model = network()
    optimizer = MANGO(
        [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2:].parameters(), "weight_decay": 0.1}],
        lr=1e-3,
        policy=config,
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.5)
    start = held_out(model)
    for step in range(60):
        optimizer.zero_grad()
        loss_of(model, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2 / 8, 1e-3 / 8]
    assert held_out(model) < 0.9 * start


def test_a1_groups_and_schedulers_match_torch_s_adamw() -> None:
    mine, theirs = params_of((40, 40), (30,)), params_of((40, 40), (30,))
    pairs: list[tuple[list[Parameter], torch.optim.Optimizer, Any]] = []
    kinds: list[tuple[list[Parameter], Any, dict[str, Any]]] = [(mine, MANGO, {"policy": FULL}), (theirs, torch.optim.AdamW, {})]
    for params, kind, more in kinds:
        groups = [
            {"params": params[:1], "lr": 0.1, "betas": (0.8, 0.9)},
            {"params": params[1:], "weight_decay": 0.2, "eps": 1e-3},
        ]
        optimizer = kind(groups, lr=0.01, weight_decay=0.0, **more)
        pairs.append((params, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)))
    for step in range(30):
        for params, optimizer, scheduler in pairs:
            feed(params, step)
            optimizer.step()
            scheduler.step()
    assert same(mine, theirs, 1e-6)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a1_maximize_and_tensor_rates_match_torch_s(maximize: bool, tensor_lr: bool) -> None:
    mine, theirs = params_of((40, 40)), params_of((40, 40))
    lr: Any = torch.tensor(0.01) if tensor_lr else 0.01
    one, other = (
        MANGO(mine, lr=lr, maximize=maximize, policy=FULL),
        torch.optim.AdamW(theirs, lr=0.01, maximize=maximize, weight_decay=0),
    )
    for step in range(20):
        feed(mine, step)
        feed(theirs, step)
        one.step()
        other.step()
    assert same(mine, theirs, 1e-6)
    if tensor_lr:
        lr.fill_(0.0)
        before = mine[0].detach().clone()
        one.step()
        assert torch.equal(before, mine[0])


def test_a1_closures_give_back_their_loss_and_tell_it_to_the_statistics() -> None:
    params = params_of((40, 40))
    optimizer = MANGO(params, policy_update_freq=2)
    decisions: list[float] = []
    optimizer.register_decision_hook(lambda decision: decisions.append(decision.loss))

    def closure() -> float:
        optimizer.zero_grad()
        loss = params[0].square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert decisions == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])


def test_a1_a_closure_may_return_nothing() -> None:
    params = params_of((40, 40))
    optimizer = MANGO(params)
    optimizer.step(lambda: feed(params, 0))  # type: ignore[arg-type, return-value]
    assert optimizer.steps == 1


def test_a1_zero_grad_and_step_hooks() -> None:
    params = params_of((40, 40))
    calls: list[str] = []
    optimizer = MANGO(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    feed(params, 0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    zeroed = params[0].grad
    assert calls == ["before", "after"] and zeroed is not None and not zeroed.any()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params) and "MANGO" in repr(optimizer)


def test_a1_decision_hooks_can_be_removed() -> None:
    params, seen = params_of((40, 40)), []
    optimizer = MANGO(params, policy_update_freq=1)
    handle = optimizer.register_decision_hook(lambda d: seen.append(d.step))
    for step in range(4):
        if step == 2:
            handle.remove()
        feed(params, step)
        optimizer.step()
    assert seen == [1, 2]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_a1_a_group_added_while_training_joins_in(config: CompressionConfig) -> None:
    params = params_of((40, 40), (50, 30))
    optimizer = MANGO(params[:1], policy=config, policy_update_freq=3, memory_budget=1.5)
    for step in range(10):
        feed(params, step)
        optimizer.step()
        assert optimizer.state_bytes() <= optimizer.memory_budget
        if step == 4:
            kept = [x.clone() for x in optimizer.state[params[0]]["tensor"].moments()]
            optimizer.add_param_group({"params": params[1:], "lr": 0.5})
            assert all(torch.equal(a, b) for a, b in zip(kept, optimizer.state[params[0]]["tensor"].moments(), strict=True))
            assert optimizer.adamw_bytes == 8 * (1600 + 1500) and len(optimizer.layers) == 2
    assert optimizer.applied == [config] * 2 and optimizer.observe().shape == (2, 64)


def test_a1_an_empty_list_is_refused_and_an_empty_group_is_not() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        MANGO([])
    params = params_of((40, 40))
    groups: list[dict[str, Any]] = [{"params": []}, {"params": params}]
    optimizer = MANGO(groups)
    feed(params, 0)
    optimizer.step()


def test_a_model_of_small_tensors_only_is_plain_adamw() -> None:
    mine, theirs = params_of((8, 6, 3), (5,)), params_of((8, 6, 3), (5,))
    one, other = MANGO(mine, policy_update_freq=5), torch.optim.AdamW(theirs, weight_decay=0)
    for step in range(12):
        feed(mine, step)
        feed(theirs, step)
        one.step()
        other.step()
    assert same(mine, theirs, 1e-6) and one.layers == [] and one.applied == [] and one.observe().shape == (0, 64)
    assert one.apply(M8V8) == [] and one.memory_report()["total"] == one.state_bytes() == 8 * (8 * 6 * 3 + 5)
    one.load_state_dict(one.state_dict())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_frozen_unused_and_empty_parameters_are_left_alone(config: CompressionConfig) -> None:
    params = params_of((40, 40), (40, 40), (40, 40), (0, 7), ())
    params[1].requires_grad_(False)
    before = [p.detach().clone() for p in params]
    optimizer = MANGO(params, policy=config, policy_update_freq=2, min_numel=1)
    for step in range(5):
        feed([params[0], params[3], params[4]], step)
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
    assert moved == [True, False, False, False, True]
    assert optimizer.state_bytes() <= optimizer.planned_bytes() and optimizer.observe().isfinite().all()


def test_a_parameter_shared_by_two_modules_is_one_layer() -> None:
    embedding, head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head])
    optimizer = MANGO(model.named_parameters())
    head(embedding(torch.tensor([1, 2, 3]))).square().sum().backward()
    optimizer.step()
    assert len(optimizer.layers) == 1 and optimizer.adamw_bytes == 8 * 1600


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_layout_does_not_matter(config: CompressionConfig) -> None:
    """Strided tensors take PyTorch's way and not the kernels': at a tie their codes may be a level apart, one in a thousand."""
    dense = params_of((48, 32), (16, 8, 3, 3))
    strided = [Parameter(dense[0].detach().T.contiguous().T), Parameter(dense[1].detach().to(memory_format=torch.channels_last))]
    assert not any(p.is_contiguous() for p in strided)
    one, other = MANGO(dense, policy=config), MANGO(strided, policy=config)
    for step in range(10):
        feed(dense, step)
        for a, b in zip(dense, strided, strict=True):
            assert a.grad is not None
            b.grad = torch.empty_like(b).copy_(a.grad)
        one.step()
        other.step()
    ties = 0.0 if config == FULL else 1e-3
    for a, b in zip(dense, strided, strict=True):
        gap = (a - b).abs()
        assert (gap > 1e-6).float().mean() <= ties and gap.max() <= 10 * 1e-3 / 127      # ten updates, off by a level


@pytest.mark.parametrize("config", [FULL, M8V8], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_follow_float32_within_their_rounding(config: CompressionConfig, dtype: torch.dtype) -> None:
    full = params_of((48, 32), (20,))
    half = [Parameter(p.detach().to(dtype)) for p in full]
    one, other = MANGO(full, lr=0.05, policy=config), MANGO(half, lr=0.05, policy=config)
    for step in range(20):
        feed(half, step)
        for a, b in zip(full, half, strict=True):
            assert b.grad is not None
            a.grad = b.grad.float()
        one.step()
        other.step()
    eps = torch.finfo(dtype).eps
    for a, b in zip(full, half, strict=True):
        assert b.dtype == dtype and (a - b.float()).norm() <= 2 * eps * 20**0.5 * a.norm()
    assert other.state_bytes() == one.state_bytes()


def test_float64_parameters_keep_their_precision() -> None:
    x = Parameter(torch.full((40, 40), 1 / 3, dtype=torch.float64))
    optimizer = MANGO([x], lr=0.0)
    x.grad = torch.ones_like(x)
    optimizer.step()
    assert (x == 1 / 3).all()
    huge = Parameter(torch.zeros(40, 40, dtype=torch.float64))
    optimizer = MANGO([huge], lr=0.1)
    huge.grad = torch.ones_like(huge)
    optimizer.step()
    assert torch.allclose(huge, torch.full_like(huge, -0.1), rtol=1e-6)


@pytest.mark.parametrize("release", [False, True])
def test_sparse_gradients_and_complex_parameters_are_type_errors(release: bool) -> None:
    embedding = nn.Embedding(50, 32, sparse=True)
    optimizer = MANGO(embedding.parameters(), release_gradients=release)

    def go() -> None:
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()

    with pytest.raises(TypeError, match=r"sparse gradient.*Embedding\(sparse=False\)"):
        go()
    with pytest.raises(TypeError, match="view_as_real"):
        MANGO([Parameter(torch.zeros(3, dtype=torch.complex64))], release_gradients=release)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("release", [False, True])
def test_a_copy_goes_on_as_the_original_would_and_leaves_it_alone(how: Any, release: bool) -> None:
    """Also under a scheduler, which puts its own wrapper over `step`, and with hooks that cannot be pickled."""
    model = network()
    optimizer = MANGO(model.parameters(), policy="random", policy_update_freq=3, memory_budget=0.6, release_gradients=release)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    optimizer.register_decision_hook(lambda decision: None)
    optimizer.register_step_pre_hook(lambda *_: None)

    def go(model: nn.Module, optimizer: MANGO, steps: range) -> list[Parameter]:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return list(model.parameters())

    go(model, optimizer, range(5))
    scheduler.step()
    both = how((model, optimizer))  # the parameters are shared within the copy
    before = optimizer.steps, [p.detach().clone() for p in model.parameters()]
    copied = go(both[0], both[1], range(5, 12))
    assert (optimizer.steps, both[1].steps) == (5, 12)
    assert all(torch.equal(a, b) for a, b in zip(before[1], model.parameters(), strict=True))
    assert same(go(model, optimizer, range(5, 12)), copied) and both[1].applied == optimizer.applied


def test_two_runs_from_one_seed_are_bit_equal_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        params = params_of((40, 40))
        optimizer = MANGO(params, policy=CompressionConfig(momentum_bits=2, variance_bits=4), seed=seed)
        for step in range(10):
            feed(params, step)
            optimizer.step()
        runs.append(params)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert torch.equal(before, torch.get_rng_state())


def run(
    release: bool, config: CompressionConfig, micro: int = 1, clip: float | None = None, steps: int = 12
) -> tuple[list[Parameter], list[float]]:
    model, norms = network(), []
    optimizer = MANGO(model.parameters(), lr=1e-2, policy=config, release_gradients=release)
    for step in range(steps):
        for part in range(micro):
            (loss_of(model, step * micro + part) / micro).backward()  # type: ignore[no-untyped-call]
            assert all((p.grad is None) == release for p in model.parameters())
        if clip is not None:
            norms.append(float(optimizer.clip_grad_norm(clip)))
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters()), norms


@pytest.mark.parametrize("config", [FULL, M8V8, R8], ids=lambda c: c.name)
@pytest.mark.parametrize("micro", [1, 3])
def test_released_gradients_train_bit_equal_to_plain_ones(config: CompressionConfig, micro: int) -> None:
    assert same(run(True, config, micro)[0], run(False, config, micro)[0])


def test_released_gradients_are_clipped_by_their_global_norm() -> None:
    held, plain = run(True, FULL, micro=2, clip=0.1), run(False, FULL, micro=2, clip=0.1)
    assert held[1] == pytest.approx(plain[1], rel=1e-5) and same(held[0], plain[0], 1e-5)


def test_clipping_twice_keeps_the_smaller_and_zero_grad_forgets() -> None:
    model = network()
    optimizer = MANGO(model.parameters(), policy=FULL, release_gradients=True)
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    before = optimizer.clip_grad_norm(1e-3)
    assert float(optimizer.clip_grad_norm(1.0)) == pytest.approx(1e-3, rel=1e-2) and before > 1e-2
    optimizer.zero_grad()
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    assert float(optimizer.clip_grad_norm(1e9)) == pytest.approx(float(before))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_released_gradients_at_fewer_bits_train_close_to_plain_ones(bits: int) -> None:
    def final(release: bool, config: CompressionConfig) -> float:
        model = network()
        optimizer = MANGO(model.parameters(), lr=1e-2, policy=config, release_gradients=release)
        for step in range(100):
            optimizer.zero_grad()
            for part in range(2):
                (loss_of(model, 2 * step + part) / 2).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return sum(loss_of(model, 1000 + i).item() for i in range(20))

    assert final(True, CompressionConfig(gradient_bits=bits)) < 1.15 * final(False, FULL)


def test_released_mode_takes_gradients_set_by_hand_and_parameters_unfrozen_later() -> None:
    params = params_of((40, 40), (40, 40))
    params[0].requires_grad_(False)
    optimizer = MANGO(params, policy=FULL, release_gradients=True)
    reference = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in params], lr=1e-3, weight_decay=0)
    theirs = reference.param_groups[0]["params"]
    feed(params, 0)
    feed(theirs, 0)
    optimizer.step()
    reference.step()
    params[0].requires_grad_(True)
    params[0].square().sum().backward()  # type: ignore[no-untyped-call]
    theirs[0].grad, theirs[1].grad = 2 * theirs[0].detach(), None
    optimizer.step()
    reference.step()
    assert same(params, theirs, 1e-6) and all(p.grad is None for p in params)


def test_released_mode_bears_parameters_that_never_get_a_gradient() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = MANGO(model.parameters(), release_gradients=True)
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    optimizer.clip_grad_norm(1.0)
    optimizer.zero_grad()
    assert optimizer.state_bytes() <= optimizer.memory_budget
    optimizer.load_state_dict(optimizer.state_dict())
