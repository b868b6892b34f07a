"""Promises of the published models: their sizes, no future, tied weights, and training by MANGO within its bytes.

Sizes are counted on the meta device, which holds no numbers. The shared promises of every workload are in
tests/test_workloads.py, which also makes the data sets used here.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mango import MANGO
from mango.layers import describe
from mango_env.run import TrainingRun
from mango_env.workloads import bert, gpt2, imagenet, initialise, llama, make_workload
from mango_env.workloads.data import drawing
from mango_env.workloads.efficientnet import EfficientNet, InvertedResidual
from mango_env.workloads.resnet import ResNet
from tests import made_data
from tests.test_workloads import made, sees_no_future

__all__ = ["made"]                                                             # the fixture
TINY = {"merges": made_data.MERGES, "context": 16, "size": "tiny", "batch": 4, "val_windows": 4}
BERT_VOCABULARY, BERT_POSITIONS = 30_522, 512


@pytest.fixture
def data(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The made-up data sets, for this test."""
    monkeypatch.setenv("MANGO_DATA", str(made))
    monkeypatch.setenv("MANGO_CACHE", str(made / "cache"))
    monkeypatch.syspath_prepend(str(made / "site"))
    return made


def gpt2_of(size: str) -> nn.Module:
    found = gpt2.SIZES[size]
    return gpt2.GPT2(found.width, found.depth, found.heads, 1024, found.merges + 257)


def llama_of(size: str) -> nn.Module:
    found = llama.SIZES[size]
    assert isinstance(found, llama.LlamaSize)
    return llama.Llama(found.width, found.depth, found.heads, 256, found.inner, found.merges + 257)


def bert_of(size: str) -> nn.Module:
    found = bert.SIZES[size]
    return bert.Bert(BERT_VOCABULARY, BERT_POSITIONS, found.width, found.depth, found.heads, separator=102)


def of_imagenet(name: str) -> nn.Module:
    return imagenet.MODELS[name](1000, 224, None, None)


@pytest.mark.parametrize(
    ("factory", "published"),
    [
        # torchvision's and, for the variants for small images, the usual ones
        (partial(ResNet, 18, 10, small=True), 11_173_962),
        (partial(ResNet, 50, 10, small=True), 23_520_842),
        (partial(ResNet, 18, 100, small=True), 11_220_132),
        (partial(ResNet, 50, 100, small=True), 23_705_252),
        (partial(ResNet, 18, 1000, small=False), 11_689_512),
        (partial(of_imagenet, "resnet50"), 25_557_032),
        (partial(of_imagenet, "vit_b16"), 86_567_656),
        (partial(of_imagenet, "efficientnet_b4"), 19_341_616),
        # GPT-2 as it was released, of 50,257 tokens and 1,024 positions
        (partial(gpt2_of, "124M"), 124_439_808),
        (partial(gpt2_of, "355M"), 354_823_168),
        (partial(gpt2_of, "774M"), 774_030_080),
        # BERT with its pooler, and our head of two classes (1,538 and 2,050); MiniLM likewise (770)
        (partial(bert_of, "minilm"), 22_713_216 + 770),
        (partial(bert_of, "base"), 109_482_240 + 1_538),
        (partial(bert_of, "large"), 335_141_888 + 2_050),
        # LLaMA of GaLore's table, of 32,000 tokens; 7B is LLaMA's own
        (partial(llama_of, "60M"), 58_073_600),
        (partial(llama_of, "130M"), 134_105_856),
        (partial(llama_of, "350M"), 367_969_280),
        (partial(llama_of, "1B"), 1_339_082_752),
        (partial(llama_of, "7B"), 6_738_415_616),
    ],
)
def test_a_published_model_has_the_published_number_of_parameters(factory: Callable[[], nn.Module], published: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in factory().parameters()) == published


def kinds(model: nn.Module) -> dict[str, str]:
    members = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return {layer.name: layer.kind for layer in describe([n for n, _ in members], [s for _, s in members])}


def test_layer_kinds_of_the_published_models_can_be_told_by_name() -> None:
    with torch.device("meta"):
        found = kinds(llama_of("60M"))
        assert {found[f"blocks.0.attn.{part}_proj.weight"] for part in "qkv"} == {"attention_in"}
        assert found["blocks.0.attn.o_proj.weight"] == "attention_out"
        assert found["blocks.0.mlp.gate.weight"] == found["blocks.0.mlp.up.weight"] == "mlp_up"
        assert (found["blocks.0.mlp.down.weight"], found["head.weight"]) == ("mlp_down", "head")
        assert found["embed.weight"] == "embedding"
        assert found["blocks.0.norm_attn.weight"] == "norm"
        found = kinds(bert_of("minilm"))
        assert {found[f"embed{part}.weight"] for part in ("", "_position", "_type")} == {"embedding"}
        assert found["blocks.0.attn.qkv.weight"] == "attention_in" and found["head.weight"] == "head"
        found = kinds(of_imagenet("efficientnet_b4"))
        assert set(found.values()) == {"conv", "norm", "head"}
        found = kinds(of_imagenet("resnet50"))
        assert set(found.values()) == {"conv", "norm", "head"}


def test_the_decoders_see_no_future() -> None:
    for model in (gpt2.GPT2(32, 2, 2, 16, 20), llama.Llama(32, 2, 2, 16, 48, 20)):
        sees_no_future(initialise(model, torch.Generator().manual_seed(0)))


def test_the_tied_tensor_of_gpt2_is_one_layer_and_moves_with_both_its_uses(data: Path) -> None:
    workload = make_workload("gpt2", 0, **TINY)
    names = [name for name, _ in workload.model.named_parameters()]
    assert [name for name in names if "embed" in name or "head" in name] == ["embed.weight", "embed_position.weight"]
    workload.loss().backward()                                                 # type: ignore[no-untyped-call]
    embedding: Any = workload.model.embed
    read = workload._data.train.unique()                                       # type: ignore[attr-defined]
    unread = [token for token in range(len(embedding.weight)) if token not in read]
    assert embedding.weight.grad[unread].abs().sum() > 0                       # as a head it has a gradient of every token
    optimizer = MANGO(workload.model.named_parameters(), lr=1e-3, memory_budget=0.25)
    assert [layer.name for layer in optimizer.layers].count("embed.weight") == 1


def test_rotation_does_not_depend_on_the_dtype_and_bfloat16_models_train(data: Path) -> None:
    plain, rounded = (make_workload("llama", 0, dtype=dtype, **TINY) for dtype in ("float32", "bfloat16"))
    assert torch.equal(plain.model.blocks[0].attn.rotation, rounded.model.blocks[0].attn.rotation)  # type: ignore
    assert {p.dtype for p in rounded.model.parameters()} == {torch.bfloat16}
    assert rounded.loss().item() == pytest.approx(plain.loss().item(), rel=0.02)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_recomputing_activations_changes_no_gradient(name: str, data: Path) -> None:
    options = TINY | ({"dropout": 0.2} if name == "gpt2" else {})
    gradients = []
    for recompute in (False, True):
        workload = make_workload(name, 0, recompute=recompute, **options)
        workload.loss().backward()                                             # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in workload.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_blocks_of_an_efficientnet_are_left_out_while_training_and_kept_on_average() -> None:
    block = initialise(InvertedResidual(8, 8, 1, 3, 1, dropped=0.5), torch.Generator().manual_seed(0))
    x = torch.randn(4000, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    with drawing(block, torch.Generator().manual_seed(2)), torch.no_grad():
        y = block(x)
    same = (y == x).flatten(1).all(1)
    assert abs(float(same.float().mean()) - 0.5) < 4 * (0.25 / len(x)) ** 0.5
    block.dropped = 0.0
    with torch.no_grad():
        whole = initialise(block, torch.Generator().manual_seed(0))(x)
    assert torch.allclose((y - x)[~same], 2 * (whole - x)[~same], atol=1e-4)
    block.eval()
    assert not torch.equal(block(x), x)


def test_sizes_that_there_are_not_are_named(data: Path) -> None:
    for name in ("gpt2", "llama", "bert_pairs"):
        with pytest.raises(ValueError, match=f"unknown size '3B' of workload '{name}'; known: "):
            make_workload(name, 0, size="3B")
    with pytest.raises(ValueError, match="unknown dtype 'float16' of workload 'gpt2'; known: float32, bfloat16"):
        make_workload("gpt2", 0, **TINY, dtype="float16")
    with pytest.raises(ValueError, match="unknown data 'web' of workload 'llama'; known: books, wikitext2"):
        make_workload("llama", 0, **TINY, data="web")
    with pytest.raises(ValueError, match="unknown model 'alexnet' of workload 'imagenet'; known: resnet50"):
        make_workload("imagenet", 0, model="alexnet")
    with pytest.raises(ValueError, match="depth=34 of a ResNet must be one of 18, 50"):
        ResNet(34, 10, small=True)
    with pytest.raises(ValueError, match=r"width=0 and depth=1.8 must be positive"):
        EfficientNet(10, width=0)
    with pytest.raises(ValueError, match=r"dropout=1.0 must be in \[0, 1\)"):
        make_workload("gpt2", 0, **TINY, dropout=1.0)


# ---- under MANGO

IMAGES = {"image_size": 32, "batch": 8, "depth": 1, "val_size": 8, "threads": 1}
MEMBERS: list[tuple[str, dict[str, Any]]] = [
    ("imagenet", IMAGES | {"model": "resnet50", "width": 8}),
    ("imagenet", IMAGES | {"model": "vit_b16", "width": 32}),
    ("imagenet", IMAGES | {"model": "efficientnet_b4", "width": 8}),
    ("cifar100_resnet", {"depth": 50, "width": 4, "units": 1, "batch": 8, "val_size": 8}),
    ("gpt2", TINY | {"dropout": 0.1}),
    ("llama", TINY),
    ("llama", TINY | {"dtype": "bfloat16", "depth": 1, "recompute": True}),
    ("bert_pairs", {"context": 24, "pairs": 100, "val_size": 20, "batch": 4}),
    ("bert_sst2", {"context": 16, "batch": 4}),
]


@pytest.fixture(params=MEMBERS, ids=lambda member: "-".join((member[0], *map(str, member[1].values())))[:40])
def run(request: pytest.FixtureRequest, data: Path) -> TrainingRun:
    """A tiny member of a family, trained by MANGO in an eighth of AdamW's bytes, one decision per step."""
    name, options = request.param
    return TrainingRun(name, 0, horizon=2, interval=1, memory_budget=0.125, policy="water-filling", workload_kwargs=options)


def test_two_steps_of_every_family_stay_within_the_bytes_and_can_be_forked(run: TrainingRun) -> None:
    first = run.advance()
    assert first.error is None and not run.diverged
    assert first.state_bytes_peak <= run.budget
    fork = run.fork()
    second, again = run.advance(), fork.advance()
    assert second.error is None and second.state_bytes_peak <= run.budget
    assert (second.losses == again.losses).all()
    measures = run.evaluate()
    assert measures == fork.evaluate()
    assert {"val_accuracy", "val_perplexity"} & set(measures)
