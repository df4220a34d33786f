"""Model families: how to load them, where their pictures lie in the batch, and the proofs at start.

The model itself is transformers' own class. A family only says how pictures lie in the processor's pixel inputs
(`vig.models.pixels`), so that null images are made on the device from the clean pixels. Before anything is scored, the
loaded model proves on one real batch that its last hidden state times its head is its own logits, that a later token
does not change an earlier row, and that the pictures lie where the family says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from vig.models.pixels import (
    Layout,
    Patches,
    Picture,
    Sizes,
    Tiles,
    any_resolution,
    masked_tiles,
    optimal_canvas,
    plain,
    same_shapes,
)
from vig.models.processors import load_processor
from vig.training.loss import HeadTransform, find_head, head_replaced, verify_head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelError(ValueError):
    """The model cannot be loaded, or does not do what scoring needs; says what, and what helps."""


@dataclass(frozen=True)
class Family:
    """One model_type of transformers, and where pictures lie in its pixel inputs.

    `family_of` binds it to a processor, whose settings say how pictures were cut. sizes: for each sample of the
    batch, the (height, width) of its decoded images (`Encoded.sizes`).
    """

    name: str
    model_type: str
    layout: Layout
    processor: Any = None

    def pictures(self, pixels: dict[str, Tensor], sizes: Sizes) -> list[Picture]:
        """The pictures (C, H, W) of a batch without their padding, tiles put together; a thumbnail counts as one.

        Raises ModelError where the pixel inputs are not what the processor's settings make of images of such sizes.
        """
        try:
            return self.layout.take(pixels, sizes, self.processor)
        except ValueError as error:
            raise ModelError(f"{self.name}: {error}") from error

    def check(self, pixels: dict[str, Tensor], sizes: Sizes) -> None:
        """Raises ModelError where `pictures` would."""
        try:
            self.layout.check(pixels, sizes, self.processor)
        except ValueError as error:
            raise ModelError(f"{self.name}: {error}") from error

    def put_back(
        self, pixels: dict[str, Tensor], sizes: Sizes, pictures: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The same pixel inputs with other pictures in the places of `pictures`' own; padding stays as it is."""
        return self.layout.put_back(pixels, sizes, self.processor, pictures)

    def null_pixels(
        self, pixels: dict[str, Tensor], sizes: Sizes, make: Callable[[Tensor, list[int]], Tensor]
    ) -> dict[str, Tensor]:
        """The pixel inputs with every picture replaced by make(pictures (n, C, H, W), numbers of their images)."""
        pictures = self.pictures(pixels, sizes)
        made: list[Tensor] = [picture.pixels for picture in pictures]
        for places in same_shapes(pictures):
            stacked = torch.stack([pictures[place].pixels for place in places])
            nulls = make(stacked, [pictures[place].image for place in places])
            for place, null in zip(places, nulls, strict=True):
                made[place] = null
        return self.put_back(pixels, sizes, made)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("LLaVA-1.5, ShareGPT4V", "llava", Tiles(plain)),
        Family("LLaVA-NeXT", "llava_next", Tiles(any_resolution)),
        Family("LLaVA-OneVision", "llava_onevision", Tiles(any_resolution)),
        Family("Qwen2-VL", "qwen2_vl", Patches()),
        Family("Qwen2.5-VL", "qwen2_5_vl", Patches()),
        Family("Qwen3-VL", "qwen3_vl", Patches()),
        Family("Idefics3", "idefics3", Tiles(masked_tiles, keep_from_zero=True)),
        Family("SmolVLM", "smolvlm", Tiles(masked_tiles, keep_from_zero=True)),
        Family("InternVL", "internvl", Tiles(optimal_canvas)),
        Family("Gemma 3", "gemma3", Tiles(plain)),
        Family("PaliGemma", "paligemma", Tiles(plain)),
    )
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be scored with: the model in eval mode, its processor, its family, and where it came from."""

    model: PreTrainedModel
    processor: Any
    family: Family
    name: str
    revision: str | None = None


def load(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads a checkpoint (a folder, or a name on the hub) through transformers' auto classes.

    dtype: "float32", "bfloat16", "float16" or "auto" (what the checkpoint is stored in; float32 on a CPU without
        bfloat16 instructions is not chosen for you). device: "cuda" where there is one, else "cpu".
    Only safetensors weights are read, and no code from the checkpoint runs unless trust_remote_code is set.
    Raises ModelError.
    """
    name = str(name)
    check_dtype(dtype)
    check_device(device)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        family_of(config)
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=DTYPES.get(dtype, "auto"), use_safetensors=True, attn_implementation=attn, **options
        )
        processor = load_processor(name, **options)
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"cannot load {name}: {_reason(error, name)}") from error
    return as_loaded(model, processor, name=name, revision=revision, device=device)


def check_dtype(dtype: str) -> None:
    """Raises ModelError for a dtype that no checkpoint can be loaded in."""
    if dtype not in (*DTYPES, "auto"):
        raise ModelError(f"dtype = {dtype!r}, expected auto, {', '.join(DTYPES)}")


def device_for(device: str | torch.device | None) -> torch.device:
    """The device that a checkpoint is loaded to: the one given, else the GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def device_named(device: str | torch.device) -> torch.device:
    """Raises ModelError for what names no device on any machine."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise _no_device(device, error) from error


def _no_device(device: str | torch.device, error: Exception) -> ModelError:
    reason = str(error).partition("\n")[0].rstrip(". ")
    return ModelError(f"device = {str(device)!r}: {reason}. Use cuda, cuda:1, cpu, ...")


def check_device(device: str | torch.device | None) -> None:
    """Raises ModelError where torch has no such device here."""
    if device is None:
        return
    device = device_named(device)
    try:
        here = torch.get_device_module(device)
        found = here.device_count() if here.is_available() else 0
    except (RuntimeError, AttributeError) as error:
        raise _no_device(device, error) from error
    if (device.index or 0) >= found:
        raise ModelError(
            f"device = {str(device)!r}, but torch {torch.__version__} finds {found} {device.type} devices here. Use "
            "another one (cpu), or install the torch build and the driver for it"
        )


def _reason(error: Exception, name: str) -> str:
    """What went wrong, in a sentence, and what helps."""
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file() and not (Path(name) / "config.json").exists():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        return (
            f"it is a PEFT adapter of {base}, not a model. Merge it once: "
            f"merged = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained({base!r}), {name!r})"
            f".merge_and_unload(); merged.save_pretrained('merged'); "
            f"AutoProcessor.from_pretrained({name!r}).save_pretrained('merged')"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = lines[0].rstrip(". ")
    pickled = sorted(path.name for path in Path(name).glob("*.bin")) if Path(name).is_dir() else []
    if "safetensors" in str(error):
        found = f" (found {', '.join(pickled)})" if pickled else ""
        return (
            f"{first}{found}. Only safetensors are read, since pickled weights can run code. Where you trust them, "
            "convert them once: load the model with transformers and save_pretrained it"
        )
    if "trust_remote_code" in str(error):
        return f"{first}. Such code runs only with --trust-remote-code; read it first"
    if isinstance(error, ImportError):
        return " ".join(lines)
    return f"{first}. Give a folder with config.json and *.safetensors, or a name on the hub"


def as_loaded(
    model: PreTrainedModel,
    processor: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """Wraps a model and processor that are already in memory. Raises ModelError for an unknown family."""
    family = family_of(model.config, processor)
    check_device(device)
    if device is None:
        device = device_for(None) if model.device.type == "cpu" else model.device
    name = name or model.config.name_or_path or type(model).__name__
    revision = revision or getattr(model.config, "_commit_hash", None)
    return LoadedModel(model.to(device).eval(), processor, family, name, revision)


def family_of(config: Any, processor: Any = None) -> Family:
    """The family of a checkpoint's config, bound to its processor. Raises ModelError where none fits."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(f"{family.model_type} ({family.name})" for family in FAMILIES.values())
        raise ModelError(
            f"model_type {config.model_type!r} is not supported; supported: {known}. "
            "CONTRIBUTING.md says how a family is added"
        )
    if getattr(getattr(processor, "image_processor", None), "do_pan_and_scan", None):
        raise ModelError(
            "do_pan_and_scan shows crops of a picture as pictures of their own, whose null would not be that of the "
            "picture. Set processor.image_processor.do_pan_and_scan = False"
        )
    return replace(family, processor=processor)


def context_length(loaded: LoadedModel) -> int | None:
    """The longest sequence, in tokens, that the text model has positions for; None where it does not say."""
    return getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)


@torch.inference_mode()
def prove(
    loaded: LoadedModel,
    inputs: dict[str, Tensor],
    sizes: Sizes = ((),),
    last_answers: Sequence[int] | None = None,
) -> HeadTransform:
    """Checks the facts that scoring stands on, on one real batch. Returns what the model does to its logits.

    1. hidden state x head, with that scale and softcap, equals the model's own logits;
    2. attention is causal over the answers: another last answer token leaves the bits of the rows before it;
    3. the pictures of the batch, taken out and put back, are the pixel inputs again.
    sizes: (height, width) of the images of each sample. last_answers: where each row's last answer token stands; its
    last token unless given. Raises ModelError with the values.
    """
    try:
        transform = verify_head(loaded.model, inputs)
    except ValueError as error:
        raise ModelError(f"{loaded.name}: {error}") from error
    _prove_causal(loaded, inputs, last_answers)
    if any(sizes):
        _prove_layout(loaded, inputs, sizes)
    return transform


def _prove_causal(loaded: LoadedModel, inputs: dict[str, Tensor], last_answers: Sequence[int] | None) -> None:
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    last = inputs["attention_mask"].sum(dim=1) - 1
    if last_answers is not None:  # an image may follow, whose placeholders must stay
        last = last.new_tensor(last_answers)
    for row, end in enumerate(last.tolist()):
        changed["input_ids"][row, end] = _another_token(loaded.model, inputs["input_ids"][row, : end + 1])
    hidden = hidden_at_head(loaded.model, inputs)
    before = torch.arange(hidden.shape[1], device=last.device) < last[:, None]
    moved = (hidden_at_head(loaded.model, changed) - hidden)[before].abs()
    if not (moved == 0).all():
        raise ModelError(
            f"{loaded.name}: changing a later token moves earlier hidden states by {float(moved.max()):.3g}, so it is "
            "not causal over the answer and cannot be scored token by token"
        )


def _another_token(model: PreTrainedModel, ids: Tensor) -> int:
    """An ordinary token that differs from the last of ids (T,): one that stands before it, no image's placeholder."""
    config = model.config.to_dict()
    special = {value for name, value in config.items() if name.endswith(("token_id", "token_index"))}
    ordinary = [id for id in ids.tolist() if id not in special and id != int(ids[-1])]
    return ordinary[-1] if ordinary else (int(ids[-1]) + 1) % model.get_input_embeddings().weight.shape[0]


def _prove_layout(loaded: LoadedModel, inputs: dict[str, Tensor], sizes: Sizes) -> None:
    pictures = loaded.family.pictures(inputs, sizes)
    again = loaded.family.put_back(inputs, sizes, [picture.pixels for picture in pictures])
    if not torch.equal(again["pixel_values"], inputs["pixel_values"]):
        raise ModelError(
            f"{loaded.name}: its pixel inputs {tuple(inputs['pixel_values'].shape)} are not laid out like those of "
            f"{loaded.family.name}. Score with the processor that the checkpoint came with"
        )


def hidden_at_head(model: PreTrainedModel, inputs: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
    """What the model hands to its LM head: (B, T, D) hidden states, or (N, D) of the flat positions `rows` (N,).

    The model's own forward runs up to its head; no logits are computed. Pixels are cast to the model's dtype.
    """
    taken = None

    def take(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        nonlocal taken
        taken = hidden if rows is None else hidden.reshape(-1, hidden.shape[-1])[rows]
        return hidden.new_zeros(1, 1, 1)  # the logits that nobody reads

    cast = {
        name: value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with head_replaced(find_head(model), take):
        model(**cast, use_cache=False)
    return taken
