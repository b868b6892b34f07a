"""`mango demo`: the whole way on real data, from recorded training runs to a frozen policy that decides in the optimizer.

Collect, validate, clone, improve offline (native IQL and d3rlpy's DiscreteCQL), fine-tune with PPO, gate every stage, freeze,
evaluate beside AdamW, every fixed rung, the heuristics and `universal`. Training, gating and evaluation use different seeds, and
one workload family (`source_lm`) is seen by the evaluation alone; `universal` was trained on it and on `digits_cnn`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mango.config import CompressionConfig
from train_policy.cli_support import console, err_console, write_json
from train_policy.demo_comparison import show, verdicts
from train_policy.evaluate import EvaluationArgs, EvaluationRow, evaluate, returns_by_run, summary
from train_policy.gate import decide

T = TypeVar("T")
DIGITS = ("digits_mlp", "digits_cnn")
TEACHERS = ("random", "explore:water-filling", "adaptive", "water-filling")
FIXED_TEACHERS = ("fixed:m4v0", "fixed:m8v0")
HEURISTICS = ("random", "scheduled", "adaptive", "water-filling")
SHIPPED = "universal"                                    # stands in the comparison for what more data brings
CLONE, NATIVE, D3RLPY, TUNED, NAME = "bc", "iql", "d3rlpy-discrete-cql", "ppo", "demo"


@dataclass(frozen=True, slots=True)
class DemoArgs:
    """How large the demo is. `quick` only proves that the stages work together."""

    out: Path = Path("runs/demo")
    seed: int = 0
    workers: int = 2
    quick: bool = False
    compare_all: bool = False                            # the comparison alone, with the shipped policy: nothing is learned
    rank: int | None = None                              # of a low-rank config beside the rungs; None: no such config
    bits_p: int | None = None                            # of its projector; None: 8, with NF4 4
    bits_q: int | None = None                            # of its first moment in the subspace; likewise
    use_nf4: bool = False                                # its factors in NF4, which is what 4 bits are

    def __post_init__(self) -> None:
        assert self.low_rank or self.rank is None        # what it asks for is on the menus, or this raises

    @property
    def low_rank(self) -> CompressionConfig | None:
        """The low-rank config of the comparison."""
        if self.rank is None:
            if self.use_nf4 or self.bits_p is not None or self.bits_q is not None:
                raise ValueError("--bits-p, --bits-q and --use-nf4 say how a low-rank config is stored; give its --rank too")
            return None
        usual = 4 if self.use_nf4 else 8
        bits = [usual if given is None else given for given in (self.bits_p, self.bits_q)]
        if self.use_nf4 and 4 not in bits:
            raise ValueError(f"--use-nf4 has 4 bits, and neither --bits-p {bits[0]} nor --bits-q {bits[1]} has; leave one out")
        if self.rank < 1:
            raise ValueError(f"--rank {self.rank} must be at least 1")
        return CompressionConfig(rank=self.rank, factor_bits_p=bits[0], factor_bits_q=bits[1], variance_bits=0)

    @property
    def size(self) -> "Size":
        return QUICK if self.quick else FULL_SIZE


@dataclass(frozen=True, slots=True)
class Size:
    """Runs, steps and updates of the stages."""

    workloads: tuple[str, ...] = DIGITS                  # recorded and evaluated
    held_out: tuple[str, ...] = ("source_lm",)           # evaluated only
    budgets: tuple[float, ...] = (0.125, 0.25)           # of AdamW's state bytes
    held_out_budgets: tuple[float, ...] = (0.125,)
    steps: int = 100                                     # optimizer steps of a run
    held_out_steps: int = 40
    collected: int = 3                                   # seeds per behaviour
    oracle: tuple[str, ...] = DIGITS[:1]                 # what the oracle decides, once per budget: it is slow
    fixed: tuple[str, ...] = FIXED_TEACHERS
    epochs: int = 40
    updates: int = 1500                                  # of native offline RL
    d3rlpy_updates: int = 800
    timesteps: int = 1024                                # of PPO: one decision of one layer
    rollout: int = 512
    gated: int = 2                                       # seeds of a gate
    evaluated: int = 3                                   # seeds of the evaluation


FULL_SIZE = Size()
QUICK = Size(
    workloads=("digits_mlp",), held_out=(), steps=20, collected=2, oracle=(), fixed=("fixed:m4v0",),
    epochs=3, updates=40, d3rlpy_updates=20, timesteps=48, rollout=24, gated=3, evaluated=2,
)  # fmt: skip


@dataclass(slots=True)
class Journal:
    """What happened: stages with their seconds, learning curves, gates."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)

    def run(self, stage: str, work: Callable[[], tuple[T, str]]) -> T:
        """Do a stage; print and keep what came of it and how long it took."""
        console.print(f"[bold]{len(self.stages) + 1}. {stage}[/bold]", highlight=False)
        began = time.perf_counter()
        result, outcome = work()
        seconds = time.perf_counter() - began
        self.stages.append({"stage": stage, "seconds": round(seconds, 1), "outcome": outcome})
        console.print(f"   {outcome}  ({seconds:.0f} s)", highlight=False, markup=False)
        return result

    def curve(self, stage: str, name: str, rows: Sequence[dict[str, float]], x: str, y: str) -> None:
        """Keep one learning curve, of the rows that have both numbers."""
        kept = [row for row in rows if x in row and y in row]
        if kept:
            title = f"{stage}: {y.replace('_', ' ')}"
            self.curves.append({"group": title, "name": name, "x": [r[x] for r in kept], "y": [r[y] for r in kept],
                                "x_title": x, "y_title": y.replace("_", " ")})  # fmt: skip


def run_demo(args: DemoArgs) -> dict[str, Any]:
    """Run every stage; returns what the JSON holds, the evaluation's rows last."""
    from train_policy.provenance import about

    began = time.perf_counter()
    journal = Journal()
    cache = None if args.compare_all else collect_stage(args, journal)
    policy = NAME if cache is None else learn(args, journal, cache)
    rows = journal.run("evaluate beside AdamW, fixed rungs and heuristics", lambda: evaluation(args, policy))
    own = verdicts(rows, NAME)
    lines = own + verdicts(rows, SHIPPED)
    if cache is not None and isinstance(policy, Path):
        measured = [row.to_dict() for row in summary(rows) if row.policy == NAME]
        freeze_best(args, policy, card_of(args, journal, cache.digest) | {"verdicts": own, "evaluation": measured})
    show(rows, lines)
    failures = [row.to_dict() for row in rows if row.status == "diverged" or not row.within_budget]
    result = {
        "kind": "demo",
        "about": about(),
        "args": asdict(args),
        "seconds": round(time.perf_counter() - began, 1),
        "stages": journal.stages,
        "gates": journal.gates,
        "policy": str(policy),
        "verdicts": lines,
        "curves": journal.curves,
        "summary": [row.to_dict() for row in summary(rows)],
        "failures": failures,
        "rows": [row.to_dict() for row in rows],
    }
    report_stage(args, result)
    return result


def collect_stage(args: DemoArgs, journal: Journal) -> Any:
    """Record training runs under many behaviours, check the store, build the cache that training reads."""
    from mango_env.cache import build_cache
    from mango_env.validate import validate
    from train_policy.collect import CollectArgs, collect

    size, root = args.size, args.out / "trajectories"
    horizon = CollectArgs(horizon=size.steps, seed=args.seed)
    shared: dict[str, Any] = {"workers": args.workers, "progress": err_console.is_terminal}

    def record() -> tuple[None, str]:
        seeds = [args.seed + 100 + i for i in range(size.collected)]
        done = [collect(size.workloads, [*TEACHERS, *size.fixed], seeds, size.budgets, root, horizon, **shared)]
        if size.oracle:
            done.append(collect(size.oracle, ["oracle"], seeds[:1], size.budgets, root, horizon, **shared))
        recorded, there = sum(d.recorded for d in done), sum(d.skipped for d in done)
        over = sum(d.over_budget for d in done)
        return None, f"{recorded} runs recorded, {there} were there already, {over} broke their budget"

    def check() -> tuple[Any, str]:
        report = validate(root)
        if not report.ok:
            raise ValueError(str(report))
        return build_cache(root), f"{report.episodes} episodes, {report.transitions} decisions: valid"

    behaviours = len(TEACHERS) + len(size.fixed) + bool(size.oracle)
    journal.run(f"collect: {', '.join(size.workloads)} under {behaviours} behaviours", record)
    return journal.run("validate and cache", check)


def learn(args: DemoArgs, journal: Journal, cache: Any) -> Path:
    """Clone, improve offline, fine-tune; each stage has to pass the gate. Returns the frozen policy."""
    from mango.networks import PolicyNetwork
    from train_policy import bc, offline
    from train_policy.fitting import save_checkpoint

    size, progress = args.size, err_console.is_terminal
    start = PolicyNetwork("mlp", seed=args.seed)
    save_checkpoint(start, path_of(args, "untrained"), head="rung", card={"stage": "untrained"})

    def clone() -> tuple[Any, str]:
        settings = bc.BcArgs(epochs=size.epochs, seed=args.seed)
        result = bc.train(start, cache, settings, checkpoint=path_of(args, CLONE), progress=progress)
        journal.curve("behaviour cloning", CLONE, result.curves, "epoch", "loss")
        right = f"{result.accuracy['rung']:.0%} of the decisions of held-out runs"
        return result.network, f"{result.decisions} decisions imitated; decides as its teachers in {right}"

    def improve(algo: str, updates: int) -> Callable[[], tuple[None, str]]:
        def work() -> tuple[None, str]:
            settings = offline.OfflineArgs(algo=algo, updates=updates, seed=args.seed)
            result = offline.train(cloned, cache, settings, checkpoint=path_of(args, algo), progress=progress)
            for number in ("policy_loss", "td_loss", "loss"):
                journal.curve("offline RL", algo, result.curves, "updates", number)
            return None, ", ".join(f"{name} {value:.3g}" for name, value in list(result.metrics.items())[:4])

        return work

    cloned = journal.run("behaviour cloning", clone)
    journal.run("offline RL, native: IQL", improve(NATIVE, size.updates))
    journal.run("offline RL, d3rlpy: DiscreteCQL", improve(D3RLPY, size.d3rlpy_updates))
    best = journal.run("gate: cloning and offline RL", lambda: gate_stage(args, journal, "untrained", [CLONE, NATIVE, D3RLPY]))
    journal.run("PPO (Stable-Baselines3) from the best", lambda: tune(args, journal, best))
    best = journal.run("gate: PPO", lambda: gate_stage(args, journal, best, [TUNED]))
    return journal.run("freeze", lambda: freeze_best(args, path_of(args, best), card_of(args, journal, cache.digest)))


def tune(args: DemoArgs, journal: Journal, best: str) -> tuple[None, str]:
    """PPO on live training runs, from the policy that passed so far."""
    from mango.policy_file import load_policy
    from train_policy import ppo
    from train_policy.transfer import import_sb3

    import_sb3()
    from mango_env.layer_vec_env import LayerVecEnv

    size = args.size
    settings = ppo.PpoArgs(
        total_timesteps=size.timesteps, rollout=size.rollout, batch_size=128, critic_warmup=size.rollout, seed=args.seed
    )
    env = LayerVecEnv(list(size.workloads), horizon=size.steps, memory_budget=list(size.budgets), actions="rung",
                      seeds=[args.seed + 100 + i for i in range(16)], seed=args.seed)  # fmt: skip
    try:
        network = load_policy(path_of(args, best)).network
        result = ppo.train(network, env, settings, checkpoint=path_of(args, TUNED), progress=err_console.is_terminal)
    finally:
        env.close()
    journal.curve("PPO", TUNED, result.curves, "timesteps", "reward")
    first, last = (result.curves[i]["reward"] for i in (0, -1))
    return None, f"{result.timesteps} decisions; reward per decision {first:+.3f} in the first rollout, {last:+.3f} in the last"


def gate_stage(args: DemoArgs, journal: Journal, incumbent: str, candidates: Sequence[str]) -> tuple[str, str]:
    """Each candidate in turn replaces the incumbent only where paired returns prove it better; the name that stands."""
    size = args.size
    paths = {path_of(args, name): name for name in (incumbent, *candidates)}
    seeds = [args.seed + 50 + i for i in range(size.gated)]
    settings = EvaluationArgs(horizon=size.steps)
    rows = evaluate(list(paths), size.workloads, size.budgets, seeds, settings, workers=args.workers)
    returns = {name: returns_by_run(row for row in rows if row.policy == path.stem) for path, name in paths.items()}
    for name in candidates:
        decision = decide(returns[name], returns[incumbent], seed=args.seed)
        journal.gates.append({"policy": name, "against": incumbent, **decision.to_dict()})
        console.print(f"   {name} against {incumbent}: {decision.reason}", highlight=False, markup=False)
        incumbent = name if decision.accepted else incumbent
    return incumbent, f"{incumbent} stands"


def path_of(args: DemoArgs, name: str) -> Path:
    return args.out / f"{name}.safetensors"


def card_of(args: DemoArgs, journal: Journal, digest: str) -> dict[str, Any]:
    """What the policy's card says of its making."""
    from train_policy.provenance import about

    gates = [{key: gate[key] for key in ("policy", "against", "accepted", "reason")} for gate in journal.gates]
    return {
        "description": "The demo's policy: trained within minutes on digits; it shows the way and is not meant for large models.",
        "licence": "MIT",
        "made": about("mango demo"),
        "seed": args.seed,
        "trained_on": list(args.size.workloads),
        "training_data_digest": digest,
        "gates": gates,
    }


def freeze_best(args: DemoArgs, checkpoint: Path, card: dict[str, Any]) -> tuple[Path, str]:
    """Write the frozen policy; the same weights again where `checkpoint` is itself, with another card."""
    from mango.policy_file import freeze, load_policy

    policy = load_policy(checkpoint)
    stage = policy.card.get("stage", checkpoint.stem)
    path = freeze(policy.network, path_of(args, NAME), head=policy.head, card={**card, "stage": stage})
    return path, f"{path}: {path.stat().st_size:,} bytes, from the stage {stage}"


def evaluation(args: DemoArgs, policy: Path | str) -> tuple[list[EvaluationRow], str]:
    """The frozen file beside AdamW, every rung, the heuristics and the shipped policy, on seeds that no stage has seen."""
    from train_policy.behaviours import behaviours

    size, seeds = args.size, [args.seed + i for i in range(args.size.evaluated)]
    low_rank = [] if args.low_rank is None else [f"fixed:{args.low_rank.name}"]
    specs = list(dict.fromkeys(behaviours(["adamw", "fixed", *low_rank, *HEURISTICS, SHIPPED, policy])))
    shared: dict[str, Any] = {"workers": args.workers, "progress": err_console.is_terminal}
    rows: list[EvaluationRow] = []
    cases = ((size.workloads, size.budgets, size.steps), (size.held_out, size.held_out_budgets, size.held_out_steps))
    for works, budgets, steps in cases:
        if works:
            rows += evaluate(specs, works, budgets, seeds, EvaluationArgs(horizon=steps), **shared)
    done = [row for row in rows if row.fits]
    held, unfit = sum(row.within_budget for row in done), len(rows) - len(done)
    return rows, f"{len(done)} runs, {held} within their budget at every step; {unfit} of fixed rungs that do not fit"


def report_stage(args: DemoArgs, result: dict[str, Any]) -> None:
    """The HTML page and the CSV, from the same JSON that the command writes."""
    from train_policy.report import report_file

    results = args.out / "results.json"                  # demo.json beside it is the policy's card
    write_json(results, result)
    page, table = report_file(results, args.out / "report.html")
    console.print(f"policy: {result['policy']}\nreport: {page}\ntable:  {table}\ntook {result['seconds']:.0f} s", highlight=False)
