"""The demo's last table: learned policies beside AdamW, every fixed rung and the heuristics, and where they stand."""

from collections.abc import Sequence

from train_policy.cli_support import console, print_table
from train_policy.evaluate import EvaluationRow, best_fixed, summary
from train_policy.gate import bootstrap_interval

Rows = Sequence[EvaluationRow]


def verdicts(rows: Rows, learned: str) -> list[str]:
    """Where a learned policy stands against the best fixed rung that fits the same bytes, per workload and budget."""
    cases = dict.fromkeys((row.workload, row.budget) for row in rows if row.policy == learned)
    return [f"{learned} on {work} at {size} of AdamW's bytes: {_verdict(rows, learned, work, size)}" for work, size in cases]


def _verdict(rows: Rows, learned: str, workload: str, budget: float | int | str) -> str:
    rung = best_fixed(rows, workload, budget)
    if rung is None:
        return "no fixed rung fits, this does"
    mine, theirs = (_losses(rows, name, workload, budget) for name in (learned, rung))
    gains = [100 * (mine[seed] - theirs[seed]) / theirs[seed] for seed in mine if seed in theirs]
    if len(gains) < 2:
        return f"too few finished runs to compare with {rung}"
    low, high = bootstrap_interval(gains)
    verdict = "better" if high < 0 else "worse" if low > 0 else "no difference is proven"
    mean = sum(gains) / len(gains)
    return f"held-out loss {mean:+.1f} % [{low:+.1f}, {high:+.1f}] against the best fixed rung, {rung[6:]}: {verdict}"


def _losses(rows: Rows, policy: str, workload: str, budget: float | int | str) -> dict[int, float]:
    """Held-out loss by seed of the runs that have one."""
    mine = [row for row in rows if (row.policy, row.workload, row.budget) == (policy, workload, budget)]
    return {row.seed: row.val_loss for row in mine if row.val_loss is not None}


def show(rows: Rows, lines: Sequence[str]) -> None:
    """The comparison as a table, best loss first, then the verdicts."""
    columns = ("policy", "workload", "budget", "peak bytes", "held", "held-out loss", "gap %", "95 % interval", "step time")
    body = []
    for row in summary(rows):
        if row.val_loss is None or row.state_bytes_peak is None:
            continue
        interval = "" if row.gap_low is None else f"{row.gap_low:+.1f} .. {row.gap_high:+.1f}"
        gap = "-" if row.gap is None else f"{row.gap:+.1f}"
        asked = "none" if row.policy == "adamw" else f"{row.budget} = {row.budget_bytes:,} B"
        held = "always" if row.within_budget else "BROKEN"
        where = (row.policy, row.workload, asked, row.state_bytes_peak, held)
        body.append((*where, row.val_loss, gap, interval, row.step_time_ratio))
    body.sort(key=lambda line: (line[1], line[2], line[5]))
    caption = "held: the budget, after every step; gap: held-out loss above AdamW's; step time: over AdamW's.\n"
    print_table("Under a byte budget, mean over seeds", columns, body, f"{caption}Fixed rungs that do not fit are left out.")
    console.print("Learned policies against the best fixed rung of equal bytes:")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False)
