"""What can be learned at all: the studies of the oracle's head-room, of estimated returns, of other trunks."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import cost_fidelity, distilled_tree, ope_returns, oracle_headroom, trunk_variants
from mango.config import LADDER
from mango.features import FEATURES
from mango.policy_file import load_policy
from mango_env.cache import build_cache
from train_policy.additive import AdditivePolicy, fit, outcomes_of
from train_policy.collect import CollectArgs, collect
from train_policy.evaluate import policy_of, start_run

FIXTURE = Path(__file__).resolve().parent.parent / "trajectories" / "fixture"
OPE = ope_returns.Args(
    budgets="0.125", policies="water-filling", explored="", steps=4, interval=2, drawn=2, fixed_seeds=1, seeds=2, updates=5,
    epochs=1,
)  # fmt: skip

HEADROOM = oracle_headroom.Args(
    workloads="digits_mlp", rules="adamw", budgets="0.125", policies="water-filling", fixed="m0v0,m4v0", seeds=1, steps=6,
    interval=3, rates="1",
)  # fmt: skip


def run(policy: str, seed: int, loss: float, budget: float = 4.0, **more: Any) -> dict[str, Any]:
    facts = {"workload": "digits_mlp", "rule": "adamw", "seed": seed, "policy": policy, "weights": "", "budget": budget}
    facts |= {"budget_bytes": 100, "state_bytes_peak": 10, "val_loss": loss, "val_loss_full": 1.0, "within_budget": True}
    return facts | more


def test_head_room_is_what_the_oracle_saves_of_the_best_rung_that_fits_and_noise_what_16_bits_differ_by() -> None:
    trials = {"promised": [2.0, 4.0], "brought": [1.0], "cpu_seconds": 5.0}
    runs = [run("fixed:m0v0", seed, 1.07) for seed in range(2)]
    runs += [run("fixed:m4v0", seed, 1.05 + 0.02 * seed, state_bytes_peak=90) for seed in range(2)]
    runs += [run("fixed:m16v16", seed, loss, state_bytes_peak=900) for seed, loss in enumerate((1.03, 0.96))]
    runs += [run("oracle", seed, 1.01 + 0.02 * seed, 0.125, **trials) for seed in range(2)]
    runs += [run("water-filling", seed, 1.02, 0.125) for seed in range(2)]
    (case,) = oracle_headroom.cases(runs, replace(HEADROOM, seeds=2))
    assert case["best_fixed"] == "m4v0" and case["best_fixed_gap"] == pytest.approx(6.0) and case["oracle"] == "oracle"
    assert case["gap"] == pytest.approx(2.0) and case["headroom"] == pytest.approx([4.0, 4.0])
    assert case["noise"] == pytest.approx((0.5 * (3.0**2 + 4.0**2)) ** 0.5)        # both ways of differing are noise
    assert case["promised"] == pytest.approx(3.0) and case["brought"] == pytest.approx(1.0) and case["failed"] == 0
    (total,) = oracle_headroom.totals([case])
    assert total["pairs"] == 2 and total["headroom"] == total["most"] == pytest.approx(4.0)


def test_hindsight_scores_are_losses_at_the_end_and_leave_the_run_as_it_was() -> None:
    facts = {"workload": "digits_mlp", "rule": "adamw", "seed": 0, "lr": 2e-3, "budget": 0.125, "policy": "hindsight"}
    run = oracle_headroom.begun(facts, HEADROOM)
    held = list(run.optimizer.applied)
    scores = oracle_headroom.hindsight(run)
    assert run.t == 0 and run.optimizer.applied == held and scores.shape == (3, 2)
    alone = oracle_headroom.begun(facts, HEADROOM)
    while not alone.done:
        alone.advance()
    kept = [scores[layer, run.optimizer.ladder.index(config.name)] for layer, config in enumerate(held)]
    assert kept == pytest.approx([-100 * math.log(alone.evaluate()["val_loss"])] * 3) and len(set(scores.flatten().tolist())) > 1


def test_the_oracles_study_runs_within_its_budget_and_goes_on(tmp_path: Path) -> None:
    args = replace(HEADROOM, out=tmp_path / "o.json")
    oracle_headroom.train(args)
    kept = json.loads(args.out.read_text())
    assert sorted(one["policy"] for one in kept["runs"]) == [
        "fixed:m0v0", "fixed:m16v16", "fixed:m4v0", "hindsight", "oracle", "water-filling"
    ]  # fmt: skip
    for name, decisions in (("oracle", 2), ("hindsight", 1)):
        found = next(one for one in kept["runs"] if one["policy"] == name)
        assert found["within_budget"] and {rung for row in found["decisions"] for rung in row} <= {"m0v0", "m4v0"}
        assert len(found["decisions"]) == decisions and len(found["promised"]) == len(found["brought"])
        assert min(found["promised"]) > -1e-9
    assert kept["cases"][0]["noise"] < 1.0
    oracle_headroom.train(args)
    assert json.loads(args.out.read_text())["runs"] == kept["runs"]          # times too: nothing was run again


def test_an_estimate_is_judged_by_ranks_and_by_what_its_choice_loses() -> None:
    real = {"a": [1.0, 1.2], "b": [2.0, 2.2], "c": [3.0, 3.2], "d": [4.0, 4.2]}
    said = {"a": 10.0, "b": 20.0, "c": 40.0, "d": 30.0}
    facts = {"budget": 4.0, "reward": "default"}
    rows = [facts | {"policy": name, "fqe": said[name], "real_by_seed": real[name]} for name in real]
    (found,) = ope_returns.summary(rows)
    assert found["spearman"] == pytest.approx(0.8) and found["low"] <= 0.8 <= found["high"]
    assert (found["best"], found["chosen"]) == ("d", "c") and found["chosen_loses"] == pytest.approx(1.0)
    assert found["among_the_best"] == pytest.approx(-1.0)                     # c and d are the better half
    assert found["agreement"] == pytest.approx(1.0) and found["random_loses"] == pytest.approx(1.5)
    assert found["bias"] == pytest.approx(25 - 2.6)


def test_the_action_that_is_valued_under_a_budget_is_the_one_that_the_optimizer_applies(tmp_path: Path) -> None:
    args = replace(OPE, root=tmp_path / "store")
    cache, run = ope_returns.record(args, 0.125), start_run("digits_mlp", 0, 0.125, "hold", args.run)
    assert ope_returns.fitting_rungs(args, 0.125, LADDER.names) == ["m0v0", "r32p4q4v0", "m2v0", "m4v0"]
    obs = torch.from_numpy(cache.columns["observations"].take(cache.begins[:3], 0))                   # layers of the first run
    decide = ope_returns.decider_under_budget(policy_of("water-filling"), cache, run)
    applied = run.apply(policy_of("water-filling").scores(obs))
    assert [LADDER[int(rung)] for rung in decide(obs).argmax(1)] == applied
    assert decide(torch.zeros(2, 64)).argmax(1).tolist() == [0, 0]                                      # after the end: nothing
    paid = ope_returns.rescored(cache, ope_returns.REWARDS["loss alone"])
    assert np.allclose(paid.returns(), -np.array([one["reward_loss"].sum() for one in cache.episodes()]), atol=1e-6)


def test_estimates_and_real_returns_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ope_returns, "REWARDS", {"loss alone": ope_returns.REWARDS["loss alone"]})
    args = replace(OPE, root=tmp_path / "store", out=tmp_path / "ope.json")
    ope_returns.train(args)
    kept = json.loads(args.out.read_text())
    assert [row["policy"] for row in kept["runs"]][4:] == ["water-filling", "bc", "iql"]
    assert all(len(row["real_by_seed"]) == 2 for row in kept["runs"]) and len(kept["summary"]) == 1
    ope_returns.train(args)
    assert json.loads(args.out.read_text())["runs"] == kept["runs"]


def test_importance_sampling_knows_the_policies_that_explored(tmp_path: Path) -> None:
    args = replace(OPE, root=tmp_path / "store", explored="fixed:m4v0", drawn=6)
    facts = {"budget": 4.0, "reward": "loss alone", "fqe": 0.0, "real": 0.0}
    known, other = ope_returns.by_importance([facts | {"policy": f"fixed:{rung}"} for rung in ("m4v0", "m16v16")], args)
    assert known["low"] <= known["importance"] <= known["high"] and known["effective"] > 1
    assert other["importance"] is None and "no recorded episode decides as the policy does" in other["note"]


def test_mixed_sequences_keep_every_feature_in_time() -> None:
    obs = torch.arange(5).float()[:, None, None] * 100 + torch.arange(3).float()[:, None] + torch.zeros(5, 3, 64)
    found = trunk_variants.mixed(obs, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, 1:] - found[:, :-1], torch.ones(5, 2, 64)) and not torch.equal(found, obs)
    assert torch.equal(found.sort(0).values, obs)
    kinds = [i for i, feature in enumerate(FEATURES) if feature.name.startswith("kind_")]
    assert len({tuple(row) for row in found[:, 0, kinds].T.tolist()}) == 1                            # from one episode


def test_an_allocation_loses_nothing_where_it_is_the_teachers() -> None:
    truth, zero, one = np.array([[0.0, 3.0], [0.0, 1.0]]), np.array([0, 0]), np.array([1, 1])
    assert trunk_variants.compared(truth, one, one, one, zero) == (1.0, 1.0, 0.0, 4.0, 1.0)
    assert trunk_variants.compared(truth, one, np.array([1, 0]), zero, zero) == (0.0, 0.5, 1.0, 4.0, 0.0)


def test_students_learn_their_teachers_scores_and_are_compared_on_runs_they_have_not_seen(tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(FIXTURE, store)                          # the cache is written beside the data
    args = trunk_variants.Args(data=store, left_out="", updates=60, budgets="0.25", timed_layers="3", out=tmp_path / "t.json")
    known, tests = trunk_variants.parts(args)
    assert list(tests) == ["runs held out"]
    assert not set(known.attributes["run_id"]) & set(tests["runs held out"].attributes["run_id"])
    trunk_variants.train(replace(args, students="lstm"))
    kept = json.loads(args.out.read_text())
    assert [row["student"] for row in kept["students"]] == ["teacher", "lstm"]
    (row,) = kept["fidelity"]
    assert row["decisions"] > 0 and 0 <= row["equal"] <= row["layers_equal"] <= 1 and row["score_lost"] >= -1e-9
    teacher = load_policy("universal").network
    few, many = (trunk_variants.teach("lstm", teacher, known, replace(args, updates=updates))[1] for updates in (5, 60))
    assert many < few


def test_the_costs_themselves_lose_nothing_and_what_is_no_better_than_chance_loses(tmp_path: Path) -> None:
    collect("digits_mlp", ["factorial", "fixed:m8v0", "random"], 4, [0.5], tmp_path / "data", CollectArgs(horizon=12, interval=4))
    args = cost_fidelity.Args(data=tmp_path / "data", budgets="0.0625,0.125", shares="0.5", draws=1, out=tmp_path / "f.json")
    cost_fidelity.train(args)
    rows = json.loads(args.out.read_text())["rows"]
    assert [row["policy"] for row in rows] == ["universal"] * 2 + ["0.5 of the runs, draw 0"] * 2
    assert all(row["decisions"] > 0 and row["lost"] >= -1e-3 * row["best"] and 0 <= row["equal"] <= 1 for row in rows)
    cache = build_cache(args.data)
    costs = fit(outcomes_of(cache)).costs
    asked = list(cost_fidelity.cases(cache, costs, args))
    assert all(row["lost"] == 0 and row["equal"] == 1 for row in cost_fidelity.measure(asked, AdditivePolicy(costs)))
    assert any(row["lost"] > 0 for row in rows)


def test_a_share_of_the_runs_keeps_their_twins(tmp_path: Path) -> None:
    collect("digits_mlp", ["factorial", "random"], 3, [0.5], tmp_path, CollectArgs(horizon=8, interval=4))
    data = outcomes_of(build_cache(tmp_path))
    part = cost_fidelity.without(data, 0.0, np.random.default_rng(0))
    assert len(part) == 3 and not part.loss.any() and len(cost_fidelity.without(data, 1.0, np.random.default_rng(0))) == len(data)


def test_trees_are_judged_on_workloads_that_they_have_not_learned_from(tmp_path: Path) -> None:
    args = distilled_tree.Args(
        policy="water-filling", learned="digits_mlp", judged="digits_mlp+width=64", rules="adamw", budgets="0.125", depths="1,3",
        seeds=2, steps=20, interval=5, out=tmp_path / "t.json", frozen=tmp_path / "tree.safetensors",
    )  # fmt: skip
    distilled_tree.train(args)
    frozen = load_policy(args.frozen)
    assert frozen.network.architecture["depth"] == 1 and frozen.card["evaluation"][1]["runs"] == 2
    kept = json.loads(args.out.read_text())
    assert [row["policy"] for row in kept["summary"]] == ["water-filling", "tree of depth 1", "tree of depth 3"]
    assert {row["workload"] for row in kept["rows"]} == {"digits_mlp+width=64"} and len(kept["rows"]) == 6
    policy, shallow, deep = kept["summary"]
    assert policy["more"] == 0 and "agrees" not in policy and policy["runs"] == 2
    for tree in (shallow, deep):
        assert 0 <= tree["agrees"] <= 1 and tree["more"] == pytest.approx(tree["above"] - policy["above"])
    nodes = {name: len(tree["nodes"]["feature"]) for name, tree in kept["trees"].items()}
    assert nodes["tree of depth 1"] <= 3 < nodes["tree of depth 3"]
