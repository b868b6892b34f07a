"""Paged state: what exceeds the memory budget lies in a mapped file, and training is the same bit for bit."""

import copy
import errno
import gc
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mango import MANGO, CompressionConfig, native
from mango.config import FULL, LADDER
from mango.paging import NEAR, Paged, Pager, Staged
from tests.test_state import Meter, backward, train

M8V8 = CompressionConfig(momentum_bits=8, variance_bits=8)
SPARSE = CompressionConfig(gradient_bits=4, sparsity=0.9, momentum_bits=4, variance_bits=4)
CONFIGS = [FULL, M8V8, SPARSE, LADDER[1]]


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 4))
        return nn.Sequential(*layers)


def made(paged: Path | None, config: Any = FULL, share: float = 0.6, **more: Any) -> tuple[nn.Sequential, MANGO]:
    """Paged: with room for a share of the state; unpaged: with room for all of it."""
    model = network()
    arguments: dict[str, Any] = {"lr": 1e-2, "policy": config, "policy_update_freq": 3} | more
    if paged is None:
        return model, MANGO(model.named_parameters(), memory_budget=4.0, **arguments)
    whole = MANGO(network().named_parameters(), memory_budget=4.0, **arguments)
    budget = whole.budget.fixed + int(share * (whole.planned_bytes() - whole.budget.fixed))
    return model, MANGO(model.named_parameters(), memory_budget=budget, page_to=paged, **arguments)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Resident(Meter):
    """Measures resident bytes alone, at every instant at which something is stored."""

    def __init__(self, optimizer: MANGO, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(optimizer, monkeypatch)
        self.optimizer: Any = SimpleNamespace(state_bytes=optimizer.resident_bytes)


def mapped_bytes(folder: Path) -> int:
    """Bytes that this process has mapped of files in the folder, under names or without any."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, end = line.split()[0].split("-")
            total += int(end, 16) - int(start, 16)
    return total


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is mapped")


@contextmanager
def disk_of(nbytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: to the program a full disk."""
    before, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "twins"])
def test_d13_state_exceeds_the_memory_budget_and_training_is_the_same_bit_for_bit(
    config: CompressionConfig, release: bool, kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(native, "load", lambda strict=False: None)
    (model, optimizer), (twin, plain) = (made(where, config, release_gradients=release) for where in (tmp_path, None))
    with monkeypatch.context() as patch:
        meter = Resident(optimizer, patch)
        train(model, optimizer, 12)
    train(twin, plain, 12)
    assert same(model, twin) and optimizer.applied == plain.applied == [config] * 3
    assert meter.peak <= optimizer.memory_budget < optimizer.planned_bytes() and optimizer.state_bytes() == plain.state_bytes()
    assert optimizer.resident_bytes() + optimizer.paged_bytes() == optimizer.state_bytes()
    assert optimizer.paged_bytes() > 0 and plain.paged_bytes() == 0


def test_d13_at_a_tenth_of_the_state_all_layers_are_paged_and_less_is_refused_in_words(tmp_path: Path) -> None:
    model, optimizer = made(tmp_path)
    least = optimizer.budget.fixed
    tight = MANGO(model.named_parameters(), policy=FULL, memory_budget=least, page_to=tmp_path)
    train(model, tight, 3)
    assert tight.resident_bytes() <= least < 0.3 * tight.state_bytes() and tight.pager.layers == {0, 1, 2}
    with pytest.raises(ValueError, match=f"least feasible is {least:,} bytes"):
        MANGO(model.named_parameters(), policy=FULL, memory_budget=least - 1, page_to=tmp_path)


@linux
def test_d13_paged_state_is_in_a_mapped_file_that_has_no_name_and_goes_with_the_optimizer(tmp_path: Path) -> None:
    model, optimizer = made(tmp_path, M8V8)
    train(model, optimizer, 4)
    paged = [s for s in optimizer.kept() if s is not None and isinstance(s.encoded, Paged)]
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in ranges]
    assert paged and all("(deleted)" in fields for fields in ranges)
    for state in paged:
        for encoded in state.encoded.values():
            for part in encoded.parts.values():
                assert any(low <= part.data_ptr() < high for low, high in spans)
    assert mapped_bytes(tmp_path) >= optimizer.paged_bytes() > 0 and not list(tmp_path.iterdir())
    del optimizer, paged, state, encoded, part
    gc.collect()
    assert mapped_bytes(tmp_path) == 0


def test_d13_nothing_is_left_where_the_process_is_killed(tmp_path: Path, root: Path) -> None:
    code = f"""
import os, signal, torch
from mango import MANGO
from mango.config import FULL
param = torch.nn.Parameter(torch.zeros(64, 64))
optimizer = MANGO([param], policy=FULL, memory_budget=20_000, page_to={str(tmp_path)!r})
param.square().sum().backward()
optimizer.step()
assert optimizer.paged_bytes() > 30_000
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=False)
    assert done.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())


def test_the_biggest_layers_are_paged_and_the_report_says_which(tmp_path: Path) -> None:
    model, optimizer = made(tmp_path, share=0.7)
    train(model, optimizer, 2)
    report = optimizer.memory_report()
    sizes = {row["name"]: row["bytes"] for row in report["layers"]}
    away = {row["name"] for row in report["layers"] if row["paged"]}
    assert away and min(sizes[name] for name in away) >= max(sizes[name] for name in set(sizes) - away)
    assert report["paged"] == sum(sizes[name] for name in away) == optimizer.paged_bytes()
    assert report["total"] == optimizer.state_bytes() == optimizer.resident_bytes() + report["paged"]
    assert optimizer.get_memory_usage()["paged_gb"] == report["paged"] / 1e9
    smallest = min(sizes[name] for name in away)
    assert optimizer.resident_bytes() + smallest > optimizer.memory_budget          # not one more than it takes


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("policy", ["random", "water-filling"])
@pytest.mark.parametrize("page_budget", [None, 0.3])
def test_both_budgets_hold_while_configs_change(
    policy: str, release: bool, page_budget: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    optimizer = MANGO(
        model.named_parameters(), policy=policy, memory_budget=0.25, page_to=tmp_path, page_budget=page_budget,
        policy_update_freq=2, release_gradients=release, seed=3,
    )  # fmt: skip
    seen = set()
    meter = Resident(optimizer, monkeypatch)
    for step in range(20):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        seen.add(optimizer.pager.layers)
        assert optimizer.resident_bytes() <= optimizer.memory_budget
        assert page_budget is None or optimizer.paged_bytes() <= page_budget * optimizer.adamw_bytes
    assert meter.peak <= optimizer.memory_budget and any(seen) and all(p.isfinite().all() for p in model.parameters())
    assert policy != "random" or len(seen) > 1                                      # layers came and went


def test_a_page_budget_is_a_second_budget_and_both_together_may_be_impossible(tmp_path: Path) -> None:
    model = network()
    every = {"policy": "water-filling", "memory_budget": 0.15}
    compressed = MANGO(model.named_parameters(), **every)                           # type: ignore[arg-type]
    some = MANGO(model.named_parameters(), page_to=tmp_path, page_budget="8KiB", **every)  # type: ignore[arg-type]
    wide = MANGO(model.named_parameters(), page_to=tmp_path, **every)               # type: ignore[arg-type]
    assert compressed.planned_bytes() < some.planned_bytes() < wide.planned_bytes()
    train(model, some, 3)
    assert some.paged_bytes() <= 8 * 1024
    with pytest.raises(ValueError, match="least feasible"):
        MANGO(model.named_parameters(), memory_budget=wide.budget.fixed + 10, page_to=tmp_path, page_budget=10)


def test_a_memory_budget_set_in_mid_run_pages_out_at_once_and_in_at_the_next_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, optimizer), (twin, plain) = made(tmp_path), made(None)
    train(model, optimizer, 4)
    meter = Resident(optimizer, monkeypatch)
    before, few, bytes_ = optimizer.memory_budget, optimizer.pager.layers, optimizer.planned_bytes()
    optimizer.memory_budget = optimizer.budget.fixed
    assert few < optimizer.pager.layers == {0, 1, 2} and optimizer.resident_bytes() <= optimizer.memory_budget
    assert meter.peak <= before
    optimizer.memory_budget = 2 * bytes_
    assert optimizer.pager.layers == {0, 1, 2}
    train(model, optimizer, 3)
    assert not optimizer.pager.layers and not optimizer.paged_bytes() and optimizer.resident_bytes() == optimizer.state_bytes()
    train(twin, plain, 4)
    train(twin, plain, 3)
    assert same(model, twin)


@pytest.mark.parametrize("config", [FULL, SPARSE], ids=lambda c: c.name)
@pytest.mark.parametrize("where", [(True, True), (True, False), (False, True)], ids=["paged", "paged to not", "not to paged"])
def test_d13_checkpoints_resume_bit_for_bit_paged_or_not(
    config: CompressionConfig, where: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_, to = (tmp_path if paged else None for paged in where)
    model, optimizer = made(from_, config, release_gradients=True)
    train(model, optimizer, 5)
    backward(model, 40)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    twin, other = made(to, config, release_gradients=True)
    train(twin, other, 2)
    twin.load_state_dict(saved["model"])
    with monkeypatch.context() as patch:
        meter = Resident(other, patch)
        other.load_state_dict(saved["optimizer"])
    assert meter.peak <= other.memory_budget and bool(other.paged_bytes()) == (to is not None)
    for network_, its in ((model, optimizer), (twin, other)):
        backward(network_, 41)
        its.step()
        train(network_, its, 5)
    assert same(model, twin)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_have_pages_of_their_own(how: Any, tmp_path: Path) -> None:
    model, optimizer = made(tmp_path, M8V8)
    train(model, optimizer, 4)
    twin, other = how((model, optimizer))
    assert other.paged_bytes() == optimizer.paged_bytes() > 0 and other.resident_bytes() == optimizer.resident_bytes()
    before = [p.detach().clone() for p in model.parameters()]
    train(twin, other, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train(model, optimizer, 4)
    assert same(model, twin)


def test_what_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    params = [nn.Parameter(torch.zeros(64, 64))]
    with pytest.raises(ValueError, match="is no folder; make it"):
        MANGO(params, page_to=tmp_path / "missing")
    with pytest.raises(ValueError, match="parameters on a CUDA device"):
        MANGO(params, page_to="pinned")
    with pytest.raises(ValueError, match="say where to with page_to"):
        MANGO(params, page_budget="1GiB")
    with pytest.raises(ValueError, match="page_budget='much'"):
        MANGO(params, page_to=tmp_path, page_budget="much")


@pytest.mark.parametrize("config", [FULL, M8V8], ids=lambda c: c.name)
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_when_there_is_room(config: CompressionConfig, tmp_path: Path) -> None:
    (model, optimizer), (twin, plain) = made(tmp_path, config), made(None, config)
    backward(model, 0)
    with disk_of(2000), pytest.raises(OSError, match="bytes of state find no room in") as error:
        optimizer.step()
    assert error.value.errno in (errno.EFBIG, errno.ENOSPC) and str(tmp_path) in str(error.value)
    assert not list(tmp_path.iterdir())
    assert same(model, network())                                                   # no parameter had moved
    model, optimizer = made(tmp_path, config)
    train(model, optimizer, 3)
    train(twin, plain, 3)
    before = optimizer.memory_budget
    with disk_of(500), pytest.raises(OSError, match="find no room"):
        optimizer.memory_budget = optimizer.budget.fixed                            # pages out what was resident
    assert optimizer.memory_budget == before
    train(model, optimizer, 4)
    train(twin, plain, 4)
    assert same(model, twin)


def test_a_folder_that_vanishes_is_said_when_room_is_needed(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    model, optimizer = made(tmp_path / "pages")
    (tmp_path / "pages").rmdir()
    with pytest.raises(OSError, match=r"find no room in .*pages"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("release", [False, True])
def test_working_on_copies_as_a_gpu_does_is_the_same_bit_for_bit_with_two_layers_near(
    config: CompressionConfig, release: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of a CUDA device without its streams: the CPU plays the device, a mapped file the host."""
    monkeypatch.setattr(native, "load", lambda strict=False: None)
    monkeypatch.setattr(Pager, "_staged", True)
    bytes_ = MANGO(network().named_parameters(), policy=config, memory_budget=4.0, release_gradients=release)
    largest = max(bytes_.layer_bytes().tolist())
    budget = bytes_.budget.fixed + NEAR * largest                                   # all is paged, and two layers are near
    model, (twin, plain) = network(), made(None, config, release_gradients=release)
    optimizer = MANGO(
        model.named_parameters(), lr=1e-2, policy=config, policy_update_freq=3, release_gradients=release,
        memory_budget=min(budget, bytes_.planned_bytes() - 1), page_to=tmp_path,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        meter = Resident(optimizer, patch)
        train(model, optimizer, 7)
    train(twin, plain, 7)
    states = [s for s in optimizer.kept_layers() if s is not None]
    assert all(isinstance(s.encoded, Staged) for s in states) and same(model, twin)
    assert meter.peak <= optimizer.memory_budget and optimizer.pager.near_bytes == 0
    assert optimizer.resident_bytes() < optimizer.memory_budget
    clone, other = copy.deepcopy((model, optimizer))
    for network_, its in ((model, optimizer), (clone, other), (twin, plain)):
        train(network_, its, 4)
    assert same(model, twin) and same(clone, twin)
    saved = optimizer.state_dict()
    plain.load_state_dict(saved)
    for network_, its in ((model, optimizer), (twin, plain)):
        train(network_, its, 4)
    assert same(model, twin)


def test_corrections_of_bfloat16_parameters_stay_and_count_as_resident(tmp_path: Path) -> None:
    runs = []
    for place in (tmp_path, None):
        model = network().bfloat16()
        budget = 4.0 if place is None else MANGO(model.parameters(), policy=FULL, master_bits=24, memory_budget=4.0).budget.fixed
        optimizer = MANGO(model.parameters(), lr=1e-2, policy=FULL, master_bits=24, memory_budget=budget, page_to=place)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step)).bfloat16()
            (model(x) - x[:, :4].square()).square().mean().backward()
            optimizer.step()
        runs.append((model, optimizer))
    (model, optimizer), (twin, _) = runs
    corrections = optimizer.memory_report()["correction"]
    assert same(model, twin) and optimizer.pager.layers == {0, 1, 2}
    everything = optimizer.state_bytes()
    assert corrections < optimizer.resident_bytes() == optimizer.memory_budget == everything - optimizer.paged_bytes()


def test_a_group_added_later_is_paged_if_it_is_big(tmp_path: Path) -> None:
    model, optimizer = made(tmp_path, "hold")
    train(model, optimizer, 2)
    away = optimizer.pager.layers
    big = nn.Parameter(torch.ones(128, 128))
    optimizer.add_param_group({"params": [big], "param_names": ["big"]})
    assert 3 in optimizer.pager.layers and away
    train(model, optimizer, 1)
    big.grad = torch.ones_like(big)
    optimizer.step()
    assert optimizer.resident_bytes() <= optimizer.memory_budget and optimizer.state_bytes() > 8 * big.numel()


def test_without_a_place_nothing_is_paged_and_the_budget_is_kept_by_compression() -> None:
    model = network()
    optimizer = MANGO(model.named_parameters(), memory_budget=0.5)
    train(model, optimizer, 3)
    report = optimizer.memory_report()
    assert report["paged"] == 0 and "paged_gb" not in optimizer.get_memory_usage()
    assert optimizer.resident_bytes() == optimizer.state_bytes() <= optimizer.memory_budget
