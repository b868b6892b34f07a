"""Two processes over gloo: the run of one process, a budget per rank, one decision, and checkpoints that change shape."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mango import FULL, MANGO, CompressionConfig
from mango.config import LADDER
from mango.distributed import EncodedGradients, checkpoint_state, encoded_gradient_hook, load_checkpoint_state
from mango.features import FEATURE_INDEX
from tests.two_processes import WORLD, TwoProcesses, batch, build, network, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")   # of its checkpoints in one process
MODES = ("ddp", "sharded", "fsdp2")
M8V8 = CompressionConfig(momentum_bits=8, variance_bits=8)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    with TwoProcesses(tmp_path_factory.mktemp("two")) as processes:
        yield processes


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rule", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("mode", MODES)
def test_f16_two_processes_are_one_within_1e_6_in_full_precision(two: TwoProcesses, mode: str, rule: str) -> None:
    options: dict[str, Any] = {"policy": FULL, "rule": rule, "weight_decay": 0.01}
    # Lion steps by signs: where a sum of gradients is rounding alone, another order of summation turns the step around.
    options |= {"lr": 1e-7} if rule == "lion" else {}
    alone = train(0, "alone", options, range(20))
    for rank in two.run(train, mode, options, range(20)):
        assert apart(rank["params"], alone["params"]) < 1e-6
        assert rank["steps"] == 20 and rank["skipped"] == 0


def test_f16_muon_moves_whole_matrices_where_layers_are_sharded(two: TwoProcesses) -> None:
    """Newton-Schulz runs in bfloat16: a last bit of the input becomes 2^-9 of an entry, of 0.2 learning rates each step."""
    options = {"policy": FULL, "rule": "muon", "lr": 1e-4}
    alone = train(0, "alone", options, range(10))
    for rank in two.run(train, "sharded", options, range(10)):
        assert apart(rank["params"], alone["params"]) < 10 * 1e-4 * 2**-6


@pytest.mark.parametrize("mode", MODES)
def test_clipping_is_by_the_norm_of_the_whole_gradient(two: TwoProcesses, mode: str) -> None:
    alone = train(0, "alone", {"policy": FULL}, range(6), None, None, 0.05)
    for rank in two.run(train, mode, {"policy": FULL}, range(6), None, None, 0.05):
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert apart(rank["params"], alone["params"]) < 1e-6


@pytest.mark.parametrize("options", [{"memory_budget": 0.25}, {"memory_budget": 0.5, "policy": "random"}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_rank_decides_alike_and_holds_its_budget(two: TwoProcesses, mode: str, options: dict[str, Any]) -> None:
    """Ranks see other losses and, where state is sharded, other statistics: what is decided on is what all of them see."""
    one, other = two.run(train, mode, options, range(21))
    assert one["applied"] == other["applied"] and len(one["seen"]) == 5
    assert equal(one["seen"], other["seen"]) and equal(one["params"], other["params"])
    assert all(rank["peak"] <= rank["budget"] for rank in (one, other))
    assert one["budget"] == other["budget"]


def test_decisions_of_shards_are_made_on_the_statistics_of_whole_layers(two: TwoProcesses) -> None:
    """Gradient norms are those of one process; what is sampled is sampled elsewhere, and only near."""
    alone = train(0, "alone", {"policy": FULL}, range(9))
    for mode in MODES:
        seen = two.run(train, mode, {"policy": FULL}, range(9))[0]["seen"]
        for here, there in zip(seen, alone["seen"], strict=True):
            assert torch.allclose(here[:, :2], there[:, :2], atol=1e-4)      # norm and root mean square
            assert torch.allclose(here[:, 2], there[:, 2], atol=1e-2)        # running means of norms are not norms of means
            place = FEATURE_INDEX["loss"]
            assert torch.allclose(here[:, place], there[:, place], atol=1e-5)


def test_state_sharded_by_layers_or_by_fsdp2_is_half_of_it_on_each_rank(two: TwoProcesses) -> None:
    whole = train(0, "alone", {"policy": M8V8}, range(3))["bytes"]
    assert [rank["bytes"] for rank in two.run(train, "ddp", {"policy": M8V8}, range(3))] == [whole, whole]
    for mode in ("sharded", "fsdp2"):
        shares = [rank["bytes"] / whole for rank in two.run(train, mode, {"policy": M8V8}, range(3))]
        assert max(shares) < 0.55 and sum(shares) > 0.95


def trained_by_hook(rank: int, bits: int | None, feedback: bool, steps: int) -> tuple[list[Tensor], int, int, int]:
    model: Any = nn.parallel.DistributedDataParallel(network())
    state = EncodedGradients(bits or 32, error_feedback=feedback)
    if bits is not None:
        model.register_comm_hook(state, encoded_gradient_hook)
    optimizer = MANGO(model.parameters(), lr=1e-3, policy=FULL, memory_budget=3.0)
    for step in range(steps):
        optimizer.zero_grad()
        x = batch(step, rank, WORLD)
        (model(x) - x.square()).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], state.sent_bytes, state.plain_bytes, state.nbytes


def test_gradients_sent_in_32_bits_are_ddps_own(two: TwoProcesses) -> None:
    plain, _, _, _ = two.run(trained_by_hook, None, False, 5)[0]
    for params, sent, whole, _ in two.run(trained_by_hook, 32, False, 5):
        assert equal(params, plain) and sent == whole > 0


@pytest.mark.parametrize("feedback", [False, True], ids=["by chance", "feedback"])
@pytest.mark.parametrize("bits", [8, 4])
def test_encoded_gradients_send_a_fraction_of_the_bytes_and_train_alike(two: TwoProcesses, bits: int, feedback: bool) -> None:
    """Scales are 2 bytes per block of 128 or 64: 8.125 and 4.25 bits per value. At lr 1e-3 twenty steps of Adam go 0.02."""
    plain, _, _, _ = two.run(trained_by_hook, None, False, 20)[0]
    (one, sent, whole, owed), (other, *_) = two.run(trained_by_hook, bits, feedback, 20)
    assert equal(one, other)                                             # decoded alike on both ranks
    assert sent / whole == pytest.approx((bits + 16 / (128 if bits == 8 else 64)) / 32, rel=0.01)
    moved = torch.cat([(a - b).flatten() for a, b in zip(plain, network().parameters(), strict=True)]).norm()
    missed = torch.cat([(a - b).flatten() for a, b in zip(one, plain, strict=True)]).norm()
    assert 0 < missed < (0.1 if bits == 8 else 0.5) * moved
    numel = sum(p.numel() for p in one)
    assert owed == 0 if not feedback else numel < owed < 1.05 * numel    # 8 bits each, in no more blocks than buckets add


def hook_with_nan(rank: int) -> list[float]:
    model: Any = nn.parallel.DistributedDataParallel(network())
    model.register_comm_hook(EncodedGradients(4, error_feedback=True), encoded_gradient_hook)
    sums = []
    for step in range(2):
        x = batch(step, rank, WORLD)
        model.zero_grad()
        (model(x).sum() * (float("nan") if step == 0 and rank == 1 else 1.0)).backward()
        sums.append(float(sum(p.grad.sum() for p in model.parameters())))
    return sums


def test_a_gradient_that_is_not_finite_arrives_as_such_and_is_not_owed_for_ever(two: TwoProcesses) -> None:
    for first, second in two.run(hook_with_nan):
        assert first != first and abs(second) < float("inf")


CONFIGS: dict[str, dict[str, Any]] = {
    "full": {"policy": FULL},
    "random": {"policy": "random", "memory_budget": 0.6},
    "feedback": {"policy": CompressionConfig(gradient_bits=4, sparsity=0.5, momentum_bits=4, variance_bits=4)},
    "rank": {"policy": LADDER[1]},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumed_on_as_many_ranks_is_the_same_bit_for_bit(two: TwoProcesses, mode: str, name: str, tmp_path: Path) -> None:
    options, folder = CONFIGS[name], str(tmp_path / "checkpoint")
    straight = two.run(train, mode, options, range(13))
    two.run(train, mode, options, range(6), None, folder)
    for resumed, ahead in zip(two.run(train, mode, options | {"seed": 9}, range(6, 13), folder), straight, strict=True):
        assert equal(resumed["params"], ahead["params"]) and resumed["applied"] == ahead["applied"][6:]
        assert resumed["tensors"].keys() == ahead["tensors"].keys()
        own = {key for key in ahead["tensors"] if ":state" in key or ":statistics" in key}
        assert all(torch.equal(resumed["tensors"][key], ahead["tensors"][key]) for key in own)


@pytest.mark.parametrize("mode", MODES)
def test_a_full_precision_run_goes_on_at_another_number_of_ranks_and_back(two: TwoProcesses, mode: str, tmp_path: Path) -> None:
    """Two ranks, then one, then two again: within 1e-6 of a run on one throughout. Float32 state is only put together."""
    options, first, second = {"policy": FULL}, str(tmp_path / "two"), str(tmp_path / "one")
    alone = train(0, "alone", options, range(18))
    two.run(train, mode, options, range(6), None, first)
    train(0, "alone", options, range(6, 12), first, second)
    for rank in two.run(train, mode, options, range(12, 18), second):
        assert apart(rank["params"], alone["params"]) < 1e-6 and rank["steps"] == 18


@pytest.mark.parametrize("mode", ["ddp", "sharded"])
def test_whole_tensors_cross_to_another_number_of_ranks_code_by_code(two: TwoProcesses, mode: str, tmp_path: Path) -> None:
    options, folder = {"policy": "random", "memory_budget": 0.6}, str(tmp_path / "checkpoint")
    saved: dict[str, Tensor] = {}
    for rank in two.run(train, mode, options, range(7), None, folder):
        saved |= rank["tensors"]
    found = train(0, "alone", options, range(0), folder)["tensors"]
    here = {key for key in saved if not key.startswith("run@")}
    assert here == {key for key in found if not key.startswith("run@")}
    assert all(torch.equal(saved[key], found[key]) for key in here)


@pytest.mark.parametrize(("config", "error"), [(M8V8, 0.02), (LADDER[1], 1e-2)], ids=["m8v8", "rank 8"])
def test_shards_are_decoded_and_encoded_anew_as_one(
    two: TwoProcesses, config: CompressionConfig, error: float, tmp_path: Path
) -> None:
    """FSDP2 to one process. At 8 bits blocks of 128 and 256 lie elsewhere: one more rounding of 0.7 %. In a subspace the two
    shards' spans of rank 8 do not fit into one of rank 8, and the config's bytes are what is kept."""
    folder, options = str(tmp_path / "checkpoint"), {"policy": config}
    parts: dict[str, Tensor] = {}
    for rank in two.run(dense_moments, options, folder):
        for key, part in rank.items():
            parts[key] = torch.cat([parts[key], part]) if key in parts else part
    _, optimizer = build("alone", options)
    load_checkpoint_state(optimizer, folder)
    for target in optimizer.targets:
        state = optimizer.state[target.param]["tensor"]
        assert state.config == (FULL if target.layer is None else config) and state.step == 7
        exp_avg, _ = state.moments()
        expected = parts[target.name]
        off = float((exp_avg - expected).norm() / expected.norm())
        assert off < error if not config.rank or target.layer is None else off < 0.8
    assert optimizer.state_bytes() <= optimizer.planned_bytes() <= optimizer.memory_budget


def dense_moments(rank: int, options: dict[str, Any], folder: str) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict_saver import save

    model, optimizer = build("fsdp2", options)
    for step in range(7):
        optimizer.zero_grad()
        x = batch(step, rank, WORLD)
        (model(x) - x.square()).square().mean().backward()
        optimizer.step()
    save({"optimizer": checkpoint_state(optimizer)}, checkpoint_id=folder)
    return {t.name: optimizer.state[t.param]["tensor"].moments()[0].clone() for t in optimizer.targets if t.mine}


def own_state_dicts(rank: int, mode: str) -> tuple[list[str], str]:
    model, optimizer = build(mode, {"policy": M8V8})
    model(batch(0, rank, WORLD)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    _, other = build("alone", {"policy": M8V8, "process_group": False})
    try:
        other.load_state_dict(saved)
    except ValueError as error:
        return list(saved["mango"]), str(error)
    return list(saved["mango"]), ""


def test_a_state_dict_of_a_shard_is_never_taken_for_the_whole(two: TwoProcesses) -> None:
    """Savers that keep one of equal keys would drop all shards but one, and resume from a corrupted state without a word."""
    for mode in ("sharded", "fsdp2"):
        (keys, error), (others, _) = two.run(own_state_dicts, mode)
        assert not set(keys) & set(others) and "checkpoint_state" in error
    assert two.run(own_state_dicts, "ddp")[0][1] == ""


def test_a_checkpoint_that_does_not_fit_is_refused(two: TwoProcesses, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    two.run(train, "fsdp2", {"policy": FULL}, range(2), None, folder)
    _, optimizer = build("alone", {"policy": FULL})
    with pytest.raises(ValueError, match="nothing under 'other'"):
        load_checkpoint_state(optimizer, folder, prefix="other")
    with pytest.raises(ValueError, match="other layers"):
        load_checkpoint_state(MANGO(nn.Linear(64, 64).named_parameters(), memory_budget=3.0), folder)
    part = two.run(train, "fsdp2", {"policy": FULL}, range(2))[0]["tensors"]
    with pytest.raises(ValueError, match="no run"):
        load_checkpoint_state(optimizer, part)


def test_one_process_reads_back_what_it_gave_without_files() -> None:
    model, optimizer = build("alone", {"memory_budget": 0.3})
    for step in range(5):
        model(batch(step, 0, 1)).square().mean().backward()
        optimizer.step()
    saved = checkpoint_state(optimizer)
    _, other = build("alone", {"memory_budget": 0.3, "seed": 3})
    load_checkpoint_state(other, saved)
    again = checkpoint_state(other)
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)


def refusals(rank: int) -> list[str]:
    found = []
    for mode, options in (("ddp", {"release_gradients": True}), ("fsdp2", {"rule": "muon"}), ("fsdp2", {"shard": True})):
        try:
            model, _ = build(mode, {key: value for key, value in options.items() if key != "shard"})
            MANGO(model.named_parameters(), **options)
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_cannot_be_shared_is_refused_with_what_to_do(two: TwoProcesses) -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        MANGO(network().parameters(), shard=True)
    released, muon, sharded = two.run(refusals)[0]
    assert "process_group=False" in released and "shard=True" in muon and "sharded already" in sharded


def program(root: Path, name: str, folder: Path, *more: str, ranks: int = 2) -> dict[str, Any]:
    """What a program of `deploy/` reports after 12 more steps."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, str(root / "deploy" / name), "--steps", "12", "--folder", str(folder), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    told: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert told["ranks"] == len(told["state_bytes"]) == ranks
    assert all(held <= told["budget"] for held in told["state_bytes"])
    return told


def test_the_ddp_example_trains_with_two_processes_and_goes_on_with_one(root: Path, tmp_path: Path) -> None:
    first = program(root, "ddp.py", tmp_path, "--gradient-bits", "8")
    sent, plain = first["sent_bytes"]
    assert first["steps"] == 12 and first["loss"] < first["first_loss"] and sent < 0.26 * plain
    assert program(root, "ddp.py", tmp_path, ranks=1)["steps"] == 24


def test_the_fsdp2_example_trains_with_two_processes(root: Path, tmp_path: Path) -> None:
    told = program(root, "fsdp2.py", tmp_path)
    assert told["steps"] == 12 and told["loss"] < told["first_loss"]
