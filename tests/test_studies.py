"""Promises of the programs that measure: what their own small parts compute."""

import doctest
import importlib
import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import step_time
from benchmarks.memory import widest
from benchmarks.quality import config_of
from benchmarks.record import median_error
from experiments import headroom
from experiments.adarankgrad import AdaRankGrad, hidden_matrices
from experiments.bf16_master import bound
from mango import MANGO
from mango.lowrank import matricise
from mango_env.workloads.text import Transformer


@pytest.mark.parametrize("name", ["benchmarks.memory", "experiments.bf16_master", "experiments.adarankgrad"])
def test_examples_of_the_studies_run_as_they_are_printed(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


@pytest.mark.parametrize("cap", [0, 15, 16, 500, 2031, 2032, 10_000])
def test_the_widest_model_fits_and_the_next_one_does_not(cap: int) -> None:
    found = widest(float, cap, 16, 2048)
    assert found % 16 == 0 and found <= cap and (found + 16 > cap or found == 2032)


def test_g9_a_median_has_the_standard_error_that_the_median_of_fresh_samples_has() -> None:
    rng = np.random.default_rng(0)
    true = np.median(rng.normal(1.0, 0.1, (4000, 41)), axis=1).std()
    told = [median_error(rng.normal(1.0, 0.1, 41).tolist()) or 0.0 for _ in range(40)]
    assert np.mean(told) == pytest.approx(true, rel=0.2)             # the bootstrap of a median is a little too wide
    assert median_error([1.0]) is None and median_error([2.0, 2.0]) == 0.0


def test_g9_every_ratio_of_step_times_has_its_standard_error() -> None:
    found = step_time.measure([(64, 64), (64,)], step_time.Args(rounds=5, steps=1))
    assert found["adamw_fused"]["ratio_fused"] == 1.0 and found["adamw_fused"]["ratio_fused_se"] == 0.0
    for name, row in found.items():
        others = [other for other in ("fused", "foreach") if name != f"adamw_{other}"]
        assert all(row[f"ratio_{other}"] > 0 and row[f"ratio_{other}_se"] > 0 for other in others), name


def test_noise_stays_within_its_bound_95_times_in_100() -> None:
    draws = torch.randn(2000, 4 + 3, generator=torch.Generator().manual_seed(0)).tolist()
    inside = sum(abs(sum(row[4:]) / 3) <= bound(row[:4], 3) for row in draws[:200])
    assert abs(inside / 200 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 200)


@pytest.mark.parametrize(("schedule", "rises"), [("falling-0.01", False), ("free-0.01", True)])
def test_adarankgrad_keeps_the_energy_it_is_told_to_and_counts_its_bytes(schedule: str, rises: bool) -> None:
    """Gradients of rank 4, then 1, then 4: what falls never rises again. The rest has dense AdamW, as torch's."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(24, 12)
    twin = nn.Parameter(model.bias.detach().clone())
    optimizer = AdaRankGrad(model.named_parameters(), lr=0.01, hidden={"weight"}, schedule=schedule, every=2, seed=0)
    dense = torch.optim.AdamW([twin], lr=0.01, weight_decay=0)
    ranks = []
    for step in range(6):
        rank = (4, 1, 4)[step // 2]
        gradient = torch.linalg.qr(torch.randn(12, rank, generator=generator)).Q @ torch.randn(rank, 24, generator=generator)
        before = model.weight.detach().clone()
        model.weight.grad, model.bias.grad = gradient, torch.randn(12, generator=generator)
        twin.grad = model.bias.grad.clone()
        optimizer.step()
        dense.step()
        ranks.append(optimizer.ranks()["weight"])
        projector = optimizer.state[model.weight]["projector"]
        if step % 2 == 0 and (rises or step < 4):
            assert (projector.T @ matricise(gradient)).square().sum() >= 0.99 * gradient.square().sum() * (1 - 1e-5)
        moved = model.weight.detach() - before
        assert torch.linalg.matrix_rank(moved) <= ranks[-1]
        assert optimizer.state_bytes() == 4 * (12 * ranks[-1] + 2 * 24 * ranks[-1] + 2 * 12)
    assert ranks[0] == ranks[1] > 1 and ranks[2] == 1 and (ranks[4] > 1) == rises
    torch.testing.assert_close(model.bias, twin)


def test_what_is_projected_are_the_blocks_matrices() -> None:
    names = hidden_matrices(Transformer(32, 1, 4, 16))
    assert names == {f"blocks.0.{part}.weight" for part in ("attn.qkv", "attn.out_proj", "mlp.up", "mlp.down")}


def test_cells_of_the_headroom_maps_place_formats_by_kind_and_phase() -> None:
    args = headroom.Args()
    layers = MANGO(Transformer(32, 1, 4, 16).named_parameters(), rule="muon", min_numel=1).layers
    cells = headroom.cells(layers, args)
    assert len(cells) == len(set(cells)) and cells[:5] == args.uniform.split(",")
    kinds = {layer.kind for layer in layers if layer.kind != "norm"}
    assert {c.split(":")[1] for c in cells if c.startswith("gain") and "+" not in c} == kinds | {"all"}
    dear, cheap = config_of(args.dear), config_of(args.cheap)
    for phase in (0, 1):
        found = headroom.placed(layers, "gain:attention_in+mlp_up:1", phase, args)
        assert [c == dear for c in found] == [phase == 1 and layer.kind in ("attention_in", "mlp_up") for layer in layers]
        found = headroom.placed(layers, "damage:head:all", phase, args)
        assert [c == cheap for c in found] == [layer.kind == "head" for layer in layers]
        assert set(headroom.placed(layers, "m2v0", phase, args)) == {config_of("m2v0")}


def test_headroom_is_paired_by_seed_and_tells_its_table() -> None:
    args = headroom.Args()
    losses = {("full", 0): 2.0, ("full", 1): 4.0, ("m4v0", 0): 2.2, ("m4v0", 1): 4.0, ("damage:head:all", 0): 1.1}
    runs = [
        {"data": "books", "rule": "muon", "cell": cell, "seed": seed, "val_loss": loss, "bytes_per_param": 0.5}
        for (cell, seed), loss in losses.items()
    ]
    rows = {row["cell"]: row for row in headroom.summary(runs, args)}
    assert rows["m4v0"]["percent_over_full"] == pytest.approx({"mean": 5.0, "low": 0.0, "high": 10.0, "seeds": 2})
    assert rows["damage:head:all"]["percent_over_start"] == pytest.approx({"mean": -50, "low": -50, "high": -50, "seeds": 1})
    told = headroom.table(list(rows.values()))
    assert "+5.00" in told and "-50.00 at 0.500" in told
