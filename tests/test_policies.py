"""Policies: what they answer, that the budget cuts it, and that every one of the table works in the optimizer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.config import FULL, KNOBS, LADDER, NVEC, Ladder
from mango.features import FEATURE_INDEX, FEATURES
from mango.networks import PolicyNetwork
from mango.policies import (
    POLICIES,
    AdaptiveCompressionPolicy,
    AdaptivePolicy,
    FixedCompressionPolicy,
    FixedPolicy,
    HoldPolicy,
    RandomPolicy,
    ScheduledPolicy,
    ScoringPolicy,
    WaterFillingPolicy,
    phases,
    random_action,
    register_policy,
)
from mango.policy_choice import as_policy, proposals, rung_scores

SHAPES = ((48, 32), (2048,), (32, 8, 3, 3))
LOW, HIGH = torch.tensor([f.low for f in FEATURES]), torch.tensor([f.high for f in FEATURES])


def train(optimizer: MANGO, steps: int, check: Callable[[], None] = lambda: None) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator) + param.detach()
        optimizer.step()
        check()


def make(policy: Any = None, **options: Any) -> MANGO:
    params = [Parameter(torch.ones(shape)) for shape in (*SHAPES, (10,))]
    return MANGO(params, policy=policy, **({"policy_update_freq": 5} | options))


def observation(layers: int = 3, **features: float) -> Tensor:
    table = torch.zeros(layers, len(FEATURES))
    for name, value in features.items():
        table[:, FEATURE_INDEX[name]] = value
    return table


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_of_the_table_trains_within_the_budget(name: str) -> None:
    optimizer = make(name, memory_budget=0.5 if name != "fixed" else 1.2, total_steps=30)
    start = optimizer.param_groups[0]["params"][0].detach().clone()

    def check() -> None:
        assert optimizer.state_bytes() <= optimizer.memory_budget
        assert all(isinstance(config, CompressionConfig) for config in optimizer.applied)

    train(optimizer, 30, check)
    assert not torch.equal(start, optimizer.param_groups[0]["params"][0])
    optimizer.policy.reset()


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(seed=st.integers(0, 1000), layers=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_c3_every_emitted_action_is_legal(name: str, seed: int, layers: int) -> None:
    policy = POLICIES[name]()
    obs = LOW + torch.rand(layers, len(FEATURES), generator=torch.Generator().manual_seed(seed)) * (HIGH - LOW)
    choice = policy.act(obs)
    if isinstance(policy, ScoringPolicy):
        scores = rung_scores(policy.scores(obs), layers, len(LADDER))
        assert scores is not None
    if choice is None:
        assert name == "hold"
        return
    for config in proposals(choice, layers):
        action = config.to_action()
        assert all(0 <= index < n for index, n in zip(action, NVEC, strict=True))
        assert CompressionConfig.from_action(action) == config


def test_c3_random_actions_are_legal_and_reach_the_whole_menu() -> None:
    actions = random_action(2000, torch.Generator().manual_seed(0))
    assert actions.shape == (2000, len(KNOBS)) and actions.dtype == torch.int64
    for column, n in enumerate(NVEC):
        assert actions[:, column].unique().tolist() == list(range(n))  # type: ignore[no-untyped-call]


def test_c4_two_layers_get_different_configs_in_one_step() -> None:
    class ByLayer:
        def act(self, obs: Tensor) -> list[CompressionConfig]:
            return [FULL, CompressionConfig(momentum_bits=8, variance_bits=8), CompressionConfig(gradient_bits=4, sparsity=0.5)]

        def reset(self) -> None: ...

    optimizer = make(ByLayer())
    train(optimizer, 6)
    assert [config.name for config in optimizer.applied] == ["full", "m8v8", "g4s0.5m32v32"]
    bytes_of = optimizer.layer_bytes().tolist()
    assert bytes_of[0] == 8 * 48 * 32 and bytes_of[1] < 2.1 * 2048


def test_a20_a_schedule_goes_from_its_start_to_its_end() -> None:
    end = CompressionConfig(momentum_bits=4, variance_bits=0)
    optimizer = make(ScheduledPolicy(FULL, end), total_steps=50)
    assert set(optimizer.applied) == {FULL}
    seen: list[int] = []
    optimizer.register_decision_hook(lambda decision: seen.append(LADDER.index(decision.applied[0].name)))
    train(optimizer, 50)
    assert set(optimizer.applied) == {end}
    assert seen == sorted(seen, reverse=True) and len(set(seen)) > 4 and len(seen) == 10


def test_a20_a_schedule_without_known_length_stays_at_its_start() -> None:
    optimizer = make("scheduled")
    train(optimizer, 20)
    assert set(optimizer.applied) == {FULL}


def test_a21_the_default_starts_at_full_precision_and_adapts() -> None:
    optimizer = MANGO([Parameter(torch.ones(64, 64))], policy_update_freq=10)
    logged: list[CompressionConfig] = []
    train(optimizer, 30, lambda: logged.append(optimizer.applied[0]))
    assert logged[0] == FULL and logged[8] == FULL
    assert logged[-1] != FULL and optimizer.state_bytes() < optimizer.adamw_bytes


def test_a22_the_heuristic_s_own_decision_is_the_one_applied() -> None:
    policy = AdaptiveCompressionPolicy()
    optimizer = MANGO(
        [Parameter(torch.ones(64, 64))], policy_net=policy, error_feedback=True, policy_update_freq=10, total_steps=100
    )
    pairs: list[tuple[list[CompressionConfig], list[CompressionConfig]]] = []
    optimizer.register_decision_hook(lambda d: pairs.append((policy.act(d.observation), d.applied)))
    train(optimizer, 100)
    assert len(pairs) == 10 and all(wanted == applied for wanted, applied in pairs)
    assert len({applied[0] for _, applied in pairs}) > 1


def test_a22_phases_go_from_early_to_converged() -> None:
    assert phases(observation(progress=0.05, update_ratio=-2)).tolist() == [0, 0, 0]
    assert phases(observation(progress=0.5, update_ratio=-2, grad_trend=0.1)).tolist() == [1, 1, 1]
    assert phases(observation(progress=0.9, update_ratio=-2)).tolist() == [2, 2, 2]
    assert AdaptivePolicy()({"layers": observation(progress=0.05)}) == [FULL] * 3


def test_a23_a_fixed_config_is_constant_in_the_log_over_a_thousand_steps() -> None:
    config = CompressionConfig(momentum_bits=8, variance_bits=4)
    optimizer = MANGO([Parameter(torch.ones(32, 32))], policy=FixedCompressionPolicy(config))
    logged: set[CompressionConfig] = set()
    decisions: list[list[CompressionConfig]] = []
    optimizer.register_decision_hook(lambda d: decisions.append(d.applied))
    train(optimizer, 1000, lambda: logged.update(optimizer.applied))
    assert logged == {config} and decisions == [[config]] * 10
    assert optimizer.get_compression_stats()["changes"] == 0


def test_a23_a_group_added_later_gets_the_fixed_config_too() -> None:
    config = CompressionConfig(momentum_bits=8, variance_bits=8)
    optimizer = make(config)
    optimizer.add_param_group({"params": [Parameter(torch.ones(64, 64))]})
    assert set(optimizer.applied) == {config} and len(optimizer.applied) == 4


def test_a24_somebody_s_own_policy_is_asked_and_obeyed() -> None:
    class MyCustomPolicy:
        forgotten = 0

        def __call__(self, features: dict[str, Any]) -> dict[str, float]:
            assert features["layers"].shape == (3, 64) and features["grad_norm"].shape == (3,)
            return {"gradient_bits": 16, "momentum_bits": 16, "sparsity_ratio": 0.1}

        def reset_hidden_state(self) -> None:
            self.forgotten += 1

    inner = MyCustomPolicy()
    optimizer = make(inner, policy_update_freq=1)
    logged: list[tuple[float, ...]] = []
    optimizer.register_decision_hook(lambda d: logged.extend((c.gradient_bits, c.momentum_bits, c.sparsity) for c in d.applied))
    train(optimizer, 20)
    assert logged == [(16, 16, 0.1)] * 60
    in_force = optimizer.get_compression_config()
    assert [in_force[knob] for knob in ("gradient_bits", "momentum_bits", "sparsity_ratio")] == [16, 16, 0.1]
    optimizer.policy.reset()
    assert inner.forgotten == 1


def test_a19_the_policy_is_consulted_every_n_steps_and_its_last_action_stays_in_force() -> None:
    class Counting:
        calls = 0

        def act(self, obs: Tensor) -> CompressionConfig:
            self.calls += 1
            return LADDER[self.calls % len(LADDER)]

        def reset(self) -> None: ...

    policy = Counting()
    optimizer = make(policy, policy_update_freq=100)
    logged: list[str] = []
    train(optimizer, 450, lambda: logged.append(optimizer.applied[0].name))
    assert policy.calls == 4
    assert (
        logged == ["full"] * 99 + [LADDER[1].name] * 100 + [LADDER[2].name] * 100 + [LADDER[3].name] * 100 + [LADDER[4].name] * 51
    )


def test_holding_changes_nothing_but_observes() -> None:
    optimizer = make("hold", memory_budget=0.5)
    before = list(optimizer.applied)
    decisions: list[Any] = []
    optimizer.register_decision_hook(decisions.append)
    train(optimizer, 20)
    assert optimizer.applied == before and len(decisions) == 4 and isinstance(optimizer.policy, HoldPolicy)
    assert not torch.equal(decisions[0].observation, decisions[-1].observation)


def test_random_rungs_persist_for_a_geometric_number_of_decisions() -> None:
    policy, obs = RandomPolicy(seed=1, persistence=0.75), observation(500)
    before, kept = [c.name for c in policy.act(obs)], []
    for _ in range(20):
        now = [c.name for c in policy.act(obs)]
        kept += [a == b for a, b in zip(before, now, strict=True)]
        before = now
    expected = 0.75 + 0.25 / len(LADDER)
    assert abs(sum(kept) / len(kept) - expected) < 6 * (expected * (1 - expected) / len(kept)) ** 0.5
    assert set(before) == set(LADDER.names)
    with pytest.raises(ValueError, match="persistence"):
        RandomPolicy(persistence=1.0)


def test_a_random_policy_resumes_where_it_was() -> None:
    policy, obs = RandomPolicy(seed=3), observation(4)
    for _ in range(5):
        policy.act(obs)
    saved = copy.deepcopy(policy.state_dict())
    ahead = [policy.act(obs) for _ in range(5)]
    other = RandomPolicy(seed=99)
    other.load_state_dict(saved)
    assert [other.act(obs) for _ in range(5)] == ahead


def test_water_filling_prefers_what_was_measured_to_err_least() -> None:
    policy = WaterFillingPolicy(tolerance=0.001)
    obs = observation(2, numel=4, error_momentum_8=-2, error_momentum_4=-1, error_momentum_2=0, error_variance_8=-2.3,
                      error_variance_4=-1.3, error_variance_0=-0.5, error_rank_1=0.9, error_rank_8=0.5)  # fmt: skip
    scores = policy.scores(obs)
    by_name = dict(zip(LADDER.names, scores[0].tolist(), strict=True))
    assert by_name["full"] > by_name["m8v8"] > by_name["m8v0"] > by_name["m6v0"] > by_name["m4v0"] > by_name["m0v0"]
    assert by_name["m4v0"] == pytest.approx(-(10**4) * (0.1**2 + policy.VARIANCE * 10**-1.0), rel=1e-4)
    big = observation(1, numel=6)
    assert (policy.scores(big) < policy.scores(observation(1, numel=3))).all()


def test_water_filling_spends_a_budget_better_than_one_config_for_all() -> None:
    """One layer's second moment is rank one, the other's not: only the first can be stored as factors for nothing."""
    params = [Parameter(torch.zeros(128, 128)), Parameter(torch.zeros(128, 128))]
    optimizer = MANGO(params, memory_budget=0.24, policy_update_freq=10, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.logspace(-0.5, 0, 128)[:, None], torch.logspace(0, -0.5, 128)[None]
    spread = torch.randn(128, 128, generator=generator).exp() ** 2
    for _ in range(30):
        params[0].grad = rows * columns * torch.randn(128, 128, generator=generator).sign()
        params[1].grad = spread * torch.randn(128, 128, generator=generator)
        optimizer.step()
    assert optimizer.applied[0].variance_bits == 0 and optimizer.applied[1].variance_bits > 0


@pytest.mark.parametrize("name", ["random", "water-filling", "scheduled"])
def test_named_policies_act_on_the_optimizer_s_own_ladder(name: str) -> None:
    ladder = Ladder(LADDER.rungs[5:9])
    optimizer = make(name, ladder=ladder, memory_budget=0.5, total_steps=40)
    train(optimizer, 40)
    end = {CompressionConfig(momentum_bits=4, variance_bits=0)} if name == "scheduled" else set()
    assert set(optimizer.applied) <= set(ladder.rungs) | end


@pytest.mark.parametrize(
    ("choice", "message"),
    [(torch.zeros(3, 5), "rung scores have shape"), (torch.full((3, len(LADDER)), torch.nan), "nan"),
     (torch.full((3, len(LADDER)), torch.inf), "inf"),
     (torch.full((3, len(LADDER)), -torch.inf), "every rung of layer 0 is forbidden"),
     (torch.zeros(2, 7, dtype=torch.int64), "actions have shape"),
     (torch.full((3, 7), 9), "outside"), ({"momentum_bits": 5}, "not on the menu")],
)  # fmt: skip
def test_unusable_decisions_say_what_was_expected(choice: Any, message: str) -> None:
    optimizer = make("hold")
    before = list(optimizer.applied)
    with pytest.raises(ValueError, match=message):
        optimizer.apply(choice)
    with pytest.raises(TypeError, match="a decision is"):
        optimizer.apply([FULL])
    assert optimizer.applied == before


def test_all_spellings_of_a_decision_mean_the_same() -> None:
    optimizer, config = make("hold"), CompressionConfig(momentum_bits=8, variance_bits=8)
    action = torch.tensor([config.to_action()] * 3)
    scores = torch.zeros(3, len(LADDER))
    scores[:, LADDER.index("m8v8")] = 1
    spellings: list[Any] = [config, config.to_dict(), [config] * 3, action, action.numpy(), scores, scores.numpy()]
    for spelling in spellings:
        optimizer.apply(FULL)
        assert optimizer.apply(spelling) == [config] * 3 == optimizer.applied
    assert optimizer.apply(None) == [config] * 3


def test_a_policy_is_a_name_a_config_a_dict_or_an_object() -> None:
    config = CompressionConfig(momentum_bits=8)
    for given_as in (config, {"momentum_bits": 8}, FixedPolicy(momentum_bits=8), FixedPolicy(config)):
        policy = as_policy(given_as, LADDER)
        assert isinstance(policy, FixedPolicy) and policy.config == config
    network = PolicyNetwork("tinyformer")
    decides = as_policy(network, LADDER)
    assert isinstance(decides, ScoringPolicy) and decides.scores(torch.zeros(3, 64)).shape == (3, len(LADDER))
    assert isinstance(as_policy(None, LADDER), WaterFillingPolicy)
    with pytest.raises(TypeError, match=r"policy is a int; give a shipped name, a path, one of .*water-filling"):
        as_policy(3, LADDER)
    with pytest.raises((ValueError, FileNotFoundError), match="no-such-policy"):
        as_policy("no-such-policy", LADDER)
    with pytest.raises(ValueError, match="not both"):
        FixedPolicy(config, momentum_bits=8)
    with pytest.raises(ValueError, match="already registered"):
        register_policy("fixed")(FixedPolicy)
