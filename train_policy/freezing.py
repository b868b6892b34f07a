"""From a checkpoint to a frozen policy with its card: what it was trained on, by which commit, how it was measured."""

import json
from pathlib import Path
from typing import Any

from mango.policy_file import freeze, load_policy
from train_policy.provenance import about

PICKLES = (".zip", ".d3")
SUMMARY = ("policy", "workload", "budget", "seeds", "failed", "unfit", "val_loss", "gap", "gap_low", "gap_high",
           "gap_full", "gap_full_low", "gap_full_high", "within_budget")  # fmt: skip


def freeze_checkpoint(
    source: Path,
    out: Path,
    *,
    evaluation: Path | None = None,
    data: Path | None = None,
    description: str = "",
    licence: str = "MIT",
    trust_pickle: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Write the frozen policy and its card; returns the path and the card.

    `source`: a checkpoint of ours (a policy file already), or an SB3 `.zip` / d3rlpy `.d3`, which is a pickle and is read only
    with `trust_pickle=True`. What an own checkpoint says of itself stays in the card.
    """
    card: dict[str, Any] = {"description": description, "licence": licence, "made": about()}
    if source.suffix in PICKLES:
        from train_policy.transfer import convert

        network, head = convert(source, trust_pickle=trust_pickle)
        card["checkpoint"] = {"kind": f"converted from a {source.suffix} file"}
    else:
        policy = load_policy(source)
        network, head = policy.network, policy.head
        card = {**card, "checkpoint": policy.card}
    if data is not None:
        card["training_data_digest"] = data_digest(data)
    if evaluation is not None:
        card["evaluation"] = evaluation_summary(evaluation)
    return freeze(network, out, head=head, card=card), card


def data_digest(store: Path) -> str:
    from mango_env.store import read_metadata

    return str(read_metadata(store)["mango"]["digest"])


def evaluation_summary(path: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation by policy, workload and budget, as the card shows them."""
    from train_policy.evaluate import EvaluationRow, summary

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["rows"] if isinstance(content, dict) else content
        known = [EvaluationRow(**{k: v for k, v in row.items() if k in EvaluationRow.__dataclass_fields__}) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no rows of mango evaluate: {error}") from error
    return [{name: getattr(row, name) for name in SUMMARY} for row in summary(known)]
