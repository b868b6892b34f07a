"""Write the measured results into the README, docs/universal.md and docs/results.md, from files that programs wrote.

    python -m experiments.readme_table [--demo demo.json] [--results benchmarks/results] [--check]

The demo's rows go between two markers in README.md, tables of `experiments.transfer` between those that name them,
`<!-- transfer policies:begin -->`; the tables of every `benchmarks/results/*.json` make docs/results.md. `--check` changes
nothing and fails where one of them differs.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.transfer_tables import transfer_tables

ROOT = Path(__file__).resolve().parent.parent
STAMP = ("args", "hardware", "versions", "targets")      # of a benchmark's file: no tables
LONG = ("cells", "headroom", "ladder", "muon_formats", "rates", "runs", "shadows")  # files and tables that are too long
TITLE = """# Measured results

Written by `python -m experiments.readme_table` from benchmarks/results, whose files carry what it takes to repeat them.
"""
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PLACE = re.compile(r"(<!-- (transfer\w*) (\w+):begin -->\n).*?(<!-- \2 \3:end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "benchmarks" / "results" / "demo.json", help="JSON of mango demo")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the benchmarks' JSON")
    parser.add_argument("--check", action="store_true", help="fail where the README is not what it would be")
    args = parser.parse_args()
    readme, universal, results = ROOT / "README.md", ROOT / "docs" / "universal.md", ROOT / "docs" / "results.md"
    texts = {
        readme: filled(with_transfer(readme.read_text(encoding="utf-8"), args.results), "\n".join(demo_lines(args.demo))),
        universal: with_transfer(universal.read_text(encoding="utf-8"), args.results),
        results: "\n".join([TITLE, *benchmark_lines(args.results)]),
    }
    for path, text in texts.items():
        if not args.check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            return fail(f"{path.name} is not up to date: run python -m experiments.readme_table")
    return 0


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


def filled(text: str, table: str) -> str:
    """The text with the table between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README needs {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def with_transfer(text: str, folder: Path) -> str:
    """The text with the tables of `experiments.transfer` between the markers that name a file and a table."""

    def table_of(place: re.Match[str]) -> str:
        begin, stem, name, end = place.groups()
        return begin + "\n".join(transfer_tables(folder / f"{stem}.json")[name]) + "\n" + end

    return PLACE.sub(table_of, text)


def demo_lines(path: Path) -> Iterator[str]:
    """The demo's summary per workload and budget: AdamW, the learned policy, the heuristics, and of the fixed rungs the best."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    yield from provenance(content["about"])
    yield ""
    yield "| workload | budget | policy | bytes held | held-out loss | gap to AdamW | 95 % interval |"
    yield "|---|---|---|---:|---:|---:|---|"
    for row in shown(content["summary"]):
        interval = "" if row["gap_low"] is None else f"{row['gap_low']:+.1f} .. {row['gap_high']:+.1f} %"
        yield (
            f"| {row['workload']} | {budget(row)} | {row['policy']} | {row['state_bytes_peak']:,} | {row['val_loss']:.4f} "
            f"| {row['gap']:+.1f} % | {interval} |"
        )
    yield ""
    yield from (f"- {line}" for line in content.get("verdicts", []))
    yield ""


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a loss, by workload and budget, the best loss first; of fixed rungs only the best."""
    done = sorted((row for row in rows if row["val_loss"] is not None), key=lambda r: (r["workload"], r["budget"], r["val_loss"]))
    kept: list[dict[str, Any]] = []
    for row in done:
        place = (row["workload"], row["budget"])
        fixed = row["policy"].startswith("fixed:")
        if not fixed or not any(k["policy"].startswith("fixed:") and (k["workload"], k["budget"]) == place for k in kept):
            kept.append({**row, "policy": f"{row['policy']} (best fixed)"} if fixed else row)
    return kept


def budget(row: dict[str, Any]) -> str:
    return "none" if row["policy"] == "adamw" else f"{row['budget']} ({row['budget_bytes']:,} B)"


def benchmark_lines(folder: Path) -> Iterator[str]:
    """Every table in the files of the benchmarks: beside the stamp of `benchmarks/record.py`, lists of rows, or one row."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "command" not in content:
            continue
        yield f"## {path.stem}"
        yield ""
        yield from provenance(content)
        yield ""
        if path.stem in LONG:
            yield f"One row per case: [{path.name}](../benchmarks/results/{path.name})."
            yield ""
            continue
        for name, rows in content.items():
            listed = [rows] if isinstance(rows, dict) else rows
            if name not in STAMP + LONG and isinstance(listed, list) and listed and isinstance(listed[0], dict):
                yield from table(name, listed)


def table(name: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows as markdown under their name."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    heads = [column.replace("_", " ") for column in columns]
    if name != "results":
        yield f"{name.capitalize()}:"
        yield ""
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(columns)
    yield from (f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows)
    yield ""


def cell(value: Any) -> str:
    """A value of a table; a median with its quartiles, or its extremes, as "1.04 [1.00, 1.08]"."""
    if isinstance(value, dict) and ({"median", "quartiles"} <= set(value) or {"median", "min", "max"} <= set(value)):
        low, high = value["quartiles"] if "quartiles" in value else (value["min"], value["max"])
        return f"{value['median']:.3g} [{low:.3g}, {high:.3g}]"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(cell(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def provenance(about: dict[str, Any]) -> Iterator[str]:
    """One line: command, hardware, commit, date; `about` is what `train_policy.provenance` or `benchmarks.record` wrote."""
    hardware = about.get("hardware", {})
    machine = ", ".join(str(part) for part in (hardware.get("cpu"), hardware.get("gpu")) if part)
    commit, changed, _ = (about.get("commit") or "unknown").partition("+")
    where = f"{machine}, {hardware.get('cores', '?')} cores"
    yield f"`{about.get('command', '?')}`, {where}, commit {commit[:10]}{changed}, {about.get('date', '')[:10]}"


if __name__ == "__main__":
    sys.exit(main())
