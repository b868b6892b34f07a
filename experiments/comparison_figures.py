"""The figures of a comparison as PNG: radar, training curves, memory, trade-off, compression. Nothing to run by itself."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
RADAR = {                                                # column -> name of the axis; of each the least is best
    "val_loss": "loss",
    "state_bytes_per_param": "state bytes",
    "peak_bytes_per_param": "peak memory",
    "step_time_ratio": "step time",
    "steps_to_target": "steps to target",
}
COLOURS = 20                                             # of the map "tab20"; line styles tell more methods apart


def draw(folder: Path, lines: Sequence[Line], runs: Sequence[Line]) -> list[Path]:
    """Write the five figures, each with a panel per domain; nothing where no method finished."""
    done = [line for line in lines if line.get("val_loss") is not None]
    if not done:
        return []
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figures need matplotlib: pip install "mango-optim[train]"') from error
    domains = list(dict.fromkeys(line["domain"] for line in done))
    methods = list(dict.fromkeys(line["method"] for line in done))
    paths = []
    for name, (panel, projection) in FIGURES.items():
        figure = Figure(figsize=(6.5 * len(domains), 6), layout="constrained")
        FigureCanvasAgg(figure)
        for i, domain in enumerate(domains):
            axes = figure.add_subplot(1, len(domains), i + 1, projection=projection)
            axes.set_title(domain)
            mine = [line for line in done if line["domain"] == domain]
            panel(axes, mine, [row for row in runs if row["domain"] == domain and row["status"] == "ok"], style_of(methods))
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
        aside = folder / f"{name}.tmp.png"
        figure.savefig(aside, dpi=110)
        paths.append(aside.replace(folder / f"{name}.png"))
    return paths


def style_of(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour per method, the same in every figure, and a line style per twenty of them."""
    from matplotlib import colormaps

    colours = colormaps["tab20"]
    lines = ("-", "--", ":")
    return {name: {"color": colours(i % COLOURS), "linestyle": lines[i // COLOURS % 3]} for i, name in enumerate(methods)}


def radar(axes: Any, lines: Sequence[Line], runs: Sequence[Line], styles: Mapping[str, dict[str, Any]]) -> None:
    """On every axis the best method has 1 and another the best's share of its own; what is not known is 0."""
    known = [name for name in RADAR if any(line.get(name) for line in lines)]
    best = {name: min(line[name] for line in lines if line.get(name)) for name in known}
    angles = [2 * math.pi * i / max(1, len(known)) for i in range(len(known))]
    for line in lines:
        values = [best[name] / line[name] if line.get(name) else 0.0 for name in known]
        axes.plot([*angles, *angles[:1]], [*values, *values[:1]], label=line["method"], linewidth=1, **styles[line["method"]])
    axes.set_xticks(angles, [RADAR[name] for name in known])
    axes.set_ylim(0, 1.05)


def training_curves(axes: Any, lines: Sequence[Line], runs: Sequence[Line], styles: Mapping[str, dict[str, Any]]) -> None:
    """The training loss of each method's first seed."""
    for line in lines:
        mine = next((row for row in runs if row["policy"] == line["method"]), None)
        if mine is not None:
            steps = [(i + 1) * mine["points_every"] for i in range(len(mine["loss_curve"]))]
            axes.plot(steps, mine["loss_curve"], label=line["method"], linewidth=1, **styles[line["method"]])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    axes.set_yscale("log")


def bars(axes: Any, lines: Sequence[Line], column: str, styles: Mapping[str, dict[str, Any]]) -> None:
    """Horizontal bars of a column, the smallest on top."""
    known = sorted((line for line in lines if line.get(column)), key=lambda line: -float(line[column]))
    for i, line in enumerate(known):
        axes.barh(i, line[column], color=styles[line["method"]]["color"], label=line["method"])
    axes.set_yticks(range(len(known)), [line["method"] for line in known], fontsize=8)


def memory(axes: Any, lines: Sequence[Line], runs: Sequence[Line], styles: Mapping[str, dict[str, Any]]) -> None:
    """Bytes of state per parameter."""
    bars(axes, lines, "state_bytes_per_param", styles)
    axes.set_xlabel("bytes of optimizer state per parameter")


def compression(axes: Any, lines: Sequence[Line], runs: Sequence[Line], styles: Mapping[str, dict[str, Any]]) -> None:
    """How many times smaller than AdamW's state."""
    bars(axes, lines, "compression_ratio", styles)
    axes.set_xscale("log")
    axes.set_xlabel("AdamW's state bytes over the method's")


def trade_off(axes: Any, lines: Sequence[Line], runs: Sequence[Line], styles: Mapping[str, dict[str, Any]]) -> None:
    """Loss against bytes of state; hollow where another method is at least as good in both (dominated)."""
    front = pareto(lines)
    for line in lines:
        at, error = (line["state_bytes_per_param"], line["val_loss"]), line.get("val_loss_se") or 0.0
        colour, inside = styles[line["method"]]["color"], None if line["method"] in front else "none"
        axes.errorbar(*at, yerr=error, fmt="o", label=line["method"], color=colour, markerfacecolor=inside)
        shade = "black" if inside is None else "grey"
        axes.annotate(line["method"], at, xytext=(4, 3), textcoords="offset points", fontsize=6, color=shade)
    best = sorted((line["state_bytes_per_param"], line["val_loss"]) for line in lines if line["method"] in front)
    axes.plot(*zip(*best, strict=True), color="#94a3b8", linestyle=":")
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_yscale("log")
    axes.set_xlabel("bytes of optimizer state per parameter")
    axes.set_ylabel("held-out loss")


def pareto(lines: Sequence[Line]) -> set[str]:
    """The methods that no other beats in both state bytes and loss."""
    found = [(float(line["state_bytes_per_param"]), float(line["val_loss"]), str(line["method"])) for line in lines]
    return {own[2] for own in found if not any(o[0] <= own[0] and o[1] <= own[1] and o[:2] != own[:2] for o in found)}


Panel = Callable[[Any, Sequence[Line], Sequence[Line], Mapping[str, dict[str, Any]]], None]
FIGURES: dict[str, tuple[Panel, str | None]] = {
    "radar": (radar, "polar"),
    "training_curves": (training_curves, None),
    "memory": (memory, None),
    "trade_off": (trade_off, None),
    "compression": (compression, None),
}
