"""Promises of online learning in a study (row F2): the updates are real, the budget holds, what is frozen stays frozen."""

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mango.config import LADDER
from mango.networks import PolicyNetwork
from mango.policy_file import freeze, load_policy
from mango.ppo_trainer import STATISTICS, Agents
from mango_env import TrainingRun
from train_policy.cli import app
from train_policy.online import EXPLORATION, NetworkAgents, OnlineLearner
from train_policy.run_study import Args, run_method
from train_policy.study_methods import methods

OBS = torch.rand((3, 64), generator=torch.Generator().manual_seed(0))


def learned(steps: int, policy: str = "demo", **learner: int) -> OnlineLearner:
    run = TrainingRun("digits_mlp", 0, horizon=steps, interval=2, policy="hold")
    found = OnlineLearner(policy, run, **learner)
    while not run.done:
        found.decide()
        interval = run.advance()
        assert interval.state_bytes_peak <= run.budget
        found.learn(interval)
    found.finish()
    return found


@pytest.fixture
def made(tmp_path: Path) -> dict[str, str]:
    """Frozen policies of both heads, and of a trunk with a memory."""
    cards = {
        "rung": freeze(PolicyNetwork("mlp", hidden=(16,)), tmp_path / "rung", card={}),
        "knobs": freeze(PolicyNetwork("mlp", hidden=(16,)), tmp_path / "knobs", head="knobs", card={}),
        "lstm": freeze(PolicyNetwork("lstm", hidden_dim=16, num_layers=1), tmp_path / "lstm", card={}),
    }
    return {name: str(path) for name, path in cards.items()}


def test_f2_the_command_as_written_ends_with_0_and_has_the_statistics_of_real_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = []
    for words in (["--epochs", "3"], ["--epochs", "3", "--no-online"]):
        done = CliRunner().invoke(app, ["run", "single", "--optimizer", "mango_learned", *words])
        assert done.exit_code == 0, done.output
        rows += json.loads(Path("runs/study/study.json").read_text())["rows"]
    online, frozen = rows
    assert "ppo_stats" not in frozen and len(online["decisions"]) == len(frozen["decisions"])
    assert online["state_bytes_peak"] <= online["budget_bytes"] and online["ppo_stats"][-1]["step"] == online["steps"]
    for update in online["ppo_stats"]:
        assert set(update) == {"step", *STATISTICS} and all(math.isfinite(value) for value in update.values())
        assert update["samples"] > 0 and update["grad_norm"] > 0
    assert "ppo_stats" not in Path("runs/study/study.csv").read_text()


@pytest.mark.parametrize("kind", ["rung", "knobs", "lstm"])
def test_every_update_changes_the_copy_and_never_the_file(kind: str, made: dict[str, str]) -> None:
    found = learned(20, made[kind], update_every=4)
    assert found.trainer.updates == len(found.stats) == math.ceil(9 / 4) - (9 % 4 == 1) and found.trainer.experiences == 9
    layers = len(found.run.layers)
    assert [update["samples"] for update in found.stats] == [4 * layers, 4 * layers]
    frozen = load_policy(made[kind]).network
    moved = {name for name, p in found.agents.network.named_parameters() if not torch.equal(p, frozen.get_parameter(name))}
    assert {"value_head.weight", "rung_head.weight" if kind != "knobs" else "knob_head.weight"} <= moved
    assert any(name.startswith("trunk") for name in moved)


def test_a_run_that_learns_repeats_with_its_seed() -> None:
    first, second = (run_method(Args(optimizer="mango_learned", steps=60), methods()["mango_learned"], 1) for _ in range(2))
    assert first["ppo_stats"] == second["ppo_stats"] and first["decisions"] == second["decisions"]


def test_draws_have_the_policys_probabilities_and_sharpening_keeps_the_best_rung() -> None:
    agents = NetworkAgents(PolicyNetwork("mlp", hidden=(16,), seed=3), seed=0)
    assert isinstance(agents, Agents)
    with torch.no_grad():
        agents.network.rung_head.weight.mul_(30)
        probs = agents.evaluate(OBS).logits["rung"].softmax(-1)
        drawn = torch.stack([agents.decide(OBS).argmax(-1) for _ in range(4000)])
    counts = torch.nn.functional.one_hot(drawn, len(LADDER)).double().mean(0)
    assert (counts - probs).abs().max() < 5 * math.sqrt(0.25 / 4000)
    best = agents.decide(OBS, explore=False).argmax(-1)
    before = agents.entropy(agents.evaluate(OBS)).mean()
    assert agents.sharpen(OBS, EXPLORATION) > 1 and before > EXPLORATION
    assert agents.entropy(agents.evaluate(OBS)).mean().item() == pytest.approx(EXPLORATION, abs=1e-3)
    assert torch.equal(agents.decide(OBS, explore=False).argmax(-1), best)
    assert agents.sharpen(OBS, 9.0) == 1.0


def test_what_is_learned_from_is_what_was_applied() -> None:
    run = TrainingRun("digits_mlp", 0, horizon=6, interval=2, policy="hold", memory_budget=0.1)
    found = OnlineLearner("universal", run)
    applied = []
    while not run.done:
        found.decide()
        applied.append(list(run.optimizer.applied))
        found.learn(run.advance())
    kept = torch.cat([actions for segment in found.trainer._segments for actions in segment.actions])
    assert kept.flatten().tolist() == [LADDER.rungs.index(config) for configs in applied[1:] for config in configs]


def test_what_cannot_learn_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["--optimizer", "adamw", "--online"], "online: 'adamw' has no policy that could learn; mango_learned has"),
        (["--optimizer", "mango_learned", "--policy", "random", "--online", "--validate-config"], "only a frozen policy can"),
    ):
        failed = CliRunner().invoke(app, ["run", "single", *words])
        assert failed.exit_code == 2 and message in failed.stderr and failed.stderr.count("\n") == 1
    row = run_method(Args(optimizer="mango_learned", policy="random", steps=4), methods("random")["mango_learned"], 0)
    assert "ppo_stats" not in row
    compared = Args("comparative", steps=4)
    assert "ppo_stats" not in run_method(compared, methods()["mango_learned"], 0)
