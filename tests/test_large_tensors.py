"""Tensors of several chunks: a gradient's sum of squares is taken while the tensor before it is updated."""

import math

import pytest
import torch
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from tests.test_native import same_moves, twins

SHAPES = [(300, 300), (65_537,), (40, 30), (500, 400), (70_000,), (3, 65_536)]


def optimizers(m: int, v: int) -> tuple[MANGO, MANGO]:
    found = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        config = CompressionConfig(momentum_bits=m, variance_bits=v)
        found.append(MANGO(params, policy=config, policy_update_freq=1000, weight_decay=0.1))
    return found[0], found[1]


def feed(optimizer: MANGO, step: int, broken: set[int], value: float) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, target in enumerate(optimizer.targets):
        target.param.grad = torch.randn(target.param.shape, generator=generator) * 10.0 ** (i - 3)
        if i in broken:
            target.param.grad.view(-1)[-1] = value


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("m", "v"), [(8, 8), (4, 0), (32, 32), (2, 4)])
@pytest.mark.parametrize("broken", [set(), {0}, {1}, {3}, {5}, {0, 1, 3, 4, 5}])
def test_a_gradient_that_is_not_finite_stops_its_own_tensor_alone(m: int, v: int, broken: set[int], threads: int) -> None:
    mine, twin = optimizers(m, v)
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(2):
            value = math.nan if step else math.inf
            before = [target.param.detach().clone() for target in mine.targets]
            feed(mine, step, broken, value)
            feed(twin, step, broken, value)
            mine.step()
            with twins():
                twin.step()
            for i, (target, start) in enumerate(zip(mine.targets, before, strict=True)):
                assert torch.equal(target.param, start) == (i in broken)
            if not broken:
                same_moves(mine, twin, before)
            assert mine.skipped == twin.skipped == len(broken) * (step + 1)
            assert torch.allclose(mine.statistics.tensors["norm"], twin.statistics.tensors["norm"], rtol=1e-5)
            twin.load_state_dict(mine.state_dict())
            for target, other in zip(mine.targets, twin.targets, strict=True):
                other.param.detach().copy_(target.param)
    finally:
        torch.set_num_threads(before_threads)
