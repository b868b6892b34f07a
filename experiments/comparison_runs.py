"""One run of a comparison: what is trained, by which method at which rate; what it takes. Nothing to run by itself."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from benchmarks.memory import clear, resident
from benchmarks.record import median_error
from experiments.baseline_optimizers import BASELINES, build_baseline, find
from experiments.run_modes import saved_activations, scaler_of, train_step
from experiments.tuning import TUNING_SEED, tune
from mango import MANGO
from mango_env.energy import metered
from mango_env.run import DIVERGED
from mango_env.schedules import rate_factor
from mango_env.workloads import Workload, make_workload
from train_policy.cli_support import one_line
from train_policy.seeding import borrowed_rng
from train_policy.state_bytes import state_nbytes

POINTS = 100                                             # of a loss curve, at most
PRETRAINING_LR = 3e-3
RAISED = (ValueError, TypeError, RuntimeError, OSError, ImportError, ArithmeticError, LookupError)    # told in a row


@dataclass(frozen=True)
class Domain:
    """What is trained."""

    workload: str
    steps: int
    pretrained: str | None = None                        # the workload whose weights, trained by AdamW, it starts from


SCALES = {
    "small": {
        "vision": Domain("mnist_vit", 120),
        "language": Domain("source_lm+batch=8", 120),
        "finetuning": Domain("shakespeare_lm+width=64+batch=8", 60, "books_lm+width=64+batch=8"),
    },
    "full": {
        "vision": Domain("cifar10_cnn", 2000),
        "language": Domain("books_words", 2000),
        "finetuning": Domain("shakespeare_lm", 600, "books_lm"),
    },
}


@dataclass(frozen=True)
class Args:
    """What a comparison runs."""

    domains: str = "vision,language,finetuning"
    methods: str = ""                                    # comma-separated, NAME or NAME@BUDGET; all without
    scale: str = "small"                                 # small or full, see SCALES
    seeds: int = 3                                       # runs per method, at its best rate
    rates: str = "0.5,1,2"                               # tried: times the recommended rate
    steps: int = 0                                       # of every run; 0: the scale's
    target: float = 0.0                                  # training loss; 0: AdamW's last one, a twentieth above
    costs: bool = True                                   # measure time and memory too
    device: str = "cpu"                                  # cpu or cuda
    workers: int = 2                                     # processes
    out: Path = Path("runs/compare")                     # a folder: compare.json, tables and figures


@dataclass(frozen=True)
class Task:
    """One training run: of a method at a rate, or of the tuning of its rate."""

    domain: str
    method: str
    seed: int
    lr: float
    args: Args

    @property
    def facts(self) -> dict[str, Any]:
        place = place_of(self.domain, self.args)
        return {"domain": self.domain, "workload": place.workload, "steps": place.steps, "policy": self.method, "seed": self.seed,
                "lr": self.lr}  # fmt: skip


def place_of(domain: str, args: Args) -> Domain:
    found = SCALES[args.scale][domain]
    return Domain(found.workload, args.steps, found.pretrained) if args.steps else found


def method_of(name: str) -> tuple[str, dict[str, Any]]:
    """A baseline and the options beside its recommended ones: NAME@BUDGET gives MANGO a budget."""
    name, at, budget = name.partition("@")
    find(name)
    return name, {"memory_budget": float(budget)} if at else {}


def optimizer_of(method: str, workload: Workload, lr: float | None, steps: int) -> Optimizer:
    """The method's optimizer for a workload's model (`lr` None: as recommended); methods that plan ahead are told the steps."""
    name, options = method_of(method)
    plans = "total_steps" in BASELINES[name].options or "policy" in BASELINES[name].options
    return build_baseline(name, workload.model, lr, **options, **({"total_steps": steps} if plans else {}))


def started(task: Task) -> Workload:
    """The workload before its first step, with the weights that it starts from."""
    place = place_of(task.domain, task.args)
    workload = make_workload(place.workload, task.seed)
    workload.model.to(task.args.device)
    if place.pretrained:
        workload.model.load_state_dict(pretrained(place, task.args))
    return workload


def pretrained(place: Domain, args: Args) -> dict[str, torch.Tensor]:
    """Weights after AdamW's training on another workload; made once and kept in the folder of the results."""
    from safetensors.torch import load_file, save_file

    assert place.pretrained is not None
    path = args.out / f"{place.pretrained}.{2 * place.steps}.safetensors"
    if not path.exists():
        workload = make_workload(place.pretrained, 0)
        optimizer = AdamW(workload.model.parameters(), lr=PRETRAINING_LR, weight_decay=0.0)
        for _ in steps_of(optimizer, workload, 2 * place.steps, "fp32"):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in workload.model.state_dict().items()}, aside)
        aside.replace(path)
    return load_file(path)


def steps_of(optimizer: Optimizer, workload: Workload, steps: int, mode: str) -> Iterator[float]:
    """Trains with a cosine schedule and yields the loss of every step."""
    usual = [group["lr"] for group in optimizer.param_groups]
    scaler = scaler_of(mode, next(workload.model.parameters()).device)
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, usual, strict=True):
            group["lr"] = lr * rate_factor("cosine", step, steps)
        loss = train_step(optimizer, workload.loss, scaler, mode)
        if isinstance(optimizer, MANGO):
            optimizer.observe_loss(loss)
        yield loss


def run(task: Task) -> dict[str, Any]:
    """One training; what it raises is told in its row."""
    place, began = place_of(task.domain, task.args), time.perf_counter()
    losses: list[float] = []
    stored, status, message, measures = 0, "ok", "", dict[str, float]()
    try:
        with borrowed_rng(task.seed), torch.compiler.set_stance("force_eager"):
            workload = started(task)
            optimizer = optimizer_of(task.method, workload, task.lr, place.steps)
            for loss in steps_of(optimizer, workload, place.steps, BASELINES[method_of(task.method)[0]].amp):
                losses.append(loss)
                if len(losses) % 10 == 1 or len(losses) == place.steps:
                    stored = max(stored, state_nbytes(optimizer))
                if not loss <= DIVERGED * max(1.0, losses[0]):
                    status, message = "diverged", f"loss {loss:.3g} at step {len(losses)}, {losses[0]:.3g} at the first"
                    break
            else:
                measures = {name: float(value) for name, value in workload.evaluate().items()}
                if not math.isfinite(measures["val_loss"]):
                    status, message = "diverged", "the held-out loss is not finite"
        numel = sum(p.numel() for p in workload.model.parameters())
    except RAISED as error:
        return task.facts | {"status": "failed", "message": one_line(error), "val_loss": None, "state_bytes_peak": None}
    size = max(1, len(losses) // POINTS)
    seconds = time.perf_counter() - began
    if status == "diverged":
        measures = {}
    return task.facts | {"val_loss": None} | measures | {
        "status": status, "message": message, "state_bytes_peak": stored, "adamw_bytes": 8 * numel, "parameters": numel,
        "seconds": seconds, "steps_per_second": len(losses) / seconds, "points_every": size,
        "loss_curve": [round(fmean(losses[i : i + size]), 5) for i in range(0, len(losses), size)],
    }  # fmt: skip


def cost(task: Task) -> dict[str, Any]:
    """Time and memory of a method in this process, which does nothing else; steps take turns with AdamW's."""
    args, steps = task.args, 12
    facts = {"domain": task.domain, "policy": task.method, "device": args.device}
    cuda = args.device != "cpu"
    try:
        with torch.compiler.set_stance("force_eager"):
            usual = started(task)
            other = AdamW(usual.model.parameters(), lr=1e-4, weight_decay=0.0)
            for _ in steps_of(other, usual, 3, "fp32"):
                pass
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if cuda else clear()
            workload = started(task)
            optimizer = optimizer_of(task.method, workload, task.lr, steps)
            held: list[int] = []
            mode = BASELINES[method_of(task.method)[0]].amp
            with metered() as energy:
                for _ in steps_of(optimizer, workload, steps, mode):
                    held.append((torch.cuda.memory_allocated() if cuda else resident()) - before)
            peak = (torch.cuda.max_memory_allocated() if cuda else resident()) - before
            with saved_activations(workload.model) as saved:
                workload.loss()
            ratios = [step_seconds(optimizer, cuda) / step_seconds(other, cuda) for _ in range(21)]
    except RAISED as error:
        return facts | {"status": "failed", "message": one_line(error)}
    numel = sum(p.numel() for p in workload.model.parameters())
    return facts | {
        "status": "ok", "peak_bytes_per_param": peak / numel, "median_bytes_per_param": median(held) / numel,
        "activation_bytes_per_param": saved.nbytes / numel, "step_time_ratio": median(ratios),
        "step_time_ratio_se": median_error(ratios),
        "joules_per_step": energy.per_step(steps),
    }  # fmt: skip


def step_seconds(optimizer: Optimizer, cuda: bool) -> float:
    """One step on the gradients that are there."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.full_like(parameter, 1e-3)
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    optimizer.step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rate_facts(domain: str, method: str, args: Args) -> dict[str, Any]:
    """What tells one tuning from another."""
    return {"domain": domain, "policy": method, "steps": place_of(domain, args).steps, "rates": args.rates}


def tuned(domain: str, method: str, args: Args) -> dict[str, Any]:
    """The best rate of a method in a domain, and every run that was needed to find it."""
    runs: list[dict[str, Any]] = []

    def loss_of(lr: float) -> float:
        runs.append(run(Task(domain, method, TUNING_SEED, lr, args)))
        return math.inf if runs[-1]["val_loss"] is None else float(runs[-1]["val_loss"])

    found = tune(find(method_of(method)[0]).lr, [float(one) for one in args.rates.split(",")], loss_of, further=2)
    failed = [one["message"] for one in runs if one["status"] == "failed"]
    why = {"status": "failed", "message": failed[0]} if failed and len(failed) == len(runs) else {"status": "ok"}
    return rate_facts(domain, method, args) | found.to_dict() | why
