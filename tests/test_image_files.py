"""Promises of the image files: folders are read lazily and cropped by the seed; CIFAR-100 is converted, never unpickled."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mango_env.workloads import imagenet, make_workload
from mango_env.workloads.cifar10 import decode as decode_archive
from mango_env.workloads.convert_cifar100 import convert, main, read
from mango_env.workloads.imagenet import Crop, ImageFolder, load_folder
from tests import made_data
from tests.test_large_models import IMAGES, data
from tests.test_workloads import made

__all__ = ["data", "made"]                                                     # fixtures


def folder_of(root: Path, val_size: int = 100) -> ImageFolder:
    return load_folder(root / "imagenet", 16, 1, val_size)


def test_classes_are_the_folders_in_alphabetical_order(data: Path) -> None:
    found = folder_of(data)
    assert found.classes == ("n01", "n02", "n03", "n04") and len(found.train_x) == 80
    assert found.train_y.bincount().tolist() == [20] * 4 and found.val_y.bincount().tolist() == [5] * 4
    assert all(f"n0{label + 1}_" in path for path, label in zip(found.train_x[:], found.train_y.tolist(), strict=True))
    assert folder_of(data, 8).val_y.bincount().tolist() == [2] * 4             # fewer, and still of all classes


def test_crops_follow_the_generator_and_keep_the_colour(data: Path) -> None:
    found = folder_of(data)
    paths = found.train_x[torch.tensor([0, 25, 45, 65] * 10)]
    crops, again, other = (found.random_crops(paths, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert crops.shape == (40, 3, 16, 16) and crops.dtype == torch.uint8
    assert torch.equal(crops, again) and not torch.equal(crops, other)
    near = (crops.double().mean((2, 3)) - torch.tensor(made_data.COLOURS.tolist() * 10)).abs().max()
    assert near < 30
    middle = found.inputs(paths, torch.zeros(1, dtype=torch.bfloat16))
    assert middle.shape == (40, 3, 16, 16) and middle.dtype == torch.bfloat16
    many = load_folder(data / "imagenet", 16, 3, 100).random_crops(paths, torch.Generator().manual_seed(1))
    assert torch.equal(many, crops)                                            # threads change nothing


def test_a_crop_lies_within_its_image_and_has_the_area_that_was_drawn() -> None:
    for area in (0.08, 0.5, 1.0):
        for aspect in (0.75, 1.0, 4 / 3):
            for at in (0.0, 0.3, 1.0):
                left, top, right, bottom = Crop(area, aspect, at, 1 - at, False).box(100, 80)
                assert -1e-9 <= left < right <= 100 + 1e-9 and -1e-9 <= top < bottom <= 80 + 1e-9
                if area < 0.6:
                    assert (right - left) * (bottom - top) == pytest.approx(area * 8000)
                    assert (right - left) / (bottom - top) == pytest.approx(aspect)


def test_a_mirrored_crop_is_the_other_way_round(data: Path) -> None:
    path = folder_of(data).train_x[:1][0]
    plain, mirrored = (imagenet.decode(path, Crop(0.5, 1.0, 0.2, 0.6, flag), 16) for flag in (False, True))
    assert np.array_equal(plain[:, ::-1], mirrored) and not np.array_equal(plain, mirrored)


def test_without_a_folder_of_held_out_images_every_twentieth_is_held_out(tmp_path: Path) -> None:
    made_data.write_image_folder(tmp_path)
    (tmp_path / "imagenet" / "val").rename(tmp_path / "elsewhere")
    found = folder_of(tmp_path)
    assert found.val_y.tolist() == [0, 1, 2, 3] and len(found.train_x) == 76
    assert not set(found.val_x[:]) & set(found.train_x[:])


def test_what_is_no_image_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANGO_DATA", str(tmp_path))
    (tmp_path / "imagenet" / "train" / "n01").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train has 0 images in 1 folders of classes.*image-net\.org"):
        make_workload("imagenet", 0)
    made_data.write_image_folder(tmp_path / "whole")
    monkeypatch.setenv("MANGO_DATA", str(tmp_path / "whole"))
    workload = make_workload("imagenet", 0, **IMAGES, width=8)
    for path in (tmp_path / "whole" / "imagenet" / "train").rglob("*.JPEG"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"n0\d_\d+\.JPEG is no image that can be decoded"):
        workload.loss()


def test_ten_steps_on_the_stub_folder_for_every_model(data: Path) -> None:
    """Row F11: ten optimizer steps of EfficientNet-B4, ResNet-50 and ViT-B on a stub data set."""
    for model, width in (("resnet50", 8), ("vit_b16", 32), ("efficientnet_b4", 8)):
        workload = make_workload("imagenet", 0, **IMAGES, model=model, width=width)
        optimizer = torch.optim.AdamW(workload.model.parameters(), lr=1e-3)
        for _ in range(10):
            optimizer.zero_grad()
            loss = workload.loss()
            loss.backward()                                                    # type: ignore[no-untyped-call]
            optimizer.step()
        assert torch.isfinite(loss) and set(workload.evaluate()) == {"val_loss", "val_accuracy"}


# ---- CIFAR-100


def test_cifar100_is_converted_without_loss_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL.Image", reason="needs Pillow, which encodes the images")
    pixels, labels = made_data.write_cifar100_pickles(tmp_path)
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path / "cache"))
    written = convert(tmp_path / "cifar-100-python", tmp_path / "data")
    assert [path.name for path in written] == ["cifar100_train_jpeg.npz", "cifar100_test_jpeg.npz"]
    decoded = np.load(decode_archive(written[0]))                              # (6, 3, 32, 32)
    order = np.random.default_rng(0).permutation(6)
    assert np.array_equal(decoded, pixels.reshape(6, 3, 32, 32)[order])
    assert np.load(written[0])["y"].tolist() == [labels[i] for i in order]
    monkeypatch.setenv("MANGO_DATA", str(tmp_path / "data"))
    workload = make_workload("cifar100_resnet", 0, width=4, units=1, batch=3, val_size=6)
    assert torch.isfinite(workload.loss()) and workload.steps_per_epoch == 2   # type: ignore[attr-defined]


def test_a_planted_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    for planted in (Evil(), {b"data": Evil(), b"fine_labels": [1]}):
        (tmp_path / "train").write_bytes(pickle.dumps(planted))
        with pytest.raises(ValueError, match=r"is no file of cifar-100-python: it refers to builtins\.exec.*refused"):
            read(tmp_path / "train")
    assert not (tmp_path / "ran").exists()
    others: list[object] = [{b"data": 3}, [1, 2], {b"data": np.zeros((2, 5), np.uint8), b"fine_labels": [1, 2]}]
    for content in others:
        (tmp_path / "train").write_bytes(pickle.dumps(content, protocol=3))
        with pytest.raises(ValueError, match=r"train (is no file of cifar-100-python|holds uint8 \(2, 5\) and 2 labels)"):
            read(tmp_path / "train")


def test_the_converter_fails_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_cifar100", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^convert_cifar100: .*train") as failed:
        main()
    assert "\n" not in str(failed.value)
