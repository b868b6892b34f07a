"""The networks that decide: one `PolicyNetwork` from behaviour cloning to the frozen file, and the published LSTM policy.

A layer of the model in training is one row of the batch, so one set of weights serves every layer of any model. The
normaliser is part of the network: whoever copies `trunk` copies it too, and no statistics are kept beside the weights.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango.config import KNOBS, LADDER, MAX_SPARSITY, NVEC, CompressionConfig
from mango.features import FEATURE_DIM
from mango.trunks import TRUNKS, LstmTrunk, State, Trunk, check_size, linear

PUBLISHED_KNOBS: dict[str, tuple[float, ...]] = {        # an empty menu: one output, any sparsity in [0, 0.99]
    "gradient_bits": (32, 16, 8, 4, 2),
    "momentum_bits": (32, 16, 8),
    "sparsity": (),
}
_NO_LOGIT = -1e9                                         # pads a short menu: probability 0, and 0 * -1e9 is 0, not nan
_NEVER = -60.0                                           # logit of an entry that a policy has no output for
_SPARSITY_EDGE = 4.0                                     # |logit| from here on means a sparsity of exactly 0 or 0.99


class PolicyOutput(NamedTuple):
    """What the network says about B layers, or about T steps of each."""

    knob_logits: Tensor                                  # (B, 34) or (B, T, 34): `NVEC` side by side
    rung_logits: Tensor                                  # (B, R) or (B, T, R)
    value: Tensor                                        # (B,) or (B, T)
    state: State | None                                  # to carry to the next call; None for a trunk without memory


@cache
def _menu_slots(nvec: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where the logits of K menus lie when every menu is padded to the longest: (positions (K*M,), is_padding (K, M))."""
    longest, start = max(nvec), 0
    slots = torch.zeros(len(nvec), longest, dtype=torch.long)
    padding = torch.ones(len(nvec), longest, dtype=torch.bool)
    for k, size in enumerate(nvec):
        slots[k, :size] = torch.arange(start, start + size)
        padding[k, :size] = False
        start += size
    return slots.reshape(-1), padding


class FactoredCategorical:
    """K independent choices whose logits lie side by side: the joint log-probability is the sum over the knobs.

    `logits` (..., sum(nvec)); actions (..., K) integers. A single choice of R is `nvec=(R,)`.

    >>> FactoredCategorical(torch.zeros(5, sum(NVEC))).mode().shape
    torch.Size([5, 7])
    """

    def __init__(self, logits: Tensor, nvec: tuple[int, ...] = NVEC) -> None:
        if logits.shape[-1] != sum(nvec):
            raise ValueError(f"{len(nvec)} knobs with menus {nvec} need {sum(nvec)} logits; got {logits.shape[-1]}")
        slots, padding = (t.to(logits.device) for t in _menu_slots(nvec))
        padded = logits[..., slots].view(*logits.shape[:-1], *padding.shape).masked_fill(padding, _NO_LOGIT)
        self.nvec = nvec
        self.log_probs = F.log_softmax(padded, -1)                             # (..., K, longest menu)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Joint log-probability (...,) of actions (..., K)."""
        return self.log_probs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self) -> Tensor:
        """Joint entropy in nats (...,)."""
        return -(self.log_probs.exp() * self.log_probs).sum((-1, -2))

    def kl(self, other: "FactoredCategorical") -> Tensor:
        """KL(self || other) in nats (...,)."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum((-1, -2))

    def mode(self) -> Tensor:
        """The most probable action (..., K) int64."""
        return self.log_probs.argmax(-1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """One random action (..., K) int64."""
        probs = self.log_probs.detach().exp().to(generator.device)
        drawn = torch.multinomial(probs.flatten(0, -2), 1, generator=generator)
        return drawn.view(probs.shape[:-1]).to(self.log_probs.device)


class PolicyNetwork(nn.Module):
    """Normaliser and trunk, then three heads: knobs (factored over `KNOBS`), rungs (over a ladder), value.

    `architecture` names the trunk, the further keywords are the trunk's: `hidden`, `activation` for "mlp"; `hidden_dim`,
    `num_layers` for "lstm"; these, `num_heads` and `window` for "tinyformer". The attribute `architecture` holds all of them
    as JSON, so `PolicyNetwork(**net.architecture)` rebuilds the shapes. Weights are drawn from `generator` (or `seed`), never
    from the global one; `device="meta"` draws none.

    >>> PolicyNetwork("mlp", hidden=(32, 32))(torch.zeros(5, 64)).rung_logits.shape
    torch.Size([5, 13])
    """

    def __init__(
        self,
        architecture: str = "mlp",
        *,
        rungs: int = len(LADDER),
        seed: int = 0,
        generator: torch.Generator | None = None,
        device: str = "cpu",
        **trunk: Any,
    ) -> None:
        super().__init__()
        if architecture not in TRUNKS:
            raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(TRUNKS)}")
        generator = generator or torch.Generator().manual_seed(seed)
        try:
            self.trunk: Trunk = TRUNKS[architecture](**trunk, generator=generator, device=device)
        except TypeError as error:
            raise ValueError(f"architecture {architecture!r} does not take {sorted(trunk)}: {error}") from error
        check_size("rungs", rungs)
        self.architecture: dict[str, Any] = {"architecture": architecture, "rungs": rungs, **self.trunk.settings}
        self.name = architecture
        features = self.trunk.features_dim
        self.knob_head = linear(features, sum(NVEC), 0.01, generator, device)     # small: the first policy is near uniform
        self.rung_head = linear(features, rungs, 0.01, generator, device)
        self.value_head = linear(features, 1, 1.0, generator, device)

    def forward(self, obs: Tensor, state: State | None = None) -> PolicyOutput:
        """Observations (B, 64), or (B, T, 64) as sequences, with the state that the last call returned."""
        features, state = self.trunk.step(obs, state)
        value: Tensor = self.value_head(features).squeeze(-1)
        return PolicyOutput(self.knob_head(features), self.rung_head(features), value, state)

    def distribution(self, output: PolicyOutput, head: str = "knobs") -> FactoredCategorical:
        """The distribution of one head: over knobs, actions (..., 7), or over rungs, actions (..., 1)."""
        if head == "knobs":
            return FactoredCategorical(output.knob_logits)
        if head == "rung":
            return FactoredCategorical(output.rung_logits, (self.rung_head.out_features,))
        raise ValueError(f"unknown head {head!r}; known: knobs, rung")

    def log_prob(self, obs: Tensor, actions: Tensor, *, head: str = "knobs", state: State | None = None) -> Tensor:
        """Log-probability (B,) or (B, T) of knob actions (..., 7), or of rungs (...,) with `head="rung"`."""
        return self.distribution(self(obs, state), head).log_prob(actions if head == "knobs" else actions.unsqueeze(-1))

    def fit_normaliser(self, obs: Tensor) -> None:
        """Fit mean and standard deviation to observations (N, 64)."""
        self.trunk.normaliser.fit(obs)


class Heads(NamedTuple):
    """What `CompressionPolicyNet` says about B agents, or about T steps of each."""

    logits: dict[str, Tensor]                            # knob -> (B, [T,] menu size), or (B, [T,] 1) for a free sparsity
    value: Tensor                                        # (B,) or (B, T)
    state: State


class CompressionPolicyNet(nn.Module):
    """The published LSTM policy: 5 gradient bits, 3 momentum bits, 1 sparsity; `knobs=KNOBS` for the whole menu.

    It decides in two ways, each with its own carried state:

    - `act(obs (L, 64)) -> (L, 7)` knob indices, one decision per layer: what the optimizer calls.
    - `policy(features) -> dict`, one decision per parameter group: the layers, in order, are cut into
      `num_parameter_groups` runs of equal length and each run is decided on the mean of its layers' features.

    In training mode decisions are drawn from the policy's own generator (`seed`); in eval mode they are the most probable
    ones. Dropout (before the heads) is on only in `evaluate(..., dropout=True)` in training mode, never when deciding.
    Sparsity is 0.99 sigmoid(z), z normal around its output with a learned standard deviation; |z| >= 4 gives exactly 0 or
    0.99. Knobs without a head keep full precision.
    """

    def __init__(
        self,
        feature_dim: int = FEATURE_DIM,
        hidden_dim: int = 128,
        num_layers: int = 2,
        num_parameter_groups: int = 1,
        dropout: float = 0.1,
        knobs: Mapping[str, Sequence[float]] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r} is not in [0, 1)")
        self.knobs = _check_menus(PUBLISHED_KNOBS if knobs is None else knobs)
        self.num_parameter_groups = check_size("num_parameter_groups", num_parameter_groups)
        self.dropout = float(dropout)
        self.generator = torch.Generator().manual_seed(seed)
        drawn = torch.Generator().manual_seed(seed)
        self.trunk = LstmTrunk(hidden_dim, num_layers, feature_dim=feature_dim, generator=drawn)
        self.heads = nn.ModuleDict(
            {knob: linear(hidden_dim, max(len(menu), 1), 0.01, drawn, "cpu") for knob, menu in self.knobs.items()}
        )
        self.value_head = linear(hidden_dim, 1, 1.0, drawn, "cpu")
        self.sparsity_log_std = nn.Parameter(torch.zeros(()))
        if self.knobs.get("sparsity") == ():
            nn.init.constant_(self.heads.get_parameter("sparsity.bias"), -2.0)  # begin by dropping little: 0.12
        self.architecture: dict[str, Any] = {
            **self.trunk.settings,
            "num_parameter_groups": num_parameter_groups,
            "dropout": self.dropout,
            "knobs": {knob: list(menu) for knob, menu in self.knobs.items()},
        }
        self._layer_state: State | None = None
        self._group_state: State | None = None

    def evaluate(self, obs: Tensor, state: State | None = None, *, dropout: bool = False) -> Heads:
        """Heads for observations (B, F) or sequences (B, T, F), from `state` or zeros, with gradients."""
        features, state = self.trunk.step(obs, state)
        features = F.dropout(features, self.dropout, self.training and dropout)
        value: Tensor = self.value_head(features).squeeze(-1)
        return Heads({knob: head(features) for knob, head in self.heads.items()}, value, state)

    def log_prob(self, heads: Heads, actions: Tensor) -> Tensor:
        """Joint log-probability (B,) or (B, T) of actions (..., K) in the form of `encode`.

        A free sparsity is a normal density of z within the edges and the mass beyond them at the edges.
        """
        parts = []
        for k, (knob, menu) in enumerate(self.knobs.items()):
            if menu:
                parts.append(F.log_softmax(heads.logits[knob], -1).gather(-1, actions[..., k, None].long()).squeeze(-1))
            else:
                parts.append(self._sparsity_log_prob(heads.logits[knob].squeeze(-1), actions[..., k]))
        return torch.stack(parts).sum(0)

    def entropy(self, heads: Heads) -> Tensor:
        """Joint entropy in nats (B,) or (B, T); for a free sparsity that of the normal z, edges not considered."""
        parts = []
        for knob, menu in self.knobs.items():
            if menu:
                logp = F.log_softmax(heads.logits[knob], -1)
                parts.append(-(logp.exp() * logp).sum(-1))
            else:
                parts.append((1.4189385 + self._log_std()).expand_as(heads.value))     # (1 + ln 2 pi) / 2
        return torch.stack(parts).sum(0)

    def encode(self, choices: Sequence[Mapping[str, Any] | CompressionConfig]) -> Tensor:
        """Choices as actions (B, K) float32: menu indices (the nearest entry), z for a free sparsity.

        Choices may be configs or dicts of knobs (`sparsity_ratio` is accepted); a knob that is not named keeps full precision.
        """
        rows = []
        for choice in choices:
            if isinstance(choice, CompressionConfig):
                config = choice
            else:                                        # what else a decision carries (logits, value) is no knob
                config = CompressionConfig.from_dict({k: choice[k] for k in (*KNOBS, "sparsity_ratio") if k in choice})
            rows.append([_encode_knob(float(getattr(config, knob)), menu) for knob, menu in self.knobs.items()])
        return torch.tensor(rows, dtype=torch.float32).view(len(rows), len(self.knobs))

    def decode(self, actions: Tensor) -> list[dict[str, float]]:
        """Actions (B, K) as dicts of the knobs that have heads, sparsity under its public name `sparsity_ratio`."""
        return [
            {
                "sparsity_ratio" if knob == "sparsity" else knob: _decode_knob(entry, menu)
                for entry, (knob, menu) in zip(row, self.knobs.items(), strict=True)
            }
            for row in actions.tolist()
        ]

    def act(self, obs: Tensor) -> Tensor:
        """One decision per layer: observations (L, F) to knob indices (L, 7) int64; a free sparsity takes the nearest entry."""
        with torch.no_grad():
            actions, _, self._layer_state = self._decide(_as_rows(obs), self._layer_state)
        return torch.tensor(
            [CompressionConfig.from_dict(choice).to_action() for choice in self.decode(actions)], dtype=torch.int64
        ).view(-1, len(NVEC))

    def forward(self, features: Mapping[str, Any] | Tensor) -> dict[str, Any]:
        """One decision per parameter group, from the optimizer's features ({"layers": (L, F), ...}), (L, F) or (F,).

        The dict has the knobs of the first group (`gradient_bits`, `momentum_bits`, `sparsity_ratio`), the same as `config`,
        `configs` with one dict per group, `log_prob`, `value`, and the logits: `gradient_logits` (5,), `momentum_logits` (3,),
        `sparsity_logit` (1,), each with a leading group dimension where there are several groups.
        """
        rows = self.pool(self.rows(features))
        actions, heads, self._group_state = self._decide(rows, self._group_state)
        configs = self.decode(actions)
        several = self.num_parameter_groups > 1
        shown: dict[str, Any] = {_logit_name(knob, self.knobs[knob]): x for knob, x in heads.logits.items()}
        shown |= {"value": heads.value, "log_prob": self.log_prob(heads, actions)}
        shown = {name: x if several else x.squeeze(0) for name, x in shown.items()}
        return {**configs[0], "config": configs[0], "configs": configs, **shown}

    def rows(self, features: Mapping[str, Any] | Tensor) -> Tensor:
        """The layers' observations (L, F) in what the optimizer collects."""
        if isinstance(features, Mapping):
            if "layers" not in features:
                raise ValueError(f"features need the key 'layers' with a tensor (L, F); got the keys {sorted(features)}")
            layers: Tensor = features["layers"]
            return _as_rows(layers)
        return _as_rows(features)

    def pool(self, rows: Tensor) -> Tensor:
        """Layers (L, F) as parameter groups (G, F): means over G runs of layers (a layer may serve several of more groups)."""
        count, groups = rows.shape[0], self.num_parameter_groups
        starts = [g * count // groups for g in range(groups)]
        ends = [max(start + 1, (g + 1) * count // groups) for g, start in enumerate(starts)]
        return torch.stack([rows[start:end].mean(0) for start, end in zip(starts, ends, strict=True)])

    def fit_normaliser(self, obs: Tensor) -> None:
        """Fit mean and standard deviation to observations (N, F)."""
        self.trunk.normaliser.fit(obs)

    def to_network(self) -> PolicyNetwork:
        """The same policy as a `PolicyNetwork`, to freeze with `head="knobs"`; needs menus only, such as `knobs=KNOBS`."""
        if () in self.knobs.values():
            raise ValueError("a free sparsity has no place on the menu of a policy file; build the policy with knobs=KNOBS")
        settings = self.trunk.settings
        network = PolicyNetwork("lstm", **settings)
        network.trunk.load_state_dict(self.trunk.state_dict())
        network.value_head.load_state_dict(self.value_head.state_dict())
        weight, bias = torch.zeros_like(network.knob_head.weight), torch.full_like(network.knob_head.bias, _NEVER)
        start = 0
        with torch.no_grad():
            for knob, full in KNOBS.items():
                if knob not in self.knobs:
                    bias[start] = 0.0                                          # the first entry of every menu: full precision
                for i, entry in enumerate(self.knobs.get(knob, ())):
                    slot = start + full.index(entry)
                    weight[slot] = self.heads.get_parameter(f"{knob}.weight")[i]
                    bias[slot] = self.heads.get_parameter(f"{knob}.bias")[i]
                start += len(full)
            network.knob_head.weight.copy_(weight)
            network.knob_head.bias.copy_(bias)
        return network

    def reset(self) -> None:
        """Forget the carried states: a new model, or a new run."""
        self._layer_state = self._group_state = None

    def reset_hidden_state(self) -> None:
        """The published name of `reset`."""
        self.reset()

    def get_extra_state(self) -> dict[str, Tensor]:
        """Carried states and generator, as tensors: a restored policy continues with identical decisions."""
        kept = {"generator": self.generator.get_state()}
        for name, state in (("layer", self._layer_state), ("group", self._group_state)):
            if state is not None:
                kept |= {f"{name}_h": state[0].clone(), f"{name}_c": state[1].clone()}
        return kept

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())
        device = self.value_head.weight.device
        layer, group = (
            (state[f"{name}_h"].to(device), state[f"{name}_c"].to(device)) if f"{name}_h" in state else None
            for name in ("layer", "group")
        )
        self._layer_state, self._group_state = layer, group

    def _decide(self, rows: Tensor, state: State | None) -> tuple[Tensor, Heads, State]:
        """Actions (B, K), the heads they come from, and the detached state to carry."""
        if state is not None and state[0].shape[1] != rows.shape[0]:
            state = None                                                       # another model: other agents
        heads = self.evaluate(rows.to(self.value_head.weight.device), state)
        columns = []
        for knob, menu in self.knobs.items():
            logits = heads.logits[knob].detach().cpu()
            if menu and self.training:
                columns.append(torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(-1).float())
            elif menu:
                columns.append(logits.argmax(-1).float())
            else:
                z = logits.squeeze(-1)
                if self.training:
                    z = z + self._log_std().detach().cpu().exp() * torch.randn(z.shape, generator=self.generator)
                columns.append(z.clamp(-_SPARSITY_EDGE, _SPARSITY_EDGE))
        actions = torch.stack(columns, -1).to(heads.value.device)
        return actions, heads, (heads.state[0].detach(), heads.state[1].detach())

    def _log_std(self) -> Tensor:
        return self.sparsity_log_std.clamp(-3.0, 1.0)

    def _sparsity_log_prob(self, mean: Tensor, z: Tensor) -> Tensor:
        log_std = self._log_std()
        std = log_std.exp()
        inside = -0.5 * ((z - mean) / std) ** 2 - log_std - 0.9189385          # ln(2 pi) / 2
        below = torch.special.log_ndtr((-_SPARSITY_EDGE - mean) / std)
        above = torch.special.log_ndtr((mean - _SPARSITY_EDGE) / std)
        return torch.where(z <= -_SPARSITY_EDGE, below, torch.where(z >= _SPARSITY_EDGE, above, inside))


def _check_menus(knobs: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    """Menus in the order of `KNOBS`, each a part of the knob's menu; only sparsity may be free (an empty menu)."""
    unknown = sorted(set(knobs) - set(KNOBS))
    if unknown or not knobs:
        raise ValueError(f"knobs names {sorted(knobs)}; known, at least one: {list(KNOBS)}")
    for knob, menu in knobs.items():
        if not set(menu) <= set(KNOBS[knob]) or len(set(menu)) != len(menu) or not (len(menu) or knob == "sparsity"):
            raise ValueError(f"the menu {tuple(menu)} of {knob} is not a part of {KNOBS[knob]}")
    return {knob: tuple(full[full.index(entry)] for entry in knobs[knob]) for knob, full in KNOBS.items() if knob in knobs}


def _encode_knob(value: float, menu: tuple[float, ...]) -> float:
    if menu:
        return float(min(range(len(menu)), key=lambda i: abs(menu[i] - value)))
    fraction = min(max(value / MAX_SPARSITY, 1e-9), 1 - 1e-9)
    z = math.log(fraction) - math.log1p(-fraction)
    return min(max(z, -_SPARSITY_EDGE), _SPARSITY_EDGE)


def _decode_knob(entry: float, menu: tuple[float, ...]) -> float:
    if menu:
        return menu[int(entry)]
    if abs(entry) >= _SPARSITY_EDGE:
        return MAX_SPARSITY if entry > 0 else 0.0
    return MAX_SPARSITY / (1 + math.exp(-entry))


def _logit_name(knob: str, menu: tuple[float, ...]) -> str:
    return knob.removesuffix("_bits") + ("_logits" if menu else "_logit")


def _as_rows(obs: Tensor) -> Tensor:
    if obs.dim() not in (1, 2) or obs.numel() == 0:
        raise ValueError(f"a policy reads features (L, F) or (F,), L >= 1; got {tuple(obs.shape)}")
    return obs.detach().reshape(-1, obs.shape[-1]).float()
