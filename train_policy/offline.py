"""Offline reinforcement learning: improve on what was recorded without running anything.

`ALGOS` names the algorithms, all of one signature: `train(network, cache, args)` looks them up. The native ones keep the
actions factored: IQL and AWR end in a policy that was extracted by advantage-weighted imitation, so that it can seed
PPO; CQL ends in action values over the ladder's rungs, whose scaled copy is the rung head; additive costs end in scores
that the knapsack sums over layers.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango.config import NVEC
from mango.networks import PolicyNetwork
from mango.trunks import MlpTrunk
from mango_env.cache import TrajectoryCache
from train_policy.additive import fit, outcomes_of, teach
from train_policy.batches import Loader, Steps, check_network, observations_of, prepare_normaliser, split_runs
from train_policy.bc import accuracy, imitate
from train_policy.distil import adopt_values
from train_policy.fitting import Advance, TrainingInterrupted, progress_line, save_checkpoint
from train_policy.transfer import check_head, clone

TAUGHT_ROWS = 50_000                                     # observations that additive costs are distilled on


@dataclass(frozen=True, slots=True)
class OfflineArgs:
    """What to learn from a store and how. Rewards are divided by `reward_scale` before learning (None: their spread)."""

    algo: str = "iql"                                    # a name in ALGOS
    updates: int = 3_000
    batch_size: int = 256                                # decisions; a trunk with memory takes as many in whole episodes
    learning_rate: float = 3e-4
    gamma: float = 0.99                                  # per decision; episodes are finite, and time left is observed
    target_rate: float = 0.005                           # Polyak step of the target values
    expectile: float = 0.7                               # IQL: of the value, 0.5 is the mean, towards 1 the best seen
    temperature: float = 0.5                             # AWR, IQL: of the advantage weights, in its standard deviations
    max_weight: float = 20.0                             # AWR, IQL: largest advantage weight
    conservatism: float = 1.0                            # CQL: weight of the penalty on unseen actions (alpha)
    validation: float = 0.2                              # share of runs held out
    reward_scale: float | None = None
    head: str = "rung"                                   # the head that decides when it is deployed
    fit_normaliser: bool | None = None                   # None: only that of a network that never was trained
    report_every: int = 250                              # updates between rows of the curves and checkpoints
    seed: int = 0

    def __post_init__(self) -> None:
        check_head(self.head)
        if self.algo not in ALGOS:
            raise ValueError(f"unknown algorithm {self.algo!r}; known: {', '.join(ALGOS)}")
        for name in ("updates", "batch_size", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.gamma <= 1 or not 0 < self.expectile < 1 or self.temperature <= 0:
            raise ValueError("gamma must be in [0, 1], expectile in (0, 1) and temperature above 0")


@dataclass(frozen=True, slots=True)
class OfflineResult:
    """The policy, which head was trained, and numbers: the last row of `curves` and what the data were."""

    network: PolicyNetwork
    head: str
    metrics: dict[str, float]
    digest: str                                          # of the store
    curves: tuple[dict[str, float], ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Task:
    """What an algorithm gets: data split by run, a network of its own to train, and how to report."""

    network: PolicyNetwork                               # to train in place
    everything: TrajectoryCache
    training: TrajectoryCache
    validation: TrajectoryCache
    args: OfflineArgs
    scale: float                                         # rewards are divided by it
    report: Callable[[int, dict[str, float]], None]      # (updates done, numbers); writes the checkpoint


class Algorithm(Protocol):
    def __call__(self, task: Task) -> None: ...


def train(
    network: PolicyNetwork,
    cache: TrajectoryCache,
    args: OfflineArgs | None = None,
    *,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> OfflineResult:
    """Train a copy of `network` on all episodes of `cache` by `args.algo`.

    `checkpoint`: policy file, rewritten at every report; Ctrl-C writes it once more and raises `TrainingInterrupted`.

    Raises ValueError for fewer than two runs, for another ladder, for a tree that asks nothing, and for data with a single
    action, which say nothing about what another would have done.
    """
    args = args or OfflineArgs()
    check_network(network, cache)
    training, validation = split_runs(cache, args.validation, args.seed)
    _check_actions(training)
    student = clone(network)
    prepare_normaliser(student, training, args.fit_normaliser, args.seed)
    scale = args.reward_scale if args.reward_scale is not None else reward_spread(training)
    if not scale > 0:
        raise ValueError(f"reward_scale={scale} must be above 0")
    held = Loader(validation, 4096, args.seed, sequences=student.trunk.has_memory)
    curves: list[dict[str, float]] = []
    card = {"stage": f"offline:{args.algo}", "args": asdict(args), "training_data_digest": cache.digest}

    def save() -> None:
        save_checkpoint(student, checkpoint, head=args.head, card={**card, "updates": curves[-1]["updates"] if curves else 0})

    with progress_line(args.algo, args.updates, progress) as advance:
        report = _reporter(curves, advance, save)
        try:
            ALGOS[args.algo](Task(student, cache, training, validation, args, scale, report))
        except KeyboardInterrupt as interrupt:
            save()
            done = f"{curves[-1]['updates']:.0f} updates" if curves else "less than a report"
            raise TrainingInterrupted(args.algo, checkpoint, done) from interrupt
    student.eval()
    save()
    facts = {"reward_scale": scale, "transitions": float(len(training)), "runs": float(len(set(cache.attributes["run_id"])))}
    agreement = {f"agreement_{name}": value for name, value in accuracy(student, held).items() if name in ("rung", "knobs")}
    last = curves[-1] if curves else {}
    return OfflineResult(student, args.head, {**last, **facts, **agreement}, cache.digest, tuple(curves))


def reward_spread(cache: TrajectoryCache) -> float:
    """Standard deviation of the rewards, at least 1e-3 of the largest: what values are measured in."""
    rewards = np.concatenate([episode["rewards"] for episode in cache.episodes()]).astype(np.float64)
    return max(float(rewards.std()), 1e-3 * float(np.abs(rewards).max()), 1e-6)


def _check_actions(cache: TrajectoryCache) -> None:
    """Raise ValueError where all decisions were the same."""
    first = None
    for episode in cache.episodes():
        first = episode["actions"][0] if first is None else first
        if (episode["actions"] != first).any():
            return
    rung = cache.header.ladder.names[int(next(iter(cache.episodes()))["rung"][0])]
    raise ValueError(
        f"all {len(cache)} decisions of the data are the same ({rung}): there is nothing to compare it with; "
        "record other behaviours too, for example random and explore:water-filling"
    )


Report = Callable[[int, dict[str, float]], None]


def _reporter(curves: list[dict[str, float]], advance: Advance, save: Callable[[], None]) -> Report:
    def report(updates: int, numbers: dict[str, float]) -> None:
        advance(updates - (curves[-1]["updates"] if curves else 0), status=", ".join(f"{k} {v:.3g}" for k, v in numbers.items()))
        curves.append({"updates": float(updates), **numbers})
        save()

    return report


class ActionValue(nn.Module):
    """Q(s, a) as a sum over what the action is made of: a base, its rung, and each of its seven knob entries."""

    def __init__(self, trunk: MlpTrunk, rungs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.trunk = trunk
        self.base = _head(trunk.features_dim, 1, generator)
        self.rung = _head(trunk.features_dim, rungs, generator)
        self.knobs = _head(trunk.features_dim, sum(NVEC), generator)
        starts = torch.tensor([0, *np.cumsum(NVEC)[:-1].tolist()])
        self.starts: Tensor
        self.register_buffer("starts", starts, persistent=False)

    def forward(self, observations: Tensor, rungs: Tensor, actions: Tensor) -> Tensor:
        features = self.trunk(observations)
        knobs = self.knobs(features).gather(-1, actions + self.starts).sum(-1)
        chosen = self.rung(features).gather(-1, rungs.unsqueeze(-1)).squeeze(-1)
        value: Tensor = self.base(features).squeeze(-1) + chosen + knobs
        return value


class StateValue(nn.Module):
    """V(s)."""

    def __init__(self, trunk: MlpTrunk, generator: torch.Generator) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = _head(trunk.features_dim, 1, generator)

    def forward(self, observations: Tensor) -> Tensor:
        value: Tensor = self.head(self.trunk(observations)).squeeze(-1)
        return value


def _head(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")    # torch's own draw would be global
    nn.init.orthogonal_(layer.weight, 0.1, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _critic_trunk(network: PolicyNetwork) -> MlpTrunk:
    """A trunk for a critic: the policy's own weights, or for a policy with memory a fresh MLP with its normaliser."""
    own = clone(network).trunk
    if isinstance(own, MlpTrunk):
        return own
    trunk = MlpTrunk()
    trunk.normaliser.load_state_dict(own.normaliser.state_dict())
    return trunk


@contextmanager
def _updating(*modules: nn.Module) -> Iterator[None]:
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()


def iql(task: Task) -> None:
    """Implicit Q-learning (Kostrikov et al. 2021) with factored actions and twin action values."""
    args, network = task.args, task.network
    generator = torch.Generator().manual_seed(args.seed)
    rungs = network.architecture["rungs"]
    value = StateValue(_critic_trunk(network), generator)
    q = nn.ModuleList([ActionValue(_critic_trunk(network), rungs, generator) for _ in range(2)])
    target = copy.deepcopy(q)
    critic = torch.optim.Adam([*q.parameters(), *value.parameters()], lr=args.learning_rate)
    actor = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    loader = _loader(task)
    with _updating(network, q, value):
        for update in range(1, args.updates + 1):
            steps = loader.sample()
            taken = (steps.observations, steps.rungs, steps.actions)
            with torch.no_grad():
                q_target = torch.minimum(target[0](*taken), target[1](*taken))
                ahead = steps.rewards / task.scale + args.gamma * steps.going_on * value(steps.next_observations)
            v = value(steps.observations)
            lead = q_target - v
            v_loss = steps.mean((args.expectile - (lead < 0).float()).abs() * lead.square())
            q_loss = sum((steps.mean((one(*taken) - ahead).square()) for one in q), torch.zeros(()))
            _descend(critic, v_loss + q_loss)
            _polyak(target, q, args.target_rate)
            p_loss = _extract(network, steps, lead.detach(), v.detach() * task.scale, actor, args)
            if update % args.report_every == 0 or update == args.updates:
                numbers = {"v_loss": v_loss, "q_loss": q_loss, "policy_loss": p_loss, "value": steps.mean(v)}
                task.report(update, {name: float(x.detach()) for name, x in numbers.items()})


def awr(task: Task) -> None:
    """Advantage-weighted regression (Peng et al. 2019): the advantage is the recorded return above a fitted value."""
    args, network = task.args, task.network
    value = StateValue(_critic_trunk(network), torch.Generator().manual_seed(args.seed))
    critic = torch.optim.Adam(value.parameters(), lr=args.learning_rate)
    actor = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    loader = _loader(task)
    with _updating(network, value):
        for update in range(1, args.updates + 1):
            steps = loader.sample()
            v = value(steps.observations)
            lead = steps.to_go / task.scale - v
            v_loss = steps.mean(lead.square())
            _descend(critic, v_loss)
            p_loss = _extract(network, steps, lead.detach(), v.detach() * task.scale, actor, args)
            if update % args.report_every == 0 or update == args.updates:
                numbers = {"v_loss": v_loss, "policy_loss": p_loss, "value": steps.mean(v)}
                task.report(update, {name: float(x.detach()) for name, x in numbers.items()})


def cql(task: Task) -> None:
    """Conservative Q-learning over rungs (Kumar et al. 2020) with double DQN targets."""
    args, network = task.args, task.network
    if network.trunk.has_memory:
        raise ValueError(f"cql values single observations: it takes architecture 'mlp', got {network.name!r}; use iql or awr")
    generator = torch.Generator().manual_seed(args.seed)
    trunk, head = clone(network).trunk, _head(network.trunk.features_dim, network.architecture["rungs"], generator)
    q = nn.Sequential(trunk, head)
    target = copy.deepcopy(q)
    optimizer = torch.optim.Adam(q.parameters(), lr=args.learning_rate)
    loader = _loader(task)
    seen = observations_of(task.training, args.seed)

    def adopt() -> float:
        network.trunk.load_state_dict(trunk.state_dict())
        return adopt_values(network, head.weight.detach(), head.bias.detach(), seen, seed=args.seed)

    with _updating(q):
        for update in range(1, args.updates + 1):
            steps = loader.sample()
            with torch.no_grad():
                best = q(steps.next_observations).argmax(1, keepdim=True)
                ahead = target(steps.next_observations).gather(1, best).squeeze(1)
                wanted = steps.rewards / task.scale + args.gamma * steps.going_on * ahead
            values = q(steps.observations)
            taken = values.gather(1, steps.rungs[:, None]).squeeze(1)
            td_loss = F.smooth_l1_loss(taken, wanted)
            gap = (values.logsumexp(1) - taken).mean()
            _descend(optimizer, td_loss + args.conservatism * gap)
            _polyak(target, q, args.target_rate)
            if update % args.report_every == 0 or update == args.updates:
                temperature = adopt()
                numbers = {"td_loss": float(td_loss.detach()), "gap": float(gap.detach()), "temperature": temperature}
                task.report(update, numbers)


def additive(task: Task) -> None:
    """Costs of rungs from final losses by regression, distilled into the network; see `train_policy.additive`.

    What is distilled was fitted to all runs: without a fifth of them other layers are given bytes, at a sixteenth in half of
    the decisions. What a fit without the validation runs explains of them is reported beside.
    """
    args, network = task.args, task.network
    if network.trunk.has_memory:
        raise ValueError(
            f"additive costs are of single observations: it takes architecture 'mlp', got {network.name!r}; use iql or awr"
        )
    ladder = task.everything.header.ladder
    found = fit(outcomes_of(task.everything), ladder)
    numbers = {
        "explained_elsewhere": found.explained_elsewhere,
        "explained_held_out": fit(outcomes_of(task.training), ladder).explained(outcomes_of(task.validation)),
        "shrinkage": found.shrinkage,
        "size": found.costs.size,
    }
    seen = observations_of(task.everything, args.seed, TAUGHT_ROWS)
    teach(network, found.costs, seen, updates=args.updates, batch_size=args.batch_size, learning_rate=args.learning_rate,
          seed=args.seed, report=lambda n, more: task.report(n, numbers | more), report_every=args.report_every)  # fmt: skip


def _loader(task: Task) -> Loader:
    sequences = task.network.trunk.has_memory
    return Loader(task.training, task.args.batch_size, task.args.seed, sequences=sequences, gamma=task.args.gamma)


def _extract(
    network: PolicyNetwork, steps: Steps, advantages: Tensor, values: Tensor, optimizer: torch.optim.Optimizer, args: OfflineArgs
) -> Tensor:
    """One step of advantage-weighted imitation; the value head follows the critic without shaping the features."""
    centred = advantages - steps.mean(advantages)
    spread = steps.mean(centred.square()).sqrt().clamp(min=1e-6)
    weights = (advantages / (args.temperature * spread)).clamp(max=math.log(args.max_weight)).exp()
    return imitate(network, steps, values, optimizer, weights / steps.mean(weights))


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@torch.no_grad()
def _polyak(target: nn.Module, source: nn.Module, rate: float) -> None:
    for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
        slow.lerp_(fast, rate)


def _d3rlpy(name: str) -> Algorithm:
    def run(task: Task) -> None:
        from train_policy import d3rlpy_backend

        d3rlpy_backend.fit(name, task)

    return run


ALGOS: dict[str, Algorithm] = {
    "iql": iql,
    "awr": awr,
    "cql": cql,
    "additive": additive,
    "d3rlpy-discrete-cql": _d3rlpy("discrete-cql"),
    "d3rlpy-iql": _d3rlpy("iql"),
    "d3rlpy-td3+bc": _d3rlpy("td3+bc"),
}
