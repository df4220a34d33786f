"""Inside a batch the scorer's own code never waits for the device; it does so once, behind the batch, for values."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny_families
import torch
from far_device import FAR, FarDevice, FarTensor, moved
from naive_families import SAMPLES, WITH_IMAGES

from vig.models.families import FAMILIES
from vig.models.null_image import NULLS
from vig.models.transfer import to_device
from vig.scoring.loader import load_record
from vig.scoring.scorer import Scorer
from vig.training import loop
from vig.training.settings import TrainSettings

TEXT_ONLY = [one for one in SAMPLES if not one.images]


def own_waits(family: str, samples: list = WITH_IMAGES, **options) -> list[str]:
    """Where vig waits for the far device while it scores one batch, whose values are those of the CPU."""
    model = copy.deepcopy(tiny_families.model(family))
    one = Scorer(model, tiny_families.processor(family), device="cpu", backend="torch", **options)
    items = [load_record(sample, one.encoder, one.null.stage) for sample in samples]
    views = [item.view for item in items]
    nulls = [item.null_view for item in items] if one.null.stage == "prompt" else None
    expected = one.passes.score(views, nulls)
    one.passes.features.clear()
    with torch.inference_mode(), FarDevice() as device:
        moved(model)
        found = one.passes.score(views, nulls)
    assert device.copies >= 4, "the batch was not on the device"
    for value, other in zip(found, expected, strict=True):
        (*passes, stats), (*of_cpu, stats_of_cpu) = value, other
        assert stats.keys() == stats_of_cpu.keys() and bool(stats) == ("stats" in options)
        pairs = zip((*passes, *stats.values()), (*of_cpu, *stats_of_cpu.values()), strict=True)
        for ours, theirs in pairs:
            assert ours is theirs is None or abs(ours - theirs).max() < 1e-5
    ours = [wait for wait in device.waits if wait.is_ours]
    assert ours[-1] == device.waits[-1], "something was waited for behind the values"
    return [f"{wait.op} {wait.where.split()[-1]}" for wait in ours]


THE_VALUES = ["aten::to to the CPU _per_sample"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_waited_for_once(family):
    """Shared rows, samples alone, several images; packed, or padded where the family is not packed."""
    assert own_waits(family) == THE_VALUES


@pytest.mark.parametrize("null", [name for name, row in NULLS.items() if row.stage != "image"])
def test_no_null_image_waits(null):
    assert own_waits("llava", null=null) == THE_VALUES


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen3_vl"])
def test_samples_apart_do_not_wait_either(family):
    assert own_waits(family, share=False) == THE_VALUES


def test_text_alone_does_not_wait():
    assert own_waits("llava", TEXT_ONLY) == THE_VALUES


def test_statistics_come_with_the_values():
    assert own_waits("llava", stats=("kl", "entropy")) == THE_VALUES


def test_a_micro_batch_of_training_is_copied_without_a_wait(monkeypatch):
    given = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "pixel_values": torch.ones(1, 3, 4, 4)}
    one, seen = torch.zeros((), requires_grad=True), []
    monkeypatch.setattr(loop, "selective_loss", lambda model, batch, **_: seen.append(batch) or one * 1)
    stepper = SimpleNamespace(
        device=FAR, settings=TrainSettings(), world=1, model=None, _autocast=nullcontext
    )
    with FarDevice() as device:
        loop.Stepper._backward(stepper, [given], [3], 3)
    assert device.copies == 2 and not device.waits
    assert all(isinstance(value, FarTensor) for value in seen[0].values()) and seen[0].keys() == given.keys()


WAITS = {
    "a number": lambda far: far.sum().item(),
    "a bool": lambda far: bool(far.sum() > 0),
    "an int": lambda far: int(far[0]),
    "a list": lambda far: far.tolist(),
    "text": lambda far: f"{far.sum()}",
    "places": lambda far: far.nonzero(),
    "places of a condition": lambda far: torch.where(far > 1),
    "chosen by a mask": lambda far: far[far > 1],
    "set by a mask": lambda far: far.clone().__setitem__(far > 1, 0),
    "masked_select": lambda far: far.masked_select(far > 1),
    "equal": lambda far: torch.equal(far, far + 1),
    "unique": lambda far: far.unique(),
    "repeated": lambda far: far.repeat_interleave(far),
    "to the CPU": lambda far: far.cpu(),
    "copied to the CPU": lambda far: torch.zeros(4, dtype=torch.int64).copy_(far),
    "from the CPU": lambda far: torch.arange(4).to(FAR),
    "copied from the CPU": lambda far: far.clone().copy_(torch.arange(4)),
    "a list to it": lambda far: torch.tensor([1, 2], device=FAR),
    "a list like it": lambda far: far.new_tensor([1, 2]),
    "an index on the CPU": lambda far: far[torch.tensor([0, 1])],
}
DOES_NOT_WAIT = {
    "arithmetic": lambda far: (far * 2 + 1).float().softmax(0),
    "an index on it": lambda far: far[far.clamp(max=3)],
    "filled by a mask": lambda far: far.masked_fill(far > 1, 0),
    "a choice": lambda far: torch.where(far > 1, far, 0),
    "a part": lambda far: far[1:3],
    "made on it": lambda far: torch.zeros(3, device=FAR),
    "not waited for": lambda far: to_device(torch.arange(4), FAR),
    "already there": lambda far: to_device(far, FAR),
    "on the CPU": lambda far: torch.arange(4)[torch.arange(4) > 2].tolist(),
}


@pytest.mark.parametrize("name", [*WAITS, *DOES_NOT_WAIT])
def test_what_the_stand_in_calls_a_wait(name):
    with torch.inference_mode(), FarDevice() as device:
        far = FarTensor(torch.arange(4))
        (WAITS | DOES_NOT_WAIT)[name](far)
    assert len(device.waits) == (name in WAITS), device.waits


def test_a_copy_to_a_gpu_is_from_pinned_memory():
    called = []
    value = SimpleNamespace(device=torch.device("cpu"))
    value.pin_memory = lambda: called.append("pin_memory") or value
    value.to = lambda device, non_blocking: called.append((str(device), non_blocking)) or "copied"
    assert to_device(value, torch.device("cuda", 1)) == "copied" and called == [
        "pin_memory",
        ("cuda:1", True),
    ]
