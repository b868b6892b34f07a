"""What a comparison found: a line per domain and method, as text, CSV, LaTeX, Markdown and a page. Nothing to run by itself."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.record import find_run, mean_error
from experiments.comparison_runs import Args, place_of
from train_policy.cli_support import write_json
from train_policy.evaluation_rows import percent_above
from train_policy.gate import bootstrap_interval

Line = dict[str, Any]
REFERENCE = "adamw"                                      # what gaps, times and targets are relative to
TARGET_SLACK = 1.05                                      # the target of a domain is AdamW's last training loss, times this


def summary(
    domain: str, methods: Sequence[str], found: Mapping[str, Sequence[Line]], missing: Mapping[tuple[str, str], str], args: Args
) -> list[Line]:
    """Losses, gaps to AdamW paired by seed with their 95 % interval, bytes, times; the best first, what failed last."""
    steps = place_of(domain, args).steps
    mine = [row for row in found["runs"] if row["domain"] == domain and row["steps"] == steps]
    usual = {row["seed"]: row for row in mine if row["policy"] == REFERENCE and row["status"] == "ok"}
    ends = [fmean(row["loss_curve"][-max(1, len(row["loss_curve"]) // 10) :]) for row in usual.values()]
    target = args.target or (TARGET_SLACK * fmean(ends) if ends else None)
    lines = []
    for method in methods:
        line: Line = {"domain": domain, "method": method, "status": "ok", "seeds": 0}
        runs = [row for row in mine if row["policy"] == method]
        done = [row for row in runs if row["status"] == "ok"]
        bad = [row for row in runs if row["status"] != "ok"]
        if (domain, method) in missing:
            line |= {"status": "unavailable", "message": missing[domain, method]}
        elif bad:
            line |= {"status": bad[0]["status"], "message": f"{len(bad)} of {len(runs)} seeds: {bad[0]['message']}"}
        rate = find_run(found["rates"], {"domain": domain, "policy": method, "steps": steps, "rates": args.rates})
        line |= {"lr": rate["lr"], "rate_at_edge": rate["at_edge"]} if rate else {}
        if done:
            line |= _measured(done, usual, target)
        costs = find_run(found["costs"], {"domain": domain, "policy": method, "device": args.device, "status": "ok"})
        line |= {name: value for name, value in (costs or {}).items() if "per" in name or "ratio" in name}
        lines.append(line)
    return sorted(lines, key=lambda line: line.get("val_loss", math.inf))


def _measured(done: Sequence[Line], usual: dict[int, Line], target: float | None) -> Line:
    losses = [row["val_loss"] for row in done]
    gaps = [percent_above(row["val_loss"], usual[row["seed"]]["val_loss"]) for row in done if row["seed"] in usual]
    paired = [gap for gap in gaps if gap is not None]
    low, high = bootstrap_interval(paired) if len(paired) > 1 else (None, None)
    reached = [step for row in done if target and (step := first_below(row, target)) is not None]
    accuracy = [row["val_accuracy"] for row in done if "val_accuracy" in row]
    return {
        "seeds": len(done), "val_loss": fmean(losses),
        "val_loss_se": mean_error(losses),
        "gap_percent": fmean(paired) if paired else None, "gap_low": low, "gap_high": high,
        "val_accuracy": fmean(accuracy) if accuracy else None,
        "perplexity": None if accuracy else math.exp(min(fmean(losses), 50.0)),
        "state_bytes_per_param": max(row["state_bytes_peak"] / row["parameters"] for row in done),
        "compression_ratio": min(row["adamw_bytes"] / max(1, row["state_bytes_peak"]) for row in done),
        "target": target, "steps_to_target": fmean(reached) if len(reached) == len(done) else None,
        "steps_per_second": median(row["steps_per_second"] for row in done),
    }  # fmt: skip


def first_below(row: Line, target: float) -> int | None:
    """The step at which a run's smoothed training loss first reached a target; None where it never did."""
    curve = row["loss_curve"]
    smooth = [fmean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
    return next(((i + 1) * row["points_every"] for i, loss in enumerate(smooth) if loss <= target), None)


def table(lines: Sequence[Line]) -> str:
    text = []
    for domain in dict.fromkeys(line["domain"] for line in lines):
        names = (("loss", 8), ("gap %", 7), ("95 % interval", 17), ("B/param", 8), ("peak B/p", 9), ("time", 6), ("rate", 8))
        text.append(f"\n{domain:18s} " + " ".join(f"{name:>{width}s}" for name, width in names))
        for line in (line for line in lines if line["domain"] == domain):
            text.append(_row(line))
    return "\n".join(text)


def _row(line: Line) -> str:
    if "val_loss" not in line:
        return f"{line['method']:18s} {line['status']}: {line.get('message', 'nothing was run')}"

    def shown(name: str, form: str, width: int) -> str:
        value = line.get(name)
        return f"{'-' if value is None else format(value, form):>{width}s}"

    between = "" if line["gap_low"] is None else f"[{line['gap_low']:+.2f}, {line['gap_high']:+.2f}]"
    parts = [f"{line['method']:18s}", shown("val_loss", ".4f", 8), shown("gap_percent", "+.2f", 7), f"{between:>17s}"]
    parts += [shown("state_bytes_per_param", ".3f", 8), shown("peak_bytes_per_param", ".2f", 9)]
    parts += [shown("step_time_ratio", ".2f", 6), shown("lr", ".2g", 8)]
    return " ".join(parts) + ("" if line["status"] == "ok" else f"  {line['status']}: {line['message']}")


def columns_of(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def write_csv(path: Path, lines: Sequence[Line]) -> Path:
    """Every number of every line, unrounded; what is not known is empty."""
    aside = path.with_suffix(".tmp")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(lines))
        writer.writeheader()
        writer.writerows(lines)
    aside.replace(path)
    return path


SHOWN: dict[str, tuple[str, str]] = {                    # of the tables for readers: column -> heading, format
    "method": ("method", "s"),
    "val_loss": ("held-out loss", ".4f"),
    "val_loss_se": ("s.e.", ".4f"),
    "gap_percent": ("gap to AdamW, %", "+.2f"),
    "gap_low": ("95 % from", "+.2f"),
    "gap_high": ("to", "+.2f"),
    "val_accuracy": ("accuracy", ".3f"),
    "perplexity": ("perplexity", ".2f"),
    "state_bytes_per_param": ("state, B/param", ".3f"),
    "peak_bytes_per_param": ("peak, B/param", ".2f"),
    "step_time_ratio": ("step time / AdamW's", ".2f"),
    "step_time_ratio_se": ("s.e. of it", ".3f"),
    "steps_to_target": ("steps to target", ".0f"),
    "lr": ("rate", ".2g"),
    "status": ("status", "s"),
}


def cells(line: Line, columns: Sequence[str]) -> list[str]:
    """A line as text; what did not end well says why."""
    told = line | ({} if line["status"] == "ok" else {"status": f"{line['status']}: {line.get('message', '')}"})
    return ["-" if told.get(name) is None else format(told[name], SHOWN[name][1]) for name in columns]


def tables(lines: Sequence[Line], layout: Callable[[str, list[str], list[list[str]]], str]) -> str:
    """All domains, each with the columns that it has, one after another."""
    parts = []
    for domain in dict.fromkeys(line["domain"] for line in lines):
        mine = [line for line in lines if line["domain"] == domain]
        columns = [name for name in SHOWN if any(line.get(name) is not None for line in mine)]
        parts.append(layout(domain, [SHOWN[name][0] for name in columns], [cells(line, columns) for line in mine]))
    return "\n\n".join(parts) + "\n"


def markdown(domain: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return f"## {domain}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in lines)


def latex(domain: str, head: list[str], rows: list[list[str]]) -> str:
    """A booktabs table."""
    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (head, *rows)]
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{escaped(domain)}}}", rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ])  # fmt: skip


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    text = text.replace("\\", r"\textbackslash ")
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text


def write_tables(folder: Path, lines: Sequence[Line], runs: Sequence[Line], failures: Sequence[Line], head: Line) -> list[Path]:
    """report.json, .csv, .tex, .md, and the page comparison.html with the CSV of its runs; their paths."""
    done = [row | {"workload": f"{row['domain']}: {row['workload']}"} for row in runs if row["status"] == "ok"]
    content = {"kind": "comparison", "about": head, "summary": list(lines), "rows": done, "failures": list(failures)}
    paths = [folder / "report.json", folder / "report.csv"]
    write_json(paths[0], content)
    write_csv(paths[1], lines)
    told = f"`{head['command']}`, commit {head['commit'][:10]}, {head['hardware']['cpu']}, {head['date'][:10]}"
    for name, text in (("report.md", f"{told}\n\n{tables(lines, markdown)}"), ("report.tex", tables(lines, latex))):
        aside = folder / f"{name}.tmp"
        aside.write_text(text, encoding="utf-8")
        paths.append(aside.replace(folder / name))
    if done:
        from train_policy.report import report_file

        paths += report_file(paths[0], folder / "comparison.html")
    return paths
