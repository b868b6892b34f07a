"""Behaviours: who decides while trajectories are recorded. What is tried is what can be learned from."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.config import LADDER, CompressionConfig
from mango.features import KINDS
from mango.policies import Choice, ScoringPolicy, feature, random_action
from mango.policy_choice import proposals
from mango_env.reward import Reward
from train_policy.evaluate import listed, policy_of, spec_name
from train_policy.oracle import OraclePolicy

EXPLORE = 0.3                                            # of a layer's decisions are random under "explore:SPEC"
FAVOUR = 1e6                                             # score of a rung to be tried: above anything a policy says
CHEAP_OFTEN = {"m0v0": 6, "r32p4q4v0": 2, "m2v0": 4, "m4v0": 4, "m8v0": 2}       # how often a rung is drawn; others: 1


class ExploringPolicy:
    """Another policy, of whose decisions a share `epsilon` is replaced, per layer, by a rung drawn uniformly.

    It shows what happens around a good policy, which the policy itself never does. `logp` (L,) are the log probabilities
    of its last proposals, the inner policy taken as deterministic.
    """

    def __init__(self, inner: Any, epsilon: float = EXPLORE, seed: int = 0, name: str = "explore") -> None:
        if not 0 < epsilon <= 1:
            raise ValueError(f"epsilon={epsilon} is not a probability in (0, 1]")
        self.inner, self.epsilon, self.name = inner, epsilon, name
        self.generator = torch.Generator().manual_seed(seed)
        self.logp: NDArray[np.float32] | None = None

    def reset(self) -> None:
        self.inner.reset()

    def act(self, obs: Tensor) -> Choice:
        """Rung scores (L, R) where the inner policy scores, else a config per layer."""
        layers, rungs = len(obs), len(LADDER)
        explored = torch.rand(layers, generator=self.generator) < self.epsilon
        drawn = torch.randint(rungs, (layers,), generator=self.generator)
        if isinstance(self.inner, ScoringPolicy):
            scores = self.inner.scores(obs).double()
            usual = scores.argmax(1)
            scores[explored] = torch.nn.functional.one_hot(drawn[explored], rungs).double() * FAVOUR
            self._note(torch.where(explored, drawn, usual) == usual)
            return scores
        choice = self.inner.act(obs)
        if choice is None:
            return None
        configs = proposals(choice, layers)
        tried = [LADDER[int(rung)] if at else config for rung, at, config in zip(drawn, explored, configs, strict=True)]
        self._note(torch.tensor([a == b for a, b in zip(tried, configs, strict=True)]))
        return tried

    def _note(self, usual: Tensor) -> None:
        uniform = self.epsilon / len(LADDER)
        self.logp = np.log(np.where(usual.numpy(), 1 - self.epsilon + uniform, uniform)).astype(np.float32)


class RandomKnobsPolicy:
    """Uniform knob indices per layer, each kept for a geometric number of decisions: data for the knobs head."""

    name = "random-knobs"

    def __init__(self, seed: int = 0, persistence: float = 0.8) -> None:
        if not 0 <= persistence < 1:
            raise ValueError(f"persistence={persistence} is not a probability in [0, 1)")
        self.persistence = persistence
        self.generator = torch.Generator().manual_seed(seed)
        self._actions: Tensor | None = None

    def reset(self) -> None:
        self._actions = None

    def act(self, obs: Tensor) -> list[CompressionConfig]:
        drawn = random_action(len(obs), self.generator)
        keep = torch.rand(len(obs), 1, generator=self.generator) < self.persistence
        self._actions = drawn if self._actions is None else torch.where(keep, self._actions, drawn)
        return proposals(self._actions, len(obs))


class FactorialPolicy:
    """A designed experiment: each layer has one rung per phase of the run, drawn at random and kept for all of it.

    In half of the runs layers of one kind share their draw, so that what a kind loses is seen at full size; in the others
    every layer has its own. Cheap rungs are drawn more often (`CHEAP_OFTEN`): that is where losses differ. Effects of
    layers and phases can then be told apart by regression (Fisher, The Design of Experiments, 1935, ch. VI).
    """

    name = "factorial"

    def __init__(self, seed: int = 0, phases: int = 2) -> None:
        if phases < 1:
            raise ValueError(f"phases={phases} must be at least 1")
        self.phases = phases
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = torch.tensor([float(CHEAP_OFTEN.get(name, 1)) for name in LADDER.names])
        self.reset()

    def reset(self) -> None:
        self._by_kind = bool(torch.rand((), generator=self.generator) < 0.5)
        self._drawn: dict[int, Tensor] = {}

    def act(self, obs: Tensor) -> list[CompressionConfig]:
        progress = float(feature(obs, "progress")[0]) if len(obs) else 0.0
        phase = min(int(progress * self.phases), self.phases - 1)
        if phase not in self._drawn or len(self._drawn[phase]) != len(obs):
            self._drawn[phase] = self._draw(obs)
        return [LADDER[int(rung)] for rung in self._drawn[phase]]

    def _draw(self, obs: Tensor) -> Tensor:
        own = torch.multinomial(self.weights, len(obs), replacement=True, generator=self.generator)
        kinds = torch.stack([feature(obs, f"kind_{kind}") for kind in KINDS], 1)
        shared = torch.multinomial(self.weights, len(KINDS), replacement=True, generator=self.generator)
        return shared[kinds.argmax(1)] if self._by_kind else own


def behaviours(specs: str | Any | Sequence[str | Any]) -> list[str | Any]:
    """Specs with "fixed" spelled out as every rung of the ladder."""
    spelled = [f"fixed:{name}" for name in LADDER.names]
    return [one for spec in listed(specs) for one in (spelled if isinstance(spec, str) and spec == "fixed" else [spec])]


def behaviour_of(spec: str | Any, run_id: str, seed: int = 0, reward: Reward | None = None) -> Any:
    """A fresh behaviour from a spec: what `evaluate` takes, and "oracle", "factorial", "random-knobs", "explore:SPEC"."""
    seed = int(np.random.SeedSequence([seed, zlib.crc32(run_id.encode())]).generate_state(1)[0])
    if not isinstance(spec, str):
        return spec
    if spec == "oracle":
        return OraclePolicy(reward)
    if spec == "random-knobs":
        return RandomKnobsPolicy(seed=seed)
    if spec == "factorial":
        return FactorialPolicy(seed=seed)
    if spec.startswith("explore:"):
        return ExploringPolicy(policy_of(spec.removeprefix("explore:"), seed), seed=seed, name=behaviour_name(spec))
    return policy_of(spec, seed)


def behaviour_name(spec: str | Any) -> str:
    """How episodes call a behaviour."""
    if isinstance(spec, str) and spec.startswith("explore:"):
        return f"explore:{spec_name(spec.removeprefix('explore:'))}"
    return spec_name(spec)
