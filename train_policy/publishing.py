"""A frozen policy onto the Hugging Face Hub: the file, its card, and a README.md that says what it is and what it is not.

`mango freeze --from runs/iql.safetensors --out mine.safetensors --push owner/name` makes the repository where there is none. One
repository may hold several policies: the README has a part for each, and `hf://owner/name/mine` loads one of them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mango.hub import HUB, HubPolicy, hub_library, told_in_one_line
from mango.policy_file import load_policy

LIBRARY = "mango-optim"
TAGS = ("mango-optim", "optimizer", "memory-efficient-training", "quantization", "reinforcement-learning", "pytorch")
LICENCES = (                                             # those that the Hub knows by the same name; there are more
    *("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "isc", "unlicense"),
)
HEADS = {"rung": "one rung of the ladder per layer", "knobs": "one config per layer"}
COLUMNS = {                                              # of an evaluation row: key -> heading
    "workload": "workload",
    "budget": "budget",
    "policy": "policy",
    "seeds": "seeds",
    "failed": "failed",
    "val_loss": "held-out loss",
    "gap": "gap to AdamW, %",
    "gap_low": "95 % from",
    "gap_high": "to",
    "gap_full": "gap to its rule in full precision, %",
    "gap_full_low": "95 % from",
    "gap_full_high": "to",
    "cases": "cases",
    "above": "loss above full precision, %",
    "one_fixed": "best rung for all cases",
    "one_fixed_above": "its loss above, %",
    "best_fixed_above": "of the best rung of each case, in hindsight, %",
    "within_budget": "budget held",
}
LIMITS = (
    "It was measured on what the table above names and nowhere else; a table that is missing means that nothing was measured.",
    "It decides how the optimizer's state is stored, layer by layer; the optimizer holds the byte budget whatever it decides.",
    "It reads one observation schema, one menu of choices and, if it scores rungs, one ladder; other versions refuse it by name.",
    "A good fixed format is hard to beat on small models. Compare on yours before you rely on it:",
)


def repository(name: str) -> str:
    """owner/name, checked before anything is written."""
    asked = HubPolicy.parse(name)
    if asked.revision is not None or asked.file is not None:
        raise ValueError(f"--push takes owner/name; got {name!r}")
    if hub_library().get_token() is None:
        raise ValueError(f"no token to push to {asked.repo}: set HF_TOKEN, or run `hf auth login`")
    return asked.repo


def push(path: Path, name: str, *, private: bool = False) -> tuple[str, str]:
    """Upload a frozen policy, its card and the README in one commit; returns the page of the repository and the commit.

    The repository is made where there is none. With `private` it is made private, and one that is public already is refused.
    """
    repo, policy = repository(name), load_policy(path)                     # what cannot be loaded is not published
    HubPolicy.parse(f"{HUB}{repo}/{path.stem}")                            # a name that nobody could ask for is refused
    library = hub_library()
    api = library.HfApi(library_name=LIBRARY)
    summary = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    with told_in_one_line(f"pushing {path.name} to {repo}"):
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ValueError(f"{repo} exists and is public: make it private on its settings page, or push without --private")
        others = _cards(api, repo, without=policy.name)
        readme = model_card(repo, [summary, *others])
        added = {path.name: path, f"{path.stem}.json": path.with_suffix(".json"), "README.md": readme.encode()}
        operations = [library.CommitOperationAdd(path_in_repo=to, path_or_fileobj=what) for to, what in added.items()]
        commit = api.create_commit(repo, operations, commit_message=f"Frozen policy {path.stem}")
    return f"{api.endpoint}/{repo}", str(commit.oid)


def _cards(api: Any, repo: str, *, without: str) -> list[dict[str, Any]]:
    """The cards of the other policies that the repository holds already."""
    files = set(api.list_repo_files(repo))
    names = sorted(file.removesuffix(".safetensors") for file in files if file.endswith(".safetensors"))
    found = []
    for name in names:
        if name == without or f"{name}.json" not in files:
            continue
        text = Path(api.hf_hub_download(repo, f"{name}.json")).read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("card"), dict):
            found.append({**content, "name": name})
    return found


def model_card(repo: str, summaries: list[dict[str, Any]]) -> str:
    """The README.md of a repository from its policies' cards, the newest first: Markdown below what the Hub indexes (YAML)."""
    front = {**_licence(summaries), "library_name": LIBRARY, "tags": list(TAGS)}
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())  # JSON is YAML
    several = len(summaries) > 1
    parts = [_part(f"{HUB}{repo}" + (f"/{one['name']}" if several else ""), one) for one in summaries]
    title = f"# {_cell(repo)}\n\nFrozen policies for MANGO, an optimizer that keeps its state inside a hard byte budget."
    return f"---\n{head}\n---\n\n{title}\n\n" + "\n\n".join(parts) + "\n"


def _part(spec: str, summary: Mapping[str, Any]) -> str:
    facts = told(summary["card"])
    blocks = [
        f"## {_cell(summary['name'])}",
        _cell(facts.get("description") or ""),
        f'```python\nfrom mango import MANGO                                    # pip install "{LIBRARY}[hub]"\n\n'
        f'optimizer = MANGO(model.named_parameters(), policy="{spec}", memory_budget=0.25)\n```',
        "### What it is\n\n" + _table(("", ""), _identity(summary, facts)),
        "### How it was made\n\n" + _table(("", ""), _making(facts)),
        "### Evaluation\n\n" + _evaluation(facts),
        "### Limits\n\n" + "\n".join(f"- {limit}" for limit in (*_listed(facts.get("limits")), *LIMITS))
        + f"\n  `mango evaluate --policy {spec} --policy fixed --workload my_module:my_function --seeds 3`.",
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block)


def told(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says, and what the card of the checkpoint below it says where it is silent."""
    below = card.get("checkpoint")
    said = {key: value for key, value in card.items() if value not in (None, "", [], {}) and key != "checkpoint"}
    return {**(told(below) if isinstance(below, Mapping) else {}), **said}


def _identity(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("decides", HEADS.get(str(summary.get("head")))),
        ("network", _joined(summary.get("architecture"))),
        ("parameters", summary.get("parameters")),
        ("ladder", _joined(summary.get("ladder"))),
        ("observation schema", summary.get("schema_hash")),
        ("menus, version", summary.get("knobs_version")),
        ("sha256 of the file", summary.get("file_sha256")),
        ("licence", facts.get("licence")),
        ("reading it", "parses safetensors and JSON and runs no code from it"),
    ]


def _making(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    recorded = facts.get("made")
    made = recorded if isinstance(recorded, Mapping) else {}
    return [
        ("trained on", _joined(facts.get("trained_on"))),
        ("stage", facts.get("stage")),
        ("digest of the training data", facts.get("training_data_digest") or "not recorded"),
        ("seed", facts.get("seed")),
        ("commit", made.get("commit") or "not recorded"),
        ("command", made.get("command")),
        ("date", made.get("date")),
        ("hardware", _joined(made.get("hardware"))),
        ("versions", _joined(made.get("versions"))),
    ]


def _evaluation(facts: Mapping[str, Any]) -> str:
    rows = [row for row in _listed(facts.get("evaluation")) if isinstance(row, Mapping)]
    verdicts = "\n".join(f"- {_cell(verdict)}" for verdict in _listed(facts.get("verdicts")))
    if not rows:
        return verdicts or "None is in its card: nothing is known about how good it is."
    shown = {key: heading for key, heading in COLUMNS.items() if any(key in row for row in rows)}
    table = _table(tuple(shown.values()), [tuple(row.get(key) for key in shown) for row in rows])
    note = "Held-out loss beside full precision on the same seeds; the budget is a fraction of AdamW's state."
    return "\n\n".join(part for part in (note, table, verdicts) if part)


def _licence(summaries: list[dict[str, Any]]) -> dict[str, str]:
    """As the Hub has it: one of its identifiers, or "other" with a name."""
    names = sorted({str(told(one["card"]).get("licence", "unknown")).strip() for one in summaries})
    if len(names) == 1 and names[0].lower() in (*LICENCES, "unknown"):
        return {"license": names[0].lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", " ".join(names).lower()).strip("-") or "other"}


def _joined(value: Any) -> str:
    """A list, or a dict's keys with their values, on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return ", ".join(map(str, _listed(value)))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Markdown; of a table without headings the rows that say nothing are left out."""
    body = [row for row in rows if any(columns) or row[1] not in (None, "")]
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (columns, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _cell(value: Any) -> str:
    """A value as Markdown text on one line: cards are free text, and no part of one becomes a table's border, a link or HTML."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\|<>\[\]`*])", r"\\\1", " ".join(text.split()))
