"""The `mango` command. Heavy libraries are imported by the command that needs them, so that `mango --help` is quick.

Errors are one line on stderr and exit code 2, a failed part of a run is exit code 1, Ctrl-C is 130. `--json FILE` writes what a
command found for a machine to read, `-` writes it to stdout in place of the tables.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from train_policy.cli_data import data_app
from train_policy.cli_run import PART_FAILED, run
from train_policy.cli_support import (
    DEBUG_FLAG,
    ClipOption,
    JsonOption,
    RuleOption,
    ScheduleOption,
    SeedOption,
    StepsOption,
    check_rule,
    console,
    emit,
    err_console,
    guarded,
    one_line,
    parse_budget,
    parse_list,
    print_table,
    say,
)
from train_policy.cli_train import collect, sweep, train_app

app = typer.Typer(name="mango", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command("collect")(guarded(collect))
app.command("sweep")(guarded(sweep))
app.command("run")(guarded(run))
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")


@app.callback(help="MANGO: training under a byte budget. Record runs, learn a policy from them, freeze it, plug it in, compare.")
def common(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    if debug:
        os.environ[DEBUG_FLAG] = "1"


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="folder of everything that the demo makes")] = Path("runs/demo"),
    seed: SeedOption = 0,
    workers: Annotated[int, typer.Option(help="processes")] = 2,
    quick: Annotated[bool, typer.Option(help="the same stages, far too short to learn: a test of the machinery")] = False,
    compare_all: Annotated[bool, typer.Option("--compare-all", help="the comparison alone, with the shipped policy")] = False,
    rank: Annotated[int | None, typer.Option(help="add a low-rank config to the comparison: 1, 4, 8, 32 or 128")] = None,
    bits_p: Annotated[int | None, typer.Option(help="bits of its projector: 16, 8 or 4; default: 8, with NF4 4")] = None,
    bits_q: Annotated[int | None, typer.Option(help="bits of its first moment in the subspace, likewise")] = None,
    use_nf4: Annotated[bool, typer.Option("--use-nf4", help="its factors in 4-bit NormalFloat")] = False,
    json: JsonOption = None,
) -> None:
    """The whole way: record runs, learn in stages, freeze, plug in, compare. At most 10 minutes on 2 cores."""
    from train_policy.demo import DemoArgs, run_demo

    result = run_demo(DemoArgs(out, seed, workers, quick, compare_all, rank, bits_p, bits_q, use_nf4))
    emit(json, result, lambda: None)
    if result["failures"]:
        raise typer.Exit(PART_FAILED)


@app.command()
@guarded
def evaluate(
    policy: Annotated[list[str], typer.Option(help="adamw, fixed:RUNG, fixed (all), a heuristic, a name, a path, hf://...")],
    workload: Annotated[list[str], typer.Option(help="a name or module:function; repeatable")],
    budgets: Annotated[str, typer.Option(help="comma-separated: fractions of AdamW's state, 64KiB, bytes")] = "0.25",
    seeds: Annotated[int, typer.Option(help="runs per policy, workload and budget")] = 3,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    interval: Annotated[int, typer.Option(help="optimizer steps per decision")] = 10,
    lr: Annotated[float | None, typer.Option(help="learning rate; default: the workload's own, or 2e-3")] = None,
    rule: RuleOption = "adamw",
    schedule: ScheduleOption = "constant",
    max_grad_norm: ClipOption = None,
    matrix_lr_scale: Annotated[float, typer.Option(help="Muon's rate over the learning rate, for the matrices it moves")] = 1.0,
    workers: Annotated[int, typer.Option(help="processes")] = 1,
    json: JsonOption = None,
) -> None:
    """Train under budgets with each policy, beside torch.optim.AdamW and the rule at full precision on the same seeds."""
    from train_policy.behaviours import behaviours
    from train_policy.evaluate import EvaluationArgs
    from train_policy.evaluate import evaluate as measure

    check_rule(rule)
    specs = [spec for given in policy for spec in given.split(",") if spec]
    specs = list(dict.fromkeys(behaviours(specs)))
    args = EvaluationArgs(
        horizon=steps, interval=interval, lr=lr, rule=rule, schedule=schedule, max_grad_norm=max_grad_norm,
        matrix_lr_scale=matrix_lr_scale,
    )
    sizes, draws = parse_list(budgets, parse_budget, "--budgets"), list(range(seed, seed + seeds))
    rows = measure(specs, workload, sizes, draws, args, workers=workers, progress=err_console.is_terminal)
    emit(json, [row.to_dict() for row in rows], lambda: print_evaluation(rows))
    judge(rows)


def judge(rows: list[Any]) -> None:
    """Exit with `PART_FAILED` where a run diverged or broke its budget, or where none could be done."""
    diverged = [row for row in rows if row.status == "diverged"]
    over = [row for row in rows if not row.within_budget]
    if diverged or over or all(row.val_loss is None for row in rows):
        unfit = sum(not row.fits for row in rows)
        say(f"of {len(rows)} runs {len(diverged)} diverged, {len(over)} broke the budget, {unfit} did not fit it")
        raise typer.Exit(PART_FAILED)


def print_evaluation(rows: list[Any]) -> None:
    from train_policy.evaluate import summary

    columns = ("policy", "workload", "budget", "peak bytes", "val loss", "gap %", "95 % interval", "full gap %", "95 % interval",
               "step time", "note")  # fmt: skip
    body = []
    for row in summary(rows):
        interval = "" if row.gap_low is None else f"{row.gap_low:+.1f} .. {row.gap_high:+.1f}"
        full = "" if row.gap_full_low is None else f"{row.gap_full_low:+.1f} .. {row.gap_full_high:+.1f}"
        told = ((row.failed, f"{row.failed} diverged"), (row.unfit, "does not fit"), (not row.within_budget, "over budget"))
        note = ", ".join(text for it_is, text in told if it_is)
        body.append((row.policy, row.workload, str(row.budget), row.state_bytes_peak, row.val_loss,
                     row.gap, interval, row.gap_full, full, row.step_time_ratio, note))  # fmt: skip
    caption = "gap: held-out loss above AdamW's; full gap: above the same rule's at full precision; step time: over AdamW's"
    print_table("Held-out loss under a byte budget (mean over seeds)", columns, body, caption)


@app.command()
@guarded
def ope(
    data: Annotated[Path, typer.Option(help="a trajectory store")],
    policy: Annotated[list[str], typer.Option(help="a name, a path, hf://..., or fixed:RUNG; repeatable")],
    softmax: Annotated[bool, typer.Option("--softmax", help="draw rungs from the policy's probabilities")] = False,
    gamma: Annotated[float, typer.Option(help="discount per decision; 1: the returns of mango evaluate")] = 1.0,
    updates: Annotated[int, typer.Option(help="gradient steps of fitted Q evaluation")] = 4_000,
    refits: Annotated[int, typer.Option(help="fits to resampled runs, for an interval; 0: none")] = 0,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Off-policy evaluation: estimate from recorded runs what a policy would return, without running it."""
    from mango_env.cache import build_cache
    from train_policy.ope import OpeArgs, evaluate_offline

    cache, args = build_cache(data), OpeArgs(softmax, gamma, updates, refits=refits, seed=seed)
    results = [evaluate_offline(spec, cache, args, progress=err_console.is_terminal) for spec in policy]
    emit(json, [result.to_dict() for result in results], lambda: print_estimates(results))


def print_estimates(results: list[Any]) -> None:
    def line(name: str, how: str, found: Any) -> tuple[Any, ...]:
        interval = "" if found.low is None else f"{found.low:+.4g} .. {found.high:+.4g}"
        return name, how, found.value, interval, found.runs, found.effective, found.note

    body = [line("(recorded)", "real returns", results[0].recorded)]
    for result in results:
        body.append(line(result.policy, "fitted Q evaluation", result.fqe))
        body.append(line(result.policy, "importance sampling", result.importance))
    columns = ("policy", "estimate by", "return", "95 % interval", "runs", "effective episodes", "note")
    caption = "Rungs count as applied: a budget that forbids some changes the truth. Other layers are taken as recorded."
    print_table(f"Estimated returns, {results[0].decides}", columns, body, caption)


@app.command()
@guarded
def freeze(
    source: Annotated[Path, typer.Option("--from", help="a checkpoint of mango train, an SB3 .zip or a d3rlpy .d3")],
    out: Annotated[Path, typer.Option(help="the frozen policy, NAME.safetensors; its card NAME.json lies beside it")],
    evaluation: Annotated[Path | None, typer.Option(help="JSON of mango evaluate; its summary goes into the card")] = None,
    data: Annotated[Path | None, typer.Option(help="the store that it was trained on; its digest goes into the card")] = None,
    description: Annotated[str, typer.Option(help="one line for the card")] = "",
    licence: Annotated[str, typer.Option(help="licence of the policy")] = "MIT",
    trust_pickle: Annotated[bool, typer.Option(help="load a .zip or .d3 although it runs code of its author")] = False,
    push: Annotated[str | None, typer.Option(help="owner/name on the Hugging Face Hub: upload file, card and README")] = None,
    private: Annotated[bool, typer.Option("--private", help="with --push: the repository is a private one")] = False,
    json: JsonOption = None,
) -> None:
    """Turn a checkpoint into a frozen policy file that runs anywhere with torch alone, and publish it on demand."""
    from train_policy import publishing
    from train_policy.freezing import freeze_checkpoint

    if push is None and private:
        raise ValueError("--private says how to --push; give --push owner/name too")
    repo = None if push is None else publishing.repository(push)          # what is missing is said before anything is made
    path, card = freeze_checkpoint(
        source, out, evaluation=evaluation, data=data, description=description, licence=licence, trust_pickle=trust_pickle
    )
    written = [f"wrote {path} and {path.with_suffix('.json')}"]
    result: dict[str, Any] = {"path": str(path), "card": card}
    if repo is not None:
        page, commit = publishing.push(path, repo, private=private)
        result |= {"page": page, "commit": commit}
        written.append(f"pushed to {page}; load it as hf://{repo}/{path.stem}, or hf://{repo}@{commit}/{path.stem} for good")
    emit(json, result, lambda: console.print("\n".join(written), soft_wrap=True))


@app.command()
@guarded
def inspect(
    policy: Annotated[str, typer.Argument(help="a shipped name, the path of a frozen policy, or hf://owner/name")],
    workload: Annotated[str, typer.Option(help="the run that it decides for us to watch")] = "source_lm",
    steps: StepsOption = None,
    budget: Annotated[str, typer.Option(help="a fraction of AdamW's state, a size, or bytes")] = "0.25",
    depth: Annotated[int, typer.Option(help="questions on the way to a leaf of its decision tree, at most")] = 4,
    rule: RuleOption = "adamw",
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """What a policy is, what it decides during a run, what moves it, its phases, and the policy as a small decision tree."""
    from mango.policy_file import load_policy
    from train_policy.evaluate import EvaluationArgs
    from train_policy.inspection import inspect_policy

    settings = EvaluationArgs(horizon=steps, rule=rule)
    found = inspect_policy(load_policy(policy), workload, settings, seed=seed, budget=parse_budget(budget), depth=depth)
    emit(json, found, lambda: print_inspection(found))


def print_inspection(found: dict[str, Any]) -> None:
    shown = ("name", "head", "architecture", "parameters", "ladder", "schema_hash", "weights_sha256")
    print_table("Policy", ("", ""), [(key, str(found[key])) for key in shown])
    card = {key: value for key, value in found["card"].items() if not isinstance(value, list | dict)}
    print_table("Card", ("", ""), [(key, str(value)) for key, value in card.items()])
    probe = found["probe"]
    title = f"Decisions on {probe['workload']} under {probe['rule']}, seed {probe['seed']}, budget {probe['budget']}"
    last = len(probe["rungs"]) - 1
    moments = sorted({0, last // 4, last // 2, 3 * last // 4, last})
    columns = ("layer", *(f"decision {t}" for t in moments))
    print_table(title, columns, [(name, *(probe["rungs"][t][i] for t in moments)) for i, name in enumerate(probe["layers"])])
    listened = [(name, value) for name, value in list(found["sensitivity"].items())[:12]]
    print_table("What it listens to (change of its scores per spread of a feature)", ("feature", "change"), listened)
    for name, phases in found["phase_separation"].items():
        by_label = phases["by_label"].items()
        rows = [(label, ", ".join(f"{r} {share:.0%}" for r, share in shares.items())) for label, shares in by_label]
        score = "" if phases["silhouette"] is None else f" (silhouette {phases['silhouette']:+.2f})"
        title = "Decisions by third of the run" if name == "thirds" else "Decisions by phase"
        print_table(title, ("when", "rungs"), rows, caption=phases["verdict"] + score)
    print_tree(found["tree"])


def print_tree(tree: dict[str, Any]) -> None:
    console.print("The policy as a decision tree", style="italic", highlight=False)
    for line in tree["rules"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    same, loss = tree["fidelity"], tree["val_loss"]
    rows = [
        ("best-scored rung", f"{same['preferred']:.1%}", f"{same['preferred_constant']:.1%}", same["preferred_constant_rung"]),
        ("applied under the budget", f"{same['applied']:.1%}", f"{same['applied_constant']:.1%}", same["applied_constant_rung"]),
    ]
    caption = (
        f"{same['decisions']} decisions of a run that the tree has not seen (seed {tree['held_out_seed']}). One table of "
        f"scores for all layers agrees under the budget in {same['applied_mean_scores']:.1%}.\n"
        f"Held-out loss of that run: {loss['policy']:.4f} decided by the policy, {loss['tree']:.4f} by the tree."
    )
    print_table("Decisions equal to the policy's", ("decision", "tree", "constant", "which is"), rows, caption)


@app.command()
@guarded
def report(
    results: Annotated[Path, typer.Argument(help="JSON of mango evaluate, mango demo or mango run")],
    out: Annotated[Path | None, typer.Option(help="the page; default: beside the results, with the suffix .html")] = None,
    json: JsonOption = None,
) -> None:
    """One self-contained HTML page from a results file, and a CSV of its rows beside it."""
    from train_policy.report import report_file

    page, table = report_file(results, out or results.with_suffix(".html"))
    emit(json, {"page": str(page), "csv": str(table)}, lambda: console.print(f"wrote {page} and {table}"))


def main() -> None:
    """The entry point of `mango`; `--debug` may stand anywhere on the line."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if len(arguments) < len(sys.argv) - 1:
        os.environ[DEBUG_FLAG] = "1"
    try:
        app(arguments, prog_name="mango")
    except Exception as error:
        # What no command expects is a bug of ours: still one line, and the way to see all of it.
        if os.environ.get(DEBUG_FLAG):
            raise
        print(f"mango: internal error: {one_line(error)} (add --debug for the traceback)", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
