"""Promises about reports and studies: every number is of a real run, and the page needs nothing else."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from train_policy.report import report_file
from train_policy.report_data import Curve, Result, points, read_result, traces, write_csv
from train_policy.report_page import page
from train_policy.run_study import Args, chosen, run_method, run_study, summary
from train_policy.study_methods import COMPARED, methods


def row(policy: str, nbytes: int, loss: float | None, *, seed: int = 0, budget: int | None = 1000, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "workload": "w", "seed": seed, "budget_bytes": budget, "state_bytes_peak": nbytes, "val_loss": loss,
            "val_loss_adamw": 1.0, "decisions": [["full", "m8v8"], ["m4v4", "m8v8"]], **more}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("study")
    args = Args(mode="comparative", workload="digits_mlp", policy="water-filling", steps=30, seeds=2)
    return run_study(args, folder, report=lambda line: None)


def test_a_comparative_study_runs_all_five_methods_for_real_and_writes_json_and_csv(
    study: tuple[Path, list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    path, rows, failures = study
    assert failures == []
    assert {r["policy"] for r in rows} == set(COMPARED) and len(rows) == 2 * len(COMPARED)
    assert all(r["loss_curve"][-1] < r["loss_curve"][0] for r in rows)
    written = json.loads(path.read_text())
    assert written["rows"] == json.loads(json.dumps(rows)) and written["about"]["hardware"]["cores"] >= 1
    with path.with_suffix(".csv").open() as file:
        assert [r["policy"] for r in csv.DictReader(file)] == [r["policy"] for r in rows]
    assert {line["policy"]: line["seeds"] for line in summary(rows)} == dict.fromkeys(COMPARED, 2)


def test_adam_and_mango_without_a_limit_train_the_same_model_in_a_study() -> None:
    args = Args(workload="digits_mlp", steps=20)
    adamw, full = (run_method(args, methods()[name], seed=3) for name in ("adamw", "mango_full"))
    assert full["val_loss"] == pytest.approx(adamw["val_loss"], rel=1e-5)
    assert full["state_bytes_peak"] >= adamw["adamw_bytes"] == adamw["state_bytes_peak"] - 4 * 6   # float32 counts of steps


def test_a_method_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    args = Args(mode="comparative", workload="digits_mlp", policy="no-such-policy", steps=5)
    _, rows, failures = run_study(args, tmp_path, report=lambda line: None)
    assert [f["policy"] for f in failures] == ["mango_learned"] and "no-such-policy" in failures[0]["error"]
    assert {r["policy"] for r in rows} == set(COMPARED) - {"mango_learned"}


def test_an_ablation_has_a_row_per_component_that_is_switched_off() -> None:
    names = [m.name for m in chosen(Args(mode="ablation", policy="water-filling", steps=10))]
    assert names[0] == "mango_learned" and len(names) == len(set(names)) == 7
    assert {"without_learning", "without_a_policy", "without_adaptation", "without_a_budget", "mango_g4_no_ef"} <= set(names)


def test_a_study_names_what_is_wrong_with_its_arguments() -> None:
    with pytest.raises(ValueError, match="unknown mode 'both'; known: single"):
        Args(mode="both")
    with pytest.raises(ValueError, match="unknown optimizer 'adamm'; known: adam, adamw"):
        chosen(Args(optimizer="adamm"))
    with pytest.raises(ValueError, match="steps or epochs, not both"):
        Args(steps=1, epochs=1)


class Links(HTMLParser):
    """Collects what a page would fetch: sources and links outside its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href")]


def test_the_report_is_one_page_that_fetches_nothing_and_a_csv(
    study: tuple[Path, list[dict[str, Any]], list[dict[str, Any]]], tmp_path: Path
) -> None:
    html, table = report_file(study[0], tmp_path / "report.html")
    text = html.read_text()
    links = Links()
    links.feed(text)
    assert links.found == []
    for heading in ("Loss against bytes", "Decisions: mango_adaptive", "State bytes over time", "Training loss on digits_mlp"):
        assert heading in text
    assert "held it at every step" in text
    drawn = re.findall(r"^draw\('figure\d+', |draw\('figure(\d+)', ", text)
    assert len(drawn) >= 5
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(study[1])
    assert not list(tmp_path.glob("*.tmp"))


def test_a_report_shows_names_as_text_and_never_runs_them() -> None:
    evil = "</script><script>alert(1)</script>"
    text = page(Result(evil, [row(evil, 10, 1.0)]), [(evil, json.dumps({"name": evil}))])
    assert "<script>alert" not in text


def test_the_report_says_when_a_budget_was_broken() -> None:
    assert "1 of 2 runs went over their budget" in page(Result("t", [row("a", 10, 1.0), row("b", 1001, 1.0)]), [])


def test_dominated_points_are_those_that_another_beats_in_bytes_and_loss() -> None:
    rows = [row("small", 10, 2.0), row("good", 20, 1.0), row("bad", 30, 1.5), row("none", 5, None)]
    found = {p.policy: p for p in points(rows)}
    assert {name: p.dominated for name, p in found.items()} == {"small": False, "good": False, "bad": True}
    assert found["good"].loss == 1.0 and math.isnan(found["good"].error)


def test_a_result_file_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    wrong = {"{": "no JSON", '{"a": 1}': "no rows", '[{"policy": "x"}]': "row 0 .* lacks workload", "[]": "no rows"}
    for content, message in wrong.items():
        bad.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_result(bad)


def test_what_was_summed_over_seeds_is_a_table_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"rows": [row("a", 10, 1.0)], "summary": [{"policy": "a", "val_loss_se": 0.25}]}))
    page, _ = report_file(path, tmp_path / "page.html")
    assert "Over all seeds" in page.read_text() and "<th>val_loss_se</th>" in page.read_text()


def test_curves_stages_and_failures_of_a_result_survive_reading(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    curve = {"group": "cloning", "name": "loss", "x": [1, 2], "y": [3.0, 2.0]}
    stages = [{"stage": "collect", "seconds": 1.5}]
    path.write_text(json.dumps({"rows": [row("a", 10, 1.0)], "curves": [curve], "stages": stages}))
    result = read_result(path)
    assert result.failures == [] and result.verdicts == []
    assert result.curves == [Curve("cloning", "loss", [1, 2], [3.0, 2.0])] and result.stages[0]["seconds"] == 1.5
    assert [t.rungs for t in traces(result.rows)] == [[["full", "m8v8"], ["m4v4", "m8v8"]]]


def test_the_learned_policy_is_drawn_before_heuristics_and_constants() -> None:
    named = [row(policy, 10, 1.0) for policy in ("fixed:m8v8", "water-filling", "mine")]
    assert [trace.label.split()[0] for trace in traces(named)] == ["mine", "fixed:m8v8", "water-filling"]


def test_csv_rows_leave_out_nested_columns(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", [row("a", 10, 1.0), row("b", 11, None, note="x")])
    first, second, third = path.read_text().splitlines()
    assert first == "policy,workload,seed,budget_bytes,state_bytes_peak,val_loss,val_loss_adamw,note"
    assert (second, third) == ("a,w,0,1000,10,1.0,1.0,", "b,w,0,1000,11,,1.0,x")
