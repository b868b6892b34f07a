"""The HTML of a report: one page with its own style and script, tables sorted by a click."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from train_policy.report_data import Result, Row, columns_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #0f172a; background: #fff; }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e2e8f0; text-align: left; white-space: nowrap; }
th { cursor: pointer; user-select: none; background: #f8fafc; position: sticky; top: 0; }
th::after { content: " \\2195"; color: #94a3b8; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } .over { color: #b91c1c; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13px; color: #475569; }
dd { margin: 0; overflow-wrap: anywhere; } dt { font-weight: 600; }
"""

SORTING = """
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, down = head.dataset.down !== "1";
  head.dataset.down = down ? "1" : "0";
  const text = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const value = row => text(row) === "" || isNaN(text(row)) ? text(row) : Number(text(row));
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  [...body.rows].sort((a, b) => (down ? 1 : -1) * order(value(a), value(b))).forEach(row => body.append(row));
}));
"""


def page(result: Result, figures: Sequence[tuple[str, str]]) -> str:
    """The whole page; `figures` are (heading, plotly JSON)."""
    from plotly.offline import get_plotlyjs

    parts = [f"<h1>{escape(result.title)}</h1>", verdict(result.rows)]
    parts += [section("Verdict", "".join(f"<p>{escape(line)}</p>" for line in result.verdicts))] if result.verdicts else []
    parts += [section("Over all seeds", f'<div class="wide">{table(result.summary)}</div>')] if result.summary else []
    parts += [section("Stages", table(result.stages))] if result.stages else []
    parts += [section("Gates", table(result.gates))] if result.gates else []
    parts += [section("Failed runs", table(result.failures))] if result.failures else []
    scripts = []
    for i, (heading, figure) in enumerate(figures):
        parts.append(section(heading, f'<div id="figure{i}"></div>'))
        scripts.append(f"draw('figure{i}', {in_script(figure)});")
    parts.append(section("Every run", f'<div class="wide">{table(result.rows)}</div>'))
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in facts_of(result.about))
    parts += [section("Where this comes from", f"<dl>{facts}</dl>")] if facts else []
    draw = "function draw(id, f) { Plotly.newPlot(id, f.data, f.layout, {responsive: true, displaylogo: false}); }"
    return "\n".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(result.title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>",
        *parts,
        f"<script>{draw}\n{''.join(scripts)}\n{SORTING}</script></body></html>",
        "",
    ])  # fmt: skip


def verdict(rows: Sequence[Row]) -> str:
    """One paragraph: how many runs there were and whether every budget held at every step."""
    done = [row for row in rows if row["state_bytes_peak"] is not None]
    limited = [row for row in done if row.get("budget_bytes")]
    over = [row for row in limited if row["state_bytes_peak"] > row["budget_bytes"]]
    runs = f"{len(done)} runs on {', '.join(dict.fromkeys(row['workload'] for row in rows))}."
    if len(done) < len(rows):
        runs += f" {len(rows) - len(done)} more could not be: a fixed config that does not fit its budget."
    if not limited:
        return f"<p>{escape(runs)} None had a budget.</p>"
    if over:
        return f'<p>{escape(runs)} <span class="over">{len(over)} of {len(limited)} runs went over their budget.</span></p>'
    return f"<p>{escape(runs)} All {len(limited)} runs with a budget held it at every step.</p>"


def section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def table(rows: Sequence[Row]) -> str:
    columns = columns_of(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(cell(shown(row.get(name))) for name in columns)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def shown(value: Any) -> Any:
    """Lists and dicts inside a row are told by their length."""
    return f"({len(value)})" if isinstance(value, list | dict) else value


def in_script(text: str) -> str:
    """JSON as it may stand inside a script element."""
    return text.replace("<", "\\u003c")


def facts_of(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Provenance as short lines."""
    lines = []
    for key, value in about.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, Mapping) else str(value)
        lines.append((key, text))
    return lines


def cell(value: Any) -> str:
    """A table cell's HTML: numbers short, with the exact value for sorting.

    >>> cell(0.123456)
    '<td data-v="0.123456" class="n">0.1235</td>'
    """
    if value is None:
        return '<td data-v="">-</td>'
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, int | float):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        return f'<td data-v="{value}" class="n">{text}</td>'
    return f"<td>{escape(str(value))}</td>"
