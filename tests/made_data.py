"""Small made-up data sets in the formats of the real ones: classes that colours, words and topics tell apart."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from mango_env.workloads import bert, initialise
from mango_env.workloads.bert import NAMES, Bert
from mango_env.workloads.bpe import byte_letters

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOPICS = (("sea", "ship", "sail"), ("king", "war", "sword"), ("love", "heart", "rose"), ("dog", "farm", "hay"))
COMMON = ("the", "and", "was", "of")
MERGES = 40                                                                    # of the made byte pairs
COLOURS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 30]])


def picture(rng: np.random.Generator, label: int, width: int, height: int) -> bytes:
    """A noisy JPEG of the colour of a label."""
    from PIL import Image

    pixels = np.clip(COLOURS[label % 4] + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_image_folder(root: Path) -> None:
    """`imagenet/train` and `imagenet/val` with four classes of images of several sizes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 5)):
        for label, name in enumerate(("n01", "n02", "n03", "n04")):
            folder = root / "imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{name}_{i}.JPEG").write_bytes(picture(rng, label, 40 + 4 * (i % 3), 48 - 6 * (i % 2)))


def write_cifar100(root: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 120), ("test", 40)):
        labels = (np.arange(count) % 4).astype(np.uint8)
        files = [np.frombuffer(picture(rng, int(label), 32, 32), np.uint8) for label in labels]
        offsets = np.cumsum([0, *map(len, files)]).astype(np.int32)
        np.savez(root / f"cifar100_{part}_jpeg.npz", jpeg=np.concatenate(files), offsets=offsets, y=labels)


def write_texts(root: Path) -> None:
    """Books whose paragraphs come in runs of one topic, and reviews told by their words."""
    rng = np.random.default_rng(0)
    for part, runs in (("train", 40), ("valid", 12)):
        paragraphs = []
        for run in range(runs):
            words = (*TOPICS[run % 4], *TOPICS[run % 4], *COMMON)
            paragraphs += [" ".join(rng.choice(words, 18)) for _ in range(12)]
        _compress(root / f"books_{part}.txt.gz", "\n\n".join(paragraphs))
    for part, count in (("train", 200), ("dev", 40)):
        rows = [(" ".join(rng.choice((*TOPICS[i % 2], *COMMON), 6)), i % 2) for i in range(count)]
        _compress(root / f"sst2_{part}.tsv.gz", "".join(f"{a}\t{b}\n" for a, b in [("sentence", "label"), *rows]))


def write_byte_pairs(root: Path) -> None:
    """A vocabulary in the format of GPT-2's, whose merges make the words of the texts."""
    merges: list[str] = []
    for word in (*COMMON, *(word for topic in TOPICS for word in topic)):
        grown = "Ġ"
        for letter in word:
            merges.append(f"{grown} {letter}")
            grown += letter
    merges = list(dict.fromkeys(merges))
    numbers = {letter: number for number, letter in enumerate(byte_letters().values())}
    numbers |= {pair.replace(" ", ""): 256 + i for i, pair in enumerate(merges)}
    assert len(merges) >= MERGES
    _compress(root / "gpt2_encoder.json.gz", json.dumps(numbers | {"<|endoftext|>": 256 + len(merges)}))
    _compress(root / "gpt2_vocab.bpe.gz", "\n".join(["#version: 0.2", *merges]) + "\n")


def write_encoder(root: Path) -> None:
    """A package like that of MiniLM, with a small encoder. Running its code is an error."""
    folder = root / "site" / bert.PACKAGE
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('data is read, code is not run')\n")
    words = [word for topic in (*TOPICS, COMMON) for word in topic]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "model" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128,
              "hidden_act": "gelu", "max_position_embeddings": 48}  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    model = initialise(Bert(len(pieces), 48, 32, 1, 2, 3), torch.Generator().manual_seed(0), 0.1, 0.02)
    for number in range(len(TOPICS)):                                          # as if trained: words of a topic are alike
        model.embed.weight.data[4 + 3 * number : 7 + 3 * number, number] = 1.0
    save_file(published(model), folder / "model" / "model.safetensors")


def published(model: Bert) -> dict[str, torch.Tensor]:
    """The weights of an encoder under BERT's published names: what `bert.renamed` turns back."""
    names = {ours: theirs for theirs, ours in NAMES.items()}
    found = {"embeddings.position_ids": torch.arange(4)[None]}                 # published files have it, it is no weight
    for name, parameter in model.named_parameters():
        stem, _, part = name.rpartition(".")
        tensor = parameter.detach().clone()
        if stem == "head":
            continue
        place, inside = "", stem
        if stem.startswith("blocks."):
            _, number, inside = stem.split(".", 2)
            place = f"encoder.layer.{number}."
        if inside == "attn.qkv":
            for which, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{place}attention.self.{which}.{part}"] = third.clone()
        else:
            found[f"{place}{names[inside]}.{part}"] = tensor
    return found


def write_cifar100_pickles(root: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """A folder `cifar-100-python` as its authors' files are, of six images a part; pixels and labels of the training part."""
    import pickle

    rng = np.random.default_rng(0)
    (root / "cifar-100-python").mkdir()
    made = []
    for part in ("train", "test"):
        data = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
        content = {b"data": data, b"fine_labels": [3, 99, 0, 7, 7, 50], b"coarse_labels": [0] * 6, b"filenames": [b"x.png"] * 6}
        text = pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (root / "cifar-100-python" / part).write_bytes(text)
        made.append((data, [3, 99, 0, 7, 7, 50]))
    return made[0]


def _compress(path: Path, text: str) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)


def write_all(root: Path) -> Path:
    """Every made data set below `root`; `site` in it is for `sys.path`."""
    for write in (write_image_folder, write_cifar100, write_texts, write_byte_pairs, write_encoder):
        write(root)
    return root
