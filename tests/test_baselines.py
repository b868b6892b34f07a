"""Promises of the optimizers that MANGO is compared with: each builds and steps, or says why it cannot, and is what it says."""

import doctest
import importlib
import importlib.util
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from experiments.baseline_optimizers import BASELINES, EXTRA, Args, Baseline, available, build_baseline, register, train
from experiments.galore import galore_nbytes
from experiments.run_modes import scaler_of, train_step
from mango import MANGO
from mango_env.workloads import make_workload
from mango_env.workloads.initialise import build
from mango_env.workloads.text import VOCABULARY, Transformer
from train_policy.state_bytes import state_nbytes

OURS = ("adarankgrad", "dgc", "galore", "graddrop", "joined")
MODULES = (*(f"experiments.{name}" for name in OURS), "train_policy.state_bytes")


def needs(name: str) -> None:
    """Skip where a baseline cannot run, with its own reason."""
    if (reason := available(name)) is not None:
        pytest.skip(f"{name}: {reason}")


@contextmanager
def of_a_peer() -> Iterator[None]:
    """What others' code warns of is not ours to mend; torchao need not compile to be right."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        yield


def tiny(seed: int = 0) -> Transformer:
    return build(lambda: Transformer(32, 1, 2, 16), Generator().manual_seed(seed))


def next_symbol_loss(model: nn.Module, text: Tensor) -> Tensor:
    """Of windows (B, T + 1)."""
    return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def language_loss(name: str, steps: int = 100, lr: float | None = None, **options: Any) -> float:
    """Held-out loss of a small character model after some steps of a baseline, all from one start."""
    with of_a_peer():
        task = make_workload("source_lm", 0)
        optimizer = build_baseline(name, task.model, lr, **options)
        mode = BASELINES[name].amp
        scaler = scaler_of(mode)
        for _ in range(steps):
            train_step(optimizer, task.loss, scaler, mode)
        return task.evaluate()["val_loss"]


@pytest.fixture(scope="module")
def adam_loss() -> float:
    return language_loss("adamw")


def matrices_bytes(name: str, side: int = 512) -> float:
    """State bytes per parameter of two square matrices, after three steps."""
    generator = Generator().manual_seed(0)
    with of_a_peer():
        model = build(lambda: nn.Sequential(nn.Linear(side, side, bias=False), nn.Linear(side, side, bias=False)), generator)
        optimizer = build_baseline(name, model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, side, generator=generator)).square().mean().backward()
            optimizer.step()
        return state_nbytes(optimizer) / (2 * side * side)


# ---- the table ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_e14_every_name_and_its_recommended_config_builds_and_steps(name: str) -> None:
    needs(name)
    torch.manual_seed(0)
    model, generator = tiny(), Generator().manual_seed(1)
    text = torch.randint(VOCABULARY, (4, 17), generator=generator)
    before = [p.detach().clone() for p in model.parameters()]

    with of_a_peer():
        optimizer = build_baseline(name, model)
        scheduler = LambdaLR(optimizer, lambda step: 1.0)
        scaler = scaler_of(BASELINES[name].amp)
        losses = []
        for _ in range(6):
            losses.append(train_step(optimizer, partial(next_symbol_loss, model, text), scaler, BASELINES[name].amp))
            scheduler.step()
    assert isinstance(optimizer, Optimizer) and all(math.isfinite(x) for x in losses) and losses[-1] < losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    most = 32 if "topC" in BASELINES[name].options else 16                     # 5 items, their sum, two moments
    assert 0 < state_nbytes(optimizer) <= most * sum(p.numel() for p in model.parameters()) + 20_000


def test_an_unknown_name_is_told_the_known_ones_in_one_line() -> None:
    for call in (lambda: available("adamm"), lambda: build_baseline("adamm", tiny())):
        with pytest.raises(ValueError, match=r"unknown baseline 'adamm'; known: adam, adamw, ") as raised:
            call()
        assert "\n" not in str(raised.value) and all(name in str(raised.value) for name in BASELINES)


def test_what_cannot_run_is_listed_with_a_reason_of_one_line_and_refuses_to_build() -> None:
    missing = Baseline("x", "", "", build=torch.optim.SGD, lr=1.0, imports=("no_such_package.inside",))
    assert missing.requirement() == f"no_such_package is not installed: {EXTRA}"
    older = Baseline("x", "", "", build=torch.optim.SGD, lr=1.0, imports=("torch.optim:NoSuchRule",), install="newer")
    assert older.requirement() == f"torch.optim {torch.__version__} has no NoSuchRule: newer"
    reasons = {name: reason for name in BASELINES if (reason := available(name)) is not None}
    for name, reason in reasons.items():
        assert "\n" not in reason and len(reason) > 10
        with pytest.raises(RuntimeError, match=name):
            build_baseline(name, tiny())
    if not torch.cuda.is_available():
        assert {name for name, b in BASELINES.items() if b.cuda} <= set(reasons)
        assert "CUDA" in reasons["flashoptim"]


def test_a_name_is_registered_once_and_plain_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register("adam", "", "", lr=1.0)
    with pytest.raises(TypeError, match="named_parameters"):
        build_baseline("adam", list(tiny().parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_the_baselines_run_as_they_are_printed(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adamw_amp_bf16", "adamw_amp_fp16"])
def test_e1_e2_e3_e4_run_in_the_benchmark_cli(name: str, tmp_path: Path) -> None:
    """Float32 Adam, AdamW, SGD with momentum; AdamW under autocast, in float16 behind a GradScaler."""
    out = train(Args(names=name, width=16, depth=1, context=8, out=tmp_path / "told.json"))
    told = json.loads(out.read_text())
    (row,) = told["baselines"]
    assert row["name"] == name and row["available"] and row["losses"][-1] < row["losses"][0] and told["commit"]
    assert row["state_bytes_per_param"] == pytest.approx(4 if name == "sgd" else 8, rel=0.02)


# ---- E4, E5: Adam in few bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw_amp_bf16", "adamw_amp_fp16"])
def test_e4_mixed_precision_adam_is_within_1_percent_of_adam(name: str, adam_loss: float) -> None:
    assert language_loss(name) == pytest.approx(adam_loss, rel=0.01)


@pytest.mark.parametrize("name", ["adam8bit", "adam8bit_torchao", "mango_m8v8"])
def test_e5_8_bit_adam_takes_about_2_bytes_per_parameter_within_1_percent_of_adams_loss(name: str, adam_loss: float) -> None:
    needs(name)
    assert 2.0 <= matrices_bytes(name) <= 2.1
    assert language_loss(name) == pytest.approx(adam_loss, rel=0.01)


def test_4_bit_adam_takes_about_1_byte_per_parameter() -> None:
    needs("adam4bit")
    assert 1.0 <= matrices_bytes("adam4bit") <= 1.1


# ---- E10, E11: beside Adam and the packages ---------------------------------------------------------------------------------


def test_e10_adafactor_takes_less_than_1_byte_per_parameter_on_matrices() -> None:
    assert matrices_bytes("adafactor") < 0.02                       # 4 (m + n) / m n, and a step


def test_e11_galores_loss_is_within_2_percent_of_its_packages_which_keeps_more() -> None:
    needs("galore_torch")
    ours, theirs = (language_loss(name, lr=0.01) for name in ("galore", "galore_torch"))
    assert ours == pytest.approx(theirs, rel=0.02)
    taken = {}
    for name in ("galore", "galore_torch"):
        weight = nn.Parameter(torch.zeros(128, 512))
        weight.grad = torch.randn(128, 512, generator=Generator().manual_seed(0))
        with of_a_peer():
            optimizer = build_baseline(name, [("blocks.0.mlp.up.weight", weight)])
            optimizer.step()
        taken[name] = state_nbytes(optimizer)
    assert taken["galore"] == galore_nbytes(128, 512, 8) == 4 * 8 * (128 + 2 * 512)
    assert taken["galore_torch"] == taken["galore"] + 4 * 128 * (128 - 8)    # all left singular vectors


# ---- E9, E13: what MANGO stands for ------------------------------------------------------------------------------------------


def test_e9_alam_runs_within_its_budget_and_gives_layers_different_bits() -> None:
    assert "activations" in BASELINES["alam"].what                  # it says what it is not
    task = make_workload("source_lm", 0)
    optimizer = build_baseline("alam", task.model)
    assert isinstance(optimizer, MANGO)
    first = task.evaluate()["val_loss"]
    for _ in range(40):
        optimizer.zero_grad()
        task.loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert optimizer.state_bytes() <= optimizer.budget.total
    assert len(set(optimizer.applied)) > 1 and task.evaluate()["val_loss"] < first - 1


def test_e13_paged_adam_has_state_beyond_its_budget_and_trains_as_if_it_had_not(tmp_path: Path) -> None:
    models = tiny(), tiny()
    paged = build_baseline("mango_paged", models[0], page_to=tmp_path)
    whole = build_baseline("mango_full", models[1])
    text = torch.randint(VOCABULARY, (4, 17), generator=Generator().manual_seed(0))
    for _ in range(4):
        for model, optimizer in zip(models, (paged, whole), strict=True):
            train_step(optimizer, partial(next_symbol_loss, model, text), scaler_of("fp32"), "fp32")
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert isinstance(paged, MANGO) and paged.paged_bytes() > 0
    assert paged.resident_bytes() <= 2 * sum(p.numel() for p in models[0].parameters()) < paged.state_bytes()


# ---- bytes -------------------------------------------------------------------------------------------------------------------


class Slotted:
    __slots__ = ("kept",)

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept


def test_state_bytes_are_those_of_every_storage_once_and_whole() -> None:
    weight = nn.Parameter(torch.zeros(16, 8))
    optimizer: Any = torch.optim.Adam([weight])
    weight.grad = torch.ones(16, 8)
    optimizer.step()
    dense = 2 * 4 * 128 + 4                                         # two moments and a step
    assert state_nbytes(optimizer) == dense
    shared = torch.zeros(256)
    optimizer.attribute = [{"deep": (shared, shared)}, Slotted(torch.zeros(5))]
    assert state_nbytes(optimizer) == dense + 1024 + 20
    optimizer.view = torch.zeros(100, 10)[:, :1]                    # a column that keeps the matrix alive
    assert state_nbytes(optimizer) == dense + 1024 + 20 + 4000
    optimizer.network, optimizer.itself = nn.Linear(10, 10), optimizer
    assert state_nbytes(optimizer) == dense + 1024 + 20 + 4000
    optimizer.host = torch.zeros(7, dtype=torch.float64).numpy()[2:]
    assert state_nbytes(optimizer) == dense + 1024 + 20 + 4000 + 56


@pytest.mark.parametrize("name", ["mango_m8v8", "mango_m4v0", "mango_paged", "mango"])
def test_state_bytes_of_mango_are_its_own_account_and_little_that_does_not_grow(name: str) -> None:
    model = tiny()
    optimizer = build_baseline(name, model)
    assert isinstance(optimizer, MANGO)
    text = torch.randint(VOCABULARY, (4, 16), generator=Generator().manual_seed(0))
    model(text).square().mean().backward()
    optimizer.step()
    assert optimizer.state_bytes() <= state_nbytes(optimizer) <= optimizer.state_bytes() + 20_000
