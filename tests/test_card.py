"""Promises of the dataset card: its numbers are those of the data, and it says what the data lacks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mango.features import FEATURE_INDEX, KINDS
from mango_env.card import PHASES, card_of, write_card
from mango_env.curate import compact
from mango_env.dataset import TrajectoryDataset, info
from mango_env.episode import Episode
from mango_env.reward import Reward
from tests.made_episodes import make_episode, record, writer
from train_policy.cli import app

FIXTURE = Path(__file__).resolve().parent.parent / "trajectories" / "fixture"
PROGRESS = FEATURE_INDEX["progress"]


def changed(episode: Episode, progress: list[float] | None = None, rung: int | None = None, **attributes: Any) -> Episode:
    """The same episode with other attributes, steadily rising progress unless told otherwise, and one rung throughout."""
    observations, infos = episode.observations.copy(), dict(episode.infos)
    observations[:, PROGRESS] = np.linspace(0, 1, len(observations)) if progress is None else progress
    if rung is not None:
        infos["rung"] = np.full(len(episode), rung, np.int16)
    return Episode(
        observations, episode.actions, episode.rewards, episode.terminations, episode.truncations, infos,
        {**episode.attributes, **attributes},
    )  # fmt: skip


def store(root: Path, episodes: list[Episode]) -> Path:
    with writer(root, reward=episodes[0].reward) as w:
        for episode in episodes:
            w.add(episode)
    return root


def test_the_fixtures_card_has_its_numbers() -> None:
    card, known = card_of(FIXTURE), info(FIXTURE)
    assert (card.episodes, card.runs, card.transitions, card.bytes) == (72, 24, 432, known["bytes"])
    assert (card.digest, card.schema_hash, card.knobs_version) == (known["digest"], known["schema_hash"], known["knobs_version"])
    assert card.counts["workload"] == {"digits_cnn": (12, 36), "digits_mlp": (12, 36)}
    assert card.counts["behaviour"] == {"fixed-m8v8": (8, 24), "random": (8, 24), "water-filling": (8, 24)}
    assert card.counts["layer kind"] == {"conv": (12, 24), "head": (24, 24), "linear": (12, 24)}
    assert card.counts["schedule"] == {"constant": (24, 72)}                 # it was recorded before there were schedules
    assert card.counts["budget"] == {"about 1/8 of AdamW's bytes": (12, 36), "about 1/2 of AdamW's bytes": (12, 36)}
    assert (card.diverged_runs, card.truncated_runs, card.truncated) == (0, 0, 0)
    assert list(card.returns) == ["fixed-m8v8", "water-filling", "random"]    # best first
    assert sum(spread.n * spread.mean for spread in card.returns.values()) / 72 == pytest.approx(known["returns"]["mean"])
    assert "no budget near 1/16, 1/4, 1 of AdamW's bytes" in card.warnings
    assert "linear: never: m0v0, r32p4q4v0, m6v8" in card.warnings


def test_coverage_and_spreads_are_what_a_slow_count_finds() -> None:
    card, dataset = card_of(FIXTURE), TrajectoryDataset(FIXTURE)
    counted = {kind: np.zeros((3, len(card.ladder)), int) for kind in card.coverage}
    for episode in dataset:
        assert len(episode) == 6                                             # so that two decisions are a third
        for t, rung in enumerate(episode.infos["rung"]):
            counted[episode.attributes["layer_kind"]][t // 2, rung] += 1
    assert {kind: table.tolist() for kind, table in counted.items()} == card.coverage
    for name, spread in card.returns.items():
        mine = [episode for episode in dataset if episode.attributes["policy"] == name]
        returns = np.array([episode.returns for episode in mine])
        expected = (returns.mean(), returns.std(ddof=1), returns.min(), returns.max(), returns.mean() / 6)
        assert (spread.mean, spread.sd, spread.min, spread.max, spread.per_decision) == pytest.approx(expected)
        for term, value in card.components[name].items():
            assert value == pytest.approx(np.concatenate([episode.infos[term] for episode in mine]).mean(dtype=float))


def test_many_stores_say_the_same_in_one_file(tmp_path: Path) -> None:
    record(tmp_path / "s", runs=3)
    whole, packed = card_of(tmp_path / "s"), card_of(compact(tmp_path / "s", tmp_path / "one.h5"))
    assert whole.to_dict() | {"bytes": 0} == packed.to_dict() | {"bytes": 0}


def test_thirds_follow_progress_and_the_place_where_it_is_unknown(tmp_path: Path) -> None:
    part = changed(make_episode(0, steps=3), [0.6, 0.7, 0.8, 0.9], rung=2)               # the rest of a longer run
    unknown = changed(make_episode(1, steps=6), [0.0] * 7, rung=4)
    table = np.array(card_of(store(tmp_path / "s", [part, unknown])).coverage["mlp_up"])
    assert table[:, 2].tolist() == [0, 1, 2] and table[:, 4].tolist() == [2, 2, 2] and table.sum() == 9


@pytest.mark.parametrize(("penalty", "last", "steps", "horizon", "diverged"), [
    (2.0, 2.0, 6, 60, 1), (2.0, 14.0, 3, 60, 1), (2.0, 1.9, 6, 60, 0), (0.5, 2.0, 6, 60, 0), (0.5, 1.5, 4, 60, 1),
])  # fmt: skip
def test_diverged_runs_are_told_by_what_they_were_charged(
    penalty: float, last: float, steps: int, horizon: int, diverged: int, tmp_path: Path
) -> None:
    reward = Reward(divergence_penalty=penalty)
    made = make_episode(steps=steps, reward=reward)
    loss = made.infos["reward_loss"].copy()
    loss[-1] = last
    rewards = reward.combine(loss, made.infos["reward_memory"], made.infos["reward_error"])
    infos, attributes = {**made.infos, "reward_loss": loss}, {**made.attributes, "horizon": horizon}
    episode = Episode(made.observations, made.actions, rewards, made.terminations, made.truncations, infos, attributes)
    card = card_of(store(tmp_path / "s", [episode]))
    assert card.diverged_runs == diverged
    assert any("diverged" in warning for warning in card.warnings) == bool(diverged)


def test_a_narrow_store_is_called_narrow(tmp_path: Path) -> None:
    made = [changed(make_episode(run, layer, 60, truncated=True), rung=3) for run in range(2) for layer in range(2)]
    rare = changed(make_episode(9, 0, 1), rung=7)
    card = card_of(store(tmp_path / "s", [*made, rare]))
    assert (card.truncated_runs, card.truncated, card.runs) == (2, 4, 3)
    told = "\n".join(card.warnings)
    names = card.ladder
    assert "a single behaviour: random" in told and "a single workload: digits_mlp" in told
    assert "no budget near 1/16, 1/8, 1/2, 1 of AdamW's bytes" in told                    # all have a quarter
    assert f"layer kinds without an episode: {', '.join(kind for kind in KINDS if kind != 'mlp_up')}" in told
    assert f"mlp_up: never: {', '.join(name for i, name in enumerate(names) if i not in (3, 7))}" in told
    assert f"mlp_up: hardly (below 1% of its decisions): {names[7]}" in told              # 1 of 241
    assert "2 of 3 runs are truncated" in told


def test_what_varies_much_is_told_in_bands(tmp_path: Path) -> None:
    schedules, budgets = ("linear", "cosine"), [int(16384 * 2.0 ** (-run / 4)) for run in range(16)]
    made = [
        changed(make_episode(run), horizon=40 + run, budget_bytes=budgets[run], schedule=schedules[run % 2]) for run in range(16)
    ]
    card = card_of(store(tmp_path / "s", made))
    assert card.counts["horizon"] == {"32 to 63": (16, 16)}
    near = {"1/16": 2, "1/8": 4, "1/4": 4, "1/2": 4, "1": 2}
    assert card.counts["budget"] == {f"about {power} of AdamW's bytes": (n, n) for power, n in near.items()}
    assert card.counts["schedule"] == {"cosine": (8, 8), "linear": (8, 8)}
    assert not any("budget" in warning or "schedule" in warning for warning in card.warnings)


def test_an_empty_store_has_a_card_too(tmp_path: Path) -> None:
    writer(tmp_path / "s").close()
    card = card_of(tmp_path / "s")
    assert card.episodes == 0 and card.warnings[0] == "there are no episodes" and "## Returns" in str(card)


def test_the_command_writes_markdown_and_json_without_paths_of_the_machine(tmp_path: Path) -> None:
    record(tmp_path / "s", runs=2)
    out, facts = tmp_path / "cards" / "card.md", tmp_path / "card.json"
    done = CliRunner().invoke(app, ["data", "card", str(tmp_path / "s"), "--out", str(out), "--json", str(facts)])
    assert done.exit_code == 0, done.output
    text, found = out.read_text(), json.loads(facts.read_text())
    assert text == f"{write_card(tmp_path / 's', out)}\n" == CliRunner().invoke(app, ["data", "card", str(tmp_path / "s")]).stdout
    assert str(tmp_path) not in text and str(tmp_path) not in facts.read_text()
    assert found["episodes"] == 4 and f"`{found['digest']}`" in text and all(warning in text for warning in found["warnings"])
    assert all(f"### {kind}" in text for kind in found["coverage"]) and all(phase in text for phase in PHASES)
    assert list(tmp_path.glob("cards/*")) == [out]
    assert CliRunner().invoke(app, ["data", "card", str(tmp_path / "none")]).exit_code == 2
