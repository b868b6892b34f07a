"""What every `mango` command shares: one-line errors, exit codes, JSON written aside, progress on stderr."""

import functools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

FAILED = 2                                               # exit code of an error that is told in one line
INTERRUPTED = 130                                        # exit code after Ctrl-C, as shells have it
DEBUG_FLAG = "MANGO_DEBUG"

# A pipe or a file has no width: tables there are as wide as they need to be, for terminals rich knows it.
console = Console(width=None if sys.stdout.isatty() else 160)
err_console = Console(stderr=True)

JsonOption = Annotated[str | None, typer.Option("--json", help="write the result as JSON to this file; -: to stdout, no tables")]
SeedOption = Annotated[int, typer.Option("--seed", help="everything random follows from it")]
RuleOption = Annotated[str, typer.Option("--rule", help="base rule of the optimizer: adamw, adam, sgd, lion or muon")]
ScheduleOption = Annotated[str, typer.Option("--schedule", help="of the learning rate: constant, linear or cosine")]
ClipOption = Annotated[float | None, typer.Option("--max-grad-norm", help="gradients are clipped at that norm; default: not")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="optimizer steps of a run; default: the workload's own")]

LogLevelOption = Annotated[str, typer.Option("--log-level", help="what stderr tells: debug, info, warning or error")]
LOG_LEVELS = ("debug", "info", "warning", "error")

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, with its type where the message alone says too little.

    >>> one_line(ValueError("no such rung;\\n  known: full"))
    'no such rung; known: full'
    >>> one_line(KeyError("rung"))
    "KeyError: 'rung'"
    """
    text = " ".join(str(error).split())
    told = isinstance(error, ValueError | TypeError | ImportError | OSError | RuntimeError) and text
    return text if told else f"{type(error).__name__}: {text}".rstrip(": ")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a command raises into one line on stderr and an exit code; with `--debug` the traceback stays."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except typer.Exit:                               # it is a RuntimeError
            raise
        except KeyboardInterrupt as interruption:
            say(f"mango: interrupted: {interruption}" if str(interruption) else "mango: interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:                          # the reader of a pipe went away, `mango ... | head`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes stdout once more on its way out
            raise typer.Exit(FAILED) from None
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            if os.environ.get(DEBUG_FLAG):
                raise
            print(f"mango: error: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(FAILED) from None

    return run


def write_json(path: Path, content: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file. Non-finite numbers become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def emit(json_option: str | None, content: Any, tables: Callable[[], None]) -> None:
    """Show a command's result: as tables, and as JSON in a file, or as JSON on stdout alone."""
    if json_option == "-":
        print(json.dumps(plain(content), indent=1, allow_nan=False))
        return
    tables()
    if json_option is not None:
        write_json(Path(json_option), content)
        say(f"wrote {json_option}")


def say(text: str) -> None:
    """A line about what happens, on stderr, so that stdout stays the result."""
    err_console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Said(logging.Handler):
    """Log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def at_level(level: str, logger: str) -> Callable[[str], None]:
    """Let `logger` say what is at least of this level; returns how a result is reported: from info down, else not at all."""
    if level not in LOG_LEVELS:
        raise ValueError(f"unknown log level {level!r}; known: {', '.join(LOG_LEVELS)}")
    log = logging.getLogger(logger)
    log.handlers, log.propagate = [_Said()], False
    log.setLevel(level.upper())
    return log.info


def plain(value: Any) -> Any:
    """`value` as JSON has it: strings, finite numbers, lists, dicts with string keys.

    >>> plain({"a": (1, float("nan")), 2: Path("x")})
    {'a': [1, None], '2': 'x'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):                         # tensors, arrays and their scalars
        return plain(value.tolist())
    return str(value)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str | None = None) -> None:
    """A table on stdout; numbers are set to the right."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    body = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    for i, column in enumerate(columns):
        right = all(row[i][:1].isdigit() or row[i][:1] in "+-" for row in body if row[i])
        table.add_column(column, justify="right" if right else "left", no_wrap=i == 0)
    for row in body:
        table.add_row(*(escape(text) for text in row))
    console.print(table)
    if caption:
        console.print(caption, highlight=False, markup=False)


def number(value: Any) -> str:
    """A number in at most a few digits.

    >>> number(1234567), number(0.123456), number(None)
    ('1,234,567', '0.1235', '-')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse_budget(text: str) -> float | int | str:
    """A budget as the optimizer takes it: a fraction of AdamW's state, bytes, or a size.

    >>> parse_budget("0.25"), parse_budget("65536"), parse_budget("64KiB")
    (0.25, 65536, '64KiB')
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_list(text: str, kind: Callable[[str], T], what: str) -> list[T]:
    """Comma-separated values of one kind.

    >>> parse_list("0.1, 0.2", float, "budgets")
    [0.1, 0.2]
    """
    try:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{what}: {text!r} is not a comma-separated list ({one_line(error)})") from error
    if not found:
        raise ValueError(f"{what}: the list is empty")
    return found


def check_rule(rule: str) -> None:
    """One line for a rule that there is not."""
    from mango.rules import CHOICES

    if rule not in CHOICES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(CHOICES)}")
