"""Promises of the workloads that read sentences and of the vision transformer: kinds, padding, no future, clear errors.

The shared promises of every workload are in tests/test_workloads.py. Made-up tables stand in for the data sets here.
"""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mango.layers import describe
from mango_env.workloads import HELD_OUT, WORKLOADS, fashion, initialise, make_workload, mnist, multi30k, recurrent, sst2, vit
from mango_env.workloads.data import read_pairs, read_text
from mango_env.workloads.words import END, PADDING, RESERVED, START, UNKNOWN, encode_sentences, frequent_words, trim
from tests.test_workloads import sees_no_future

WORDS = "a the man woman dog runs sits eats sees big red small".split()


def kinds_of(model: nn.Module) -> dict[str, str]:
    members = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return {layer.name: layer.kind for layer in describe([n for n, _ in members], [s for _, s in members])}


def seeded(model: nn.Module) -> nn.Module:
    return initialise(model, torch.Generator().manual_seed(0))


def write(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small tables in the format of SST-2 and Multi30k."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 120), ("dev", 30), ("valid", 30)):
        sentences = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]
        write(tmp_path / f"sst2_{part}.tsv.gz", ["sentence\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(sentences))])
        write(tmp_path / f"multi30k_{part}.de-en.tsv.gz", [f"{text.upper()}!\t{text}." for text in sentences])
    monkeypatch.setenv("MANGO_DATA", str(tmp_path))
    return tmp_path


# ---- held out


def test_what_is_held_out_is_in_the_table_and_says_so() -> None:
    assert len(set(HELD_OUT)) == len(HELD_OUT) == 5
    for name in HELD_OUT:
        assert "Held out" in (WORKLOADS[name].__doc__ or ""), name
    for name in set(WORKLOADS) - set(HELD_OUT):
        assert "Held out" not in (WORKLOADS[name].__doc__ or ""), name


# ---- kinds


def test_layer_kinds_of_the_vision_transformer_can_be_told_by_name() -> None:
    kinds = kinds_of(vit.VisionTransformer(3, 32, 4, 32, 2, 4, 10))
    assert kinds["embed.weight"] == kinds["embed_position.weight"] == "embedding"
    assert kinds["blocks.0.attn.qkv.weight"] == "attention_in"
    assert kinds["blocks.1.attn.out_proj.weight"] == "attention_out"
    assert (kinds["blocks.0.mlp.up.weight"], kinds["blocks.1.mlp.down.weight"]) == ("mlp_up", "mlp_down")
    assert kinds["blocks.0.norm_attn.weight"] == kinds["norm.weight"] == "norm"
    assert kinds["head.weight"] == "head"


def test_layer_kinds_of_the_lstm_can_be_told_by_name() -> None:
    kinds = kinds_of(recurrent.Recurrent(32, 2))
    assert kinds["embed.weight"] == "embedding"
    assert {kind for name, kind in kinds.items() if name.startswith("lstm.")} == {"recurrent"}
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l1"} <= set(kinds)
    assert kinds["head.weight"] == "head"


def test_layer_kinds_of_the_translator_and_the_classifier_can_be_told_by_name() -> None:
    kinds = kinds_of(multi30k.Translator(50, 40, 32, 2, 4, 16))
    assert kinds["embed_source.weight"] == kinds["embed_target.weight"] == "embedding"
    for block in ("encoder.0", "decoder.1"):
        assert kinds[f"{block}.attn.qkv.weight"] == "attention_in"
        assert kinds[f"{block}.attn.out_proj.weight"] == "attention_out"
        assert (kinds[f"{block}.mlp.up.weight"], kinds[f"{block}.mlp.down.weight"]) == ("mlp_up", "mlp_down")
    assert {kinds[f"decoder.0.cross.{part}_proj.weight"] for part in "qkv"} == {"attention_in"}
    assert kinds["decoder.0.cross.out_proj.weight"] == "attention_out"
    assert kinds["decoder.0.norm_cross.weight"] == kinds["norm_source.weight"] == "norm"
    assert kinds["head.weight"] == "head"
    kinds = kinds_of(sst2.SentenceClassifier(50, 32, 1, 4, 16, 2))
    assert set(kinds.values()) == {"embedding", "norm", "attention_in", "attention_out", "mlp_up", "mlp_down", "head"}


# ---- what a model sees


def test_the_lstm_sees_no_future() -> None:
    sees_no_future(seeded(recurrent.Recurrent(16, 2)))


def test_the_vision_transformer_sees_where_each_patch_is() -> None:
    model = seeded(vit.VisionTransformer(1, 8, 4, 16, 1, 4, 3))
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(image).shape == (1, 3)
        turned = model(image.roll(4, -1))                                      # the same patches in other places
        assert not torch.allclose(model(image), turned)
        model.embed_position.weight.zero_()                                    # type: ignore[union-attr,operator]
        assert torch.allclose(model(image), model(image.roll(4, -1)), atol=1e-5)
    with pytest.raises(ValueError, match="patch=5 must divide the side of the images, 8"):
        vit.VisionTransformer(1, 8, 5, 16, 1, 4, 3)
    with pytest.raises(ValueError, match="width=20 must be a multiple of 2 heads, 8"):
        vit.VisionTransformer(1, 8, 4, 20, 1, 4, 3)


def test_the_translators_decoder_sees_no_future_and_all_of_the_source() -> None:
    model = seeded(multi30k.Translator(50, 40, 32, 2, 4, 16))
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(RESERVED, 40, (2, 12), generator=generator) for _ in range(2))
    later, first, last = target.clone(), source.clone(), source.clone()
    later[:, 7:] = RESERVED
    first[:, 0] = last[:, -1] = UNKNOWN
    with torch.no_grad():
        logits = model(source, target)
        assert torch.allclose(model(source, later)[:, :7], logits[:, :7], atol=1e-6)
        assert not torch.allclose(model(source, later)[:, 7:], logits[:, 7:], atol=1e-3)
        for changed in (first, last):
            assert (model(changed, target) - logits).abs().amax(2).min() > 1e-4  # at every position of the target


def test_padding_changes_no_answer_and_no_loss(tables: Path) -> None:
    wider = nn.functional.pad
    classifier = seeded(sst2.SentenceClassifier(50, 32, 2, 4, 16, 2))
    translator = seeded(multi30k.Translator(50, 40, 32, 1, 4, 16))
    rows = torch.tensor([[5, 6, 7, 8, 9], [10, 11, PADDING, PADDING, PADDING]])
    with torch.no_grad():
        assert torch.allclose(classifier(wider(rows, (0, 7))), classifier(rows), atol=1e-5)
        assert torch.allclose(classifier(rows[1:, :2]), classifier(rows)[1:], atol=1e-5)
        padded = translator(wider(rows, (0, 7)), wider(rows, (0, 4)))
        assert torch.allclose(padded[:, :5], translator(rows, rows), atol=1e-5)
        assert torch.allclose(translator(rows[1:, :2], rows[1:, :2])[0], padded[1, :2], atol=1e-5)
    options = {"source_words": 20, "target_words": 20, "width": 16, "batch": 8}
    short, long = (make_workload("multi30k_translation", 0, context=context, **options) for context in (16, 32))
    assert short.evaluate()["val_loss"] == pytest.approx(long.evaluate()["val_loss"], rel=1e-5)
    assert short.loss().item() == pytest.approx(long.loss().item(), rel=1e-5)
    short, long = (make_workload("sst2_classifier", 0, context=context, words=20, width=16, batch=8) for context in (16, 32))
    assert short.loss().item() == pytest.approx(long.loss().item(), rel=1e-5)
    assert set(short.evaluate()) == {"val_loss", "val_accuracy"}


def test_a_translations_loss_is_the_mean_over_its_words(tables: Path) -> None:
    workload = make_workload("multi30k_translation", 0, source_words=20, target_words=20, width=16)
    data = workload._data                                                      # type: ignore[attr-defined]
    total, count = 0.0, 0
    for source, target in zip(data.val_source.long(), data.val_target.long(), strict=True):
        told = [*target[target != PADDING]]
        assert (told[0], told[-1]) == (START, END)
        with torch.no_grad():
            logits = workload.model(source[None, source != PADDING], torch.stack(told)[None, :-1])
        total += float(nn.functional.cross_entropy(logits[0], torch.stack(told[1:]), reduction="sum"))
        count += len(told) - 1
    assert workload.evaluate() == {"val_loss": pytest.approx(total / count, rel=1e-5)}


# ---- words


def test_a_vocabulary_is_the_same_in_every_process_and_order() -> None:
    sentences = [["b", "a"], ["c", "a"], ["b", "d"]]
    expected = {"a": RESERVED, "b": RESERVED + 1, "c": RESERVED + 2}
    assert frequent_words(sentences, 3) == frequent_words(sentences[::-1], 3) == expected
    assert list(frequent_words(sentences, 99)) == ["a", "b", "c", "d"]
    assert encode_sentences([["a", "d"], ["c"] * 9, []], expected, 3).tolist() == [[4, UNKNOWN, 0], [6, 6, 6], [UNKNOWN, 0, 0]]
    assert encode_sentences([["a"] * 9, []], expected, 4, marked=True).tolist() == [[START, 4, 4, END], [START, UNKNOWN, END, 0]]
    assert trim(torch.tensor([[5, 0, 0, 0], [5, 6, 0, 0]])).tolist() == [[5, 0], [5, 6]]
    with pytest.raises(ValueError, match="rows of 2 have no room for a word"):
        encode_sentences([["a"]], expected, 2, marked=True)


def test_the_vocabulary_is_of_the_training_set_alone(tables: Path) -> None:
    write(tables / "sst2_dev.tsv.gz", ["sentence\tlabel", "unheard of\t1", "the dog\t0"])
    workload = make_workload("sst2_classifier", 0, words=len(WORDS), batch=8, width=16)
    assert workload._data.val_x[0, :3].tolist() == [UNKNOWN, UNKNOWN, PADDING]  # type: ignore[attr-defined]
    assert int(workload._data.val_x[1, :2].min()) >= RESERVED                  # type: ignore[attr-defined]


# ---- files


@pytest.mark.parametrize(
    ("name", "file"), [("sst2_classifier", "sst2_dev.tsv.gz"), ("multi30k_translation", "multi30k_valid.de-en.tsv.gz")]
)
def test_a_table_that_is_missing_or_damaged_is_told(tables: Path, name: str, file: str) -> None:
    whole = (tables / file).read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is no whole gzip file"),
        (b"sentence\tlabel\n", "is no whole gzip file"),
        (gzip.compress(b"one column\n"), "line 1 of .* has 1 columns instead of 2"),
        (gzip.compress(b"sentence\tlabel\na\tb\tc\n"), "line 2 of .* has 3 columns instead of 2"),
    ):
        (tables / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} {message}" if message.startswith("is") else message):
            make_workload(name, 0)
    (tables / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.*{file}.*does not exist.*github.com"):
        make_workload(name, 0)


def test_labels_other_than_the_two_are_refused(tables: Path) -> None:
    for lines in (["sentence\tlabel", "good\t2"], ["good\t1"], ["sentence\tlabel"]):
        write(tables / "sst2_train.tsv.gz", lines)
        with pytest.raises(ValueError, match=r"sst2_train\.tsv\.gz is no table with the heading .* and the labels 0 and 1"):
            make_workload("sst2_classifier", 0)


def test_a_compressed_text_is_read_to_the_size_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "x.gz", ["één\ttwee", "drie\tvier"])
    assert read_text(tmp_path / "x.gz", 4) == "één\t"
    assert read_pairs(tmp_path / "x.gz") == [("één", "twee"), ("drie", "vier")]


def test_books_too_short_to_learn_from_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANGO_DATA", str(tmp_path))
    write(tmp_path / "books_train.txt.gz", ["It was the best of times. "] * 4000)
    with pytest.raises(FileNotFoundError, match=r"books_lm.*books_valid\.txt\.gz.*does not exist.*GITenberg"):
        make_workload("books_lm", 0)
    write(tmp_path / "books_valid.txt.gz", ["It was the worst of times. "] * 4)
    with pytest.raises(ValueError, match=r"books_valid.* has 112 characters; a text workload needs 50,000"):
        make_workload("books_lm", 0)


def test_fashion_images_are_held_out_from_the_start_of_the_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANGO_DATA", str(tmp_path))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), (np.arange(40) % 10).astype(np.uint8)
    np.savez(tmp_path / "fashion_mnist_train.npz", x=x, y=y)
    with pytest.raises(FileNotFoundError, match=r"fashion_vit.*fashion_mnist_test\.npz.*does not exist.*numpy\.savez"):
        make_workload("fashion_vit", 0)
    np.savez(tmp_path / "fashion_mnist_test.npz", x=x[::-1], y=y[::-1])
    data = fashion.fashion_images("fashion_cnn", 20)
    assert (len(data.train_y), len(data.val_y), mnist.CLASSES) == (40, 20, data.classes)
    assert torch.equal(data.val_x[0], data.train_x[-1]) and data.val_y[0] == data.train_y[-1]
    with pytest.raises(ValueError, match="val_size=0 must be a positive int"):
        make_workload("fashion_cnn", 0, val_size=0)
    np.savez(tmp_path / "fashion_mnist_test.npz", x=x)
    with pytest.raises(ValueError, match=r"fashion_mnist_test\.npz has no arrays y; expected x, y"):
        make_workload("fashion_cnn", 0)
