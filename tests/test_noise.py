"""The noise of stochastic rounding: uniform, the same everywhere, another for every key and position."""

import itertools
import math

import pytest
import torch

from mango import noise

MASK = 0xFFFFFFFF


def reference(position: int, key: int) -> float:
    """One number, written out with whole numbers of any size: slow and obvious."""

    def mix(x: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = ((x ^ (x >> shift)) * factor) & MASK
        return x

    block, lane = divmod(position, 256)
    high = block * 256 >> 32
    base = (mix((key + high) & MASK) if high else key) + (block * 256 & MASK) * 0x9E3779B9
    bits = mix((base + lane % 128 * 0x9E3779B9) & MASK)
    return ((bits >> 16 if lane >= 128 else bits & 0xFFFF) + 0.5) / 65536


@pytest.mark.parametrize("key", [0, 1, 12345, MASK])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 256, 257, 1000])
def test_the_numbers_are_those_of_the_definition(key: int, n: int) -> None:
    assert noise.uniform(n, key).tolist() == [reference(i, key) for i in range(n)]


@pytest.mark.parametrize("n", [1, 128, 300, 5000])
def test_the_head_of_a_longer_draw_is_the_shorter_one(n: int) -> None:
    assert torch.equal(noise.uniform(70_000, 9)[:n], noise.uniform(n, 9))


@pytest.mark.parametrize("key", [0, 1, noise.step_key(0, 3, 17), MASK])
def test_numbers_are_uniform(key: int) -> None:
    """Mean, variance and a chi-square of 256 bins, all within six standard errors."""
    n = 1 << 20
    u = noise.uniform(n, key).double()
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 6 / math.sqrt(12 * n)
    assert abs(float(u.var()) - 1 / 12) < 6 / math.sqrt(180 * n)
    counts = torch.histc(u, 256, 0, 1)
    chi_square = float(((counts - n / 256).square() / (n / 256)).sum())
    assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)
    low = (u * 65536).long() % 256                           # the lower bits as well
    chi_square = float(((torch.bincount(low, minlength=256) - n / 256).square() / (n / 256)).sum())
    assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard errors of independent draws."""
    return abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) * math.sqrt(len(a))


def test_neighbours_steps_tensors_and_purposes_do_not_go_together() -> None:
    n = 1 << 16
    u = noise.uniform(n + 1024, 7)
    for lag in (1, 2, 64, 127, 128, 129, 256, 1024):
        assert correlation(u[:n], u[lag : n + lag]) < 6
    several = itertools.product((0, 1), (0, 1), (1, 2, 3))
    keys = [noise.step_key(seed, tensor, step) for seed, tensor, step in several]
    draws = [noise.uniform(n, noise.split(key, purpose)) for key in keys for purpose in (noise.MOMENTUM, noise.VARIANCE)]
    assert max(correlation(a, b) for a, b in itertools.combinations(draws, 2)) < 6


def test_keys_are_32_bits_and_seldom_meet() -> None:
    """Of k keys drawn from 2^32 about k^2 / 2^33 pairs are equal: 2 of 131,072; 12 are six deviations off."""
    keys = [noise.step_key(seed, tensor, step) for seed in (0, 1) for tensor in range(64) for step in range(1024)]
    assert all(0 <= key <= MASK for key in keys) and len(keys) - len(set(keys)) <= 12
    split = {noise.split(keys[5], purpose) for purpose in range(1, 9)}
    assert len(split) == 8 and all(0 <= key <= MASK for key in split)
    assert noise.step_key(2**40 + 3, 0, 1) == noise.step_key(3, 0, 1)   # any whole number is a seed
    assert 0 <= noise.step_key(-1, 10**7, 10**12) <= MASK


@pytest.mark.parametrize("start", [0, 2**31, 2**32 - 256, 2**32, 2**32 + 256, 2**33, 2**40 + 512, 3 * 2**45])
@pytest.mark.parametrize("key", [0, 77, MASK])
def test_positions_beyond_two_to_the_thirty_two_count_on(start: int, key: int) -> None:
    """The arithmetic alone: a tensor of that size is not made."""
    base = int(noise._bases(torch.tensor([start]), key)) & MASK
    for lane in (0, 1, 127, 128, 255):
        assert float(noise.uniform(256, base)[lane]) == reference(start + lane, key)


def test_noise_does_not_repeat_after_two_to_the_thirty_two_positions() -> None:
    starts = torch.arange(64) * 2**32
    assert len(set((noise._bases(starts, 5) & MASK).tolist())) == 64


def test_a_generator_starts_from_its_key() -> None:
    device = torch.device("cpu")
    one, other, third = (torch.randn(8, generator=noise.generator(key, device)) for key in (MASK, MASK, 3))
    assert torch.equal(one, other) and not torch.equal(one, third)
