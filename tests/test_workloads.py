"""Promises about workloads: seeded, resumable, pure to evaluate, shared data, and clear errors for what cannot be built."""

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mango.layers import describe
from mango_env.workloads import (
    WORKLOADS,
    ResumableWorkload,
    Workload,
    cifar10,
    digits,
    initialise,
    make_workload,
    text,
)
from mango_env.workloads.data import Batches, evaluating, read_arrays
from tests import made_data

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {                                                                      # the file that is asked for first
    "books_lm": "books_train.txt.gz",
    "cifar10_cnn": "cifar10_tiny.npz",
    "cifar10_resnet": "cifar10_tiny.npz",
    "cifar10_vit": "cifar10_tiny.npz",
    "fashion_cnn": "fashion_mnist_train.npz",
    "fashion_vit": "fashion_mnist_train.npz",
    "mnist_cnn": "mnist.npz",
    "mnist_mlp": "mnist.npz",
    "multi30k_translation": "multi30k_train.de-en.tsv.gz",
    "shakespeare_lm": "tinyshakespeare.txt",
    "shakespeare_lstm": "tinyshakespeare.txt",
    "sst2_classifier": "sst2_train.tsv.gz",
}
MADE = {                                                                       # of those that run on made-up data sets here
    "bert_pairs": "books_train.txt.gz",
    "bert_sst2": "sst2_train.tsv.gz",
    "cifar100_resnet": "cifar100_train_jpeg.npz",
    "gpt2": "books_train.txt.gz",
    "imagenet": "imagenet/train",
    "llama": "books_train.txt.gz",
}
SMALL: dict[str, dict[str, Any]] = {                                           # options that keep the shared tests fast
    "bert_pairs": {"context": 40, "pairs": 400, "dropout": 0.02},
    "bert_sst2": {"context": 16},
    "books_lm": {"width": 32},
    "cifar10_cnn": {"tiny": True, "batch": 16, "width": 8, "val_size": 100},
    "cifar10_resnet": {"tiny": True, "batch": 16, "width": 4, "units": 1, "val_size": 100},
    "cifar10_vit": {"tiny": True, "batch": 16, "width": 32, "val_size": 100},
    "cifar100_resnet": {"batch": 16, "width": 4, "units": 1, "val_size": 40},
    "fashion_cnn": {"batch": 16, "width": 8, "val_size": 100},
    "fashion_vit": {"batch": 16, "width": 32, "val_size": 100},
    "gpt2": {"size": "tiny", "merges": made_data.MERGES, "context": 16, "dropout": 0.1},
    "imagenet": {"model": "efficientnet_b4", "image_size": 32, "width": 8, "depth": 1, "batch": 16},
    "llama": {"size": "tiny", "merges": made_data.MERGES, "context": 16},
    "mnist_cnn": {"batch": 16, "width": 8, "val_size": 100},
    "mnist_mlp": {"val_size": 500},
    "multi30k_translation": {"width": 32},
    "shakespeare_lm": {"width": 32},
    "shakespeare_lstm": {"width": 32, "depth": 1},
    "source_lm": {"width": 32},
    "source_lstm": {"width": 32},
    "sst2_classifier": {"words": 2000, "width": 32},
}
SLOW_STARTERS = {"bert_pairs": 260, "cifar10_vit": 80, "sst2_classifier": 80}  # steps of test_the_loss_falls; others take 30


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of made-up data sets."""
    pytest.importorskip("PIL.Image", reason="needs Pillow, which decodes the images")
    return made_data.write_all(tmp_path_factory.mktemp("made"))


@pytest.fixture(params=sorted(WORKLOADS))
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workload]:
    """`build(seed)` of every member of the table."""
    name = request.param
    if name in MADE:
        folder = request.getfixturevalue("made")
        monkeypatch.setenv("MANGO_DATA", str(folder))
        monkeypatch.setenv("MANGO_CACHE", str(folder / "cache"))
        monkeypatch.syspath_prepend(str(folder / "site"))
    if name in NEEDS:
        folder = os.environ.get("MANGO_DATA")
        if not folder or not (Path(folder) / NEEDS[name]).is_file():
            pytest.skip(f"needs {NEEDS[name]} in the folder that MANGO_DATA names")
    return partial(make_workload, name, **SMALL.get(name, {}))


def losses(workload: Workload, steps: int, lr: float = 2e-3) -> list[float]:
    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=lr)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = workload.loss()
        loss.backward()                                                        # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append(loss.item())
    return seen


def test_one_seed_is_one_run_and_another_seed_another(build: Callable[..., Workload]) -> None:
    first, again, other = (losses(build(seed), 4) for seed in (7, 7, 8))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_the_global_random_state_is_neither_read_nor_changed(build: Callable[..., Workload]) -> None:
    torch.manual_seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    workload = build(3)
    first = losses(workload, 2)
    workload.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)              # type: ignore[index]  # noqa: NPY002
    torch.manual_seed(2)
    assert losses(build(3), 2) == first


def test_a_saved_position_continues_bit_exactly(build: Callable[..., Workload]) -> None:
    workload = build(5)
    assert isinstance(workload, ResumableWorkload)
    losses(workload, 3)
    file = io.BytesIO()
    torch.save({"workload": workload.state_dict(), "model": workload.model.state_dict()}, file)
    expected = losses(workload, 5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build(6)
    assert isinstance(resumed, ResumableWorkload)
    resumed.load_state_dict(saved["workload"])
    resumed.model.load_state_dict(saved["model"])
    assert losses(resumed, 5) == expected


def test_a_saved_position_does_not_move_with_the_run(build: Callable[..., Workload]) -> None:
    workload = build(5)
    assert isinstance(workload, ResumableWorkload)
    workload.loss()
    state = workload.state_dict()
    expected = workload.loss()
    workload.loss()
    workload.load_state_dict(state)
    assert torch.equal(workload.loss(), expected)


def test_evaluate_changes_nothing(build: Callable[..., Workload]) -> None:
    workload, untouched = build(2), build(2)
    workload.loss()
    untouched.loss()
    modes = [module.training for module in workload.model.modules()]
    weights = copy.deepcopy(workload.model.state_dict())
    first = workload.evaluate()
    assert first == workload.evaluate()
    assert "val_loss" in first
    assert all(np.isfinite(value) and type(value) is float for value in first.values())
    assert modes == [module.training for module in workload.model.modules()]
    assert all(torch.equal(value, weights[name]) for name, value in workload.model.state_dict().items())
    assert all(p.grad is None for p in workload.model.parameters())
    assert torch.equal(workload.loss(), untouched.loss())


def test_the_loss_falls(build: Callable[..., Workload], request: pytest.FixtureRequest) -> None:
    workload = build(0)
    before = workload.evaluate()["val_loss"]
    seen = losses(workload, SLOW_STARTERS.get(request.node.callspec.params["build"], 30))
    assert np.mean(seen[-5:]) < 0.9 * np.mean(seen[:2])
    assert workload.evaluate()["val_loss"] < before


def test_a_copy_shares_the_data_and_nothing_else(build: Callable[..., Workload]) -> None:
    workload = build(1)
    twin = copy.deepcopy(workload)
    again = build(2)
    data = workload._data                                                      # type: ignore[attr-defined]
    assert twin._data is data                                                  # type: ignore[attr-defined]
    assert copy.copy(data) is data
    assert again._data is data                                                 # type: ignore[attr-defined]  # loaded once
    assert losses(twin, 2) == losses(workload, 2)


def test_it_is_big_enough_to_compress_and_small_enough_for_a_cpu(build: Callable[..., Workload]) -> None:
    workload = build(0)
    sizes = [p.numel() for p in workload.model.parameters()]
    assert sum(size >= 1024 for size in sizes) >= 3
    assert sum(sizes) < 500_000
    assert workload.steps >= 100
    assert getattr(workload, "lr", 0) > 0
    loss = workload.loss()
    assert loss.shape == ()
    assert loss.requires_grad


def test_the_model_decides_device_and_dtype(build: Callable[..., Workload]) -> None:
    workload = build(0)
    workload.model.to(torch.bfloat16)
    loss = workload.loss()
    assert loss.dtype == torch.float32
    loss.backward()                                                            # type: ignore[no-untyped-call]
    assert workload.evaluate()["val_loss"] > 0


def test_options_override_the_defaults(build: Callable[..., Workload]) -> None:
    assert build(0, steps=17).steps == 17
    assert build(0, lr=0.5).lr == 0.5                                          # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"takes \(seed.*unexpected keyword argument 'colour'"):
        build(0, colour=1)
    for bad in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=r"steps=.* must be a positive int"):
            build(0, steps=bad)


def test_a_state_of_another_workload_is_refused(build: Callable[..., Workload]) -> None:
    workload = build(0)
    assert isinstance(workload, ResumableWorkload)
    with pytest.raises(ValueError, match=r"the state of this workload has the keys .*'generator'.* got \['step'\]"):
        workload.load_state_dict({"step": 1})


# ---- particular workloads


def test_layer_kinds_of_the_transformer_can_be_told_by_name() -> None:
    model = make_workload("source_lm", 0).model
    members = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.numel() >= 1024]
    kinds = {layer.name: layer.kind for layer in describe([n for n, _ in members], [s for _, s in members])}
    assert kinds["embed.weight"] == "embedding"
    assert kinds["blocks.0.attn.qkv.weight"] == "attention_in"
    assert kinds["blocks.0.attn.out_proj.weight"] == "attention_out"
    assert kinds["blocks.1.mlp.up.weight"] == "mlp_up"
    assert kinds["blocks.1.mlp.down.weight"] == "mlp_down"
    assert kinds["head.weight"] == "head"


def sees_no_future(model: nn.Module) -> None:
    """What comes at a place changes nothing before it."""
    symbols = torch.zeros(1, 16, dtype=torch.long)
    changed = symbols.clone()
    changed[0, 10:] = 5
    with torch.no_grad():
        assert torch.equal(model(symbols)[0, :10], model(changed)[0, :10])
        assert not torch.equal(model(symbols)[0, 10:], model(changed)[0, 10:])


def test_the_transformer_sees_no_future() -> None:
    sees_no_future(make_workload("source_lm", 0, width=32).model)


def test_the_vocabulary_is_the_same_on_every_machine() -> None:
    assert text.VOCABULARY == 97
    assert text.encode_text("\n ~").tolist() == [0, 1, 95]
    assert text.encode_text("\té😀\x7f").tolist() == [text.UNKNOWN] * 4
    assert int(text.load_source().train.max()) < text.VOCABULARY
    assert dict(make_workload("source_lm", 0).model.named_parameters())["head.weight"].shape == (97, 64)


def test_a_python_without_source_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found 0 characters in 0 of 6 modules.*Use a Python that has its \.py files"):
        text._read_modules(tmp_path, text.VAL_MODULES)


def test_adaptive_step_sizes_matter_on_the_transformer() -> None:
    """AdamW beats SGD with momentum by a margin: otherwise its second moments would not be worth their bytes."""

    def val_loss(optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]) -> float:
        workload = make_workload("source_lm", 0, batch=8)
        stepper = optimizer(workload.model.parameters())
        for _ in range(workload.steps):
            stepper.zero_grad()
            workload.loss().backward()                                         # type: ignore[no-untyped-call]
            stepper.step()
        return workload.evaluate()["val_loss"]

    adamw = val_loss(lambda p: torch.optim.AdamW(p, lr=3e-3))
    sgd = val_loss(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True))  # the best rate of 0.01 to 0.3
    assert adamw < sgd - 0.1


def test_crops_and_flips_move_whole_images_and_follow_the_generator() -> None:
    rows, columns = torch.meshgrid(torch.arange(1, 33), torch.arange(1, 33), indexing="ij")
    image = torch.stack([rows, columns, rows * 0 + 9]).to(torch.uint8)         # a pixel tells where it came from
    batch = image.expand(64, 3, 32, 32)
    moved = cifar10.crop_and_flip(batch, torch.Generator().manual_seed(0))
    assert moved.shape == batch.shape
    assert moved.dtype == torch.uint8
    assert torch.equal(moved, cifar10.crop_and_flip(batch, torch.Generator().manual_seed(0)))
    flipped, shifts = 0, set()
    for one in moved.long():
        inside = one[2] == 9                                                   # (32, 32): what is not padding
        mirrored = bool((one[1] * inside).diff(dim=1)[inside[:, 1:] & inside[:, :-1]].unique().item() == -1)
        flipped += mirrored
        upright = one.flip(-1) if mirrored else one
        inside = upright[2] == 9
        shift = (int((upright[0] - rows)[inside].unique().item()), int((upright[1] - columns)[inside].unique().item()))
        shifts.add(shift)
        expected = torch.zeros(3, 40, 40, dtype=torch.long)
        expected[:, 4:36, 4:36] = image
        expected = expected[:, 4 + shift[0] : 36 + shift[0], 4 + shift[1] : 36 + shift[1]]
        assert torch.equal(upright, expected)
    assert 16 < flipped < 48
    assert all(abs(value) <= 4 for shift in shifts for value in shift)
    assert {shift[0] for shift in shifts} >= {-4, 0, 4}


@pytest.fixture
def jpegs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive in the format of the CIFAR-10 files, and an empty cache."""
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow, which decodes the images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        files = []
        for level in rng.integers(0, 256, (count, 3)):
            stream = io.BytesIO()
            image_module.fromarray(np.broadcast_to(level.astype(np.uint8), (32, 32, 3))).save(stream, "JPEG", quality=95)
            files.append(np.frombuffer(stream.getvalue(), np.uint8))
        offsets = np.cumsum([0, *map(len, files)]).astype(np.int32)
        labels = (np.arange(count) % 10).astype(np.uint8)
        np.savez(tmp_path / f"cifar10_{part}_jpeg.npz", jpeg=np.concatenate(files), offsets=offsets, y=labels)
    monkeypatch.setenv("MANGO_DATA", str(tmp_path))
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_cifar10_is_decoded_once_into_the_cache(jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = make_workload("cifar10_cnn", 0, batch=8, width=4)
    assert np.isfinite(losses(workload, 2)).all()
    assert set(workload.evaluate()) == {"val_loss", "val_accuracy"}
    cached = sorted((jpegs / "cache").iterdir())
    assert [path.name.split("-")[0] for path in cached] == ["cifar10_test_jpeg", "cifar10_train_jpeg"]
    pixels = np.load(cached[1])
    assert pixels.shape == (40, 3, 32, 32)
    assert pixels.dtype == np.uint8
    level = np.random.default_rng(0).integers(0, 256, (40, 3))                 # flat images survive JPEG within a few levels
    assert np.abs(pixels.astype(int) - level[:, :, None, None]).max() <= 4
    monkeypatch.setattr(cifar10, "_decode_all", None)                          # a second decoding would fail
    cifar10.load_cifar.cache_clear()
    make_workload("cifar10_cnn", 0, batch=8, width=4)


def test_a_damaged_cifar10_file_is_refused_and_leaves_no_cache(jpegs: Path) -> None:
    path = jpegs / "cifar10_train_jpeg.npz"
    arrays = dict(np.load(path))
    arrays["jpeg"] = arrays["jpeg"].copy()
    arrays["jpeg"][arrays["offsets"][3] : arrays["offsets"][4]] = 0
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"image 3 of .* is no JPEG of 32x32 pixels"):
        make_workload("cifar10_cnn", 0)
    assert list((jpegs / "cache").iterdir()) == []
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"is no \.npz file of plain arrays"):
        make_workload("cifar10_cnn", 0)
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match="has no arrays jpeg, offsets; expected jpeg, offsets"):
        make_workload("cifar10_cnn", 0)


def test_a_pickle_in_a_data_file_is_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train_x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"no \.npz file of plain arrays"):
        read_arrays(tmp_path / "x.npz", ("train_x",))


def test_a_cache_that_cannot_be_written_is_told(jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (jpegs / "file").write_text("")
    monkeypatch.setenv("MANGO_CACHE", str(jpegs / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot be made .* set MANGO_CACHE to a writable folder"):
        make_workload("cifar10_cnn", 0)


# ---- data


@pytest.mark.parametrize(("name", "file"), [*NEEDS.items(), *MADE.items(), ("cifar10_cnn", "cifar10_train_jpeg.npz")])
def test_missing_data_says_which_file_is_wanted_and_how_to_get_it(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tiny": True} if file == "cifar10_tiny.npz" else {}
    monkeypatch.setenv("MANGO_DATA", str(tmp_path))
    source = r"(github\.com|numpy\.savez|image-net\.org)"
    with pytest.raises(FileNotFoundError, match=f"{name}.*{tmp_path / file}.*does not exist.*{source}"):
        make_workload(name, 0, **options)
    monkeypatch.delenv("MANGO_DATA")
    with pytest.raises(FileNotFoundError, match=f"{name}.*{file}.*MANGO_DATA is not set.*digits_mlp"):
        make_workload(name, 0, **options)


def test_a_text_too_short_to_learn_from_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / text.SHAKESPEARE).write_text("to be")
    monkeypatch.setenv("MANGO_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="has 5 characters; a text workload needs 50,000"):
        make_workload("shakespeare_lm", 0)


def test_every_epoch_sees_every_example_once_in_a_new_order() -> None:
    batches = Batches(12, 4, torch.Generator().manual_seed(0))
    epochs = [torch.cat([batches.next() for _ in range(3)]) for _ in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    with pytest.raises(ValueError, match=r"batch=13 is outside 1\.\.12"):
        Batches(12, 13, torch.Generator())


def test_a_position_in_other_data_is_refused() -> None:
    batches, other = (Batches(size, 4, torch.Generator().manual_seed(0)) for size in (12, 16))
    batches.next()
    with pytest.raises(ValueError, match="of 12 examples at 4, the workload has 16"):
        other.load_state_dict(batches.state_dict())


def test_held_out_digits_are_no_training_digits() -> None:
    data = digits.load_digits()
    assert (len(data.train_y), len(data.val_y)) == (1438, 359)
    assert set(data.val_y.tolist()) == set(range(10))
    normal = data.normalise(data.train_x)
    assert abs(float(normal.mean())) < 1e-4
    assert abs(float(normal.std()) - 1) < 1e-4


def test_evaluating_restores_the_mode_of_every_module_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[1].eval()                                                            # somebody froze it
    with pytest.raises(RuntimeError, match="mat1"), evaluating(model):
        model[2](torch.zeros(1, 5))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()


# ---- initialisation


def test_initialise_draws_every_parameter_from_the_generator_alone() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({
            "conv": nn.Conv2d(3, 64, 3), "linear": nn.Linear(256, 512), "embed": nn.Embedding(99, 32, padding_idx=0),
            "norm": nn.BatchNorm1d(4), "layer": nn.LayerNorm(4), "lstm": nn.LSTM(8, 16),
        })  # fmt: skip

    torch.manual_seed(0)
    a = initialise(model(), torch.Generator().manual_seed(1))
    b = initialise(model(), torch.Generator().manual_seed(1))
    c = initialise(model(), torch.Generator().manual_seed(2))
    pairs = list(zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(x, y) for (_, x), y, _ in pairs)
    constant = {"conv.bias", "linear.bias", "norm.weight", "norm.bias", "layer.weight", "layer.bias"}
    assert {name for (name, x), _, z in pairs if torch.equal(x, z)} == constant
    weights = dict(a.named_parameters())
    assert weights["conv.weight"].std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.1)
    assert weights["linear.weight"].std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not weights["embed.weight"][0].any()
    assert initialise(nn.Linear(100, 100), torch.Generator(), std=0.5).weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_initialise_refuses_parameters_that_it_does_not_know() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"no initialisation is known for Odd '0' \(parameters scale\)"):
        initialise(nn.Sequential(Odd()), torch.Generator())


def test_importing_the_table_loads_no_data_library() -> None:
    code = "import sys, mango_env.workloads; print([m for m in ('sklearn', 'PIL', 'pandas', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
