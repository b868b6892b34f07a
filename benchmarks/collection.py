"""(layer, decision) transitions per CPU-second: `mango collect` against stepping the environment run by run.

    python -m benchmarks.collection --out benchmarks/results/collection.json
    python -m benchmarks.collection --before ../mango-before                # a checkout of earlier code, as one side more

Sides: `environment` steps `Mango/TrainingRun-v0` with each policy and seed in turn, trains the uncompressed twin for every
episode anew, and records as it goes; `collect` is `train_policy.collect` (each seed's twin trained once, in the time that
counts); `batched` is the same with `batch` runs side by side, where the workload declares that it pays. Every measurement
is a process of its own with one thread and an empty cache; what is counted is CPU time of it and its children after imports
and one short warm-up run. Sides take turns. A ratio is taken within a repetition, and its median over repetitions is told
with all of them. `profile` says where the CPU time of a side goes, by the function that spends it.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

GOAL = 5.0                                               # times the environment's transitions per CPU-second
ROOT = Path(__file__).resolve().parent.parent
# Where time goes: module, class, function, and what it is called; time in a function named here is not its caller's.
STAGES = (
    ("mango_env.workloads.classification", "Classification", "loss", "forward"),
    ("mango_env.workloads.text", "LanguageModel", "loss", "forward"),
    ("mango_env.batched_run", "BatchedRuns", "_losses", "forward and backward, batched"),
    ("torch", "Tensor", "backward", "backward"),
    ("mango.native", "", "update", "native kernels"),
    ("mango.fused", "FusedUpdate", "run", "preparing the kernels"),
    ("mango.optimizer", "MANGO", "step", "rest of the optimizer's step"),
    ("mango.optimizer", "MANGO", "compress_gradients", "rest of the optimizer's step"),
    ("mango.optimizer", "MANGO", "update_parameter", "updates in PyTorch (low rank)"),
    ("mango.optimizer", "", "probe_fused", "probes"),
    ("mango.optimizer", "", "probe_dense", "probes"),
    ("mango.statistics", "GradientStatistics", "finish_probe", "probes"),
    ("mango.optimizer", "MANGO", "observe", "observations"),
    ("mango.optimizer", "MANGO", "apply", "applying, transcoding"),
    ("mango.allocation", "Allocator", "resolve", "knapsack"),
    ("mango_env.recorder", "", "choose", "policy"),
    ("mango_env.run", "TrainingRun", "evaluate_or_error", "held-out losses"),
    ("mango_env.run", "TrainingRun", "__init__", "starting runs"),
    ("mango_env.twin", "", "train_twin", "twins"),
    ("mango_env.store", "TrajectoryWriter", "add", "HDF5"),
    ("mango_env.store", "TrajectoryWriter", "close", "HDF5"),
    ("mango_env.store", "", "finalize", "HDF5"),
)


@dataclass
class Args:
    workloads: tuple[str, ...] = ("digits_mlp", "digits_cnn", "source_lm")
    policies: tuple[str, ...] = ("random", "random-knobs", "adaptive", "explore:adaptive", "fixed:m8v8", "fixed:m6v4",
                                 "fixed:m8v0", "fixed:m4v0")  # fmt: skip
    seeds: int = 2                                           # runs = policies x seeds; a seed's runs share their twin
    steps: int = 50                                          # optimizer steps per run
    interval: int = 10                                       # optimizer steps per decision
    budget: float = 0.25                                     # of AdamW's state bytes
    batch: int = 16                                          # runs side by side
    repetitions: int = 3
    before: str = ""                                         # folder of a checkout of earlier code
    out: str = "benchmarks/results/collection.json"


def cpu() -> float:
    """Seconds of CPU time, of this process and its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def forget_twins(folder: str) -> None:
    from mango_env import twin

    twin._remembered.cache_clear()
    os.environ["MANGO_CACHE"] = tempfile.mkdtemp(dir=folder)


def environment(args: Args, workload: str, folder: str) -> int:
    """Step the environment with each policy and seed; the transitions recorded."""
    import gymnasium as gym
    import numpy as np
    import torch

    import mango_env  # noqa: F401                           registers the environment
    from mango.config import CompressionConfig
    from mango.policy_choice import proposals
    from mango_env.recorder import Track, facts, logp_of
    from mango_env.reward import Reward, RewardTerms
    from mango_env.store import TrajectoryWriter
    from train_policy.behaviours import behaviour_of

    options: dict[str, Any] = {"horizon": args.steps, "interval": args.interval, "memory_budget": args.budget}
    env: Any = gym.make("Mango/TrainingRun-v0", workload=workload, reward=Reward(), **options).unwrapped
    layers = len(env.layers)
    adamw = np.array([8 * layer.numel for layer in env.layers])
    with TrajectoryWriter(Path(folder) / "environment", task=workload, policy="mixed", reward=Reward()) as writer:
        transitions = 0
        for seed, name in ((seed, name) for seed in range(args.seeds) for name in args.policies):
            forget_twins(folder)
            policy = behaviour_of(name, f"{name}-{seed}", 0, Reward())
            env.reset(options={"run_seed": seed})
            track, over = Track(env.layers), False
            while not over:
                seen = env.observation
                wanted = proposals(policy.act(torch.from_numpy(seen)), layers)
                _, _, over, _, info = env.step(np.concatenate([config.to_action() for config in wanted]))
                track.decide(seen, [CompressionConfig.from_action(row) for row in info["applied"]], logp_of(policy, layers))
                memory = (1 - info["bytes"] / adamw).astype(np.float32)
                terms = RewardTerms(info["reward_components"]["loss"], memory, info["errors"], info["reward_layers"])
                track.outcome(terms, info["loss"], info["bytes"])
            for episode in track.episodes(env.observation, True, facts(env.run, name, f"{name}-{seed}", Reward())):
                writer.add(episode)
                transitions += len(episode)
    return transitions


def collection(args: Args, workload: str, folder: str, batch: int = 1) -> int:
    """The same runs by `mango collect`."""
    from train_policy.collect import CollectArgs, collect

    forget_twins(folder)
    settings: dict[str, Any] = {"horizon": args.steps, "interval": args.interval}
    more: dict[str, Any] = {} if batch == 1 else {"batch": batch}              # which earlier code does not know
    root = Path(folder) / "collection"
    return collect(workload, list(args.policies), args.seeds, args.budget, root, CollectArgs(**settings), **more).decisions


SIDES: dict[str, Callable[[Args, str, str], int]] = {
    "environment": environment,
    "collect": collection,
    "batched": lambda args, workload, folder: collection(args, workload, folder, args.batch),
}


def measure_here(args: Args, side: str, workload: str, profile: bool) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    from mango import native

    torch.set_num_threads(1)
    native.load()                                            # compiled into the usual cache
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as folder:
        SIDES[side](Args(**asdict(args) | {"steps": args.interval, "seeds": 1, "policies": args.policies[:2]}), workload, warm)
        spent = watch() if profile else {}
        started = cpu()
        transitions = SIDES[side](args, workload, folder)
        used = cpu() - started
    shares = {what: seconds / used for what, seconds in sorted(spent.items(), key=lambda item: -item[1])}
    shares |= {"the rest": 1 - sum(shares.values())} if profile else {}
    return {"transitions": transitions, "cpu_seconds": used, "imports_and_warm_up": started, "shares": shares}


def watch() -> dict[str, float]:
    """CPU seconds by what `STAGES` calls it, counted from now on."""
    spent: dict[str, float] = defaultdict(float)
    inner: list[float] = []                                  # of each open call: seconds spent in calls that are counted apart

    def watched(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.thread_time() - began
                spent[what] += whole - inner.pop()
                if inner:
                    inner[-1] += whole

        return call

    for module, owner, name, what in STAGES:
        try:
            home: Any = importlib.import_module(module)
        except ImportError:                                  # of earlier code
            continue
        home = getattr(home, owner) if owner else home
        setattr(home, name, watched(getattr(home, name), what))
    return spent


def measure(args: Args, side: str, workload: str, code: Path, profile: bool = False) -> dict[str, Any]:
    """One measurement, in a process of its own that runs the code of a checkout."""
    told = json.dumps({"args": asdict(args), "side": side, "workload": workload, "profile": profile})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), told]
    done = subprocess.run(command, cwd=code, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(args: Args, workload: str) -> dict[str, Any]:
    """Transitions per CPU-second of every side in every repetition, ratios to the environment, and where time goes."""
    from mango_env.batched_run import batchable
    from mango_env.run import TrainingRun

    pays = batchable(TrainingRun(workload, 0, horizon=1, memory_budget=args.budget))
    if not pays:
        args = replace(args, seeds=1)                        # these are slow, and need no full batch
    sides = {side: (side, ROOT) for side in SIDES if side != "batched" or pays}
    if args.before:
        sides["environment_before"] = ("environment", Path(args.before).resolve())
    rates: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for repetition in range(args.repetitions):
        for name in order:
            found = measure(args, sides[name][0], workload, sides[name][1])
            rates[name].append(found["transitions"] / found["cpu_seconds"])
            print(f"{workload:12s} {repetition} {name:18s} {rates[name][-1]:8.1f} transitions per CPU-second", flush=True)
        order.reverse()
    result: dict[str, Any] = {"workload": workload, "goal": GOAL, "runs": args.seeds * len(args.policies), "rates": rates}
    for base in [name for name in sides if name.startswith("environment")]:
        others = [name for name in sides if not name.startswith("environment")]
        ratios = {name: [a / b for a, b in zip(rates[name], rates[base], strict=True)] for name in others}
        result[f"over_{base}"] = {name: {"median": median(each), "all": each} for name, each in ratios.items()}
    result["profile"] = {name: measure(args, *side[:1], workload, side[1], True)["shares"] for name, side in sides.items()}
    return result | {"met": max(ratio["median"] for ratio in result["over_environment"].values()) >= GOAL}


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        told = json.loads(sys.argv[1])
        found = measure_here(Args(**told["args"]), told["side"], told["workload"], told["profile"])
        print(json.dumps(found))
        return
    from benchmarks.record import stamp, write

    defaults = Args()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(defaults).items():
        several = {"nargs": "+"} if isinstance(value, tuple) else {"type": type(value)}
        parser.add_argument(f"--{name}", default=value, **several)
    args = Args(**vars(parser.parse_args()))
    rows = [compare(args, workload) for workload in args.workloads]
    for row in rows:
        told = {name: f"{each['median']:.2f}x" for name, each in row["over_environment"].items()}
        print(f"{row['workload']:12s} {told}  goal {GOAL}x: {'met' if row['met'] else 'missed'}")
    args.before = Path(args.before).name
    print(write(args.out, stamp(args) | {"results": rows}))


if __name__ == "__main__":
    main()
