"""The menus of choices, one choice, the ladder, and the table of features."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mango.config import FULL, KNOBS, LADDER, NVEC, CompressionConfig, Ladder
from mango.features import FEATURE_DIM, FEATURE_INDEX, FEATURES, GLOBAL_FEATURES, KINDS, LAYER_FEATURES, RULES
from mango.layers import describe, kind_of
from mango.state import StorageOptions, predicted_bytes

actions = st.tuples(*(st.integers(0, n - 1) for n in NVEC))


@given(actions)
def test_every_action_is_a_config_and_comes_back(action: tuple[int, ...]) -> None:
    config = CompressionConfig.from_action(action)
    assert config.to_action() == action
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(actions, actions)
def test_names_tell_configs_apart(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    """A name leaves out the knobs that have no effect: momentum bits in a subspace, factor bits outside one."""
    a, b = CompressionConfig.from_action(one), CompressionConfig.from_action(other)

    def effective(c: CompressionConfig) -> tuple[float, ...]:
        moments = (c.rank, c.factor_bits_p, c.factor_bits_q) if c.rank else (c.momentum_bits,)
        return c.gradient_bits, c.sparsity, c.variance_bits, *moments

    assert (a.name == b.name) == (effective(a) == effective(b))


@pytest.mark.parametrize(
    "bad",
    [{"momentum_bits": 5}, {"gradient_bits": 0}, {"variance_bits": 2}, {"rank": 3}, {"sparsity": 1.0}, {"sparsity": -0.1},
     {"sparsity": float("nan")}, {"sparsity": True}, {"momentum_bits": True}, {"factor_bits_q": 32}],
)  # fmt: skip
def test_c3_a_choice_outside_the_menu_is_refused_and_told_what_is_allowed(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        CompressionConfig(**bad)  # type: ignore[arg-type]


def test_dicts_of_the_earlier_interface_are_configs() -> None:
    config = CompressionConfig.from_dict({"gradient_bits": 16, "momentum_bits": 16, "sparsity_ratio": 0.1})
    assert (config.gradient_bits, config.momentum_bits, config.sparsity, config.sparsity_ratio) == (16, 16, 0.1, 0.1)
    with pytest.raises(ValueError, match="unknown knobs"):
        CompressionConfig.from_dict({"bits": 8})


def test_actions_of_the_wrong_size_or_range_are_refused() -> None:
    with pytest.raises(ValueError, match="one index per knob"):
        CompressionConfig.from_action([0, 0])
    for knob, n in enumerate(NVEC):
        for index in (-1, n):
            with pytest.raises(ValueError, match="outside"):
                CompressionConfig.from_action([index if i == knob else 0 for i in range(len(NVEC))])


def test_the_ladder_climbs_in_bytes_and_ends_at_full_precision() -> None:
    sizes = [predicted_bytes((512, 512), rung, StorageOptions()) for rung in LADDER]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    assert LADDER[len(LADDER) - 1] == FULL and 8 <= len(LADDER) <= 16


def test_rungs_are_found_by_name_and_position_and_travel_as_json() -> None:
    for i, name in enumerate(LADDER.names):
        assert LADDER.index(name) == LADDER.index(i) == LADDER.index(str(i)) == LADDER.nearest(LADDER[i]) == i
    assert Ladder.from_json(LADDER.to_json()) == LADDER
    for wrong in ("m3v3", len(LADDER), -1):
        with pytest.raises(ValueError):
            LADDER.index(wrong)
    with pytest.raises(ValueError, match="two different"):
        Ladder((FULL, FULL))


@given(actions)
def test_the_nearest_rung_keeps_the_kind_of_storage(action: tuple[int, ...]) -> None:
    config = CompressionConfig.from_action(action)
    assert (LADDER[LADDER.nearest(config)].rank > 0) == (config.rank > 0)


def test_menus_hold_what_the_documents_promise() -> None:
    assert set(KNOBS["gradient_bits"]) >= {32, 16, 8, 6, 4, 2} and set(KNOBS["momentum_bits"]) >= {32, 16, 8, 6}
    assert {1, 4, 8} <= set(KNOBS["rank"]) and max(KNOBS["sparsity"]) == 0.99


def test_the_feature_table_is_finite_named_once_and_64_wide() -> None:
    assert len(FEATURES) == FEATURE_DIM == len(FEATURE_INDEX) == 64 and len(LAYER_FEATURES) + len(GLOBAL_FEATURES) == 64
    assert all(torch.isfinite(torch.tensor([f.low, f.high])).all() and f.low < f.high and f.meaning and f.unit for f in FEATURES)
    assert all(f"kind_{kind}" in FEATURE_INDEX for kind in KINDS) and all(f"rule_{rule}" in FEATURE_INDEX for rule in RULES)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [("layer1.0.conv1.weight", (64, 64, 3, 3), "conv"), ("transformer.wte.weight", (1000, 64), "embedding"),
     ("h.0.ln_1.weight", (64,), "norm"), ("h.0.attn.c_attn.weight", (64, 192), "attention_in"),
     ("h.0.attn.c_proj.weight", (64, 64), "attention_out"), ("h.0.mlp.c_fc.weight", (64, 256), "mlp_up"),
     ("h.0.mlp.c_proj.weight", (256, 64), "mlp_down"), ("lm_head.weight", (1000, 64), "head"),
     ("rnn.weight_hh_l0", (256, 64), "recurrent"), ("fc.weight", (10, 64), "linear")],
)  # fmt: skip
def test_b6_names_tell_the_kind_of_a_layer(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert kind_of(name, shape) == kind


def test_b6_depth_count_and_kind_of_every_layer() -> None:
    layers = describe(["a", "b", "c"], [(8, 3, 3, 3), (16, 8), (4, 16)])
    assert [layer.depth for layer in layers] == [0.0, 0.5, 1.0]
    assert [layer.numel for layer in layers] == [216, 128, 64]
    assert [layer.kind for layer in layers] == ["conv", "linear", "head"]


def test_every_pair_of_knobs_is_a_legal_config() -> None:
    for i, j in itertools.combinations(range(len(NVEC)), 2):
        for a, b in itertools.product(range(NVEC[i]), range(NVEC[j])):
            action = [a if k == i else b if k == j else 0 for k in range(len(NVEC))]
            assert CompressionConfig.from_action(action).to_action() == tuple(action)
