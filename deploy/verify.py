"""Does this policy work on this model? Trains briefly under MANGO and checks actions, bytes and budget at every step.

    python deploy/verify.py --policy NAME|PATH --workload NAME|module:function|file.py:function \\
        --memory-budget 0.125 --steps 60 --json out.json

Prints a table of checks. Exit code 0: all passed; 1: some failed; 2: it could not be run, with one line that says why.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

# Run as a file, Python looks for modules in deploy/ and not in the checkout beside it, which an uninstalled checkout needs.
if __package__ in (None, "") and (Path(__file__).parent.parent / "mango").is_dir():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mango import KNOBS, LADDER, MANGO, CompressionConfig, Decision
from mango.config import NVEC
from mango.policy_choice import as_policy, proposals
from mango.policy_file import FrozenPolicy
from mango_env.workloads import Workload, make_workload
from train_policy.cli_support import one_line, parse_budget, write_json
from train_policy.provenance import about

FILE_CHECK = "policy can be loaded"
BOOKKEEPING = 256                                                              # bytes per layer of tables that are no state


@dataclass(frozen=True)
class Args:
    """What to verify. Every field is an option of the same name."""

    policy: str = field(metadata={"help": "a shipped name, the path of a frozen policy, or a heuristic such as water-filling"})
    workload: str = field(metadata={"help": "a name, module:function, or path/to/file.py:function"})
    memory_budget: str = field(
        default="0.125", metadata={"help": 'a fraction of AdamW\'s state bytes (0.125), a size ("64KiB"), or bytes (65536)'}
    )
    steps: int = field(default=60, metadata={"help": "optimizer steps to train"})
    interval: int = field(default=10, metadata={"help": "optimizer steps per decision"})
    lr: float | None = field(default=None, metadata={"help": "learning rate; by default the workload's own, or 2e-3"})
    seed: int = field(default=0, metadata={"help": "of the workload and of the optimizer"})
    json: Path | None = field(default=None, metadata={"help": "file for the checks, the bytes and the losses"})

    def __post_init__(self) -> None:
        if self.interval < 1 or self.steps < 2 * self.interval:
            raise ValueError(f"steps={self.steps} must be at least twice interval={self.interval}, and that at least 1")


@dataclass(frozen=True)
class Check:
    """One promise and whether it held."""

    name: str
    passed: bool
    detail: str


@dataclass
class Record:
    """What was measured while training; nothing is judged yet."""

    losses: list[float] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)                       # after construction, then after every step
    illegal: list[str] = field(default_factory=list)                           # configs in force that are on no menu
    answers: list[str] = field(default_factory=list)                           # what is wrong with the policy's own answers
    mismatches: list[str] = field(default_factory=list)                        # where a report and the storages disagree
    decisions: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)                       # the last memory report


def verify(args: Args) -> tuple[list[Check], Record]:
    """Train and judge. Raises what a wrong workload or budget raises; a wrong policy file is a failed check."""
    try:
        shadow = as_policy(args.policy, LADDER)                                # refuses any file that is not of our schema
    except ValueError as error:
        return [Check(FILE_CHECK, False, one_line(error))], Record()
    workload = make_workload(args.workload, args.seed)
    optimizer = MANGO(
        workload.model.named_parameters(),
        lr=args.lr if args.lr is not None else getattr(workload, "lr", 2e-3),
        policy=args.policy,
        memory_budget=parse_budget(args.memory_budget),
        policy_update_freq=args.interval,
        total_steps=args.steps,
        seed=args.seed,
    )
    if not optimizer.layers:
        raise ValueError(f"workload {args.workload!r} has no tensor of {optimizer.min_numel} entries or more: nothing to decide")
    record = train(args, workload, optimizer, shadow)
    return judge(args, optimizer, shadow, record), record


def train(args: Args, workload: Workload, optimizer: MANGO, shadow: Any) -> Record:
    """Run `args.steps` steps and look at everything after each of them. `shadow` is a second copy of the policy."""
    record = Record(state_bytes=[optimizer.state_bytes()])

    def watch(decision: Decision) -> None:
        record.decisions.append({"step": decision.step, "applied": [config.name for config in decision.applied]})
        record.state_bytes.append(optimizer.state_bytes())
        problems = wrong_answers(shadow, decision, len(optimizer.ladder))
        record.answers += [f"step {decision.step}: {problem}" for problem in problems]

    handle = optimizer.register_decision_hook(watch)
    for step in range(1, args.steps + 1):
        optimizer.zero_grad()
        loss = workload.loss()
        loss.backward()                                                        # type: ignore[no-untyped-call]
        record.losses.append(float(loss.detach()))
        optimizer.observe_loss(record.losses[-1])
        optimizer.step()
        record.state_bytes.append(optimizer.state_bytes())
        record.illegal += [f"step {step}: {problem}" for problem in illegal_configs(optimizer, shadow)]
        record.report = optimizer.memory_report()
        record.mismatches += [f"step {step}: {problem}" for problem in report_mismatches(optimizer, record.report)]
    handle.remove()
    return record


def judge(args: Args, optimizer: MANGO, shadow: Any, record: Record) -> list[Check]:
    """Turn what was measured into checks."""
    budget, peak = optimizer.memory_budget, max(record.state_bytes)
    over = sum(used > budget for used in record.state_bytes)
    window = max(1, min(10, args.steps // 4))
    start, end = (sum(part) / window for part in (record.losses[:window], record.losses[-window:]))
    finite = all(map(math.isfinite, record.losses))
    due = args.steps // args.interval
    used = sorted({name for decision in record.decisions for name in decision["applied"]})
    origin = f"{args.policy} is no file, its rules are in mango.policies"
    if isinstance(shadow, FrozenPolicy):
        meta = shadow.metadata
        origin = f"{meta['format']} {meta['format_version']}, schema {meta['schema_hash']}, knobs {meta['knobs_version']}"
    return [
        Check(FILE_CHECK, True, origin),
        Check("its answers are legal", not record.answers, first_of(record.answers) or "shapes, values and menus"),
        Check("decisions are taken on time", len(record.decisions) == due, f"{len(record.decisions)} of {due}"),
        Check("applied configs are on the menus", not record.illegal, first_of(record.illegal) or f"used {', '.join(used)}"),
        Check(
            "state is within the budget at all times",
            over == 0,
            f"peak {peak:,} of {budget:,} bytes ({peak / optimizer.adamw_bytes:.1%} of AdamW's), {over} times over",
        ),
        Check(
            "memory report matches the storages",
            not record.mismatches,
            first_of(record.mismatches) or f"{record.report['total']:,} bytes, equal after each of {args.steps} steps",
        ),
        Check("gradients are finite", optimizer.skipped == 0, f"{optimizer.skipped} updates skipped"),
        Check("loss is finite", finite, f"{sum(not math.isfinite(x) for x in record.losses)} of {args.steps} are not"),
        Check(
            "loss falls", finite and end < start, f"{start:.4g} to {end:.4g} (means of the first and last {window} steps)"
        ),
    ]  # fmt: skip


def wrong_answers(shadow: Any, decision: Decision, rungs: int) -> Iterator[str]:
    """What is wrong with a policy's own answer to an observation, before the budget has its say."""
    layers = len(decision.observation)
    if hasattr(shadow, "scores"):
        scores: Tensor = shadow.scores(decision.observation)
        if tuple(scores.shape) != (layers, rungs) or not scores.isfinite().all():
            yield f"scores {tuple(scores.shape)}, expected finite ({layers}, {rungs})"
        return
    answer = shadow.act(decision.observation)
    if isinstance(answer, Tensor):
        sizes = torch.tensor(NVEC)
        if answer.dtype != torch.int64 or answer.dim() != 2 or ((answer < 0) | (answer >= sizes)).any():
            yield f"actions {tuple(answer.shape)} {answer.dtype}, expected int64 indices into menus of the sizes {NVEC}"
    if answer is not None:
        try:
            proposals(answer, layers)
        except (ValueError, TypeError) as error:
            yield one_line(error)


def illegal_configs(optimizer: MANGO, shadow: Any) -> Iterator[str]:
    """Configs in force that are off the menus or, where the policy picks rungs, off the ladder."""
    if len(optimizer.applied) != len(optimizer.layers):
        yield f"{len(optimizer.applied)} configs for {len(optimizer.layers)} layers"
    in_force: list[Any] = list(optimizer.applied)
    for layer, config in zip(optimizer.layers, in_force, strict=False):
        if not isinstance(config, CompressionConfig):
            yield f"{layer.name} has a {type(config).__name__}, no CompressionConfig"
        elif any(getattr(config, knob) not in menu for knob, menu in KNOBS.items()):
            yield f"{layer.name} has {config}, which is off the menus"
        elif hasattr(shadow, "scores") and config not in optimizer.ladder.rungs:
            yield f"{layer.name} has {config.name}, which is no rung of the ladder"


def report_mismatches(optimizer: MANGO, report: dict[str, Any]) -> Iterator[str]:
    """Where the memory report, `state_bytes` and the storages that are really alive disagree."""
    parts = {k: v for k, v in report.items() if isinstance(v, int) and k not in ("total", "paged", "budget", "adamw")}
    if sum(parts.values()) != report["total"]:
        yield f"components sum to {sum(parts.values()):,}, total says {report['total']:,}"
    if report["total"] != optimizer.state_bytes():
        yield f"total says {report['total']:,}, state_bytes {optimizer.state_bytes():,}"
    if [row["bytes"] for row in report["layers"]] != optimizer.layer_bytes().tolist():
        yield "the layers' rows differ from layer_bytes()"
    parameters = {tensor.untyped_storage().data_ptr() for group in optimizer.param_groups for tensor in group["params"]}
    state = storages([list(optimizer.state.values()), optimizer.statistics], skip=parameters)
    if sum(state.values()) != report["total"]:
        yield f"storages hold {sum(state.values()):,} bytes, total says {report['total']:,}"
    # Anything else that the optimizer holds must be small tables: a dense copy hidden anywhere would show here.
    everything = [value for name, value in vars(optimizer).items() if name not in ("policy", "param_groups")]
    hidden = sum(storages(everything, skip=parameters | set(state)).values())
    if hidden > BOOKKEEPING * (len(optimizer.layers) + 1):
        yield f"{hidden:,} bytes are held beside the state"


def storages(roots: Any, skip: set[int]) -> dict[int, int]:
    """Bytes by address of every tensor storage reachable from `roots` through containers and objects of `mango`."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack = [roots]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            if storage.data_ptr() not in skip and storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
            stack += [] if item.grad is None or storage.data_ptr() in skip else [item.grad]
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            stack += item
        elif type(item).__module__.split(".")[0] == "mango":
            names = {name for cls in type(item).__mro__ for name in getattr(cls, "__slots__", ())}
            stack += [getattr(item, name) for name in names | set(getattr(item, "__dict__", ())) if hasattr(item, name)]
    return found


def first_of(problems: Sequence[str]) -> str:
    """The first problem and how many there are; empty where there is none."""
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "") if problems else ""


def arguments(argv: Sequence[str] | None) -> Args:
    """`Args` from the command line, one option per field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds: dict[Any, Callable[[str], Any]] = {int: int, float | None: float, Path | None: Path}
    for option in fields(Args):
        required = option.name in ("policy", "workload")
        text = option.metadata["help"] + ("" if required or option.default is None else f" (default {option.default})")
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=kinds.get(option.type, str),
            required=required,
            default=None if required else option.default,
            help=text.replace("%", "%%"),
        )
    return Args(**vars(parser.parse_args(argv)))


def show(args: Args, checks: Sequence[Check], console: Console) -> None:
    """The table of checks."""
    table = Table(title=escape(f"{args.policy} on {args.workload}"), title_justify="left")
    for column in ("check", "", "measured"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, "[green]ok[/]" if check.passed else "[bold red]FAILED[/]", escape(check.detail))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    try:
        args = arguments(argv)
        checks, record = verify(args)
        passed = all(check.passed for check in checks)
        show(args, checks, Console())
        if args.json is not None:
            result = {"passed": passed, "checks": [asdict(check) for check in checks], "record": asdict(record)}
            write_json(args.json, result | {"args": asdict(args), "about": about()})
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"verify: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
