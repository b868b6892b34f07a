"""Promises of BLEU: an exact copy has 100, an untrained model next to nothing; decoding is greedy and stops at the end."""

import gzip
import sys
from pathlib import Path

import pytest
import torch

from mango_env.workloads import make_workload
from mango_env.workloads.multi30k import Translation
from mango_env.workloads.words import END, START
from train_policy.bleu import bleu, score

PAIRS = [
    ("Ein Hund rennt .", "a dog runs ."),
    ("Zwei Frauen essen heute .", "two women eat today ."),
    ("Er schläft .", "he sleeps now ."),
]


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Translation:
    monkeypatch.setenv("MANGO_DATA", str(tmp_path))
    for part in ("train", "valid"):
        with gzip.open(tmp_path / f"multi30k_{part}.de-en.tsv.gz", "wt", encoding="utf-8") as file:
            file.writelines(f"{german}\t{english}\n" for german, english in PAIRS * 4)
    found = make_workload("multi30k_translation", 0, source_words=20, target_words=20, width=32, heads=2, batch=4, context=8)
    assert isinstance(found, Translation)
    return found


def test_an_exact_copy_has_100_and_nothing_in_common_has_0() -> None:
    pytest.importorskip("sacrebleu", reason='needs pip install "mango-optim[metrics]"')
    english = [pair[1] for pair in PAIRS]
    assert score(english, english) == pytest.approx(100)
    assert score(["x y z w v"] * 3, english) < 1e-6
    assert 0 < score(["a dog runs .", "two men eat bread .", "she sleeps now ."], english) < 100
    with pytest.raises(ValueError, match="1 translations beside 3 references"):
        score(["a"], english)


def test_a_model_that_has_learned_its_pairs_beats_the_untrained_one(workload: Translation) -> None:
    pytest.importorskip("sacrebleu", reason='needs pip install "mango-optim[metrics]"')
    before, position = bleu(workload), workload.state_dict()
    assert before < 20
    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        workload.loss().backward()                                             # type: ignore[no-untyped-call]
        optimizer.step()
    assert bleu(workload) > 90 and bleu(workload, limit=2) > 90
    workload.load_state_dict(position)
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        bleu(workload, limit=0)


def test_translating_is_greedy_stops_at_the_end_and_changes_nothing(workload: Translation) -> None:
    state, mode = workload.state_dict(), workload.model.training
    said = workload.translate(limit=3)
    assert workload.translate(limit=3) == said and len(said) == 3
    assert workload.references(3) == [pair[1] for pair in PAIRS] and len(workload.translate()) == 12
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in zip(state.values(), workload.state_dict().values(), strict=True))  # fmt: skip
    assert workload.model.training == mode
    source = workload._data.val_source[:1].long()
    numbers = [START]
    with torch.no_grad():
        workload.model.eval()
        while numbers[-1] != END and len(numbers) < workload._data.val_target.shape[1]:
            scores = workload.model(source, torch.tensor([numbers]))[0, -1]
            scores[[0, START]] = -torch.inf
            numbers.append(int(scores.argmax()))
    assert said[0].split() == [workload._data.target_words[n] for n in numbers[1:] if n != END]


def test_without_sacrebleu_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r'pip install "mango-optim\[metrics\]"'):
        score(["a"], ["a"])
