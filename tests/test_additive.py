"""Value decomposition by regression: what is planted is found, what is kept in full costs nothing, the network learns it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mango.config import LADDER
from mango.features import FEATURE_DIM, FEATURE_INDEX, FEATURES
from mango.networks import PolicyNetwork
from mango_env.cache import build_cache
from mango_env.reward import Reward
from train_policy import offline
from train_policy.additive import (
    BEST,
    CONTEXT_PRIOR,
    RANKS,
    SHRINKAGE,
    SIZES,
    AdditivePolicy,
    Costs,
    Outcomes,
    circumstances,
    described,
    design,
    fit,
    mixed,
    outcomes_of,
    weight_of,
)
from train_policy.collect import CollectArgs, collect

KINDS = ("attention_in", "attention_out", "mlp_up", "mlp_down")
MUON = np.array(["muon"] * 600)
NONE, FULL, FOUR = LADDER.index("m0v0"), LADDER.index("full"), LADDER.index("m4v0")


def layers(kinds: tuple[str, ...] = KINDS, progress: float = 0.0) -> Tensor:
    """Observations of as many layers of one size."""
    obs = torch.zeros(len(kinds), FEATURE_DIM)
    for row, kind in enumerate(kinds):
        obs[row, FEATURE_INDEX[f"kind_{kind}"]] = 1
    obs[:, FEATURE_INDEX["rule_muon"]] = 1
    obs[:, FEATURE_INDEX["progress"]] = progress
    obs[:, FEATURE_INDEX["share"]] = 1 / len(kinds)
    obs[:, FEATURE_INDEX["layers"]] = float(np.log10(len(kinds)))
    return obs


def drawn(runs: int, seed: int) -> tuple[dict[float, np.ndarray], np.ndarray]:
    """Random allocations: regressors of the runs, and losses where only attention_in without momentum costs: 3 %, early."""
    rng = np.random.default_rng(seed)
    rows = {size: np.zeros((runs, len(SHRINKAGE))) for size in SIZES}
    loss = np.zeros(runs)
    for run in range(runs):
        for half, progress in enumerate((0.0, 0.5)):
            obs, rungs = layers(progress=progress), torch.from_numpy(rng.integers(0, len(LADDER), len(KINDS)))
            for size in SIZES:
                rows[size][run] += (weight_of(obs, size)[:, None] * design(obs, rungs)).double().sum(0).numpy() / 2
            loss[run] += 3.0 * (rungs[0] == NONE) * (half == 0)
    return rows, loss + rng.normal(0, 0.3, runs)


def test_what_was_planted_is_found_and_nothing_else() -> None:
    rows, loss = drawn(600, seed=0)
    group = np.arange(600) % 6
    found = fit(Outcomes(rows, loss + group, group, np.array(["a", "b", "c"])[group % 3], MUON[:600]))
    early, late = (found.costs(layers(progress=p)) for p in (0.0, 0.5))
    assert found.explained_elsewhere > 0.5
    planted = 3.0 / found.spread["a", "muon"]                                                          # for half of the run
    assert 1.3 * planted < float(early[0, NONE]) < 2.7 * planted and float(early[0, NONE]) > 1.5 * float(late[0, NONE])
    assert float(early[1:, NONE].abs().max()) < 0.25 * float(early[0, NONE])
    assert float(early[:, FULL].abs().max()) == 0


def test_nothing_is_charged_for_full_precision() -> None:
    obs = layers()
    costs = Costs(np.ones(len(SHRINKAGE)), size=0.0)(obs)
    assert torch.equal(costs[:, FULL], torch.zeros(len(KINDS)))
    assert torch.equal(costs[:, LADDER.index("m16v16")], torch.zeros(len(KINDS))) and bool((costs[:, NONE] > 0).all())


def test_costs_are_described_by_rule_and_half() -> None:
    obs = torch.cat([layers(progress=0.0), layers(progress=0.75)])
    rows = described(Costs(np.ones(len(SHRINKAGE)), size=0.0), obs)
    assert [(row["rule"], row["half"]) for row in rows] == [("muon", "first"), ("muon", "second")]
    assert rows[0]["full"] == 0 and rows[0]["m0v0"] > 0 and set(LADDER.names) < set(rows[0])


def test_a_rule_without_second_moment_pays_nothing_for_it() -> None:
    obs = layers()
    rungs = torch.full((len(KINDS),), LADDER.index("m8v8"))
    assert torch.equal(design(obs, rungs), design(obs, torch.full((len(KINDS),), LADDER.index("m8v0"))))
    obs[:, FEATURE_INDEX["rule_muon"]], obs[:, FEATURE_INDEX["rule_adamw"]] = 0, 1
    assert not torch.equal(design(obs, rungs), design(obs, torch.full((len(KINDS),), LADDER.index("m8v0"))))


def test_weights_of_layers_average_to_one_over_their_number() -> None:
    obs = layers()
    obs[:, FEATURE_INDEX["share"]] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for size in SIZES:
        assert weight_of(obs, size).mean() == pytest.approx(0.25, rel=0.05)
    assert torch.allclose(weight_of(obs, 1.0), obs[:, FEATURE_INDEX["share"]])
    assert torch.allclose(weight_of(obs, 0.0), torch.tensor(0.25))


def test_the_policy_prefers_what_costs_less() -> None:
    rows, loss = drawn(300, seed=1)
    policy = AdditivePolicy(fit(Outcomes(rows, loss, np.zeros(300, np.int64), np.array(["a"] * 300), MUON[:300])).costs)
    scores = policy.scores(layers())
    assert scores.shape == (len(KINDS), len(LADDER)) and int(scores[:, NONE].argmin()) == 0
    assert policy.act(layers()).shape == (len(KINDS), 7)


def test_mixing_keeps_every_column_and_breaks_what_went_together() -> None:
    obs = torch.rand(500, FEATURE_DIM)
    obs[:, FEATURE_INDEX["lr"]] = obs[:, FEATURE_INDEX["share"]]
    found = mixed(obs, torch.Generator().manual_seed(0))
    assert torch.equal(found.sort(0).values, obs.sort(0).values)
    kinds = [i for i, f in enumerate(FEATURES) if f.name.startswith("kind_")]
    rows = {tuple(row) for row in obs[:, kinds].tolist()}
    assert all(tuple(row) in rows for row in found[:, kinds].tolist())
    assert abs(float(np.corrcoef(found[:, FEATURE_INDEX["lr"]], found[:, FEATURE_INDEX["share"]])[0, 1])) < 0.2


def trained(cosine: float, lr: float, lr_ratio: float) -> list[float]:
    obs = torch.zeros(1, len(FEATURES))
    for name, value in (("grad_cosine", cosine), ("lr", lr), ("lr_ratio", lr_ratio), ("grad_rms", -4.0 if cosine else -20.0)):
        obs[0, FEATURE_INDEX[name]] = value
    return [round(one, 3) for one in circumstances(obs)[0].tolist()]


def test_noise_opposition_and_the_rate_are_read_off_an_observation() -> None:
    assert trained(0.5, -2.5, 1.0) == [-1.3, 0.0, 0.0]                          # as much noise as signal
    assert trained(1 / 21, -3.5, 0.1) == [0.001, 0.0, 0.0]                      # twenty times as much; the rate fell since
    assert trained(-0.15, -1.5, 1.0)[1:] == [0.5, 1.0]                          # steps overshoot, at ten times the rate
    assert trained(0.0, -2.5, 1.0) == [0.0, 0.0, 0.0]                           # nothing was seen yet


def test_dropping_a_moment_is_charged_when_it_is_dropped() -> None:
    """Keeping it away is not, nor starting without one."""
    costs = Costs(np.eye(len(SHRINKAGE))[-1], 0.5)
    obs = adamw_layer()
    obs[0, FEATURE_INDEX["momentum_bits"]], obs[0, FEATURE_INDEX["grad_rms"]] = 0.6, -20.0
    assert not costs(obs).any()                                                      # the first decision
    obs[0, FEATURE_INDEX["grad_rms"]] = -4.0
    assert float(costs(obs)[0, NONE]) == 1.0 and float(costs(obs).sum()) == 1.0
    obs[0, FEATURE_INDEX["momentum_bits"]] = 0.0
    assert not costs(obs).any()


def adamw_layer() -> Tensor:
    obs = torch.zeros(1, FEATURE_DIM)
    obs[0, [FEATURE_INDEX[name] for name in ("rule_adamw", "kind_linear", "share")]] = 1.0
    obs[0, [i for i, feature in enumerate(FEATURES) if feature.name.startswith("error_")]] = -10.0
    return obs


def test_bits_cost_by_how_they_round_and_a_gain_is_no_cost() -> None:
    found = dict(zip(LADDER.names, Costs(np.ones(len(SHRINKAGE)), 0.5)(adamw_layer())[0].tolist(), strict=True))
    assert found["m2v0"] > found["m4v0"] > found["m6v0"] > found["m8v0"] > found["full"] == 0.0
    assert found["m8v4"] > found["m8v8"] > found["m16v8"] > found["m16v16"] == 0.0
    assert found["m16v8"] == pytest.approx((found["m8v4"] - found["m8v8"]) / (10**0.8 - 1), rel=1e-3)       # a tenth of the error
    gains = Costs(-np.ones(len(SHRINKAGE)), 0.5)
    assert not gains(adamw_layer()).any() and float(gains.effects(adamw_layer())[0, LADDER.index("m8v0")]) < 0


def test_a_subspace_that_leaves_nothing_out_costs_what_its_values_are_rounded_to() -> None:
    half = 2 * len(CONTEXT_PRIOR)
    coefficients = np.zeros(len(SHRINKAGE))
    coefficients[: half * (1 + len(RANKS) + 1)] = 1.0                                # what is kept of the first moment, no errors
    found = dict(zip(LADDER.names, Costs(coefficients, 0.5)(adamw_layer())[0].tolist(), strict=True))
    assert found["r32p4q4v0"] == found["m4v0"] > 0                                   # of a layer with a side of 1
    wide = adamw_layer()
    wide[0, FEATURE_INDEX["numel"]] = 6.0
    assert float(Costs(coefficients, 0.5)(wide)[0, LADDER.index("r32p4q4v0")]) > found["m4v0"]


def test_what_differs_between_families_is_charged() -> None:
    """Of a normal distribution the part above 0, in the deviation that the fits without each family tell."""
    ones = np.ones(len(SHRINKAGE))
    effect = float(Costs(ones, 0.5).effects(adamw_layer())[0, NONE])
    shifts = np.array([-0.03, -0.01, 0.01, 0.03])
    costs = Costs(-0.02 * ones, 0.5, left_out=np.outer(shifts - 0.02, ones))
    mean, spread = -0.02 * effect, 3 * float(shifts.std()) * effect                            # pseudo-values: K - 1 times
    draws = np.random.default_rng(0).normal(mean, spread, 200_000)
    assert float(costs(adamw_layer())[0, NONE]) == pytest.approx(float(np.maximum(draws, 0).mean()), rel=0.02)
    assert float(costs(adamw_layer())[0, FULL]) == 0.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("designed")
    collect("digits_mlp", ["factorial", "fixed:m8v8", "random"], 2, [0.5], root, CollectArgs(horizon=12, interval=4))
    return root


def test_final_losses_are_recorded_and_read(store: Path) -> None:
    cache = build_cache(store)
    data = outcomes_of(cache)
    assert len(data) == 6 + 2 and set(data.family) == {"digits_mlp"} and len(set(data.group.tolist())) == 2
    assert data.loss[6:].tolist() == [0.0, 0.0] and not data.rows[0.5][6:].any()                       # the twins
    facts = cache.attributes
    per_cent = {100 * float(np.log(a / b)) for a, b in zip(facts["val_loss"], facts["val_loss_full"], strict=True)}
    assert np.allclose(sorted(max(x, BEST) for x in per_cent), sorted(data.loss[:6].tolist()))


def test_the_network_learns_the_costs(tmp_path: Path) -> None:
    collect("digits_mlp", ["factorial", "fixed:m8v8", "random"], 8, [0.5], tmp_path, CollectArgs(horizon=12, interval=4))
    cache = build_cache(tmp_path)
    settings = offline.OfflineArgs(algo="additive", updates=1500, learning_rate=1e-3)
    result = offline.train(PolicyNetwork("mlp", hidden=(64,)), cache, settings)
    assert {"explained_elsewhere", "explained_held_out", "loss"} <= set(result.metrics)
    obs = torch.from_numpy(next(iter(cache.episodes()))["observations"].copy())
    logits = result.network(obs).rung_logits
    wanted = -fit(outcomes_of(cache)).costs(obs)                                     # of all runs, those of the validation too
    said, meant = ((values - values[:, -1:]).flatten().numpy() for values in (logits.detach(), wanted))
    assert float(np.corrcoef(said, meant)[0, 1]) > 0.9


def test_data_without_twins_and_networks_with_memory_are_refused(store: Path, tmp_path: Path) -> None:
    args = CollectArgs(horizon=8, interval=4, reward=Reward(loss="raw"))
    collect("digits_mlp", ["random", "factorial"], 2, [0.5], tmp_path, args)
    with pytest.raises(ValueError, match="no run of the data has a final loss and a twin"):
        outcomes_of(build_cache(tmp_path))
    with pytest.raises(ValueError, match="takes architecture 'mlp', got 'lstm'"):
        offline.train(PolicyNetwork("lstm"), build_cache(store), offline.OfflineArgs(algo="additive"))
