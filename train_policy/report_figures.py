"""The figures of a report, as plotly JSON: loss against bytes, decisions over time, memory, learning curves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mango.config import LADDER
from train_policy.report_data import Curve, Result, Row, Trace, points, traces

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#78716c", "#0f172a")


def figures(result: Result) -> list[tuple[str, str]]:
    """Every figure as (heading, plotly JSON)."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError('the report needs plotly: pip install "mango-optim[train]"') from error
    drawn: list[tuple[str, Any]] = []
    names = dict.fromkeys([row["policy"] for row in result.rows] + [curve.name for curve in result.curves])
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for workload in dict.fromkeys(row["workload"] for row in result.rows):
        mine = [row for row in result.rows if row["workload"] == workload]
        drawn.append((f"Loss against bytes: {workload}", pareto_figure(go, mine, colours)))
    shown = traces(result.rows)
    drawn += [(f"Decisions: {trace.label}", heat_map(go, trace)) for trace in shown]
    drawn += [("State bytes against the budget", memory_figure(go, result.rows, colours))]
    held = [trace for trace in shown if trace.state_bytes]
    drawn += [("State bytes over time", bytes_over_time(go, held))] if held else []
    for group in dict.fromkeys(curve.group for curve in result.curves):
        drawn.append((group, curves_figure(go, [c for c in result.curves if c.group == group], colours)))
    return [(heading, figure.to_json()) for heading, figure in drawn]


def pareto_figure(go: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> Any:
    found = sorted(points(rows), key=lambda p: p.nbytes)
    relative = all(row.get("val_loss_adamw") for row in rows)
    figure = go.Figure()
    for policy in dict.fromkeys(p.policy for p in found):
        mine = [p for p in found if p.policy == policy]
        symbols = ["circle-open" if p.dominated else "circle" for p in mine]
        marker = {"size": 11, "color": colours[policy], "symbol": symbols}
        figure.add_scatter(
            x=[p.nbytes for p in mine],
            y=[p.loss for p in mine],
            error_y={"type": "data", "array": [0.0 if math.isnan(p.error) else p.error for p in mine], "thickness": 1},
            mode="markers",
            name=policy,
            marker=marker,
        )
    front = [p for p in found if not p.dominated]
    line = {"color": "#94a3b8", "dash": "dot", "width": 1}
    figure.add_scatter(x=[p.nbytes for p in front], y=[p.loss for p in front], mode="lines", name="Pareto front", line=line)
    figure.update_xaxes(title="peak state bytes (log)", type="log")
    figure.update_yaxes(title="held-out loss / AdamW's (log)" if relative else "held-out loss (log)", type="log")
    return styled(figure)


def heat_map(go: Any, trace: Trace) -> Any:
    names = list(LADDER.names) + sorted({n for row in trace.rungs for n in row} - set(LADDER.names))
    z = [[names.index(trace.rungs[t][i]) for t in range(len(trace.rungs))] for i in range(len(trace.layers))]
    text = [[trace.rungs[t][i] for t in range(len(trace.rungs))] for i in range(len(trace.layers))]
    bar = {"title": "rung", "tickvals": list(range(len(names))), "ticktext": names}
    figure = go.Figure(go.Heatmap(z=z, text=text, y=trace.layers, zmin=0, zmax=len(names) - 1, colorscale="Viridis", colorbar=bar,
                                  hovertemplate="%{y}, decision %{x}: %{text}<extra></extra>"))  # fmt: skip
    figure.update_xaxes(title="decision")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return styled(figure, height=max(260, 90 + 24 * len(trace.layers)))


def memory_figure(go: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> Any:
    limited = [row for row in rows if row.get("budget_bytes") and row["state_bytes_peak"] is not None]
    figure = go.Figure()
    for policy in dict.fromkeys(row["policy"] for row in limited):
        mine = [row for row in limited if row["policy"] == policy]
        text = [f"{row['workload']}, seed {row['seed']}" for row in mine]
        used = [row["state_bytes_peak"] / row["budget_bytes"] for row in mine]
        figure.add_scatter(x=[row["budget_bytes"] for row in mine], y=used, text=text, mode="markers", name=policy,
                           marker={"color": colours[policy], "size": 8})  # fmt: skip
    figure.add_hline(y=1, line={"color": "#dc2626", "width": 1}, annotation_text="the budget")
    figure.update_xaxes(title="budget, bytes (log)", type="log")
    figure.update_yaxes(title="peak state bytes / budget", rangemode="tozero")
    return styled(figure)


def bytes_over_time(go: Any, shown: Sequence[Trace]) -> Any:
    figure = go.Figure()
    for i, trace in enumerate(shown):
        colour, x = COLOURS[i % len(COLOURS)], list(range(len(trace.state_bytes)))
        figure.add_scatter(x=x, y=trace.state_bytes, mode="lines", name=trace.label, line={"color": colour})
        if trace.budget:
            line = {"color": colour, "dash": "dot", "width": 1}
            figure.add_scatter(x=x, y=[trace.budget] * len(x), mode="lines", line=line, showlegend=False, hoverinfo="skip")
    figure.update_xaxes(title="decision")
    figure.update_yaxes(title="state bytes held (dotted: budget)", rangemode="tozero")
    return styled(figure)


def curves_figure(go: Any, curves: Sequence[Curve], colours: Mapping[str, str]) -> Any:
    figure = go.Figure()
    for curve in curves:
        line = {"color": colours[curve.name]}
        figure.add_scatter(x=list(curve.x), y=list(curve.y), mode="lines", name=curve.name, line=line)
    figure.update_xaxes(title=curves[0].x_title)
    figure.update_yaxes(title=curves[0].y_title)
    return styled(figure)


def styled(figure: Any, height: int = 420) -> Any:
    font = {"family": "system-ui, sans-serif", "size": 13}
    figure.update_layout(template="plotly_white", height=height, margin={"l": 70, "r": 20, "t": 20, "b": 50}, font=font)
    return figure
