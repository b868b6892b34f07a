"""Would the shipped policy be better off with a memory? It is distilled into an LSTM and a TinyFormer, and into an MLP again.

    python -m experiments.trunk_variants           # a few minutes on a core; writes benchmarks/results/trunk_variants.json

Every student learns the teacher's rung scores on the same recorded runs, decision after decision, and on mixtures of them (as
`train_policy/additive.py` does it), without some families and a fifth of the other runs. On those, teacher and student are asked
in turn, and the knapsack divides the same budget by the scores of each: the share of decisions with the same rung in every
layer, the share of layers with the same rung, and how much is lost of what the teacher's scores say is at stake. `_often`: the
same where every observation comes four times in a row, as if decisions were four times as frequent; a memory notices, and
should not. The data is what the policy itself learned from.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from experiments.transfer import UNLIMITED, names
from mango.budget import MemoryBudget
from mango.features import FEATURE_DIM, FEATURES
from mango.networks import PolicyNetwork
from mango.policy_file import FrozenPolicy, load_policy
from mango_env.cache import TrajectoryCache, build_cache
from mango_env.workloads import split_options
from train_policy.batches import Loader, observations_of, runs_of, split_runs
from train_policy.evaluate import EvaluationArgs, start_run

STUDENTS: dict[str, dict[str, Any]] = {                 # of about the teacher's 31,000 parameters
    "mlp": {"hidden": (128, 128)},
    "lstm": {"hidden_dim": 64, "num_layers": 1},
    "tinyformer": {"hidden_dim": 64, "num_layers": 6, "num_heads": 4},
}
TOGETHER = ("kind_", "rule_", "error_")                 # features that are mixed as one
MEASURES = ("equal", "layers_equal", "lost", "at_stake", "equal_often")
OFTEN = 4                                               # times that an observation comes in a row
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Args:
    data: Path = Path("trajectories/universal.h5")
    teacher: str = "universal"
    students: str = "mlp,lstm,tinyformer"
    left_out: str = "source_lm,mnist_cnn"               # families that no student sees
    budgets: str = "0.03125,0.0625,0.125,0.25"          # of AdamW's state bytes
    updates: int = 2000
    batch_size: int = 256                               # decisions, in whole episodes; as many mixed ones beside them
    learning_rate: float = 2e-3
    timed_layers: str = "10,100"
    seed: int = 0
    out: Path = Path("benchmarks/results/trunk_variants.json")


def parts(args: Args) -> tuple[TrajectoryCache, dict[str, TrajectoryCache]]:
    """What students learn from, and what they are tested on: runs held out, and families left out."""
    everything = build_cache(args.data)
    family = [str(split_options(work)[0]) for work in everything.attributes["workload"]]
    without = np.isin(family, names(args.left_out))
    known, held = split_runs(everything.select(~without), 0.2, args.seed)
    return known, {"runs held out": held} | ({"families left out": everything.select(without)} if without.any() else {})


def mixed(obs: Tensor, generator: torch.Generator) -> Tensor:
    """Sequences (B, T, 64) in which groups of features come from different episodes, each of them whole."""
    grouped = [[i for i, f in enumerate(FEATURES) if f.name.startswith(prefix)] for prefix in TOGETHER]
    single = sorted(set(range(FEATURE_DIM)) - {i for columns in grouped for i in columns})
    found = obs.clone()
    for columns in [*grouped, *([i] for i in single)]:
        found[..., columns] = obs[torch.randperm(len(obs), generator=generator)][..., columns]
    return found


def teach(name: str, teacher: PolicyNetwork, data: TrajectoryCache, args: Args) -> tuple[PolicyNetwork, float]:
    """A student of the teacher's rung scores, relative to the last rung's, and its last loss."""
    network = PolicyNetwork(name, seed=args.seed, **STUDENTS[name])
    network.fit_normaliser(observations_of(data, args.seed))
    loader, generator = Loader(data, args.batch_size, args.seed, sequences=True), torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    losses = []
    for _ in range(args.updates):
        steps = loader.sample()
        obs, mask = torch.cat([steps.observations, mixed(steps.observations, generator)]), steps.mask.repeat(2, 1)
        with torch.no_grad():
            wanted = relative(teacher(obs).rung_logits)
        errors = F.mse_loss(relative(network(obs).rung_logits), wanted, reduction="none").mean(-1)
        loss = (errors * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()                                  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return network.eval(), fmean(losses[-100:])


def relative(logits: Tensor) -> Tensor:
    return logits - logits[..., -1:]


@cache
def costs_of(workload: str, rule: str) -> tuple[NDArray[np.int64], int, int]:
    """Bytes of every rung for every layer of a model (L, R), those that are spent before, and AdamW's."""
    optimizer = start_run(workload, 0, UNLIMITED, "hold", EvaluationArgs(horizon=1, rule=rule)).optimizer
    return optimizer.allocator.rung_bytes.numpy(), optimizer.budget.fixed, optimizer.adamw_bytes


def decisions(data: TrajectoryCache) -> Iterator[tuple[str, str, Tensor]]:
    """The runs: workload, rule, and observations (T, L, 64), layers in order."""
    runs, facts = runs_of(data), data.attributes
    for run in range(int(runs.max()) + 1):
        episodes = sorted(np.flatnonzero(runs == run), key=lambda at: int(facts["layer_index"][at]))
        if len(episodes) == facts["n_layers"][episodes[0]]:
            length = min(int(data.lengths[at]) for at in episodes)
            rows = np.stack([data.columns["observations"][data.begins[at] : data.begins[at] + length] for at in episodes], 1)
            yield facts["workload"][episodes[0]], facts["rule"][episodes[0]], torch.from_numpy(rows)


def scores(policy: FrozenPolicy, obs: Tensor, often: int = 1) -> NDArray[np.float64]:
    """What a policy says of a run's observations (T, L, 64), each of which it is shown `often` times: (T, L, R)."""
    policy.reset()
    return np.stack([[policy.scores(now).double().numpy() for _ in range(often)][-1] for now in obs])


def fidelity(
    teacher: FrozenPolicy, student: FrozenPolicy, data: TrajectoryCache, budgets: Sequence[float]
) -> list[dict[str, float]]:
    """Per budget: how often the student's allocation is the teacher's, over the decisions of runs whose model can have it."""
    found: dict[float, dict[str, list[float]]] = {budget: {name: [] for name in MEASURES} for budget in budgets}
    for work, rule, obs in decisions(data):
        nbytes, fixed, adamw = costs_of(work, rule)
        said = [scores(teacher, obs), scores(student, obs), scores(student, obs, OFTEN)]
        for budget in budgets:
            limit = MemoryBudget(int(budget * adamw), fixed)
            if int(nbytes.min(1).sum()) <= limit.available:
                for truth, mine, often in zip(*said, strict=True):
                    best, own, again = (limit.allocate(one, nbytes) for one in (truth, mine, often))
                    values = compared(truth, best, own, again, nbytes.argmin(1))
                    for name, value in zip(MEASURES, values, strict=True):
                        found[budget][name].append(value)
    rows = []
    for budget, one in found.items():
        if one["equal"]:
            means = {name: fmean(values) for name, values in one.items()}
            share = means.pop("lost") / max(means.pop("at_stake"), 1e-9)
            rows.append({"budget": budget, "decisions": float(len(one["equal"])), "score_lost": share} | means)
    return rows


def compared(truth: Floats, best: Ints, own: Ints, often: Ints, least: Ints) -> tuple[float, float, float, float, float]:
    """`MEASURES` of one decision: the teacher's scores (L, R), and four allocations (L,)."""
    rows = np.arange(len(best))
    top, mine, bottom = (float(truth[rows, pick].sum()) for pick in (best, own, least))
    return float((best == own).all()), float((best == own).mean()), top - mine, top - bottom, float((best == often).all())


def milliseconds(policy: FrozenPolicy, layers: int, past: int = 100, calls: int = 21) -> float:
    """Processor time of one decision without the knapsack, after a past of some decisions: the median of a few."""
    policy.reset()
    obs, taken = torch.zeros(layers, FEATURE_DIM), []
    for _ in range(past + calls):
        began = time.process_time()
        policy.scores(obs)
        taken.append(1e3 * (time.process_time() - began))
    return median(taken[past:])


def train(args: Args) -> Path:
    torch.set_num_threads(1)
    head, kept = stamp(args), {kind: earlier_runs(args.out, kind) for kind in ("students", "fidelity")}
    teacher = load_policy(args.teacher)
    data, tests = parts(args)
    for name in ["teacher", *names(args.students)]:
        if find_run(kept["students"], {"student": name}) is not None:
            continue
        began = time.process_time()
        network, loss = (teacher.network, 0.0) if name == "teacher" else teach(name, teacher.network, data, args)
        student, seconds = FrozenPolicy(network, ladder=teacher.ladder), time.process_time() - began
        times = {f"ms_{layers}_layers": milliseconds(student, int(layers)) for layers in names(args.timed_layers)}
        parameters = sum(p.numel() for p in network.parameters())
        kept["students"].append({"student": name, "parameters": parameters, "loss": loss, "cpu_seconds": seconds, **times})
        for test, part in tests.items() if name != "teacher" else ():
            rows = fidelity(teacher, student, part, [float(one) for one in names(args.budgets)])
            kept["fidelity"] += [{"student": name, "test": test, **row} for row in rows]
        write(args.out, head | kept)
        print(kept["students"][-1], *kept["fidelity"][-len(tests) * len(names(args.budgets)) :], sep="\n", flush=True)
    return args.out


if __name__ == "__main__":
    print(f"wrote {train(parse(Args, __doc__))}")
