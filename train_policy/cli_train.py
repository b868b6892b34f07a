"""`mango collect`, `mango train` and `mango sweep`: from training runs to trajectories, from trajectories to a policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from train_policy.cli_support import (
    ClipOption,
    JsonOption,
    RuleOption,
    ScheduleOption,
    SeedOption,
    StepsOption,
    check_rule,
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

train_app = typer.Typer(no_args_is_help=True, help="Learn a policy: bc, offline, ppo.")

DataOption = Annotated[Path, typer.Option("--data", help="a trajectory store")]
OutOption = Annotated[Path, typer.Option("--out", help="the checkpoint, a policy file; rewritten while training")]
InitOption = Annotated[Path | None, typer.Option("--init", help="the policy file to start from; default: a new network")]
HeadOption = Annotated[str, typer.Option("--head", help="what decides when deployed: rung or knobs")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="FILE.yml:KEY, or a KEY of the shipped recipes")]
BEHAVIOURS = "who decides: random, random-knobs, fixed (every rung), fixed:RUNG, a heuristic, oracle, explore:SPEC, a policy"
SetOption = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a hyper-parameter; repeatable")]


def collect(
    workload: Annotated[list[str], typer.Option(help="a name or module:function; repeatable")],
    policy: Annotated[list[str], typer.Option(help=BEHAVIOURS)],
    root: Annotated[Path, typer.Option(help="the store; runs that it has are not repeated")],
    budgets: Annotated[str, typer.Option(help="comma-separated: fractions of AdamW's state, 64KiB, bytes")] = "0.125,0.25",
    seeds: Annotated[int, typer.Option(help="runs per workload, policy and budget")] = 3,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    interval: Annotated[int, typer.Option(help="optimizer steps per decision")] = 10,
    lr: Annotated[float | None, typer.Option(help="learning rate; default: the workload's own, or 2e-3")] = None,
    rule: RuleOption = "adamw",
    schedule: ScheduleOption = "constant",
    max_grad_norm: ClipOption = None,
    workers: Annotated[int, typer.Option(help="processes")] = 1,
    batch: Annotated[int, typer.Option(help="runs side by side in a process, for workloads where it pays; 16 to 32")] = 1,
    json: JsonOption = None,
) -> None:
    """Record training runs as episodes: every workload under every policy, budget and seed."""
    from train_policy.collect import CollectArgs
    from train_policy.collect import collect as record

    check_rule(rule)
    args = CollectArgs(
        horizon=steps, interval=interval, lr=lr, rule=rule, schedule=schedule, max_grad_norm=max_grad_norm, seed=seed
    )
    sizes, draws = parse_list(budgets, parse_budget, "--budgets"), list(range(seed, seed + seeds))
    done = record(workload, policy, draws, sizes, root, args, workers=workers, batch=batch, progress=err_console.is_terminal)

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


@train_app.command()
@guarded
def bc(
    data: DataOption,
    out: OutOption,
    init: InitOption = None,
    architecture: Annotated[str, typer.Option(help="of a new network: mlp, lstm or tinyformer; a tree comes by --init")] = "mlp",
    policies: Annotated[str, typer.Option(help="comma-separated behaviours to imitate; default: all")] = "",
    top: Annotated[float | None, typer.Option(help="best share of runs to imitate; default: 0.25, or all of named ones")] = None,
    epochs: Annotated[int | None, typer.Option(help="at most")] = None,
    head: HeadOption = "rung",
    recipe: RecipeOption = None,
    change: SetOption = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Behaviour cloning: imitate the best recorded decisions. Ctrl-C keeps the best weights so far."""
    from mango_env.cache import build_cache
    from train_policy.bc import BcArgs, train
    from train_policy.recipes import from_recipe

    named = tuple(name for name in policies.split(",") if name) or None
    chosen = {"policies": named, "top": top, "epochs": epochs, "head": head, "seed": seed, **settings(change)}
    args = from_recipe(BcArgs, recipe_of("bc", recipe, architecture), **chosen)
    network = start_from(init, architecture, seed)
    result = train(network, build_cache(data), args, checkpoint=out, progress=err_console.is_terminal)
    report_stage("Behaviour cloning", out, result.metrics, result.curves, json)


@train_app.command()
@guarded
def offline(
    data: DataOption,
    out: OutOption,
    algo: Annotated[str, typer.Option(help="iql, awr, cql, d3rlpy-discrete-cql, d3rlpy-iql, d3rlpy-td3+bc")] = "iql",
    init: InitOption = None,
    architecture: Annotated[str, typer.Option(help="of a new network: mlp, lstm or tinyformer; a tree comes by --init")] = "mlp",
    updates: Annotated[int | None, typer.Option(help="gradient steps")] = None,
    head: HeadOption = "rung",
    recipe: RecipeOption = None,
    change: SetOption = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Offline reinforcement learning: improve on what was recorded. Ctrl-C keeps the last weights."""
    from mango_env.cache import build_cache
    from train_policy.offline import ALGOS, OfflineArgs, train
    from train_policy.recipes import from_recipe

    if algo not in ALGOS:
        raise ValueError(f"unknown algorithm {algo!r}; known: {', '.join(ALGOS)}")
    chosen = {"algo": algo, "updates": updates, "head": head, "seed": seed, **settings(change)}
    args = from_recipe(OfflineArgs, recipe_of("offline", recipe, algo), **chosen)
    network = start_from(init, architecture, seed)
    result = train(network, build_cache(data), args, checkpoint=out, progress=err_console.is_terminal)
    report_stage(f"Offline: {algo}", out, result.metrics, result.curves, json)


@train_app.command()
@guarded
def ppo(
    workload: Annotated[list[str], typer.Option(help="a name or module:function; repeatable")],
    out: OutOption,
    init: InitOption = None,
    budgets: Annotated[str, typer.Option(help="comma-separated; every episode draws one")] = "0.125,0.25",
    timesteps: Annotated[int | None, typer.Option(help="decisions, counted per layer")] = None,
    runs: Annotated[int | None, typer.Option(help="training runs at once; default: one per workload")] = None,
    steps: StepsOption = None,
    interval: Annotated[int, typer.Option(help="optimizer steps per decision")] = 10,
    head: HeadOption = "rung",
    recipe: RecipeOption = None,
    change: SetOption = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Fine-tune with Stable-Baselines3's PPO on live training runs. Ctrl-C keeps the last weights."""
    from train_policy.ppo import PpoArgs, train
    from train_policy.recipes import from_recipe
    from train_policy.transfer import import_sb3

    import_sb3()
    from mango_env.layer_vec_env import LayerVecEnv

    chosen = {"total_timesteps": timesteps, "head": head, "seed": seed, **settings(change)}
    args = from_recipe(PpoArgs, recipe_of("ppo", recipe, "LayerVecEnv"), **chosen)
    network = start_from(init, "mlp", seed)
    sizes = parse_list(budgets, parse_budget, "--budgets")
    env = LayerVecEnv(workload, n_runs=runs, horizon=steps, interval=interval, memory_budget=sizes, actions=head, seed=seed)
    try:
        result = train(network, env, args, checkpoint=out, progress=err_console.is_terminal)
    finally:
        env.close()
    report_stage("PPO", out, result.metrics, result.curves, json)


def sweep(
    space: Annotated[str, typer.Argument(help="FILE.yml with spaces by trainer, or sweep: the shipped ones")],
    data: DataOption,
    trainer: Annotated[str, typer.Option(help="bc or offline:ALGO: a key of the file")] = "offline:iql",
    out: Annotated[Path, typer.Option(help="folder of sweep.json, sweep.csv and the trials' policies")] = Path("runs/sweep"),
    trials: Annotated[int | None, typer.Option(help="default: 20, or the whole grid")] = None,
    search: Annotated[str, typer.Option(help="random or grid")] = "random",
    metric: Annotated[str | None, typer.Option(help="what ranks; fqe_value: off-policy evaluation; default: agreement")] = None,
    minimise: Annotated[bool | None, typer.Option("--minimise/--maximise", help="default: losses and errors down")] = None,
    architecture: Annotated[str, typer.Option(help="of the networks: mlp, lstm or tinyformer")] = "mlp",
    recipe: RecipeOption = None,
    change: SetOption = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Search hyper-parameters of a trainer; a table ranked on held-out runs. The same command goes on after Ctrl-C."""
    from mango_env.cache import build_cache
    from train_policy.recipes import load_recipe
    from train_policy.sweep import SweepArgs, check_trainer
    from train_policy.sweep import sweep as run

    stage, _, algo = check_trainer(trainer).partition(":")
    shared = {**recipe_of(stage, recipe, algo or architecture), **settings(change)}
    args = SweepArgs(trainer, load_recipe(space, trainer), shared, architecture, trials, search, metric, minimise, seed)
    result = run(build_cache(data), args, out, report=say, progress=err_console.is_terminal)

    def tables() -> None:
        names = list(dict.fromkeys(name for row in result.rows for name in row["settings"]))
        body = [
            (
                *(str(row["rank"] or "-"), str(row["trial"]), row["metrics"].get(result.metric)),
                *(row["settings"].get(name, "") if row["settings"] else "(recipe)" for name in names),
                *(row["seconds"], row["error"]),
            )
            for row in result.rows
        ]
        title = f"{trainer} by {result.metric}, {'least' if result.minimise else 'most'} first"
        columns = ("rank", "trial", result.metric, *names, "seconds", "error")
        caption = f"wrote {result.path} and {result.path.with_suffix('.csv')}"
        print_table(title, columns, body, caption)

    emit(json, {"metric": result.metric, "trials": result.rows, "path": str(result.path)}, tables)
    if result.failed:
        say(f"{result.failed} of {len(result.rows)} trials failed")
        raise typer.Exit(1)
