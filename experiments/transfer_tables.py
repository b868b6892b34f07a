"""Tables of `experiments.transfer` as Markdown, for the README and docs/universal.md. `experiments.readme_table` writes them."""

import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

Totals = dict[tuple[float, str], dict[str, Any]]          # by budget and policy
POLICY, HEURISTIC = "universal", "water-filling"
POLICIES = (POLICY, "universal_tree", "bc", "iql", "ppo", HEURISTIC, "sensitivity", "error-constrained", "adaptive", "scheduled",
            "random")  # fmt: skip
SHORT = (POLICY, HEURISTIC, "sensitivity", "error-constrained", "random")
RULES = ("muon", "adamw")


@cache
def transfer_tables(path: Path) -> dict[str, list[str]]:
    """The tables of a file by name: "budgets", "policies", "short", and "muon" and "adamw" case by case."""
    content = json.loads(path.read_text(encoding="utf-8"))
    totals = {(row["budget"], row["policy"]): row for row in content["totals"]}
    sizes = sorted({row["budget"] for row in content["totals"]})
    return {
        "budgets": list(budgets_table(totals, sizes)),
        "policies": list(policies_table(totals, sizes)),
        "short": list(policies_table(totals, sizes, SHORT)),
        **{rule: list(cases_table(content["cells"], rule, sizes)) for rule in RULES},
    }


def budgets_table(totals: Totals, sizes: list[float]) -> Iterator[str]:
    """What the policy loses at each budget, beside the heuristic and fixed rungs."""
    fixed = ("one fixed rung for all cases", "best rung of each case, in hindsight")
    heads = ("less than one fixed rung by", "its mean gap", HEURISTIC, *fixed)
    yield f"| budget (of AdamW's bytes) | `{POLICY}` | {' | '.join(heads)} |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for size in sizes:
        row, other = totals[size, POLICY], totals.get((size, HEURISTIC))
        saved = f"{row['saved']:.2f} [{row['saved_low']:+.2f}, {row['saved_high']:+.2f}]"
        yield (
            f"| {share(size)} | **{row['above']:.2f}** | {saved} | {row['gap_percent']:+.2f} | {above(other)} "
            f"| {row['one_fixed_above']:.2f}, {row['one_fixed']} | {row['best_fixed_above']:.2f} |"
        )


def policies_table(totals: Totals, sizes: list[float], policies: Sequence[str] = POLICIES) -> Iterator[str]:
    """What policies lose at each budget; last, one fixed rung for all cases."""
    yield f"| policy | {' | '.join(map(share, sizes))} |"
    yield "|---|" + "---:|" * len(sizes)
    for policy in policies:
        found = [totals.get((size, policy)) for size in sizes]
        if any(found):
            bold = "**" if policy == POLICY else ""
            name = f"`{policy}`" if policy.startswith(POLICY) else policy
            yield f"| {name} | {' | '.join(f'{bold}{above(row)}{bold}' for row in found)} |"
    fixed = [totals[size, POLICY] for size in sizes]
    yield f"| one fixed rung | {' | '.join('{one_fixed_above:.2f}, {one_fixed}'.format(**row) for row in fixed)} |"


def cases_table(cells: list[dict[str, Any]], rule: str, sizes: list[float]) -> Iterator[str]:
    """Workload by workload: the policy's gap, and that of the best rung of equal bytes in hindsight."""
    mine = {(cell["workload"], cell["budget"]): cell for cell in cells if (cell["rule"], cell["policy"]) == (rule, POLICY)}
    yield f"| workload | {' | '.join(map(share, sizes))} |"
    yield "|---|" + "---|" * len(sizes)
    for workload in dict.fromkeys(cell["workload"] for cell in cells):
        yield f"| {workload} | {' | '.join(case(mine.get((workload, size))) for size in sizes)} |"


def case(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "impossible"
    return f"{cell['gap_percent']:+.1f} / {cell['best_fixed_gap_percent']:+.1f} ({cell['best_fixed']})"


def above(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['above']:.2f}"


def share(size: float) -> str:
    """A budget as a fraction.

    >>> share(0.0625)
    '1/16'
    """
    return str(Fraction(size))
