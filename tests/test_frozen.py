"""Promises of frozen policy files: what is written comes back, and nothing else is ever read or run."""

import copy
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mango import policy_file
from mango.config import KNOBS, KNOBS_VERSION, LADDER, CompressionConfig, Ladder
from mango.features import FEATURE_DIM, FEATURES, SCHEMA_HASH
from mango.networks import CompressionPolicyNet, PolicyNetwork
from mango.policies import Policy, ScoringPolicy
from mango.policy_file import FrozenPolicy, freeze, load_policy, policy_dir, shipped_policies

CARD = {"description": "a test", "licence": "MIT", "rows": [{"workload": "digits_mlp", "val_loss": 0.5}]}


def observations(layers: int, seed: int = 0) -> Tensor:
    low, high = (torch.tensor([getattr(f, side) for f in FEATURES]) for side in ("low", "high"))
    return low + (high - low) * torch.rand((layers, FEATURE_DIM), generator=torch.Generator().manual_seed(seed))


def opinionated(architecture: str = "mlp") -> PolicyNetwork:
    """A fitted network whose decisions differ between layers."""
    net = PolicyNetwork(architecture, seed=1, **({"hidden": [32]} if architecture == "mlp" else {"hidden_dim": 16}))
    net.fit_normaliser(observations(200, 9))
    with torch.no_grad():
        for head in (net.knob_head, net.rung_head):
            head.weight.mul_(100)
    return net


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def changed(path: Path, **changes: str | None) -> Path:
    """The same file with some metadata changed, or removed where None."""
    metadata = {k: v for k, v in (metadata_of(path) | changes).items() if v is not None}
    save_file(load_file(path), path, metadata=metadata)
    return path


@pytest.mark.parametrize("architecture", ["mlp", "lstm"])
def test_c17_a_frozen_policy_decides_as_the_network_it_was(tmp_path: Path, architecture: str) -> None:
    net = opinionated(architecture)
    scoring = load_policy(freeze(net, tmp_path / "rungs.safetensors", head="rung", card=CARD))
    acting = load_policy(freeze(net, tmp_path / "knobs.safetensors", head="knobs", card=CARD))
    twin, state = load_policy(tmp_path / "rungs.safetensors"), None
    for seed in range(4):
        obs = observations(7, seed)
        with torch.no_grad():
            out = net(obs, state)
        state = out.state
        assert torch.equal(scoring.scores(obs), out.rung_logits.log_softmax(-1))
        assert torch.equal(acting.act(obs), net.distribution(out).mode())
        rungs = [LADDER[int(rung)].to_action() for rung in out.rung_logits.argmax(-1)]
        assert torch.equal(twin.act(obs), torch.tensor(rungs))
        assert len(set(rungs)) > 1


def test_c3_a_frozen_policy_acts_legally_and_only_the_rung_head_scores(tmp_path: Path) -> None:
    for head in ("rung", "knobs"):
        policy = load_policy(freeze(opinionated(), tmp_path / head, head=head, card={}))
        action = policy.act(observations(5))
        assert action.shape == (5, len(KNOBS)) and action.dtype == torch.int64
        assert all(CompressionConfig.from_action(row) for row in action.tolist())
        assert isinstance(policy, Policy)
        assert hasattr(policy, "scores") == isinstance(policy, ScoringPolicy) == (head == "rung")
        assert not policy.network.training and not any(p.requires_grad for p in policy.network.parameters())
        with pytest.raises(ValueError, match=r"reads observations \(L, 64\); got \(5, 3\)"):
            policy.act(torch.zeros(5, 3))


def test_the_file_carries_what_the_contract_says(tmp_path: Path) -> None:
    net = opinionated()
    path = freeze(net, tmp_path / "new" / "mine", head="rung", card=CARD)
    assert path == tmp_path / "new" / "mine.safetensors"
    assert sorted(p.name for p in path.parent.iterdir()) == ["mine.json", "mine.safetensors"]
    metadata = metadata_of(path)
    assert metadata["format"] == "mango-policy" and metadata["format_version"] == "1" and metadata["head"] == "rung"
    assert metadata["schema_hash"] == SCHEMA_HASH and metadata["knobs_version"] == str(KNOBS_VERSION)
    assert json.loads(metadata["feature_names"]) == [f.name for f in FEATURES]
    assert json.loads(metadata["knobs"]) == {knob: list(menu) for knob, menu in KNOBS.items()}
    assert Ladder.from_json(metadata["ladder"]) == LADDER
    assert json.loads(metadata["architecture"]) == net.architecture
    assert json.loads(metadata["card"]) == CARD
    tensors = load_file(path)
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in net.state_dict().items()}
    assert torch.equal(tensors["trunk.normaliser.mean"], net.trunk.normaliser.mean)
    card = json.loads((path.parent / "mine.json").read_text())
    assert card["card"] == CARD and card["name"] == "mine" and card["parameters"] == sum(p.numel() for p in net.parameters())
    policy = load_policy(path)
    assert policy.card == CARD and policy.metadata == metadata and policy.name == "mine"


def test_the_same_policy_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [freeze(opinionated(), tmp_path / f"{i}.safetensors", card=CARD).read_bytes() for i in range(5)]
    assert len(set(files)) == 1


def test_freezing_replaces_whole_files_and_failing_leaves_the_old_ones(tmp_path: Path) -> None:
    path = freeze(opinionated(), tmp_path / "p", card=CARD)
    before = path.read_bytes()
    broken = opinionated()
    with torch.no_grad():
        broken.rung_head.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite weights in rung_head\.bias"):
        freeze(broken, path, card=CARD)
    with pytest.raises(ValueError, match="card is not JSON"):
        freeze(opinionated(), path, card={"loss": float("nan")})
    with pytest.raises(ValueError, match="card is not JSON"):
        freeze(opinionated(), path, card={"x": object()})
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "p.safetensors"]


def test_only_what_can_be_loaded_can_be_frozen(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got CompressionPolicyNet"):
        freeze(CompressionPolicyNet(hidden_dim=8), tmp_path / "p", card={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="known: rung, knobs"):
        freeze(opinionated(), tmp_path / "p", head="value", card={})
    with pytest.raises(ValueError, match=f"scores {len(LADDER)} rungs; the ladder has 2"):
        freeze(opinionated(), tmp_path / "p", ladder=Ladder(LADDER.rungs[:2]), card={})
    with pytest.raises(ValueError, match="reads 10 features"):
        freeze(PolicyNetwork("mlp", feature_dim=10), tmp_path / "p", card={})
    assert list(tmp_path.iterdir()) == []
    network = CompressionPolicyNet(hidden_dim=8, knobs=KNOBS).to_network()
    assert load_policy(freeze(network, tmp_path / "lstm", head="knobs", card={})).act(observations(2)).shape == (2, 7)


def test_memory_is_per_layer_carried_reset_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    path = freeze(opinionated("lstm"), tmp_path / "p", card=CARD)
    policy, other = load_policy(path), load_policy(path)
    assert policy.state_dict() == {}
    first = [policy.scores(observations(3, seed)) for seed in range(4)]
    torch.save(policy.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    twin = copy.deepcopy(policy)
    expected = policy.scores(observations(3))
    assert torch.equal(expected, other.scores(observations(3))) and torch.equal(expected, twin.scores(observations(3)))
    assert not torch.equal(expected, first[0])
    policy.reset()
    assert torch.equal(policy.scores(observations(3)), first[0])
    assert policy.scores(observations(5)).shape == (5, len(LADDER))            # another model starts from nothing
    policy.load_state_dict({})
    alone = policy.scores(observations(5)[1:2])
    assert torch.allclose(alone, load_policy(path).scores(observations(5))[1:2], atol=1e-6)


def test_wrapping_a_network_leaves_it_trainable() -> None:
    net = opinionated()
    policy = FrozenPolicy(net)
    before = policy.scores(observations(2))
    assert net.training and all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        net.rung_head.weight.zero_()
    assert torch.equal(before, policy.scores(observations(2)))


def test_loading_leaves_the_global_generator(tmp_path: Path) -> None:
    path = freeze(opinionated("lstm"), tmp_path / "p", card={})
    before = torch.get_rng_state()
    load_policy(path).act(observations(2))
    assert torch.equal(before, torch.get_rng_state())


def test_c14_a_shipped_name_is_found_and_an_unknown_one_lists_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert policy_dir().name in ("policies", "frozen") and policy_dir().is_dir()
    for name in shipped_policies():
        assert load_policy(name).act(observations(3)).shape == (3, len(KNOBS))
    monkeypatch.setattr(policy_file, "policy_dir", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"unknown policy 'universal'.*shipped policies are: none yet"):
        load_policy("universal")
    for name in ("demo", "small"):
        freeze(opinionated(), tmp_path / name, card=CARD)
    assert load_policy("demo").name == "demo"
    for missing in ("universal", tmp_path / "universal.safetensors", "../demo", tmp_path):
        with pytest.raises(ValueError, match=r"unknown policy .*shipped policies are: demo, small$"):
            load_policy(missing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "its format is 'other', expected 'mango-policy'"),
        ({"format": None}, "its format is None, expected 'mango-policy'"),
        ({"format_version": "2"}, "format_version '2', expected '1'"),
        ({"schema_hash": "0123456789abcdef"}, f"schema 0123456789abcdef, expected {SCHEMA_HASH}"),
        ({"knobs_version": "7"}, f"made for knobs 7 .* expected {KNOBS_VERSION} "),
        ({"knobs": '{"gradient_bits": [1]}'}, r"gradient_bits.: \[1\].*expected"),
        ({"ladder": Ladder(LADDER.rungs[:4]).to_json()}, "the ladder here is .*retrain"),
        ({"ladder": "[]"}, "damaged or foreign ladder"),
        ({"ladder": "{"}, "damaged or foreign ladder"),
        ({"head": "value"}, "head 'value', expected one of: rung, knobs"),
        ({"card": None}, "lacks the metadata card"),
        ({"card": "[1]"}, "card that is no JSON object"),
        ({"card": "["}, "damaged or foreign card"),
        ({"architecture": "[]"}, "damaged or foreign architecture"),
        ({"architecture": '{"architecture": "gru"}'}, "known: mlp, lstm"),
        ({"architecture": '{"architecture": "mlp", "device": "cpu"}'}, "damaged or foreign architecture"),
        ({"architecture": '{"architecture": "mlp", "hidden": [100000000]}'}, "not an integer in 1"),
        ({"architecture": json.dumps(PolicyNetwork("lstm").architecture)}, "the tensors do not fit it"),
        ({"weights_sha256": "00"}, "weights do not match their checksum"),
    ],
)
def test_foreign_files_are_refused_saying_what_was_found_and_expected(
    tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    path = changed(freeze(opinionated(), tmp_path / "p.safetensors", card=CARD), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_ladder_of_ones_own_travels_and_must_be_named(tmp_path: Path) -> None:
    ladder = Ladder(LADDER.rungs[3:6])
    path = freeze(PolicyNetwork("mlp", rungs=3), tmp_path / "p", ladder=ladder, card={})
    assert load_policy(path, ladder=ladder).scores(observations(4)).shape == (4, 3)
    with pytest.raises(ValueError, match=f"scores the rungs {', '.join(ladder.names)}"):
        load_policy(path)
    knobs = freeze(PolicyNetwork("mlp", rungs=3), tmp_path / "k", head="knobs", ladder=ladder, card={})
    assert load_policy(knobs).act(observations(4)).shape == (4, 7)             # no rungs needed


def test_infinite_weights_and_other_dtypes_are_refused(tmp_path: Path) -> None:
    path = freeze(opinionated(), tmp_path / "p.safetensors", card=CARD)
    for change in (lambda t: torch.full_like(t, torch.inf), lambda t: t.half()):
        tensors = {name: change(t) for name, t in load_file(path).items()}
        metadata = metadata_of(path) | {"weights_sha256": policy_file._weights_sha256(tensors)}
        save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match="not all finite float32"):
            load_policy(tmp_path / "bad.safetensors")


def test_truncated_and_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = freeze(opinionated(), tmp_path / "p.safetensors", card=CARD).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="corrupt or not a safetensors file"):
            load_policy(path)
    for text in (b"{}", b"hello, this is no policy at all", (2**62).to_bytes(8, "little") + b"{}"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="corrupt or not a safetensors file"):
            load_policy(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match="corrupt"):
        load_policy(path)


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_byte_is_refused_or_harmless(tmp_path: Path, position: float, flip: int) -> None:
    """Weights are guarded by their checksum; what the header's own checks let pass says the same policy in other words."""
    path = tmp_path / "p.safetensors"
    if not path.exists():
        freeze(PolicyNetwork("mlp", hidden=[4]), path, card=CARD)
    whole = bytearray(path.read_bytes())
    # half of the flips go to the header, where a flip can do more
    header = 8 + int.from_bytes(whole[:8], "little")
    at = int(2 * position * header) if position < 0.5 else header + int((2 * position - 1) * (len(whole) - header))
    whole[at] ^= flip
    (tmp_path / "flipped.safetensors").write_bytes(whole)
    policy, refusal = None, ""
    try:
        policy = load_policy(tmp_path / "flipped.safetensors")
    except ValueError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if policy is not None:
        assert at < header
        assert torch.equal(policy.scores(observations(3)), load_policy(path).scores(observations(3)))


class Planted:
    """Pickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def plant(kind: str, path: Path, mark: Path) -> None:
    payload = Planted(mark)
    if kind == "sb3":                                    # a zip with a base64 cloudpickle field, as SB3 writes them
        import base64

        field = base64.b64encode(pickle.dumps(payload)).decode()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data", json.dumps({"policy_class": {":type:": "x", ":serialized:": field}}))
            archive.writestr("policy.pth", pickle.dumps(payload))
    elif kind == "torch":
        torch.save({"weights": payload}, path)
    else:
        path.write_bytes(pickle.dumps({"config": payload}, protocol=int(kind)))


@pytest.mark.parametrize("kind", ["sb3", "torch", "0", "2", "4", "5"])
@pytest.mark.parametrize("name", ["policy.zip", "policy.d3", "policy.pt", "policy.pkl", "policy.safetensors", "policy"])
def test_malicious_files_are_refused_and_never_run(tmp_path: Path, kind: str, name: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / name
    plant(kind, path, mark)
    with pytest.raises(ValueError, match=r"trust_pickle=True|corrupt or not a safetensors file") as caught:
        load_policy(path)
    assert not mark.exists()
    if kind != "0":                                      # protocol 0 is text without a mark of its own
        assert f"mango freeze --from {path} --trust-pickle" in str(caught.value)
    pickle.loads(pickle.dumps(Planted(mark)))            # the plant works
    assert mark.exists()


def test_a_policy_with_a_header_that_begins_like_a_pickle_still_loads(tmp_path: Path) -> None:
    for size in range(200):                              # some header length has 0x80 0x04 as its first bytes
        card: dict[str, Any] = {"pad": "x" * size * 8}
        path = freeze(PolicyNetwork("mlp", hidden=[4]), tmp_path / "p", card=card)
        if path.read_bytes()[0] == 0x80:
            assert load_policy(path).card == card
            return
    pytest.fail("no header began with 0x80")
