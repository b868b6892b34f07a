"""`mango run`: studies, from options, from a configuration in YAML, or from both."""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from train_policy.cli_support import (
    JsonOption,
    LogLevelOption,
    RuleOption,
    SeedOption,
    StepsOption,
    at_level,
    check_rule,
    console,
    emit,
    parse_budget,
    print_table,
    say,
)

if TYPE_CHECKING:
    from train_policy.run_study import Args

PART_FAILED = 1                                          # exit code where some runs failed and the others are there
CONTROLS = ("mode", "config", "print_config", "validate_config", "json")  # options that no configuration holds
EITHER = {"steps": "epochs", "epochs": "steps"}          # giving one takes the place of the other in a configuration


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a configuration of `mango run` holds beside the study's own `Args`."""

    gpu_memory_fraction: float | None = None             # share of the GPU's memory that may be used
    log_level: str = "info"                              # what stderr tells
    data_dir: str | None = None                          # folder of data sets, in place of MANGO_DATA
    output_dir: str = "runs/study"                       # where study.json and study.csv go
    trace_every: int | None = None                       # optimizer steps per JSON of times and memory, in output_dir/trace
    trace_files: int = 20                                # of these JSONs per run; older ones are deleted
    profile: str | None = None                           # folder of Chrome traces, three steps of each run


def run(
    context: typer.Context,
    mode: Annotated[str, typer.Argument(help="single, comparative or ablation")],
    config: Annotated[str | None, typer.Option(help="FILE.yml with a mapping per mode; study: the shipped one")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="print the whole configuration, run nothing")] = False,
    validate_config: Annotated[bool, typer.Option("--validate-config", help="could it run? run nothing")] = False,
    optimizer: Annotated[str, typer.Option(help="of a single study: adamw, sgd, mango_learned, ...")] = "adamw",
    workload: Annotated[str, typer.Option(help="a name or module:function")] = "digits_mlp",
    policy: Annotated[str, typer.Option(help="the frozen policy of mango_learned")] = "demo",
    budget: Annotated[str, typer.Option(help="of MANGO: a fraction of AdamW's state, a size, or bytes")] = "0.25",
    steps: StepsOption = None,
    epochs: Annotated[float | None, typer.Option(help="instead of steps")] = None,
    batch_size: Annotated[int | None, typer.Option(help="default: the workload's own")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="default: the workload's own; SGD's is 25 times that")] = None,
    rule: RuleOption = "adamw",
    interval: Annotated[int, typer.Option(help="optimizer steps per decision")] = 10,
    seeds: Annotated[int, typer.Option(help="runs per method")] = 1,
    seed: SeedOption = 0,
    target: Annotated[float | None, typer.Option(help="report the first step at which --metric reaches it")] = None,
    metric: Annotated[str, typer.Option(help="loss (training's), or held out: val_loss, val_accuracy, bleu, ...")] = "loss",
    evaluate_every: Annotated[int | None, typer.Option(help="steps between held-out measures; default: the end")] = None,
    online: Annotated[bool | None, typer.Option(help="mango_learned learns by PPO meanwhile; default: in a single study")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda with --gpu-memory-fraction, else cpu")] = None,
    gpu_memory_fraction: Annotated[float | None, typer.Option(help="share of the GPU's memory that may be used")] = None,
    log_level: LogLevelOption = "info",
    data_dir: Annotated[Path | None, typer.Option(help="folder of data sets, in place of MANGO_DATA")] = None,
    output_dir: Annotated[Path, typer.Option(help="where study.json and study.csv go")] = Path("runs/study"),
    trace_every: Annotated[int | None, typer.Option(help="steps per file of times and memory in OUTPUT_DIR/trace")] = None,
    trace_files: Annotated[int, typer.Option(help="of these files per run; older ones are deleted")] = 20,
    profile: Annotated[Path | None, typer.Option(help="folder of Chrome traces, three steps of each run")] = None,
    json: JsonOption = None,
) -> None:
    """Train one optimizer, five against each other, or MANGO with components switched off. Writes JSON and CSV."""
    args, around = configured(mode, config, given_options(context))
    if around.data_dir is not None:
        if not Path(around.data_dir).is_dir():
            raise ValueError(f"--data-dir {around.data_dir} is no folder")
        os.environ["MANGO_DATA"] = around.data_dir
    report = at_level(around.log_level, "mango.study")
    from train_policy.run_study import check_study, run_study, summary
    from train_policy.throughput import check_device
    from train_policy.trace import Tracing

    tracing = Tracing(around.trace_every, around.trace_files, around.profile)
    check_rule(args.rule)
    check_device(args.device, around.gpu_memory_fraction)
    if validate_config:
        check_study(args)
        say(f"the configuration of {mode} is valid")
    if print_config:
        print(as_yaml(args, around), end="")
    if print_config or validate_config:
        return
    folder = Path(around.output_dir)
    path, rows, failures = run_study(args, folder, report=report, failed=say, tracing=tracing)
    lines = summary(rows)

    def tables() -> None:
        optional = ("best_val_loss", "val_accuracy", "best_val_accuracy", "val_perplexity",
                    "samples_per_second", "tokens_per_second", "seconds_to_target")  # fmt: skip
        known = [name for name in optional if any(line[name] is not None and line[name] == line[name] for line in lines)]
        columns = ("policy", "val_loss", "val_loss_se", *known, "state_bytes_peak", "adamw_bytes", "seconds", "what")
        if lines:
            title = f"{mode} on {args.workload}, {args.seeds} seeds"
            print_table(title, columns, [[line[c] for c in columns] for line in lines])
        console.print(f"wrote {path} and {path.with_suffix('.csv')}")

    emit(json, {"rows": rows, "summary": lines, "failures": failures}, tables)
    if failures:
        say(f"{len(failures)} of {len(rows) + len(failures)} runs failed")
        raise typer.Exit(PART_FAILED)


def given_options(context: typer.Context) -> dict[str, Any]:
    """The options that stand on the command line: what they say is above what a configuration says."""
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name not in CONTROLS and source is not None and source.name == "COMMANDLINE":
            given[name] = str(value) if isinstance(value, Path) else value
    return given


def configured(mode: str, config: str | None, given: dict[str, Any]) -> tuple["Args", Surroundings]:
    """The study to run: defaults, under the configuration's mapping for `mode`, under the options that were given."""
    from train_policy.recipes import from_recipe, load_recipe
    from train_policy.run_study import Args, check_mode

    check_mode(mode)
    recipe = {} if config is None else load_recipe(config, mode)
    for name in given:
        recipe.pop(EITHER.get(name, ""), None)
    recipe |= given
    around, study = [{f.name for f in fields(kind)} for kind in (Surroundings, Args)]
    unknown = sorted(set(map(str, recipe)) - around - (study - {"mode"}))
    if unknown:
        known = ", ".join([f.name for f in fields(Args) if f.name != "mode"] + [f.name for f in fields(Surroundings)])
        raise ValueError(f"unknown settings {unknown} of {mode}; known: {known}")
    if isinstance(recipe.get("budget"), str):
        recipe["budget"] = parse_budget(recipe["budget"])
    place = from_recipe(Surroundings, {name: value for name, value in recipe.items() if name in around})
    if recipe.get("device") is None:
        recipe["device"] = "cpu" if place.gpu_memory_fraction is None else "cuda"
    return from_recipe(Args, {name: value for name, value in recipe.items() if name in study} | {"mode": mode}), place


def as_yaml(args: "Args", around: Surroundings) -> str:
    """A configuration that `--config` reads back as what it was."""
    import yaml

    settings = {name: value for name, value in (asdict(args) | asdict(around)).items() if name != "mode"}
    return str(yaml.safe_dump({args.mode: settings}, sort_keys=False, allow_unicode=True))
