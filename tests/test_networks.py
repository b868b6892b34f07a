"""Promises of the policy networks."""

import copy
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mango.config import KNOBS, LADDER, MAX_SPARSITY, NVEC, CompressionConfig
from mango.features import FEATURE_DIM, FEATURES
from mango.networks import CompressionPolicyNet, FactoredCategorical, PolicyNetwork
from mango.policies import Policy
from mango.trunks import LstmTrunk, MlpTrunk, Normaliser

ARCHITECTURES: list[dict[str, Any]] = [
    {"architecture": "mlp", "hidden": [32, 16], "activation": "tanh"},
    {"architecture": "mlp", "hidden": [24]},
    {"architecture": "lstm", "hidden_dim": 16, "num_layers": 2},
    {"architecture": "tinyformer", "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "window": 4},
]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observations(layers: int, seed: int = 0) -> Tensor:
    """Uniform within the feature table's ranges."""
    low, high = (torch.tensor([getattr(f, side) for f in FEATURES]) for side in ("low", "high"))
    return low + (high - low) * torch.rand((layers, FEATURE_DIM), generator=torch.Generator().manual_seed(seed))


def categoricals(logits: Tensor, nvec: tuple[int, ...]) -> list[Any]:
    return [torch.distributions.Categorical(logits=part) for part in torch.split(logits, list(nvec), -1)]


def test_factored_categorical_agrees_with_a_product_of_categoricals() -> None:
    logits, nvec = gaussian(5, 9), (2, 3, 4)
    ours, theirs = FactoredCategorical(logits, nvec), categoricals(logits, nvec)
    for action in product(*map(range, nvec)):
        actions = torch.tensor(action).expand(5, 3)
        expected = torch.stack([d.log_prob(actions[:, k]) for k, d in enumerate(theirs)]).sum(0)
        assert torch.allclose(ours.log_prob(actions), expected, atol=1e-6)
    assert torch.allclose(ours.entropy(), torch.stack([d.entropy() for d in theirs]).sum(0), atol=1e-6)
    other = gaussian(5, 9, seed=1)
    kl = [torch.distributions.kl_divergence(p, q) for p, q in zip(theirs, categoricals(other, nvec), strict=True)]
    assert torch.allclose(ours.kl(FactoredCategorical(other, nvec)), torch.stack(kl).sum(0), atol=1e-6)
    assert torch.equal(ours.mode(), torch.stack([d.logits.argmax(-1) for d in theirs], -1))


def test_joint_probabilities_of_all_actions_sum_to_one() -> None:
    ours = FactoredCategorical(gaussian(9), (2, 3, 4))
    total = sum(ours.log_prob(torch.tensor(action)).exp() for action in product(range(2), range(3), range(4)))
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_samples_follow_the_probabilities_and_stay_on_the_menu() -> None:
    logits = gaussian(sum(NVEC)).expand(4000, sum(NVEC))
    drawn = FactoredCategorical(logits).sample(torch.Generator().manual_seed(1))
    assert drawn.shape == (4000, len(NVEC)) and bool((drawn >= 0).all()) and bool((drawn < torch.tensor(NVEC)).all())
    for k, part in enumerate(torch.split(logits[0], list(NVEC))):
        frequency = torch.bincount(drawn[:, k], minlength=NVEC[k]) / 4000
        assert (frequency - part.softmax(-1)).abs().max() < 4 * 0.5 / math.sqrt(4000)          # 4 standard errors


def test_padding_gives_no_gradient_and_no_nan() -> None:
    logits = gaussian(3, sum(NVEC)).requires_grad_()
    d = FactoredCategorical(logits)
    (d.log_prob(d.mode()).sum() + d.entropy().sum()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and bool(logits.grad.isfinite().all())
    with pytest.raises(ValueError, match=f"need {sum(NVEC)} logits; got 32"):
        FactoredCategorical(torch.zeros(2, 32))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_for_layers_and_for_sequences(architecture: dict[str, Any]) -> None:
    net = PolicyNetwork(**architecture)
    for lead in ((5,), (5, 3)):
        out = net(gaussian(*lead, FEATURE_DIM))
        assert out.knob_logits.shape == (*lead, sum(NVEC))
        assert out.rung_logits.shape == (*lead, len(LADDER))
        assert out.value.shape == lead
        assert net.trunk(gaussian(*lead, FEATURE_DIM)).shape == (*lead, net.trunk.features_dim)
        knobs = torch.zeros(*lead, len(NVEC), dtype=torch.int8)
        assert net.log_prob(gaussian(*lead, FEATURE_DIM), knobs).shape == lead
        assert net.log_prob(gaussian(*lead, FEATURE_DIM), knobs[..., 0], head="rung").shape == lead


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_is_json_and_rebuilds_the_network(architecture: dict[str, Any]) -> None:
    net = PolicyNetwork(**architecture, seed=3)
    again = PolicyNetwork(**json.loads(json.dumps(net.architecture)), seed=4)
    assert again.architecture == net.architecture
    again.load_state_dict(net.state_dict())
    assert torch.equal(net(gaussian(4, 64)).rung_logits, again(gaussian(4, 64)).rung_logits)


def test_initialisation_depends_on_the_seed_alone_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    for architecture in ARCHITECTURES:
        one = PolicyNetwork(**architecture, seed=5)
        same = PolicyNetwork(**architecture, generator=torch.Generator().manual_seed(5))
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
        other = PolicyNetwork(**architecture, seed=6)
        assert not torch.equal(one.rung_head.weight, other.rung_head.weight)
    net = CompressionPolicyNet(hidden_dim=8)
    net.act(gaussian(2, 64))
    net(gaussian(2, 64))
    assert torch.equal(before, torch.get_rng_state())


def test_an_untrained_policy_is_nearly_uniform() -> None:
    for architecture in ARCHITECTURES:
        net = PolicyNetwork(**architecture)
        entropy = net.distribution(net(observations(20))).entropy().detach()
        assert float(entropy.min()) > 0.99 * sum(math.log(n) for n in NVEC)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copying_the_trunk_copies_the_normaliser_and_equal_features(architecture: dict[str, Any]) -> None:
    net, other = PolicyNetwork(**architecture, seed=0), PolicyNetwork(**architecture, seed=1)
    net.fit_normaliser(observations(100))
    other.trunk.load_state_dict(net.trunk.state_dict())
    assert torch.equal(net.trunk(observations(7, 3)), other.trunk(observations(7, 3)))
    assert {"normaliser.mean", "normaliser.std"} <= set(net.trunk.state_dict())


def test_lstm_state_carried_step_by_step_equals_the_whole_sequence() -> None:
    net = PolicyNetwork("lstm", hidden_dim=16)
    sequence, state, steps = gaussian(6, 9, FEATURE_DIM), None, []
    for t in range(9):
        out = net(sequence[:, t], state)
        state = out.state
        steps.append(out.rung_logits)
    whole = net(sequence)
    assert torch.allclose(torch.stack(steps, 1), whole.rung_logits, atol=1e-6)
    assert not torch.allclose(net(sequence[:, -1]).rung_logits, whole.rung_logits[:, -1], atol=1e-7)      # memory matters
    with pytest.raises(ValueError, match=r"\(B, F\) or \(B, T, F\)"):
        net(gaussian(FEATURE_DIM))


def test_normaliser_standardises_clips_and_keeps_constant_features_quiet() -> None:
    norm = Normaliser(FEATURE_DIM, "cpu")
    obs = gaussian(5000, FEATURE_DIM) * 3 + 1
    obs[:, 7] = 4.0                                      # never varied
    norm.fit(obs)
    seen = norm(obs)
    varied = torch.arange(FEATURE_DIM) != 7
    assert seen[:, varied].mean(0).abs().max() < 1e-4 and (seen[:, varied].std(0) - 1).abs().max() < 1e-2
    assert norm(torch.full((1, FEATURE_DIM), 1e30)).max() == 10
    other = torch.full((1, FEATURE_DIM), 4.0)
    other[0, 7] = FEATURES[7].high
    assert norm(other)[0, 7] <= 1                        # scaled by its whole range
    assert norm(torch.full((1, FEATURE_DIM), math.nan)).abs().max() == 0
    for broken in (torch.zeros(3, 5), torch.full((2, FEATURE_DIM), math.inf), torch.zeros(0, FEATURE_DIM)):
        with pytest.raises(ValueError, match="normaliser needs"):
            norm.fit(broken)


def test_an_unfitted_normaliser_maps_the_feature_table_into_plus_minus_one() -> None:
    assert Normaliser(FEATURE_DIM, "cpu")(observations(200)).abs().max() <= 1 + 1e-5


def test_networks_refuse_what_they_do_not_know() -> None:
    for arguments, message in (
        ({"architecture": "gru"}, "known: mlp, lstm, tinyformer"),
        ({"hidden_dim": 3}, "does not take"),
        ({"hidden": (0,)}, r"1\.\.8192"),
        ({"hidden": ()}, "0 layers"),
        ({"hidden": (2**40,)}, r"1\.\.8192"),
        ({"activation": "gelu"}, "relu, tanh"),
        ({"rungs": 0}, "rungs=0"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyNetwork(**arguments)
    net = PolicyNetwork()
    with pytest.raises(ValueError, match="known: knobs, rung"):
        net.distribution(net(gaussian(1, 64)), "value")
    assert MlpTrunk().features_dim == LstmTrunk().features_dim == 128


# -- the published LSTM policy

PUBLISHED: dict[str, Any] = {"feature_dim": 64, "hidden_dim": 128, "num_layers": 2, "num_parameter_groups": 1, "dropout": 0.1}


def fresh(net: CompressionPolicyNet) -> dict[str, Any]:
    """A decision without memory."""
    net.reset()
    decision: dict[str, Any] = net(observations(1))
    return decision


def test_c1_published_arguments_construct_and_a_feature_dict_gives_a_legal_config() -> None:
    net = CompressionPolicyNet(**PUBLISHED)
    assert net.trunk.lstm.num_layers == 2 and net.trunk.lstm.hidden_size == 128
    decision = net({"layers": observations(5), "grad_norm": torch.zeros(5)})
    for form in (decision["config"], {key: decision[key] for key in ("gradient_bits", "momentum_bits", "sparsity_ratio")}):
        config = CompressionConfig.from_dict(form)       # raises for anything that is not legal
        assert config.momentum_bits in (32, 16, 8)
    with pytest.raises(ValueError, match="key 'layers'"):
        net({"norm": torch.zeros(3)})


def test_c2_heads_are_5_3_1() -> None:
    net = CompressionPolicyNet()
    for features in (observations(1)[0], observations(1), {"layers": observations(6)}):
        decision = net(features)
        shapes = [tuple(decision[name].shape) for name in ("gradient_logits", "momentum_logits", "sparsity_logit", "value")]
        assert shapes == [(5,), (3,), (1,), ()]


@pytest.mark.parametrize("knobs", [None, KNOBS, {"momentum_bits": (8, 4), "rank": (0, 4)}])
@pytest.mark.parametrize("training", [True, False])
def test_c3_every_emitted_action_is_legal(knobs: Any, training: bool) -> None:
    net = CompressionPolicyNet(hidden_dim=16, knobs=knobs, seed=1).train(training)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(5)                                    # a policy with opinions
    menu = dict(zip(KNOBS, NVEC, strict=True))
    for seed in range(20):
        obs = observations(8, seed)
        action = net.act(obs)
        assert action.shape == (8, len(KNOBS)) and action.dtype == torch.int64
        for row in action.tolist():
            assert CompressionConfig.from_action(row).to_action() == tuple(row)
        for k, knob in enumerate(KNOBS):
            assert int(action[:, k].max()) < menu[knob]
            if knob not in net.knobs:
                assert int(action[:, k].max()) == 0      # full precision
        config = net({"layers": obs})["config"]
        assert CompressionConfig.from_dict(config) and 0 <= config.get("sparsity_ratio", 0) <= MAX_SPARSITY


def test_c4_two_layers_can_get_different_configs_in_one_step() -> None:
    net = CompressionPolicyNet(knobs=KNOBS, seed=0)
    action = net.act(observations(6))
    assert len({tuple(row) for row in action.tolist()}) > 1
    net.eval().reset()
    with torch.no_grad():
        net.heads.get_parameter("gradient_bits.weight").mul_(1000)
    assert len(set(net.act(observations(6))[:, 0].tolist())) > 1                # greedy: because the layers differ


def test_each_layer_has_its_own_memory() -> None:
    net = CompressionPolicyNet(hidden_dim=16, knobs=KNOBS).eval()
    together, alone = copy.deepcopy(net), copy.deepcopy(net)
    obs = [observations(3, seed) for seed in range(4)]
    for o in obs:
        together.act(o)
        alone.act(o[1:2])
    a, b = together.get_extra_state(), alone.get_extra_state()
    assert torch.allclose(a["layer_h"][:, 1:2], b["layer_h"], atol=1e-6)
    together.act(observations(5))                        # another model: starts from zeros
    assert together.get_extra_state()["layer_h"].shape[1] == 5


def test_hidden_state_is_carried_detached_and_reset() -> None:
    net = CompressionPolicyNet(hidden_dim=16).eval()
    first, second = net(observations(2)), net(observations(2))
    assert not torch.equal(first["gradient_logits"], second["gradient_logits"])
    assert not net.get_extra_state()["group_h"].requires_grad
    second["gradient_logits"].sum().backward()           # one step's graph only
    net.reset_hidden_state()
    assert torch.equal(net(observations(2))["gradient_logits"], first["gradient_logits"])


def test_no_dropout_when_acting() -> None:
    net = CompressionPolicyNet(dropout=0.9)
    assert net.training
    logits = [fresh(net)["gradient_logits"] for _ in range(3)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert not torch.equal(net.evaluate(observations(1), dropout=True).value, net.evaluate(observations(1)).value)
    assert torch.equal(net.eval().evaluate(observations(1), dropout=True).value, net.evaluate(observations(1)).value)


def test_training_mode_samples_and_eval_mode_is_greedy() -> None:
    net = CompressionPolicyNet(hidden_dim=16)
    assert len({json.dumps(fresh(net)["config"]) for _ in range(20)}) > 5
    net.eval()
    assert len({json.dumps(fresh(net)["config"]) for _ in range(5)}) == 1
    decision = net(observations(1))
    greedy = MAX_SPARSITY / (1 + math.exp(-float(decision["sparsity_logit"].detach())))
    assert decision["sparsity_ratio"] == pytest.approx(greedy, rel=1e-6)
    assert decision["gradient_bits"] == net.knobs["gradient_bits"][int(decision["gradient_logits"].argmax())]


def test_parameter_groups_are_runs_of_layers_with_a_decision_each() -> None:
    net = CompressionPolicyNet(hidden_dim=16, num_parameter_groups=3).eval()
    rows = observations(7)
    assert torch.allclose(net.pool(rows), torch.stack([rows[:2].mean(0), rows[2:4].mean(0), rows[4:].mean(0)]))
    assert net.pool(rows[:2]).shape == (3, FEATURE_DIM)  # fewer layers than groups
    decision = net({"layers": rows})
    assert decision["gradient_logits"].shape == (3, 5) and len(decision["configs"]) == 3
    assert decision["config"] == decision["configs"][0]


def test_log_prob_of_sparsity_is_a_probability_density_with_mass_at_its_ends() -> None:
    net = CompressionPolicyNet(hidden_dim=8, knobs={"sparsity": ()})
    with torch.no_grad():
        net.sparsity_log_std.fill_(0.7)
    with torch.no_grad():
        heads = net.evaluate(observations(1))
    z = torch.linspace(-3.9999, 3.9999, 20001)
    one = heads._replace(logits={"sparsity": heads.logits["sparsity"].expand(20001, 1)})
    density = net.log_prob(one, z[:, None]).detach().exp()
    ends = [float(net.log_prob(heads, torch.tensor([[edge]])).detach().exp()) for edge in (-4.0, 4.0)]
    assert float(torch.trapezoid(density, z)) + sum(ends) == pytest.approx(1, abs=1e-3)
    assert net.decode(torch.tensor([[-4.0], [4.0]])) == [{"sparsity_ratio": 0.0}, {"sparsity_ratio": MAX_SPARSITY}]


def test_the_log_prob_of_a_decision_is_that_of_what_it_says() -> None:
    for knobs in (None, KNOBS):
        net = CompressionPolicyNet(hidden_dim=16, knobs=knobs)
        decision = net(observations(1))
        heads = net.evaluate(observations(1))
        assert torch.allclose(net.log_prob(heads, net.encode([decision])), decision["log_prob"], atol=1e-4)
        assert bool((net.entropy(heads) > 0).all())


def test_encode_takes_configs_and_dicts_and_the_nearest_entry() -> None:
    net = CompressionPolicyNet(hidden_dim=8)
    config = CompressionConfig(gradient_bits=4, momentum_bits=4, sparsity=0.5)
    actions = net.encode([config, {"gradient_bits": 4, "momentum_bits": 8, "sparsity_ratio": 0.5}])
    assert torch.equal(actions[0], actions[1]) and actions[0, :2].tolist() == [3, 2]
    assert net.decode(actions)[0]["sparsity_ratio"] == pytest.approx(0.5, abs=1e-6)
    assert net.decode(net.encode([{}])) == [{"gradient_bits": 32, "momentum_bits": 32, "sparsity_ratio": 0.0}]


def test_c17_a_saved_policy_continues_with_identical_actions(tmp_path: Path) -> None:
    net = CompressionPolicyNet(hidden_dim=16, seed=3)
    for seed in range(3):
        net.act(observations(4, seed))
        net(observations(4, seed))
    torch.save(net.state_dict(), tmp_path / "policy.pt")
    other = CompressionPolicyNet(hidden_dim=16, seed=9)
    other.act(observations(2))
    other.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    twin = copy.deepcopy(net)
    for seed in range(5):
        expected = net.act(observations(4, seed))
        assert torch.equal(expected, other.act(observations(4, seed)))
        assert torch.equal(expected, twin.act(observations(4, seed)))
        said = [policy(observations(4, seed))["config"] for policy in (net, other, twin)]
        assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("knobs", [KNOBS, {"momentum_bits": (16, 4), "variance_bits": (8, 0)}])
def test_a_categorical_policy_becomes_a_network_with_the_same_decisions(knobs: Any) -> None:
    net = CompressionPolicyNet(hidden_dim=16, knobs=knobs).eval()
    with torch.no_grad():
        for p in net.heads.parameters():
            p.copy_(gaussian(*p.shape))
    network, state = net.to_network(), None
    for seed in range(4):
        obs = observations(6, seed)
        out = network(obs, state)
        state = out.state
        assert torch.equal(network.distribution(out).mode(), net.act(obs))
    with pytest.raises(ValueError, match="knobs=KNOBS"):
        CompressionPolicyNet(hidden_dim=8).to_network()


def test_the_published_policy_is_a_policy_and_refuses_bad_arguments() -> None:
    net = CompressionPolicyNet(hidden_dim=8)
    assert isinstance(net, Policy)
    for arguments, message in (
        ({"dropout": 1.0}, "dropout"),
        ({"num_parameter_groups": 0}, "num_parameter_groups=0"),
        ({"knobs": {}}, "at least one"),
        ({"knobs": {"bits": (8,)}}, "known"),
        ({"knobs": {"rank": (3,)}}, "not a part of"),
        ({"knobs": {"rank": ()}}, "not a part of"),
    ):
        with pytest.raises(ValueError, match=message):
            CompressionPolicyNet(**arguments)
    for shape in ((0, 64), (2, 3, 64)):
        with pytest.raises(ValueError, match="reads features"):
            net.act(torch.zeros(shape))
    rebuilt = CompressionPolicyNet(**json.loads(json.dumps(net.architecture)))
    assert rebuilt.architecture == net.architecture
