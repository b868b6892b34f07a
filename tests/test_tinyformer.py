"""TinyFormer: six applications of one block in fewer than 100,000 parameters, a bounded memory, longer than an LSTM's."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from experiments.memory_copy import NETWORKS, SYMBOLS, Args, best, run, sequences
from mango import MANGO
from mango.features import FEATURE_DIM, FEATURES
from mango.networks import PolicyNetwork
from mango.policy_file import FrozenPolicy, freeze, load_policy
from mango.trunks import TRUNKS, State, TinyFormer
from mango_env.cache import TrajectoryCache
from train_policy import d3rlpy_backend
from train_policy.cli import app
from train_policy.collect import CollectArgs, collect
from train_policy.distil import distil
from train_policy.offline import OfflineArgs, train
from train_policy.transfer import sb3_policy_kwargs


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observations(layers: int, seed: int = 0) -> Tensor:
    """Uniform within the feature table's ranges."""
    low, high = (torch.tensor([getattr(f, side) for f in FEATURES]) for side in ("low", "high"))
    return low + (high - low) * torch.rand((layers, FEATURE_DIM), generator=torch.Generator().manual_seed(seed))


def small(window: int = 4, num_layers: int = 2) -> PolicyNetwork:
    """A network with opinions."""
    net = PolicyNetwork("tinyformer", hidden_dim=16, num_layers=num_layers, num_heads=2, window=window, seed=1)
    with torch.no_grad():
        net.rung_head.weight.mul_(100)
    return net


def step_by_step(net: PolicyNetwork, sequence: Tensor) -> tuple[Tensor, State | None]:
    """Rung logits (B, T, R) of a sequence seen one decision at a time, and the state at its end."""
    state, steps = None, []
    with torch.no_grad():
        for t in range(sequence.shape[1]):
            out = net(sequence[:, t], state)
            state = out.state
            steps.append(out.rung_logits)
    return torch.stack(steps, 1), state


def test_c20_six_applications_of_a_128_d_block_in_fewer_than_100_000_parameters() -> None:
    net = PolicyNetwork("tinyformer")
    assert isinstance(net.trunk, TinyFormer)
    assert sum(p.numel() for p in net.parameters()) < 100_000
    seen: list[torch.Size] = []
    for part in (net.trunk.attention_out, net.trunk.mlp_out):
        part.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    net(observations(5))
    assert seen == 12 * [torch.Size([5, 1, 128])]        # six times attention and MLP, weights shared


def test_decisions_one_by_one_equal_the_whole_sequence_beyond_the_window() -> None:
    for net, steps in ((PolicyNetwork("tinyformer", seed=2), 140), (small(), 30), (small(window=1), 5)):
        sequence = gaussian(3, steps, FEATURE_DIM)
        with torch.no_grad():
            whole = net(sequence)
            start = net(sequence[:, :7])
            rest = net(sequence[:, 7:], start.state)
        alone, state = step_by_step(net, sequence)
        assert (alone - whole.rung_logits).abs().max() < 1e-5 * max(1.0, float(whole.rung_logits.abs().max()))
        assert torch.allclose(torch.cat([start.value, rest.value], 1), whole.value, atol=1e-5)
        assert state is not None and isinstance(net.trunk, TinyFormer)
        kept = min(steps, net.trunk.window - 1)
        for ours, theirs in zip(state, whole.state, strict=True):
            assert ours.shape == (net.trunk.num_layers, 3, kept, net.trunk.features_dim // net.trunk.num_heads)
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_decision_depends_on_its_window_of_its_own_row_alone() -> None:
    net, sequence = small(window=4, num_layers=1), gaussian(2, 12, FEATURE_DIM)
    changed = sequence.clone()
    changed[0, 5] += 1.0
    with torch.no_grad():
        moved = (net(sequence).rung_logits - net(changed).rung_logits).abs().amax(2) > 1e-6        # (B, T)
    assert moved[0].nonzero().flatten().tolist() == [5, 6, 7, 8]                # neither the past nor what lies 4 on
    assert not moved[1].any()


def test_training_and_acting_are_the_same_function_and_weights_come_from_the_generator() -> None:
    before = torch.get_rng_state()
    net, sequence = small(), gaussian(2, 6, FEATURE_DIM)
    assert torch.equal(net.train()(sequence).rung_logits, net.eval()(sequence).rung_logits)        # no dropout
    twin = PolicyNetwork(**net.architecture, generator=torch.Generator().manual_seed(1))
    assert torch.equal(twin.trunk(sequence), net.trunk(sequence))
    assert torch.equal(before, torch.get_rng_state())
    assert PolicyNetwork("tinyformer", device="meta")(sequence.to("meta")).rung_logits.is_meta
    net(sequence).rung_logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for name, p in net.trunk.named_parameters() if name != "key_value.bias")


def test_what_cannot_be_built_or_read_is_named() -> None:
    with pytest.raises(ValueError, match="hidden_dim=10 is not a multiple of num_heads=4"):
        PolicyNetwork("tinyformer", hidden_dim=10)
    with pytest.raises(ValueError, match="window=0"):
        PolicyNetwork("tinyformer", window=0)
    with pytest.raises(ValueError, match="does not take"):
        PolicyNetwork("tinyformer", hidden=(32,))
    with pytest.raises(ValueError, match=r"\(B, F\) or \(B, T, F\)"):
        small()(gaussian(FEATURE_DIM))


def test_every_trunk_says_whether_it_remembers_and_what_it_calls_its_state() -> None:
    for name, kind in TRUNKS.items():
        trunk = kind()
        _, state = trunk.step(gaussian(2, FEATURE_DIM))
        assert (state is not None) == trunk.has_memory == (name not in ("mlp", "tree"))
        assert len(trunk.state_names) == (0 if state is None else len(state))


def test_a_frozen_one_decides_as_its_network_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    net = small()
    path = freeze(net, tmp_path / "p", card={})
    policy, other, state = load_policy(path), load_policy(path), None
    assert policy.network.architecture == net.architecture and policy.state_dict() == {}
    for seed in range(6):
        with torch.no_grad():
            out = net(observations(3, seed), state)
        state = out.state
        assert torch.equal(policy.scores(observations(3, seed)), out.rung_logits.log_softmax(-1))
    saved = policy.state_dict()
    assert sorted(saved) == ["keys", "values"] and all(t.shape == (2, 3, 3, 8) for t in saved.values())
    torch.save(saved, tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in (7, 8):
        assert torch.equal(policy.scores(observations(3, seed)), other.scores(observations(3, seed)))
    assert policy.scores(observations(5)).shape[0] == 5                         # another model starts without a past
    policy.reset()
    assert policy.state_dict() == {}


def test_an_optimizer_resumes_with_the_same_decisions() -> None:
    def optimizer(model: torch.nn.Module) -> MANGO:
        return MANGO(model.named_parameters(), lr=1e-2, policy=FrozenPolicy(small()), memory_budget=0.5, policy_update_freq=2)

    def learn(model: torch.nn.Module, optimizer: MANGO, begin: int, end: int) -> None:
        for step in range(begin, end):
            optimizer.zero_grad()
            model(gaussian(8, 16, seed=step)).square().mean().backward()
            optimizer.step()

    torch.nn.init.normal_((model := torch.nn.Linear(16, 64)).weight, generator=torch.Generator().manual_seed(0))
    first = optimizer(model)
    learn(model, first, 0, 11)
    again = copy.deepcopy(model)
    second = optimizer(again)
    second.load_state_dict(first.state_dict())
    learn(model, first, 11, 20)
    learn(again, second, 11, 20)
    assert torch.equal(model.weight, again.weight)
    assert first.memory_report()["layers"] == second.memory_report()["layers"]


@pytest.mark.parametrize("algo", ["iql", "awr"])
def test_offline_algorithms_for_sequences_train_it(algo: str, riddle: TrajectoryCache) -> None:
    result = train(small(), riddle, OfflineArgs(algo=algo, updates=5))
    assert result.network.architecture == small().architecture
    assert all(bool(t.isfinite().all()) for t in result.network.state_dict().values())


def test_where_single_observations_are_needed_it_is_refused(riddle: TrajectoryCache) -> None:
    with pytest.raises(ValueError, match="carries no memory: it takes architecture 'mlp', got 'tinyformer'"):
        sb3_policy_kwargs(small())
    with pytest.raises(ValueError, match="takes architecture 'mlp', got 'tinyformer'"):
        d3rlpy_backend.build("iql", small(), batch_size=8, learning_rate=1e-3, gamma=0.9)
    with pytest.raises(ValueError, match="use architecture 'mlp'"):
        distil(small(), gaussian(4, FEATURE_DIM), values=torch.zeros(4))
    for algo in ("cql", "additive"):
        with pytest.raises(ValueError, match="takes architecture 'mlp', got 'tinyformer'"):
            train(small(), riddle, OfflineArgs(algo=algo, updates=2))


def test_the_command_clones_it_from_recorded_runs(tmp_path: Path) -> None:
    collect(["digits_mlp"], ["water-filling"], 3, [1.2], tmp_path / "store", CollectArgs(horizon=12, interval=3))
    words = ["train", "bc", "--data", str(tmp_path / "store"), "--out", str(tmp_path / "cloned.safetensors"), "--epochs", "2"]
    done = CliRunner().invoke(app, [*words, "--architecture", "tinyformer", "--top", "1.0"])
    assert done.exit_code == 0, done.output
    policy = load_policy(tmp_path / "cloned.safetensors")
    assert policy.network.name == "tinyformer" and policy.scores(observations(3)).shape[0] == 3


def test_c21_a_symbol_is_remembered_over_100_decisions_better_than_by_an_lstm_of_equal_size() -> None:
    """Small networks here, the whole size in benchmarks/results/memory_copy.json; chance is 1 in 8."""
    args = Args(shown=4, batch=16, updates=120)
    former = {"architecture": "tinyformer", "hidden_dim": 32, "num_layers": 2, "num_heads": 2}
    lstm = {"architecture": "lstm", "hidden_dim": 31, "num_layers": 1}
    ours, theirs = (run(network, args, 1e-2, seed=3) for network in (former, lstm))
    assert theirs["parameters"] > ours["parameters"]
    assert ours["accuracy"] > 0.9 and ours["accuracy"] > theirs["accuracy"] + 0.3, (ours, theirs)


def test_the_task_asks_for_what_was_shown_a_lag_before() -> None:
    shown, symbols = sequences(4, 20, 3, torch.Generator().manual_seed(0))
    assert shown.shape == (4, 23, FEATURE_DIM) and symbols.shape == (4, 3)
    seen = TinyFormer().normaliser(shown)
    assert torch.equal(seen[:, :3, :SYMBOLS].argmax(2), symbols) and bool((seen[:, :3].sum(2) == 1).all())
    assert not seen[:, 3:20].any() and bool((seen[:, 20:, SYMBOLS] == 1).all()) and float(seen.sum()) == 4 * 6
    former, lstm = (
        sum(p.numel() for p in PolicyNetwork(**NETWORKS[name], rungs=SYMBOLS).parameters()) for name in ("tinyformer", "lstm")
    )
    assert 0 <= lstm - former < 0.01 * former


def test_the_best_rate_of_each_network_counts() -> None:
    facts = {"network": "lstm", "lag": 100, "shown": 10, "batch": 8, "updates": 120}
    runs = [facts | {"rate": rate, "accuracy": accuracy} for rate, accuracy in ((0.1, 0.2), (0.1, 0.3), (0.2, 0.24))]
    found = best([*runs, facts | {"updates": 9, "rate": 0.3, "accuracy": 1.0}], Args())
    assert found == {"lstm": {"rate": 0.1, "accuracy": [0.2, 0.3], "other_rates": {0.2: [0.24]}}}
