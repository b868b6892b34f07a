"""Off-policy evaluation: what a policy would be worth, estimated from recorded runs without running anything.

Fitted Q evaluation (Le, Voloshin and Yue 2019, alg. 1) by d3rlpy's `DiscreteFQE` on our trunk, and weighted per-decision
importance sampling (Precup, Sutton and Singh 2000, sec. 3) where the behaviour's probabilities were recorded. Both
estimate what `mango evaluate` measures as `returns`: rewards summed over a run, mean over its layers.

An action is the rung that was applied. So the estimate is of a policy whose rungs are applied as it prefers them, from the
first decision of a recorded run on: a budget that forbids them makes the truth another, and so does an optimizer that holds
its initial config until its first decision. Each layer is an agent whose surroundings are the other layers as they were
recorded. Estimates rank candidates before runs are spent on them; the gate still asks for runs.
"""

import io
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mango.config import Ladder
from mango.networks import PolicyNetwork
from mango.policies import FixedPolicy
from mango.policy_file import FrozenPolicy
from mango_env.adapters import import_d3rlpy, to_d3rlpy
from mango_env.cache import TrajectoryCache
from train_policy.batches import group_sums, observations_of, returns_to_go, runs_of
from train_policy.evaluate import policy_of, spec_name
from train_policy.fitting import progress_line
from train_policy.gate import bootstrap_interval
from train_policy.seeding import borrowed_rng

CHUNK = 65_536                                           # observations that are valued at once
SETTING = ("workload", "budget_bytes", "horizon", "interval")

Decider = Callable[[Tensor], Tensor]                     # observations (N, 64) -> probabilities over rungs (N, R)


@dataclass(frozen=True, slots=True)
class OpeArgs:
    """How a policy is valued."""

    softmax: bool = False                                # draw rungs from the policy's probabilities in place of the best one
    gamma: float = 1.0                                   # per decision; 1: the returns of `mango evaluate`
    updates: int = 4_000
    batch_size: int = 256                                # decisions
    learning_rate: float = 1e-3
    target_updates: int = 50                             # between copies of the target; updates / this is the reach in decisions
    hidden: tuple[int, ...] = (128, 128)                 # of the action values
    refits: int = 0                                      # fits to runs drawn with replacement, for an interval; 0: none
    seed: int = 0

    def __post_init__(self) -> None:
        if self.refits < 0 or self.refits == 1:
            raise ValueError(f"refits={self.refits}: an interval needs at least 2, 0 gives none")
        for name in ("updates", "batch_size", "target_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.gamma <= 1 or not self.learning_rate > 0:
            raise ValueError("gamma must be in [0, 1] and learning_rate above 0")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % bootstrap interval over runs, or None; `note` says why something is missing or to be doubted."""

    value: float | None
    low: float | None = None                             # None below 2 runs
    high: float | None = None
    runs: int = 0
    effective: float | None = None                       # importance sampling: episodes that the weights leave (Kish 1965)
    note: str = ""


@dataclass(frozen=True, slots=True)
class OpeResult:
    """What one policy is estimated to be worth on the runs of a store."""

    policy: str
    decides: str                                         # "greedy" or "softmax"
    fqe: Estimate                                        # mean over the runs' first observations of their value
    importance: Estimate
    recorded: Estimate                                   # real returns of the behaviours that recorded the runs
    settings: tuple[dict[str, Any], ...]                 # fqe and recorded for each workload, budget, horizon and interval
    digest: str                                          # of the store

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_offline(policy: Any, cache: TrajectoryCache, args: OpeArgs | None = None, *, progress: bool = False) -> OpeResult:
    """Value a policy on the runs of `cache`: a `PolicyNetwork`, a frozen policy (object, name or path), or "fixed:RUNG".

    Raises ValueError for a policy that does not decide by rungs of the data's ladder from single observations.
    """
    args = args or OpeArgs()
    if not len(cache):
        raise ValueError("the selection holds no transitions; record more runs or select less strictly")
    name = "network" if isinstance(policy, PolicyNetwork) else spec_name(policy)
    decide = decider(policy, cache.header.ladder, softmax=args.softmax)
    starts = torch.from_numpy(cache.columns["observations"].take(cache.begins, 0))                     # (E, 64)

    def valued(data: TrajectoryCache, seed: int) -> NDArray[np.float64]:
        network = fit_values(decide, data, replace(args, seed=seed), progress=progress)
        return (decide(starts) * network(starts)).sum(1).numpy().astype(np.float64)                    # (E,)

    values, returns = valued(cache, args.seed), cache.returns(args.gamma)
    return OpeResult(
        name,
        "softmax" if args.softmax else "greedy",
        _with_refits(over_runs(values, cache), valued, cache, args),
        importance_sampling(decide, cache, args.gamma),
        over_runs(returns, cache),
        tuple(_by_setting(values, returns, cache)),
        cache.digest,
    )


def _with_refits(
    found: Estimate, valued: Callable[[TrajectoryCache, int], NDArray[np.float64]], cache: TrajectoryCache, args: OpeArgs
) -> Estimate:
    """The interval of fitted Q evaluation: 1.96 standard deviations over fits to resampled runs (Hao et al. 2021, alg. 1).

    First observations alone would say nothing: those of one workload are nearly the same in every run.
    """
    if not args.refits:
        return replace(found, low=None, high=None, note="no interval without refits")
    runs, rng = runs_of(cache), np.random.default_rng(args.seed)
    count, means = int(runs.max()) + 1, []
    episodes = [np.flatnonzero(runs == run) for run in range(count)]
    for refit in range(args.refits):
        drawn = rng.integers(count, size=count)
        values = valued(cache.select(np.concatenate([episodes[run] for run in drawn])), args.seed + 1 + refit)
        means.append(np.mean([values[episodes[run]].mean() for run in drawn]))
    assert found.value is not None
    width = 1.96 * float(np.std(means, ddof=1))
    return replace(found, low=found.value - width, high=found.value + width)


def decider(policy: Any, ladder: Ladder, *, softmax: bool = False) -> Decider:
    """The policy as probabilities over the rungs of `ladder`: one-hot where it is greedy."""
    policy = policy_of(policy) if not isinstance(policy, PolicyNetwork) else policy
    if isinstance(policy, FixedPolicy):
        if policy.config not in tuple(ladder):
            raise ValueError(f"{policy.config} is no rung of the data's ladder: {', '.join(ladder.names)}")
        chosen = F.one_hot(torch.tensor(tuple(ladder).index(policy.config)), len(ladder)).float()      # (R,)
        return lambda observations: chosen.expand(len(observations), -1)
    if isinstance(policy, FrozenPolicy):
        if policy.head != "rung":
            raise ValueError(f"{policy.name} decides by its {policy.head} head; rungs are valued: freeze it with head='rung'")
        if policy.ladder != ladder:
            raise ValueError(f"{policy.name} has the ladder {', '.join(policy.ladder.names)}, the data {', '.join(ladder.names)}")
        policy = policy.network
    if not isinstance(policy, PolicyNetwork):
        raise ValueError(f"{spec_name(policy)} has no rung probabilities; give a frozen policy, a PolicyNetwork or fixed:RUNG")
    network = policy
    if network.trunk.has_memory:
        raise ValueError(f"single observations are valued: a policy with memory ({network.name}) cannot be; evaluate it on runs")
    if network.architecture["rungs"] != len(ladder):
        raise ValueError(f"the data's ladder has {len(ladder)} rungs, the network scores {network.architecture['rungs']}")

    def decide(observations: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = network(observations).rung_logits
            return logits.softmax(1) if softmax else F.one_hot(logits.argmax(1), logits.shape[1]).float()

    return decide


def fit_values(decide: Decider, cache: TrajectoryCache, args: OpeArgs, *, progress: bool = False) -> Callable[[Tensor], Tensor]:
    """Fitted Q evaluation: the action values (N, R) of a policy, as a function of observations (N, 64).

    Rewards are measured in the largest recorded return, so that d3rlpy's Huber loss stays where it is a square: its
    minimum is the mean, not the median.
    """
    from train_policy.d3rlpy_backend import register, trunks_in

    d3rlpy = import_d3rlpy()
    scale = max(float(np.abs(returns_to_go(cache, args.gamma)).max()), 1e-6)
    network = PolicyNetwork(rungs=len(cache.header.ladder), hidden=args.hidden, seed=args.seed)
    network.fit_normaliser(observations_of(cache, args.seed))
    config = d3rlpy.ope.FQEConfig(
        learning_rate=args.learning_rate,
        encoder_factory=register().factory(architecture=json.dumps(network.architecture)),
        batch_size=args.batch_size,
        gamma=args.gamma,
        target_update_interval=args.target_updates,
        reward_scaler=d3rlpy.preprocessing.MultiplyRewardScaler(1 / scale),
    )
    generator = torch.Generator().manual_seed(args.seed)

    def next_rungs(observations: Tensor) -> Tensor:
        return torch.multinomial(decide(observations), 1, generator=generator).squeeze(1)

    # all that d3rlpy's evaluation asks of an algorithm is what it would do next
    fqe = d3rlpy.ope.DiscreteFQE(SimpleNamespace(impl=SimpleNamespace(predict_best_action=next_rungs)), config, device="cpu:0")
    with tempfile.TemporaryDirectory() as folder, borrowed_rng(args.seed), redirect_stdout(io.StringIO()):
        buffer = to_d3rlpy(cache, "rung")
        fqe.create_impl((network.architecture["feature_dim"],), network.architecture["rungs"])
        for trunk in trunks_in(fqe):
            trunk.load_state_dict(network.trunk.state_dict())
        per_epoch = min(100, args.updates)
        with progress_line("fitted Q evaluation", args.updates, progress) as advance:
            for _, metrics in fqe.fitter(
                buffer,
                n_steps=args.updates // per_epoch * per_epoch,
                n_steps_per_epoch=per_epoch,
                logger_adapter=d3rlpy.logging.FileAdapterFactory(root_dir=folder),
                show_progress=False,
                save_interval=args.updates,
            ):
                advance(per_epoch, status=f"loss {metrics['loss']:.3g}")
    values: nn.Module = fqe.impl.modules.q_funcs[0].eval()

    def action_values(observations: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([values(part).q_value for part in torch.split(observations, CHUNK)]) * scale

    return action_values


def importance_sampling(decide: Decider, cache: TrajectoryCache, gamma: float = 1.0) -> Estimate:
    """Weighted per-decision importance sampling over the runs whose behaviour recorded its probabilities.

    At decision t every episode has the weight prod (policy / behaviour) up to t; an episode that has ended keeps its last
    one. The value is sum_t gamma^t (weighted mean of the rewards at t).
    """
    logp = cache.columns["behavior_logp"]
    known = np.array([bool(logp[b : b + n].any()) for b, n in zip(cache.begins, cache.lengths, strict=True)])     # (E,)
    if not known.any():
        return Estimate(None, note="no log-probabilities: the recorded behaviours are deterministic or do not tell them")
    chosen = cache.select(known)
    rewards, weights = _weighted(decide, chosen, gamma)                                                # (E, T) each
    if not (weights.sum(0) > 0).all():
        decision = int(np.argmin(weights.sum(0) > 0))
        return Estimate(None, note=f"no recorded episode decides as the policy does up to decision {decision}; try softmax")
    runs = runs_of(chosen)
    layers = np.bincount(runs)[runs][:, None]                                                          # (E, 1)
    paid = group_sums(rewards * weights / layers, runs)                                                     # (N, T): N runs
    total = group_sums(weights / layers, runs)
    effective = float(weights[:, -1].sum() ** 2 / (weights[:, -1] ** 2).sum())
    sizes = zip(*(chosen.attributes[name] for name in ("run_id", "budget_bytes", "adamw_bytes")), strict=True)
    bound = {run for run, budget, adamw in sizes if budget < adamw}
    note = f"{len(bound)} of {len(paid)} runs had a budget; probabilities are of what was proposed before it" if bound else ""
    value = float((paid.sum(0) / total.sum(0)).sum())
    if len(paid) < 2:
        return Estimate(value, runs=len(paid), effective=effective, note=note)
    picks = np.random.default_rng(0).integers(len(paid), size=(1000, len(paid)))
    with np.errstate(invalid="ignore", divide="ignore"):                       # a resample may miss every episode with weight
        found = np.array([(paid[pick].sum(0) / total[pick].sum(0)).sum() for pick in picks])
    low, high = np.nanquantile(found, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(paid), effective, note)


def _weighted(decide: Decider, cache: TrajectoryCache, gamma: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Discounted rewards and cumulative weights by decision (E, T); where an episode has ended: 0, and its last weight."""
    shape = len(cache.lengths), int(cache.lengths.max())
    rewards, ratios = np.zeros(shape), np.zeros(shape)                                                 # ratios: logarithms
    with np.errstate(divide="ignore"):
        for i, episode in enumerate(cache.episodes()):
            n = len(episode["rewards"])
            probabilities = decide(torch.from_numpy(np.array(episode["observations"][:-1]))).double()
            taken = torch.from_numpy(episode["rung"].astype(np.int64))[:, None]
            ratios[i, :n] = np.log(probabilities.gather(1, taken).squeeze(1).numpy()) - episode["behavior_logp"]
            rewards[i, :n] = episode["rewards"] * gamma ** np.arange(n)
    logs = ratios.cumsum(1)
    highest = logs.max(0, keepdims=True)                                       # weights are relative: no exponential overflows
    return rewards, np.exp(logs - np.where(np.isfinite(highest), highest, 0.0))


def over_runs(values: NDArray[np.float64], cache: TrajectoryCache) -> Estimate:
    """The mean over runs of the mean over layers of values (E,), with its interval."""
    runs = runs_of(cache)
    means = np.bincount(runs, weights=values) / np.bincount(runs)
    low, high = bootstrap_interval(means) if len(means) > 1 else (None, None)
    return Estimate(float(means.mean()), low, high, len(means))


def _by_setting(values: NDArray[np.float64], returns: NDArray[np.float64], cache: TrajectoryCache) -> Sequence[dict[str, Any]]:
    keys = list(zip(*(cache.attributes[name] for name in SETTING), strict=True))
    rows = []
    for key in sorted(set(keys), key=str):
        chosen = np.array([at for at, one in enumerate(keys) if one == key])
        part = cache.select(chosen)
        fqe, recorded = over_runs(values[chosen], part), over_runs(returns[chosen], part)
        rows.append(dict(zip(SETTING, key, strict=True)) | {"fqe": fqe.value, "recorded": asdict(recorded)})
    return rows
