"""Promises of the demo's options (row J8): all compared in one go, a low-rank config among them, mistakes told in a line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mango.config import LADDER, CompressionConfig
from mango.formats import SIGNED
from train_policy import demo as stages
from train_policy.cli import app
from train_policy.demo import DemoArgs
from train_policy.evaluate import policy_of, spec_name


def demo(*words: str) -> Any:
    return CliRunner().invoke(app, ["demo", *words])


def test_j8_everything_is_compared_with_a_low_rank_config_in_nf4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "QUICK", replace(stages.QUICK, budgets=(0.25,), evaluated=1))
    out = tmp_path / "demo.json"
    words = ("--quick", "--workers", "1", "--out", str(tmp_path / "demo"), "--json", str(out))
    done = demo("--compare-all", "--rank", "4", "--bits-p", "4", "--bits-q", "8", "--use-nf4", *words)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    rows = {(row["policy"], row["budget"]): row for row in result["rows"]}
    policies = {policy for policy, _ in rows}
    assert {"adamw", "demo", "water-filling", "random", "fixed:r4p4q8v0", *(f"fixed:{name}" for name in LADDER.names)} <= policies
    low, full = rows["fixed:r4p4q8v0", 0.25], next(row for row in result["rows"] if row["policy"] == "adamw")
    assert low["val_loss"] is not None and low["within_budget"] and low["state_bytes_peak"] < 0.25 * full["state_bytes_peak"]
    assert [stage["stage"] for stage in result["stages"]] == ["evaluate beside AdamW, fixed rungs and heuristics"]
    assert not result["failures"] and (tmp_path / "demo" / "report.html").is_file()
    assert not list((tmp_path / "demo").glob("*.safetensors"))                 # nothing was learned


def test_bits_of_the_factors_are_nf4_where_they_are_4() -> None:
    assert SIGNED[4].name == "nf4"
    assert DemoArgs(rank=8, use_nf4=True).low_rank == CompressionConfig(rank=8, factor_bits_p=4, factor_bits_q=4, variance_bits=0)
    assert DemoArgs(rank=8).low_rank == CompressionConfig(rank=8, factor_bits_p=8, factor_bits_q=8, variance_bits=0)
    assert DemoArgs().low_rank is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits-p", "4"], "give its --rank too"),
        (["--rank", "3"], "rank=3 is not on the menu"),
        (["--rank", "0"], "--rank 0 must be at least 1"),
        (["--rank", "4", "--bits-q", "5"], "factor_bits_q=5 is not on the menu"),
        (["--rank", "4", "--bits-p", "8", "--bits-q", "16", "--use-nf4"], "neither --bits-p 8 nor --bits-q 16 has"),
    ],
)
def test_what_cannot_be_stored_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    failed = demo(*words, "--out", str(tmp_path / "demo"))
    assert failed.exit_code == 2 and message in failed.stderr and failed.stderr.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_a_config_is_found_by_its_name() -> None:
    others = [CompressionConfig(gradient_bits=4, sparsity=0.9, momentum_bits=8), CompressionConfig(rank=1, gradient_bits=8)]
    for config in (*LADDER, *others):
        assert CompressionConfig.from_name(config.name).name == config.name
        assert spec_name(f"fixed:{config.name}") == f"fixed:{config.name}"
    assert all(CompressionConfig.from_name(rung.name) == rung for rung in LADDER)
    assert policy_of("fixed:0").config == LADDER[0] and policy_of("fixed:r1p8q8v0").config.rank == 1
    for name in ("", "m8", "r4", "best"):
        with pytest.raises(ValueError, match="no name of a config"):
            CompressionConfig.from_name(name)
    with pytest.raises(ValueError, match="unknown rung 'best'; the ladder has"):
        policy_of("fixed:best")
