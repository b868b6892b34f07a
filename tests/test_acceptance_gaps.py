"""Rows of docs/acceptance.md that no other test holds, each in the words of its row."""

import contextlib
import io
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from experiments import baseline_optimizers
from experiments.comparison_figures import FIGURES
from experiments.comparison_runs import Args as CompareArgs
from experiments.comparison_table import summary
from mango import MANGO, CompressionConfig
from mango.config import FULL, KNOBS, NVEC
from mango.networks import PolicyNetwork
from mango.policies import phases
from mango.state import StorageOptions, predicted_bytes
from mango_env import ENV_ID
from mango_env.cache import build_cache
from mango_env.reward import Reward
from tests.test_snippets import ONLINE_LEARNING, YourModel, batches, run
from tests.tiny_workload import Regression, tiny
from train_policy import bc
from train_policy.collect import CollectArgs, collect
from train_policy.gate import bootstrap_interval
from train_policy.report_data import traces
from train_policy.report_figures import heat_map
from train_policy.run_study import Args as StudyArgs
from train_policy.run_study import ablation, run_method
from train_policy.study_methods import methods


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fed(optimizer: MANGO, params: list[Parameter], sizes: list[float], seed: int = 0) -> Tensor:
    """The phases of layers after gradients of these norms."""
    for step, size in enumerate(sizes):
        for param in params:
            gradient = normal(tuple(param.shape), seed + step)
            param.grad = size * gradient / gradient.norm()
        optimizer.step()
    return phases(optimizer.observe())


@pytest.mark.parametrize(("lr", "expected"), [(1e-2, 1), (1e-5, 2)])
def test_b7_bursts_are_early_falling_norms_the_middle_and_small_steps_converged(lr: float, expected: int) -> None:
    """Flat norms alone are no sign of convergence under Adam, whose steps they do not shorten: the size of the steps is."""
    params = [Parameter(torch.ones(32, 32))]
    optimizer = MANGO(params, lr=lr, policy="hold", policy_update_freq=10, total_steps=400, memory_budget=2.0)
    assert phases(optimizer.observe()).tolist() == [0]                   # nothing was seen yet
    fed(optimizer, params, [1.0] * 50)
    assert fed(optimizer, params, [0.99**step for step in range(50)], 100).tolist() == [expected]
    assert fed(optimizer, params, [0.6] * 50, 200).tolist() == [expected]
    if expected == 1:
        assert fed(optimizer, params, [20.0, 0.1, 20.0], 400).tolist() == [0]
        assert fed(optimizer, params, [0.6] * 180, 500).tolist() == [2]  # past four fifths of the training


def test_d4_the_action_space_has_ranks_factor_bits_and_momentum_and_each_changes_the_bytes() -> None:
    env = gym.make(ENV_ID, workload=tiny, memory_budget=0.6, horizon=6, interval=3)
    assert isinstance(env.action_space, gym.spaces.MultiDiscrete)
    assert {"rank", "factor_bits_p", "factor_bits_q", "momentum_bits"} <= set(KNOBS)
    assert env.action_space.nvec.tolist()[: len(KNOBS)] == list(NVEC)
    low: dict[str, Any] = {"rank": 4, "factor_bits_p": 8, "factor_bits_q": 8, "variance_bits": 0}
    base: dict[str, Any] = {"rank": 0, "momentum_bits": 32}
    for knob, around, values in (("rank", low, (1, 4, 8)), ("factor_bits_p", low, (4, 8, 16)), ("factor_bits_q", low, (4, 8, 16)),
                                 ("momentum_bits", base, (0, 4, 8, 32))):  # fmt: skip
        sizes = []
        for value in values:
            config, param = CompressionConfig.from_dict(around | {knob: value}), Parameter(torch.zeros(48, 64))
            optimizer = MANGO([param], policy=config, memory_budget=4.0)
            param.grad = normal((48, 64), 0)
            optimizer.step()
            sizes.append(optimizer.state[param]["tensor"].nbytes)
            assert sizes[-1] == predicted_bytes((48, 64), config, StorageOptions())
        assert sizes == sorted(set(sizes)), knob


def test_d5_every_tensor_of_two_dimensions_or_more_of_a_mixed_model_is_low_rank_without_a_warning() -> None:
    """Warnings are errors in this suite."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({
            "embed": nn.Embedding(50, 32), "tall": nn.Linear(32, 128), "wide": nn.Linear(128, 32), "norm": nn.LayerNorm(32),
            "conv": nn.Conv2d(4, 16, 3), "line": nn.Conv1d(8, 16, 5), "cell": nn.LSTM(32, 32),
        })  # fmt: skip
    config = CompressionConfig(rank=4, factor_bits_p=8, factor_bits_q=4, variance_bits=0)
    optimizer = MANGO(model.named_parameters(), policy=config, min_numel=1, memory_budget=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        for param in model.parameters():
            param.grad = normal(tuple(param.shape), step)
        optimizer.step()
    assert optimizer.applied == [config] * len(optimizer.layers) and optimizer.skipped == 0
    for old, (name, param) in zip(before, model.named_parameters(), strict=True):
        assert not torch.equal(old, param)
        assert param.dim() < 2 or "projector" in optimizer.state[param]["tensor"].encoded, name


def test_d12_two_4_bit_states_take_less_than_8_bits_each_of_all_that_is_kept() -> None:
    params = [Parameter(torch.zeros(256, 256)), Parameter(torch.zeros(512, 128)), Parameter(torch.zeros(64))]
    optimizer = MANGO(params, policy=CompressionConfig(momentum_bits=4, variance_bits=4))
    fed(optimizer, params, [1.0])
    n = sum(param.numel() for param in params)
    assert 8 < optimizer.state_bytes() * 8 / n < 2 * 8 and optimizer.state_bytes() * 8 / n / 2 < 5


def test_d15_one_command_has_rows_of_adam_adafactor_and_4_bit_gradients_with_rank_4(tmp_path: Path) -> None:
    names = "adam,adafactor,mango_g4r4"
    args = baseline_optimizers.Args(names=names, width=64, depth=1, context=8, out=tmp_path / "told.json")
    told = {row["name"]: row for row in json.loads(baseline_optimizers.train(args).read_text())["baselines"]}
    assert list(told) == names.split(",") and all(row["losses"][-1] < row["losses"][0] for row in told.values())
    assert told["mango_g4r4"]["state_bytes_per_param"] < 0.4 * told["adam"]["state_bytes_per_param"]


def test_g1_the_peak_is_the_processes_own_within_a_percent() -> None:
    optimizer = MANGO([Parameter(torch.zeros(8, 8))])
    peak = optimizer.get_memory_usage()["peak_memory_gb"]
    assert peak * 1e9 == pytest.approx(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, rel=0.01)


def test_g2_g10_the_compression_ratio_is_that_of_the_bytes_that_were_stored() -> None:
    """Also while configs change: the mean over steps of AdamW's bytes over those that were there after each."""
    configs = [CompressionConfig(momentum_bits=8, variance_bits=8), CompressionConfig(momentum_bits=4, variance_bits=0), FULL]
    model, ratios = YourModel(), []
    optimizer = MANGO(model.parameters(), policy="hold", memory_budget=4.0, policy_update_freq=10)
    optimizer.apply(configs[0])
    for step, batch in enumerate(batches(60)):
        if step in (20, 40):
            optimizer.apply(configs[step // 20])
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
        ratios.append(optimizer.adamw_bytes / optimizer.state_bytes())
    found = optimizer.get_compression_stats()["avg_compression_ratio"]
    assert found == pytest.approx(sum(ratios) / len(ratios), rel=0.01) and found > 1 and ratios[30] > ratios[10] > 1 > ratios[50]


class Timed(Regression):
    """A workload with a clock of its own: training lasts from the first loss to the evaluation."""

    samples_per_step, tokens_per_step = 16, 64
    calls: ClassVar[list[float]] = []

    def loss(self) -> Tensor:
        self.calls.append(time.perf_counter())
        time.sleep(0.01)
        return super().loss()

    def evaluate(self) -> dict[str, float]:
        self.calls.append(time.perf_counter())
        return super().evaluate()


@pytest.mark.parametrize("method", ["adamw", "mango_adaptive"])
def test_g7_throughput_is_steps_times_batch_over_the_clock(method: str) -> None:
    """Of three turns, since another process may hold this one up between two readings of the two clocks."""
    off = []
    for _ in range(3):
        Timed.calls.clear()
        row = run_method(StudyArgs(workload=Timed, steps=40, budget=1.0), methods()[method], 0)
        wall = Timed.calls[40] - Timed.calls[0]
        assert row["tokens_per_second"] == pytest.approx(4 * row["samples_per_second"])
        off.append(abs(row["samples_per_second"] / (40 * 16 / wall) - 1))
    assert min(off) < 0.05, off


def test_a27_g13_five_seeds_at_a_quarter_of_the_bytes_stay_within_a_percent_of_accuracy() -> None:
    """Held-out accuracy of 359 digits, paired by seed, with a 95 % interval; bytes are the most that were stored."""
    args, gaps = StudyArgs(workload="digits_mlp", steps=120, budget=0.25), []
    for seed in range(5):
        ours, theirs = (run_method(args, methods()[name], seed) for name in ("mango_water_filling", "adamw"))
        assert ours["state_bytes_peak"] <= 0.25 * theirs["state_bytes_peak"] * (1 + 1e-6)
        gaps.append(100 * (ours["val_accuracy"] - theirs["val_accuracy"]))
    low, high = bootstrap_interval(gaps)
    assert low > -1 and high < 1, gaps


def rows_of(policy: str, losses: list[float], size: int) -> list[dict[str, Any]]:
    return [{"domain": "language", "workload": "w", "steps": 9, "policy": policy, "seed": seed, "status": "ok", "val_loss": loss,
             "state_bytes_peak": size, "parameters": 100, "adamw_bytes": 800, "steps_per_second": 5.0, "points_every": 1,
             "loss_curve": [loss + 1, loss]} for seed, loss in enumerate(losses)]  # fmt: skip


@pytest.fixture
def lines() -> list[dict[str, Any]]:
    """A summary over five seeds of two methods."""
    ours, theirs = [1.01, 2.02, 3.03, 4.04, 5.10], [1.0, 2.0, 3.0, 4.0, 5.0]
    found = {"runs": rows_of("adamw", theirs, 800) + rows_of("mango", ours, 200), "rates": [], "costs": []}
    return summary("language", ["mango", "adamw"], found, {}, CompareArgs(domains="language", steps=9, seeds=5))


def test_f25_g8_g10_five_seeds_give_a_mean_an_error_a_paired_interval_perplexity_and_a_ratio(lines: list[dict[str, Any]]) -> None:
    adamw, mango = sorted(lines, key=lambda line: line["method"])
    assert mango["seeds"] == 5 and mango["val_loss"] == pytest.approx(3.04)
    assert adamw["val_loss_se"] == pytest.approx(math.sqrt(2.5 / 5))
    gaps = [1.0, 1.0, 1.0, 1.0, 2.0]                                     # per cent, seed by seed: far narrower than the losses
    assert mango["gap_percent"] == pytest.approx(1.2)
    assert (mango["gap_low"], mango["gap_high"]) == pytest.approx(bootstrap_interval(gaps), abs=1e-6)
    assert 0.9 <= mango["gap_low"] <= 1.2 <= mango["gap_high"] <= 2.1
    assert mango["perplexity"] == pytest.approx(math.exp(3.04)) and mango["compression_ratio"] == 4.0 > adamw["compression_ratio"]


def test_f21_f22_figures_show_the_numbers_of_the_table(lines: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    styles: dict[str, dict[str, Any]] = {"adamw": {"color": "k", "linestyle": "-"}, "mango": {"color": "r", "linestyle": "-"}}
    runs = rows_of("adamw", [1.0], 800) + rows_of("mango", [1.01], 200)
    axes: dict[str, Any] = {}
    for name, (panel, projection) in FIGURES.items():
        axes[name] = Figure().add_subplot(projection=projection)
        panel(axes[name], lines, runs, styles)
    names = [label.get_text() for label in axes["memory"].get_yticklabels()]
    bars = {name: bar.get_width() for name, bar in zip(names, axes["memory"].patches, strict=True)}
    assert bars == {line["method"]: line["state_bytes_per_param"] for line in lines} == {"adamw": 8.0, "mango": 2.0}
    assert sorted(bar.get_width() for bar in axes["compression"].patches) == [1.0, 4.0]
    curves = {line.get_label(): line.get_ydata().tolist() for line in axes["training_curves"].lines}
    assert curves == {"adamw": [2.0, 1.0], "mango": [2.01, 1.01]}
    marked = {c.get_label(): c[0] for c in axes["trade_off"].containers}
    for line in lines:
        assert marked[line["method"]].get_xydata().tolist() == [[line["state_bytes_per_param"], line["val_loss"]]]
    worst = [*lines, {**lines[0], "method": "worse", "val_loss": 9.0, "state_bytes_per_param": 9.0}]
    again = Figure().add_subplot()
    FIGURES["trade_off"][0](again, worst, runs, styles | {"worse": {"color": "b", "linestyle": "-"}})
    hollow = {c.get_label(): c[0].get_markerfacecolor() == "none" for c in again.containers}
    assert hollow == {"adamw": False, "mango": False, "worse": True}
    assert all(ax.lines or ax.patches or ax.collections for ax in axes.values())


def test_f24_the_figure_of_decisions_has_the_rungs_that_were_logged() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    args = StudyArgs(workload="digits_mlp", steps=40, policy="demo", interval=10)
    row = run_method(args, methods("demo")["mango_learned"], 0)
    (trace,) = traces([row])
    (cells,) = heat_map(go, trace).data
    assert [list(column) for column in zip(*cells.text, strict=True)] == row["decisions"] and len(row["decisions"]) == 4
    assert list(cells.y) == row["layers"]


def door(monkeypatch: pytest.MonkeyPatch, words: str) -> tuple[int, dict[str, Any]]:
    """`python main.py ...` in this process: its exit code and its JSON."""
    import main

    monkeypatch.setattr(sys, "argv", ["main.py", *words.split()])
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended:
        main.main()
    content: dict[str, Any] = json.loads(Path("runs/study/study.json").read_text())
    return int(ended.value.code or 0), content


@pytest.mark.parametrize("optimizer", ["mango_learned", "mango_adaptive", "sgd", "adamw"])
def test_f2_f3_single_studies_end_with_0_and_their_json(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, content = door(monkeypatch, f"--mode single --optimizer {optimizer} --epochs 1")
    (row,) = content["rows"]
    assert code == 0 and row["policy"] == optimizer and row["best_train_loss"] <= row["loss_curve"][0] and row["val_accuracy"] > 0
    assert bool(row["decisions"]) == optimizer.startswith("mango")


def test_f5_an_ablation_has_a_row_for_every_component_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, content = door(monkeypatch, "--mode ablation --steps 10 --policy water-filling")
    names = [method.name for method in ablation(StudyArgs(policy="water-filling", steps=10), methods("water-filling"))]
    assert code == 0 and [row["policy"] for row in content["rows"]] == names and len(names) == 7 and not content["failures"]


def test_j4_the_online_learning_snippet_runs_under_autocast() -> None:
    class Half(YourModel):
        def forward(self, batch: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(batch).float()

    model = Half()
    first = model(next(batches(1))).item()
    user = {"compute_reward": lambda loss, *_: -loss.item(), "memory_usage": 0.5, "compression_error": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        names = run(ONLINE_LEARNING, model=model, dataloader=batches(220), **user)
    assert names["loss"].item() < first and all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert names["optimizer"].applied != [FULL] and names["optimizer"].skipped == 0


def test_j6_what_the_oracle_collected_can_be_cloned(tmp_path: Path) -> None:
    args = CollectArgs(horizon=6, interval=3, reward=Reward(loss="raw"))
    collect(tiny, ["oracle"], 3, 0.6, tmp_path / "store", args)
    cloning = bc.BcArgs(policies=("oracle",), top=1.0, epochs=2)
    result = bc.train(PolicyNetwork(hidden=(16,)), build_cache(tmp_path / "store"), cloning)
    assert 0 <= result.accuracy["rung"] <= 1 and math.isfinite(result.accuracy["rung"])
