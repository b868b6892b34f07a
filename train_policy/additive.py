"""Value decomposition on designed data: what a rung in one layer and phase costs in final loss, and the policy that follows.

The loss that a run ends with is one number for all its layers and decisions. As in value-decomposition networks (Sunehag et
al. 2018) it is taken as a sum over layers and decisions, here of linear functions of what a layer is (kind, rule), when the
decision is made (early, late), how it trains (its rate, the noise of its gradients), what is kept of each moment, and the
errors that were measured. Runs whose allocations were drawn at random (`factorial` in `train_policy.behaviours`) tell the
terms apart; runs of one workload, seed and rate are compared with each other and with their twin alone, in units of what
allocations at random differ by there. What bits of a moment cost goes by how they round, so fine formats borrow from coarse
ones, and coefficients are shrunk (ridge), the special ones more than the general ones, so a kind that was seen rarely borrows
from the others; how much is chosen by leaving whole workload families out.

What a rung is expected to lose in a family that was not seen is its cost. Costs add up over layers, so minus the cost is a
score, and the optimizer's knapsack picks the allocation of least predicted loss for every budget. `additive` fits them and
distils them into the network: a Monte-Carlo estimate of the action values of the recorded behaviour and one step of improvement
on it (Brandfonbrener et al. 2021), without bootstrapping.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mango.config import LADDER, CompressionConfig, Ladder
from mango.features import FEATURE_INDEX, FEATURES, KINDS, RULES
from mango.networks import PolicyNetwork
from mango.policies import best_scored, feature
from mango.statistics import PRIOR
from mango_env.cache import TrajectoryCache
from mango_env.workloads import split_options
from train_policy.batches import group_sums, runs_of
from train_policy.distil import distil_scores, score_spread

Floats = NDArray[np.float64]
PerSetting = Mapping[tuple[str, str], float]              # by workload, with its options, and rule

RANKS = (1, 4, 8, 32, 128)
BITS = (2, 4, 6, 8)                                      # 16 and more cost nothing
MOMENTUM = ("none", *(f"rank {rank}" for rank in RANKS), *(f"{bits} bits" for bits in BITS))
VARIANCE = ("factors", "4 bits", "8 bits")
VARIANCE_PRIOR = (8.0, 32.0)                             # shrinkage: of factors, of rounding, which costs little
MOMENTUM_ERROR = {2: 0.6, 4: 0.13, 6: 0.05, 8: 0.007}    # relative, of a normal sample; 8 bits to nearest, others by chance
VARIANCE_ERROR = {bits: PRIOR[f"error_variance_{bits}"] for bits in (4, 8)}
ROUNDING_POWER = 0.8                                     # of a relative error; 0.6 to 1 fit as well
CIRCUMSTANCES = 3                                        # see `circumstances`
CONTEXT_SIZES = [1, len(RULES), len(KINDS), len(KINDS) * len(RULES), CIRCUMSTANCES, CIRCUMSTANCES * len(RULES)]
CONTEXT_PRIOR = np.repeat([1.0, 2.0, 2.0, 4.0, 2.0, 4.0], CONTEXT_SIZES)
KIND_PRIOR = np.repeat([1.0, 2.0], [1, len(KINDS)])
SHRINKAGES = tuple(10.0**power for power in np.arange(-3, 2.5, 0.5))         # the grid of the cross-validation
SIZES = (0.5, 1.0)                                       # a layer weighs as its share of the parameters to this power; small
                                                         # models cannot tell 0 from 0.5, and large ones have layers of any size
WORST, BEST = 20.0, -10.0                                # per cent of loss that a run is charged at most and at least
COSINES, OPPOSED = (0.01, 0.9), 0.3                      # of successive gradients, that the regression tells apart
USUAL_NOISE, USUAL_RATE, RATES = 1.3, -2.5, 2.0          # powers of ten; and how far from the latter it tells rates apart
LARGEST_ERROR = 2.0                                      # of a stored moment that the regression believes
LEAST_SPREAD = 0.2                                       # per cent that losses differ by
LEAST_NOISE = 0.3                                        # of that spread; without it one quiet setting would decide alone
FIT_ROUNDS = 3                                           # of the settings' weights, by what is left unexplained in them
SHARED = ("workload", "seed", "rule", "lr", "horizon", "schedule", "max_grad_norm", "matrix_lr_scale", "interval")   # by a group


def momentum_level(config: CompressionConfig) -> int:
    """The place in `MOMENTUM` of what a config keeps of the first moment; -1 for 16 bits and more."""
    if config.rank:
        return 1 + RANKS.index(config.rank)
    levels = {0: 0} | {bits: 1 + len(RANKS) + at for at, bits in enumerate(BITS)}
    return levels.get(config.momentum_bits, -1)


def rounding(config: CompressionConfig) -> float:
    """How far what is kept of the first moment is rounded: 1 for 2 bits."""
    bits = config.factor_bits_q if config.rank else config.momentum_bits
    return _rounding(bits, MOMENTUM_ERROR)


def variance_rounding(config: CompressionConfig) -> float:
    """How far the second moment is rounded: 1 for 4 bits."""
    return _rounding(config.variance_bits, VARIANCE_ERROR)


def _rounding(bits: int, errors: Mapping[int, float]) -> float:
    """1 for the coarsest format, 0 for one that has no error."""
    return float((errors.get(bits, 0.0) / max(errors.values())) ** ROUNDING_POWER)


def variance_level(config: CompressionConfig) -> int:
    """The place in `VARIANCE`; -1 for 16 bits and more."""
    return {0: 0, 4: 1, 8: 2}.get(config.variance_bits, -1)


def hats(obs: Tensor) -> Tensor:
    """How much a decision is early and late (N, 2)."""
    progress = feature(obs, "progress").clamp(0, 1)
    return torch.stack([1 - progress, progress], 1)


def design(obs: Tensor, rungs: Tensor, ladder: Ladder = LADDER) -> Tensor:
    """The regressors (N, D) of decisions `rungs` (N,) at observations (N, 64), unweighted."""
    kinds = torch.stack([feature(obs, f"kind_{kind}") for kind in KINDS], 1)
    rules = torch.stack([feature(obs, f"rule_{rule}") for rule in RULES], 1)
    one = torch.ones(len(obs), 1)
    trains = circumstances(obs)
    context = torch.cat([one, rules, kinds, _outer(kinds, rules), trains, _outer(trains, rules)], 1)
    early_late, scales_steps = hats(obs), rules[:, [RULES.index("adamw")]]     # other rules keep no second moment
    kept, momentum_error = _level(obs, rungs, [momentum_level(rung) for rung in ladder], len(MOMENTUM), _momentum_errors(obs))
    nothing, ranks, _ = torch.tensor_split(kept, (1, 1 + len(RANKS)), 1)
    rounded = torch.tensor([[rounding(rung), variance_rounding(rung)] for rung in ladder])[rungs]
    momentum = torch.cat([nothing, ranks * shortfall(obs), rounded[:, :1]], 1)
    kept, variance_error = _level(obs, rungs, [variance_level(rung) for rung in ladder], len(VARIANCE), _variance_errors(obs))
    variance = torch.cat([kept[:, :1], rounded[:, 1:]], 1)
    return torch.cat([
        _outer(momentum, _outer(early_late, context)),
        _outer(variance * scales_steps, _outer(early_late, torch.cat([one, kinds], 1))),
        early_late * momentum_error, early_late * variance_error * scales_steps, stopped(obs, nothing),
    ], 1)  # fmt: skip


def stopped(obs: Tensor, nothing: Tensor) -> Tensor:
    """Whether decisions (N, 1) that keep `nothing` (N, 1) of the first moment drop one that was kept so far: it costs once."""
    kept = (feature(obs, "momentum_bits") > 0) & seen(obs)
    return nothing * kept[:, None]


def seen(obs: Tensor) -> Tensor:
    """Whether gradients of the layer were seen before a decision (N,): not before the first."""
    return feature(obs, "grad_rms") > FEATURES[FEATURE_INDEX["grad_rms"]].low


def circumstances(obs: Tensor) -> Tensor:
    """How a layer trains (N, 3): noise over signal of its gradients, how far successive ones oppose each other, and the rate.

    Momentum is worth more the less noise there is, and nearer to the largest stable rate (docs/headroom.md). Two gradients
    of one way have a cosine of 1 / (1 + noise / signal); it is below 0 where steps overshoot. Before gradients were seen both
    are 0. The rate is the largest so far. Noise and rate are powers of ten from a usual value.
    """
    cosine = feature(obs, "grad_cosine")
    noise = (torch.log10(1 / cosine.clamp(*COSINES) - 1) - USUAL_NOISE) * seen(obs)
    opposed = (-cosine).clamp(0, OPPOSED) / OPPOSED
    rate = feature(obs, "lr") - torch.log10(feature(obs, "lr_ratio").clamp(min=1e-3)) - USUAL_RATE
    return torch.stack([noise, opposed, rate.clamp(-RATES, RATES)], 1)


def shortfall(obs: Tensor) -> Tensor:
    """The share of a layer's directions (N, ranks) that a subspace of each rank in `RANKS` leaves out."""
    side = (10 ** ((feature(obs, "numel") - feature(obs, "aspect")) / 2)).clamp(min=1)       # the shorter one
    return (1 - torch.tensor(RANKS) / side[:, None]).clamp(min=0)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def _level(obs: Tensor, rungs: Tensor, levels: Sequence[int], count: int, errors: Tensor) -> tuple[Tensor, Tensor]:
    """One-hot levels (N, count) of the rungs, and the squared errors (N, 1) measured of them."""
    level = torch.tensor(levels)[rungs]
    chosen = F.one_hot(level.clamp(min=0), count) * (level >= 0)[:, None]
    return chosen.float(), (chosen * errors).sum(1, keepdim=True)


def _squared(obs: Tensor, name: str) -> Tensor:
    return (10 ** feature(obs, name)).clamp(max=LARGEST_ERROR).square()


def _momentum_errors(obs: Tensor) -> Tensor:
    nothing = torch.zeros(len(obs))
    left = shortfall(obs)                                                            # the tail is taken as flat
    tails = [feature(obs, f"error_rank_{RANKS[at]}").square() / left[:, at].clamp(min=1e-3) for at in (0, 2)]
    ranks = [tails[rank >= 8].clamp(max=1) * left[:, at] for at, rank in enumerate(RANKS)]
    bits = [_squared(obs, "error_momentum_2"), _squared(obs, "error_momentum_4"), nothing, _squared(obs, "error_momentum_8")]
    return torch.stack([nothing, *ranks, *bits], 1)


def _variance_errors(obs: Tensor) -> Tensor:
    return torch.stack([_squared(obs, f"error_variance_{bits}") for bits in (0, 4, 8)], 1)


SHRINKAGE = np.concatenate([                              # (D,) by regressor, in the order of `design`
    np.tile(CONTEXT_PRIOR, 2 * (1 + len(RANKS) + 1)), np.kron(VARIANCE_PRIOR, np.tile(KIND_PRIOR, 2)), [2.0] * 4, [0.5],
])  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """What a rung is expected to lose to full precision: coefficients (D,) for a layer that is all there is, for a whole run.

    Calling it gives the expected loss in a family that was not seen. Effects differ between families, by how much is told by
    the fits without each of them (jackknife: Efron & Stein 1981); of a normal distribution with that mean and deviation the
    part above 0 counts. A gain is no merit: what beats full precision in short runs (no momentum under AdamW does) lost 3 %
    on a deeper model. The unit is what the final losses of random allocations differ by (their standard deviation).
    """

    coefficients: Floats
    size: float                                          # a layer weighs as its share of the parameters to this power
    ladder: Ladder = LADDER
    left_out: Floats | None = None                       # (K, D) each family left out in turn; None: families are all alike

    def __call__(self, obs: Tensor) -> Tensor:
        """What every rung is expected to lose (N, R), at least 0, in every layer, were it kept for the whole run."""
        fits = [self.coefficients, *([] if self.left_out is None else self.left_out)]
        mean, *without = self._effects(obs, np.stack(fits, 1)).unbind(2)
        loss = mean.clamp(min=0)
        if without:
            spread = (len(without) - 1) * torch.stack(without).std(0, correction=0)
            way = mean / spread.clamp(min=1e-6)
            density = torch.exp(-way.square() / 2) / math.sqrt(2 * math.pi)
            loss = torch.where(spread > 1e-6, mean * torch.special.ndtr(way) + spread * density, loss)
        return weight_of(obs, self.size)[:, None] * loss

    def effects(self, obs: Tensor) -> Tensor:
        """The mean effect with its sign (N, R), for a layer that is all there is: below 0 where the loss was lower."""
        return self._effects(obs, self.coefficients[:, None])[:, :, 0]

    def _effects(self, obs: Tensor, fits: Floats) -> Tensor:
        """Effects (N, R, F) by several fits (D, F)."""
        weights = torch.from_numpy(fits).float()
        rungs = [design(obs, torch.full((len(obs),), rung), self.ladder) @ weights for rung in range(len(self.ladder))]
        return torch.stack(rungs, 1)


class AdditivePolicy:
    """The fitted costs as a policy by themselves: scores (L, R) are minus the cost."""

    name = "additive"

    def __init__(self, costs: Costs) -> None:
        self.costs = costs

    def scores(self, obs: Tensor) -> Tensor:
        return -self.costs(obs)

    def act(self, obs: Tensor) -> Tensor:
        return best_scored(self.scores(obs), self.costs.ladder)

    def reset(self) -> None:
        """Nothing is remembered."""


def weight_of(obs: Tensor, size: float) -> Tensor:
    """What a layer counts (N,) in the sum over the layers of its model, whose mean is one over their number."""
    layers = (10 ** feature(obs, "layers")).clamp(min=1)
    return (feature(obs, "share") * layers).clamp(min=1e-6) ** size / layers


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Runs as regressors and outcomes."""

    rows: Mapping[float, Floats]                         # by size: (runs, D), summed over layers, averaged over decisions
    loss: Floats                                         # (runs,) per cent of final loss above the twin
    group: NDArray[np.int64]                             # (runs,) which runs share their twin
    workload: NDArray[np.str_]                           # (runs,) with its options
    rule: NDArray[np.str_]                               # (runs,) the base rule

    def __len__(self) -> int:
        return len(self.loss)

    def some(self, mask: NDArray[np.bool_]) -> "Outcomes":
        """The runs of a mask (runs,)."""
        rows = {size: found[mask] for size, found in self.rows.items()}
        return Outcomes(rows, self.loss[mask], self.group[mask], self.workload[mask], self.rule[mask])

    @property
    def setting(self) -> list[tuple[str, str]]:
        """The workload and the rule of each run."""
        return [(str(workload), str(rule)) for workload, rule in zip(self.workload, self.rule, strict=True)]

    @property
    def family(self) -> NDArray[np.str_]:
        """The workload of each run (runs,), without its options."""
        return np.array([str(split_options(str(workload))[0]) for workload in self.workload])

    def in_units(self, scale: "PerSetting") -> "Outcomes":
        """The same with losses in units of a scale, so that a model whose loss is near zero does not drown the others."""
        return replace(self, loss=self.loss / np.array([scale.get(one, 1.0) for one in self.setting]))

    def weights(self, noise: "PerSetting") -> Floats:
        """How much each run counts (runs,), by the noise of its setting (1 where that is unknown)."""
        return np.array([noise.get(one, 1.0) for one in self.setting]) ** -2.0


def outcomes_of(cache: TrajectoryCache) -> Outcomes:
    """The runs of a cache whose final held-out loss and twin are known, and their twins; one that diverged counts as `WORST`.

    Raises ValueError where there are none: the store was recorded before final losses were, or without twins.
    """
    facts, runs = cache.attributes, runs_of(cache)
    table = {name: facts.get(name, [None] * len(runs)) for name in (*SHARED, "val_loss", "val_loss_full")}
    first: dict[int, int] = {}
    rows = {size: np.zeros((len(set(runs.tolist())), len(SHRINKAGE))) for size in SIZES}
    for number, (run, episode) in enumerate(zip(runs.tolist(), cache.episodes(), strict=True)):
        first.setdefault(run, number)
        obs, rungs = torch.from_numpy(episode["observations"][:-1].copy()), torch.from_numpy(episode["rung"].astype(np.int64))
        terms = design(obs, rungs, cache.header.ladder)
        for size, total in rows.items():
            total[run] += (weight_of(obs, size)[:, None] * terms).double().mean(0).numpy()
    kept = [run for run, episode in first.items() if table["val_loss_full"][episode] is not None]
    if not kept:
        raise ValueError('no run of the data has a final loss and a twin ("val_loss_full"); record it anew, with reward "twin"')
    at = [first[run] for run in kept]
    groups: dict[tuple[object, ...], int] = {}
    group = [groups.setdefault(tuple(table[name][e] for name in SHARED), len(groups)) for e in at]
    workloads = [str(table["workload"][e]) for e in at]
    loss = [_per_cent(table["val_loss"][e], table["val_loss_full"][e]) for e in at]
    rules = [str(table["rule"][e]) for e in at]
    twins = [group.index(number) for number in range(len(groups))]                   # each is a run that pays for nothing
    return Outcomes(
        {size: np.concatenate([total[kept], np.zeros((len(twins), len(SHRINKAGE)))]) for size, total in rows.items()},
        np.array(loss + [0.0] * len(twins)), np.array(group + list(range(len(twins)))),
        np.array(workloads + [workloads[member] for member in twins]), np.array(rules + [rules[member] for member in twins]),
    )  # fmt: skip


def _per_cent(loss: float | None, reference: float) -> float:
    found = WORST if loss is None else 100 * math.log(max(loss, 1e-12) / max(reference, 1e-12))
    return min(max(found, BEST), WORST)


def ridge(data: Outcomes, size: float, shrinkages: Sequence[float], noise: PerSetting) -> list[Floats]:
    """Coefficients (D,) of weighted least squares within groups, for each shrinkage. What never varied has none."""
    return _solve(_moments(data, size, noise), shrinkages)


def _moments(data: Outcomes, size: float, noise: PerSetting) -> tuple[Floats, Floats]:
    """Second moments of the regressors (D, D) and with the loss (D,), within groups, regressors in units of their prior."""
    rows = centred(data.rows[size] / np.sqrt(SHRINKAGE), data.group)
    weighted = rows * data.weights(noise)[:, None]
    return rows.T @ weighted, weighted.T @ centred(data.loss, data.group)


def _solve(moments: tuple[Floats, Floats], shrinkages: Sequence[float]) -> list[Floats]:
    second, mixed = moments
    used = np.flatnonzero(second.diagonal() > 1e-12)
    values, vectors = np.linalg.eigh(second[np.ix_(used, used)])
    projected = vectors.T @ mixed[used]
    found = [np.zeros(len(mixed)) for _ in shrinkages]
    for coefficients, shrinkage in zip(found, shrinkages, strict=True):
        coefficients[used] = vectors @ (projected / (np.maximum(values, 0) + shrinkage))
        coefficients /= np.sqrt(SHRINKAGE)
    return found


def centred(values: Floats, group: NDArray[np.int64]) -> Floats:
    """Values (runs, ...) without the means of their groups."""
    _, number, count = np.unique(group, return_inverse=True, return_counts=True)
    return np.asarray(values - (group_sums(values, number).T / count).T[number])


def spread_of(data: Outcomes) -> dict[tuple[str, str], float]:
    """Per setting the root mean square of the losses within groups, in per cent: what allocations at random differ by."""
    return _per_setting(data, centred(data.loss, data.group), lambda left: float(np.sqrt((left**2).mean())), LEAST_SPREAD)


def noise_of(data: Outcomes, predicted: Floats) -> dict[tuple[str, str], float]:
    """Per setting the standard deviation of what a prediction (runs,) leaves within groups."""
    left = centred(data.loss - predicted, data.group)
    return _per_setting(data, left, lambda part: 1.4826 * float(np.median(np.abs(part))), LEAST_NOISE)


def _per_setting(
    data: Outcomes, values: Floats, measure: Callable[[Floats], float], least: float
) -> dict[tuple[str, str], float]:
    settings = data.setting
    parts = {one: np.array([value for value, other in zip(values, settings, strict=True) if other == one]) for one in settings}
    return {one: max(measure(part), least) for one, part in parts.items()}


def explained(data: Outcomes, predicted: Floats, noise: PerSetting) -> float:
    """The share of the variance within groups that a prediction (runs,) explains."""
    weights = data.weights(noise)
    left, whole = centred(data.loss - predicted, data.group), centred(data.loss, data.group)
    return 1 - float((weights * left**2).sum() / max((weights * whole**2).sum(), 1e-12))


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    costs: Costs
    shrinkage: float
    spread: PerSetting                                   # the units of the losses, in per cent
    noise: PerSetting                                    # in those units
    explained_elsewhere: float                           # of the variance within groups, each family left out in turn

    def explained(self, data: Outcomes) -> float:
        """The share of the variance within groups that is predicted of other runs."""
        return explained(data.in_units(self.spread), data.rows[self.costs.size] @ self.costs.coefficients, self.noise)


def fit(data: Outcomes, ladder: Ladder = LADDER) -> Fit:
    """Choose size and shrinkage by leaving families out, then fit to everything."""
    spread = spread_of(data)
    data = data.in_units(spread)
    noise = noise_of(data, np.zeros(len(data)))
    for _ in range(FIT_ROUNDS):
        without = {size: list(_without(data, size, noise)) for size in SIZES}
        explains = {size: _elsewhere(data, size, noise, fits) for size, fits in without.items()}
        scores = {(size, which): score for size, found in explains.items() for which, score in enumerate(found)}
        size, which = max(scores, key=lambda key: scores[key])
        coefficients = ridge(data, size, SHRINKAGES[which : which + 1], noise)[0]
        noise = noise_of(data, data.rows[size] @ coefficients)
    left_out = np.stack([fits[which] for _, fits in without[size]])
    return Fit(Costs(coefficients, size, ladder, left_out), SHRINKAGES[which], spread, noise, scores[size, which])


def _without(data: Outcomes, size: float, noise: PerSetting) -> Iterator[tuple[NDArray[np.bool_], list[Floats]]]:
    """Each family (of one family: each group) as a mask (runs,), and the coefficients fitted to the others, by shrinkage."""
    parts = data.family if len(np.unique(data.family)) > 1 else data.group
    whole = _moments(data, size, noise)
    for part in np.unique(parts):
        held = parts == part
        own = _moments(data.some(held), size, noise)
        yield held, _solve((whole[0] - own[0], whole[1] - own[1]), SHRINKAGES)


def _elsewhere(
    data: Outcomes, size: float, noise: PerSetting, without: Sequence[tuple[NDArray[np.bool_], list[Floats]]]
) -> list[float]:
    """What each shrinkage explains of families that were left out."""
    predicted = np.zeros((len(SHRINKAGES), len(data)))
    for held, fits in without:
        for row, coefficients in zip(predicted, fits, strict=True):
            row[held] = data.rows[size][held] @ coefficients
    return [explained(data, row, noise) for row in predicted]


def described(costs: Costs, obs: Tensor) -> list[dict[str, Any]]:
    """The effects of the rungs on average over observations (N, 64), by rule and half of the run, without that of a change."""
    obs = obs.clone()
    obs[:, FEATURE_INDEX["momentum_bits"]] = 0                                       # nothing is dropped that was kept so far
    found = costs.effects(obs)
    late = feature(obs, "progress") >= 0.5
    rows = []
    for rule in RULES:
        for half, here in (("first", ~late), ("second", late)):
            chosen = found[here & (feature(obs, f"rule_{rule}") > 0)]
            if len(chosen):
                means = dict(zip(costs.ladder.names, (round(float(cost), 3) for cost in chosen.mean(0)), strict=True))
                rows.append({"rule": rule, "half": half, **means})
    return rows


def mixed(obs: Tensor, generator: torch.Generator) -> Tensor:
    """Observations (N, 64) in which kind, rule, progress, size, errors and the rest come from different rows.

    A network that learns from them cannot take one for a sign of another because they went together in the data.
    """
    together = [[i for i, f in enumerate(FEATURES) if f.name.startswith(prefix)] for prefix in ("kind_", "rule_", "error_")]
    grouped = {i for columns in together for i in columns}
    found = obs.clone()
    for columns in [*together, *([i] for i in range(len(FEATURES)) if i not in grouped)]:
        order = torch.randperm(len(obs), generator=generator)
        found[:, columns] = obs[order][:, columns]
    return found


def teach(
    network: PolicyNetwork, costs: Costs, obs: Tensor, *, updates: int, batch_size: int, learning_rate: float, seed: int,
    report: Callable[[int, dict[str, float]], None] | None = None, report_every: int = 250,
) -> float:  # fmt: skip
    """Train trunk and rung head so that logits are minus the costs over their typical spread, which is returned.

    Costs of a layer are relative to its dearest rung. Half of every batch are mixed observations. The knob and the value
    head learn from the result.
    """
    generator = torch.Generator().manual_seed(seed)
    mixture = mixed(obs, generator)
    everything = torch.cat([obs, mixture])
    wanted = -costs(everything)
    wanted = wanted - wanted[:, -1:]
    spread = score_spread(wanted)
    wanted = wanted / spread
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    network.train()
    for update in range(1, updates + 1):
        rows = torch.randint(len(everything), (batch_size,), generator=generator)
        logits = network(everything[rows]).rung_logits
        loss = F.mse_loss(logits - logits[:, -1:], wanted[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if report is not None and (update % report_every == 0 or update == updates):
            report(update, {"loss": float(loss.detach())})
    network.eval()
    shown = wanted[: len(obs)]
    distil_scores(network, obs, shown, values=shown.amax(1), ladder=costs.ladder, seed=seed)
    return spread
