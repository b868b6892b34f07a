"""`mango collect` and `mango train`: from training runs to trajectories, from trajectories to a policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from train_policy.cli_support import (
    JsonOption,
    SeedOption,
    StepsOption,
    console,
    emit,
    err_console,
    guarded,
    parse_budget,
    parse_list,
    print_table,
    say,
)

if TYPE_CHECKING:
    from mango.networks import PolicyNetwork

train_app = typer.Typer(no_args_is_help=True, help="Learn a policy: bc (clone), offline (iql, awr, cql, d3rlpy's), ppo (fine-tune).")

DataOption = Annotated[Path, typer.Option("--data", help="a trajectory store")]
OutOption = Annotated[Path, typer.Option("--out", help="the checkpoint, a policy file; rewritten while training")]
InitOption = Annotated[Path | None, typer.Option("--init", help="the policy file to start from; default: a new network")]
HeadOption = Annotated[str, typer.Option("--head", help="what decides when deployed: rung or knobs")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="FILE.yml:KEY, or a KEY of the shipped recipes")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a hyper-parameter; repeatable")]


def collect(
    workload: Annotated[list[str], typer.Option(help="a name or module:function; repeatable")],
    policy: Annotated[list[str], typer.Option(help="who decides: random, random-knobs, fixed (every rung), fixed:RUNG, a heuristic, "
                                                   "oracle, explore:SPEC, a policy; repeatable")],  # fmt: skip
    root: Annotated[Path, typer.Option(help="the store; runs that it has are not repeated")],
    budgets: Annotated[str, typer.Option(help="comma-separated: fractions of AdamW's state, 64KiB, bytes")] = "0.125,0.25",
    seeds: Annotated[int, typer.Option(help="runs per workload, policy and budget")] = 3,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    interval: Annotated[int, typer.Option(help="optimizer steps per decision")] = 10,
    lr: Annotated[float | None, typer.Option(help="learning rate; default: the workload's own, or 2e-3")] = None,
    workers: Annotated[int, typer.Option(help="processes")] = 1,
    json: JsonOption = None,
) -> None:
    """Record training runs as episodes: every workload under every policy, budget and seed."""
    from train_policy.collect import CollectArgs
    from train_policy.collect import collect as record

    args = CollectArgs(horizon=steps, interval=interval, lr=lr, seed=seed)
    sizes, draws = parse_list(budgets, parse_budget, "--budgets"), list(range(seed, seed + seeds))
    done = record(workload, policy, draws, sizes, root, args, workers=workers, progress=err_console.is_terminal)

    def tables() -> None:
        rows = [(name, value) for name, value in done.returns.items()]
        caption = f"{done.recorded} runs recorded, {done.skipped} were there, {done.episodes} episodes, {done.seconds:.0f} s"
        print_table(f"Collected into {done.root}", ("policy", "mean return"), rows, caption=caption)

    emit(json, done.to_dict(), tables)
    if done.over_budget:
        say(f"{done.over_budget} runs broke their budget")
        raise typer.Exit(1)


def settings(given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE options as a dict; values are read as YAML has them."""
    if not given:
        return {}
    try:
        import yaml
    except ImportError as error:
        raise ImportError('--set reads values as YAML: pip install "mango-optim[train]"') from error
    values = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {item!r} is not NAME=VALUE")
        values[name.replace("-", "_")] = yaml.safe_load(value)
    return values


def recipe_of(stage: str, recipe: str | None, default: str) -> dict[str, Any]:
    """Hyper-parameters from FILE.yml:KEY, from KEY of the shipped file of the stage, or its default key."""
    from train_policy.recipes import load_recipe

    if recipe is None:
        return load_recipe(stage, default)
    source, colon, key = recipe.rpartition(":")
    return load_recipe(source if colon and source.endswith((".yml", ".yaml")) else stage, key if colon else recipe)


def start_from(init: Path | None, architecture: str, seed: int) -> "PolicyNetwork":
    """The network of a policy file, or a new one."""
    from mango.networks import PolicyNetwork
    from mango.policy_file import load_policy

    return PolicyNetwork(architecture, seed=seed) if init is None else load_policy(init).network


def report_stage(stage: str, out: Path, metrics: dict[str, float], curves: Any, json: str | None) -> None:
    """What a stage reached, and where its weights are."""

    def tables() -> None:
        print_table(stage, ("", ""), list(metrics.items()), caption=f"wrote {out}")

    emit(json, {"stage": stage, "path": str(out), "metrics": metrics, "curves": curves}, tables)
