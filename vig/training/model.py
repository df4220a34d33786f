"""The model of a training run: loaded at the revision that was scored, frozen in part or given LoRA adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import nn

from vig.models.families import ModelError, vision_tower_patterns
from vig.models.lm_head import is_sharded, unwrap
from vig.models.loading import LoadedModel, device_named, hub_revision, load, places_of
from vig.store.fingerprints import weights_fingerprint
from vig.training.settings import TrainError, TrainSettings, WrongSetting


def choose_device(device: str | torch.device | None, processes: PartialState) -> torch.device:
    if device is None:
        return processes.device
    if processes.num_processes > 1:
        raise TrainError(
            f"device = {str(device)!r}, but each of the {processes.num_processes} processes has a device of its own. "
            "Leave it out"
        )
    try:
        return device_named(device)
    except ModelError as error:
        raise WrongSetting(str(error)) from error


class ModelToTrain(NamedTuple):
    """A model to train, and where it came from."""

    name: str
    revision: str | None
    model: nn.Module
    processor: Any


def load_model(
    model: Any,
    processor: Any,
    settings: TrainSettings,
    device: torch.device,
    scored: Mapping[str, Any],  # the settings of the selection's scores
    options: dict[str, Any],  # of `load`
) -> ModelToTrain:
    """The model with float32 weights (16-bit ones stay only where LoRA freezes them), and its processor."""
    if isinstance(model, str | Path):
        frozen = settings.lora_rank and computes_in(settings, device) == torch.bfloat16
        options = options | {"revision": _revision(str(model), options["revision"], scored)}
        place = "cpu" if settings.fsdp else device  # no device could hold the whole
        model = load(model, dtype="bfloat16" if frozen else "float32", device=place, **options)
    if isinstance(model, LoadedModel):
        _check_whole(model.model)
        revision = model.revision or weights_fingerprint(model.name)
        return ModelToTrain(model.name, revision, model.model, processor or model.processor)
    _check_whole(model)
    if processor is None:
        raise TrainError("a loaded model was given without its processor. Give processor=")
    return ModelToTrain(model.config.name_or_path or type(model).__name__, None, model, processor)


def revision_here(name: str, asked: str | None, scored: Mapping[str, Any]) -> str | None:
    """The revision that `load_model` would find, without loading the weights."""
    return hub_revision(name, _revision(name, asked, scored)) or weights_fingerprint(name)


def load_trained(
    out: Path,
    base: str,
    settings: TrainSettings,
    device: torch.device,
    scored: Mapping[str, Any],
    options: dict[str, Any],
) -> nn.Module:
    """The model that a finished run left in its folder, in eval mode; with adapters around its base."""
    if not settings.lora_rank:
        return load_model(out, None, settings, device, {}, options | {"revision": None}).model.eval()
    from peft import PeftModel

    model = load_model(base, None, settings, device, scored, options).model
    return PeftModel.from_pretrained(model, out).eval()


def _check_whole(model: nn.Module) -> None:
    """Raises TrainError for a model in memory that is in parts already."""
    if len(places_of(model)) > 1 or any(is_sharded(parameter) for parameter in model.parameters()):
        raise TrainError(
            "the model is in parts already (device_map, tensor parallelism or FSDP), and this loop takes whole ones. "
            "Give its name and fsdp=True, or use SelectiveTrainer"
        )


def _revision(name: str, asked: str | None, scored: Mapping[str, Any]) -> str | None:
    """What was asked for, or else what this very model was scored at; folders have no revisions."""
    recorded = scored.get("revision") if scored.get("model") == name and not Path(name).is_dir() else None
    if asked and recorded and asked != recorded:
        raise TrainError(
            f"revision = {asked!r}, but the selection was scored with {name} at {recorded!r}. Leave it out to train "
            "that one, or score again at this one"
        )
    return asked or recorded


def prepare(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """Freezes what `settings` say, or puts LoRA adapters around the frozen model."""
    if settings.lora_rank:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise TrainError('LoRA needs peft: pip install "vig-kernels[trl]"') from error
        alpha = settings.lora_alpha or 2 * settings.lora_rank
        model = get_peft_model(
            model, LoraConfig(r=settings.lora_rank, lora_alpha=alpha, target_modules=settings.lora_targets)
        )
    towers = vision_tower_patterns(unwrap(model).config.model_type)
    frozen = towers if settings.freeze is None else settings.freeze
    for pattern in () if frozen == ("none",) else frozen:
        found = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not found and settings.freeze is not None:
            names = [name for name, _ in model.named_parameters()]
            some = ", ".join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))
            raise TrainError(f"freeze = {pattern!r} matches no parameter. They are called {some}, ...")
        for parameter in found:
            parameter.requires_grad_(False)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise TrainError(
            f"every parameter is frozen, by freeze = {', '.join(map(repr, frozen))}: nothing to train. Give fewer "
            "patterns, or none to freeze nothing"
        )
    for name, parameter in trained:
        if parameter.dtype != torch.float32:
            raise TrainError(
                f"{name} is {parameter.dtype}: AdamW's small steps would be rounded away. Load the model with "
                "dtype float32; the forward still runs in bfloat16"
            )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def context(model: nn.Module) -> int | None:
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)


def computes_in(settings: TrainSettings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        able = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if able else torch.float32
    return getattr(torch, settings.dtype)
