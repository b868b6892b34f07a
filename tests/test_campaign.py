"""Collection campaigns: what is drawn, that they go on where they were, what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mango_env.dataset import TrajectoryDataset
from mango_env.workloads import split_options
from mango_env.workloads.base import HELD_OUT, WORKLOADS
from trajectories.campaign import CONFIG, Campaign, facts_of, main, read_campaign, run_campaign

SMALL: dict[str, Any] = {
    "seed": 3,
    "runs": 4,
    "horizon": [10, 20],
    "interval": [5],
    "budgets": [0.25, 0.5],
    "lr_factor": {"low": 0.5, "high": 2.0},
    "rules": {"adamw": {"weight": 1}, "lion": {"weight": 1, "lr": 0.1}},
    "schedules": {"constant": 1, "cosine": 1},
    "behaviours": {"random": 1, "fixed": 1, "explore:water-filling": 1},
    "families": {"digits_mlp": {"weight": 1, "options": {"width": [32, 48], "depth": [1, 2]}}},
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "campaign.yml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def small(folder: Path, **changes: Any) -> Campaign:
    return read_campaign(written(folder, **changes))


def test_a_run_is_a_function_of_the_ranges_and_its_number(tmp_path: Path) -> None:
    campaign = small(tmp_path)
    jobs = [campaign.job(n) for n in range(30)]
    assert jobs == [small(tmp_path, runs=99).job(n) for n in range(30)] and campaign.digest == small(tmp_path, runs=99).digest
    assert len({job.run_id for job in jobs}) == 30
    few = [small(tmp_path, seeds=2).job(n) for n in range(30)]
    assert len({job.run_id for job in few}) == 30 and {job.seed for job in few} == {0, 1}     # the same run is decided anew
    assert {job.run_id for job in jobs}.isdisjoint(small(tmp_path, seed=4).job(n).run_id for n in range(30))


def test_draws_are_within_their_ranges_and_all_of_them_come(tmp_path: Path) -> None:
    campaign = small(tmp_path)
    jobs = [campaign.job(n) for n in range(60)]
    assert {split_options(str(job.workload))[0] for job in jobs} == {"digits_mlp"}
    options = [split_options(str(job.workload))[1] for job in jobs]
    assert {(o["width"], o["depth"]) for o in options} == {(32, 1), (32, 2), (48, 1), (48, 2)}
    assert {job.args.schedule for job in jobs} == {"constant", "cosine"} and {job.args.horizon for job in jobs} == {10, 20}
    assert {str(job.behaviour).split(":")[0] for job in jobs} == {"random", "fixed", "explore"}
    for job in jobs:
        usual, least = facts_of(str(job.workload), job.args.rule)
        assert float(job.budget) >= least
        factor = job.args.lr / usual / (0.1 if job.args.rule == "lion" else 1.0)  # type: ignore[operator]
        assert 0.49 < factor < 2.01


def test_a_family_may_have_a_rate_of_its_own_for_a_rule(tmp_path: Path) -> None:
    families = {"digits_mlp": {"weight": 1, "lr": {"lion": 0.03125}}}
    jobs = [small(tmp_path, families=families, lr_factor={"low": 1, "high": 1}).job(n) for n in range(20)]
    assert {job.args.lr for job in jobs if job.args.rule == "lion"} == {0.0312}
    assert {job.args.lr for job in jobs if job.args.rule == "adamw"} == {facts_of("digits_mlp", "adamw")[0]}


def test_a_campaign_goes_on_and_can_be_extended(tmp_path: Path) -> None:
    root = tmp_path / "store"
    first = run_campaign(small(tmp_path, runs=2), root)
    again = run_campaign(small(tmp_path, runs=2), root)
    more = run_campaign(small(tmp_path), root)
    assert (first.recorded, again.recorded, again.skipped, more.recorded, more.skipped) == (2, 0, 2, 2, 2)
    assert len({facts["run_id"] for facts in TrajectoryDataset(root).attributes}) == 4
    told = json.loads((root / "campaign.json").read_text())
    assert told["digest"] == small(tmp_path).digest and told["summary"]["recorded"] == 2
    assert "water-filling" in (root / "card.md").read_text() or "random" in (root / "card.md").read_text()


def test_the_shipped_campaign_names_only_what_there_is() -> None:
    campaign = read_campaign()
    assert CONFIG.is_file() and campaign.runs >= 1000
    assert set(campaign.families) <= set(WORKLOADS) - set(HELD_OUT)


def test_the_shipped_campaign_draws_the_same_runs_however_many(mango_data: Path) -> None:
    assert read_campaign().job(0) == read_campaign(runs=5).job(0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"families": {"fashion_cnn": {"weight": 1}}}, "held out"),
        ({"families": {"fashion_cnn+width=8": {"weight": 1}}}, "held out"),
        ({"families": {}}, "families is empty"),
        ({"families": {"digits_mlp": {"wieght": 1}}}, "wieght"),
        ({"families": {"digits_mlp": {"weight": 1, "lr": {"adamw": -1.0}}}}, "learning rates must be positive"),
        ({"families": {"digits_mlp": {"weight": 1, "lr": {"adagrad": 1e-3}}}}, "unknown rules \\['adagrad'\\]"),
        ({"rules": {"adagrad": {"weight": 1}}}, "unknown rules \\['adagrad'\\]"),
        ({"schedules": {"step": 1}}, "unknown schedule 'step'"),
        ({"behaviours": {"nobody": 1}}, "unknown policy 'nobody'"),
        ({"behaviours": {"random": -1}}, "weights must be positive"),
        ({"lr_factor": {"low": 2, "high": 1}}, "low=2"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_campaign_that_cannot_be_is_refused_in_one_line(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        small(tmp_path, **changes)


def test_the_program_ends_with_2_for_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("- a list", "a: [", "{}"):
        (tmp_path / "bad.yml").write_text(text)
        with pytest.raises(SystemExit) as ended:
            main(["--root", str(tmp_path / "store"), "--config", str(tmp_path / "bad.yml")])
        assert ended.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


def test_the_program_records_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(tmp_path / "store"), "--config", str(written(tmp_path)), "--runs", "1"])
    assert capsys.readouterr().out.startswith("1 runs recorded, 0 were there, 0 diverged")
