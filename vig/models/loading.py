"""Checkpoints through transformers' auto classes: model, processor, family, device."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from vig.data.kinds import kind_of
from vig.models.families import Family, ModelError, family_of
from vig.models.family_pixels import FamilyPixels
from vig.models.processors import load_processor
from vig.models.ranks import Ranks, join

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be scored with: in eval mode, with its processor, its family, and where it came from."""

    model: PreTrainedModel
    processor: Any
    family: Family
    name: str
    revision: str | None = None
    ranks: Ranks = field(default_factory=Ranks)  # that hold the model together

    @cached_property
    def pixels(self) -> FamilyPixels:
        """Where pictures lie in the pixel inputs that its processor makes."""
        return FamilyPixels(self.family, self.processor)


def load(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
    tensor_parallel_size: int = 1,
) -> LoadedModel:
    """Loads a checkpoint (a folder, or a name on the hub) through transformers' auto classes.

    dtype: "float32", "bfloat16", "float16" or "auto" (what the checkpoint is stored in; float32 on a CPU without
        bfloat16 instructions is not chosen for you). device: "cuda" where there is one, else "cpu".
    tensor_parallel_size: so many processes, which torchrun started, hold the model together (`vig.models.ranks`), each
        on the GPU of its local rank: decoder layers and LM head are sharded by transformers' plan, the vision tower and
        the projector are whole on each.
    Only safetensors weights are read, and no code from the checkpoint runs unless trust_remote_code is set.
    Raises ModelError.
    """
    name = str(name)
    check_dtype(dtype)
    check_device(device)
    refuse_other_kind(name)
    revision = hub_revision(name, revision)  # all files of one commit, which the scores record
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        family_of(config)
        parts = _parts(config, tensor_parallel_size)
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            attn_implementation=attn,
            **parts,
            **options,
        )
        processor = load_processor(name, **options)
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"cannot load {name}: {_reason(error, name)}") from error
    return as_loaded(model, processor, name=name, revision=revision, device=device)


def refuse_other_kind(name: str) -> None:
    """Raises ModelError for a path that is not there, a file, and a folder that another command than training wrote."""
    kind = kind_of(name)
    if kind is not None and kind.name in ("checkpoint", "adapter"):
        return
    means_a_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if means_a_path and not Path(name).exists():
        raise ModelError(
            f"cannot load {name}: there is no such folder. Give one with config.json and *.safetensors"
        )
    if kind is not None or Path(name).is_file():
        what = "a file" if kind is None else kind.text
        raise ModelError(
            f"cannot load {name}: it is {what}, not a checkpoint. Give a folder with config.json and *.safetensors, or "
            "a name on the hub"
        )


def hub_revision(name: str, revision: str | None = None) -> str | None:
    """The revision asked for, else the commit of a model on the hub; None for a folder. Raises ModelError."""
    if revision or Path(name).is_dir():
        return revision
    try:
        return extract_commit_hash(cached_file(name, "config.json"), None)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {name}: {_reason(error, name)}") from error


def _parts(config: Any, size: int) -> dict[str, Any]:
    """What `from_pretrained` takes to shard a model over `size` ranks, whose process group it makes.

    Raises ModelError where transformers has no plan for the family, or heads do not divide.
    """
    if size == 1:
        return {}
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"tensor_parallel_size = {size}, but transformers has no tensor-parallel plan for the layers of "
            f"{config.model_type} ({type(text).__name__}.base_model_tp_plan is empty): each rank would hold the whole "
            "model. Give --dtype bfloat16, or a GPU that holds it"
        )
    heads = {name: getattr(text, name, None) or 1 for name in ("num_attention_heads", "num_key_value_heads")}
    whole = math.gcd(*heads.values())
    if whole % size:
        fitting = ", ".join(str(n) for n in range(2, whole + 1) if whole % n == 0)
        counts = ", ".join(f"{name} = {count}" for name, count in heads.items())
        cure = f"Give one of {fitting}" if fitting else "It can only be held whole"
        raise ModelError(f"tensor_parallel_size = {size} does not divide {counts}. {cure}")
    join(size)
    return {"distributed_config": DistributedConfig(tp_size=size)}


def check_dtype(dtype: str) -> None:
    """Raises ModelError for a dtype that no checkpoint can be loaded in."""
    if dtype not in (*DTYPES, "auto"):
        raise ModelError(f"dtype = {dtype!r}, expected auto, {', '.join(DTYPES)}")


def device_for(device: str | torch.device | None) -> torch.device:
    """The device that a checkpoint is loaded to: the one given, else the GPU that is there; Apple's by name only."""
    if device:
        return torch.device(device)
    here = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu" if here is None or here.type == "mps" else here.type)


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
    adapter = adapter_cure(name)
    if adapter is not None:
        return adapter
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


def adapter_cure(name: str) -> str | None:
    """What a folder is, and what helps, where it holds a PEFT adapter and no model; else None."""
    adapter = Path(name) / "adapter_config.json"
    if not adapter.is_file() or (Path(name) / "config.json").exists():
        return None
    base = json.loads(adapter.read_text()).get("base_model_name_or_path")
    return (
        f"it is a PEFT adapter of {base}, not a model. Merge it once: "
        f"merged = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained({base!r}), {name!r})"
        f".merge_and_unload(); merged.save_pretrained('merged'); "
        f"AutoProcessor.from_pretrained({name!r}).save_pretrained('merged')"
    )


def as_loaded(
    model: PreTrainedModel,
    processor: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """Wraps a model and processor that are already in memory. Raises ModelError for an unknown family."""
    family = family_of(model.config)
    check_pictures_whole(processor)
    _check_one_device(model)
    check_device(device)
    if device is None:
        device = device_for(None) if model.device.type == "cpu" else model.device
    name = name or model.config.name_or_path or type(model).__name__
    return LoadedModel(model.to(device).eval(), processor, family, name, revision, Ranks.of(model))


def places_of(model: torch.nn.Module) -> list[str]:
    """The devices that accelerate has spread the layers over (``device_map="auto"``); none without a map."""
    return sorted({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})


def _check_one_device(model: PreTrainedModel) -> None:
    """Raises ModelError for a model whose layers lie on several devices (``device_map="auto"``)."""
    places = places_of(model)
    if len(places) > 1:
        raise ModelError(
            f"its layers are spread over {', '.join(places)} (device_map). Scoring wants them on one device: load it "
            "without device_map, or over several GPUs with torchrun and --tensor-parallel-size"
        )


def check_pictures_whole(processor: Any) -> None:
    """Raises ModelError for a processor that shows parts of a picture as pictures of their own."""
    if getattr(getattr(processor, "image_processor", None), "do_pan_and_scan", None):
        raise ModelError(
            "do_pan_and_scan shows crops of a picture as pictures of their own, whose null would not be that of the "
            "picture. Set processor.image_processor.do_pan_and_scan = False"
        )


def context_length(loaded: LoadedModel) -> int | None:
    """The longest sequence, in tokens, that the text model has positions for; None where it does not say."""
    return getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
