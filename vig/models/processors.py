"""Loading a checkpoint's processor, also where what it needs for videos is not installed."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoProcessor


def load_processor(name: str, **options: Any) -> Any:
    """The processor of a checkpoint (folder, or name on the hub), through transformers' auto class.

    Several processors hold a video processor, which needs torchvision to exist at all. Without torchvision, and
    where one was saved without its video processor, they are loaded without it: images and text go the same way.
    options: revision, trust_remote_code.
    """
    try:
        return AutoProcessor.from_pretrained(name, **options)
    except (ImportError, OSError) as error:
        if "VideoProcessor requires" not in str(error) and "load video processor" not in str(error):
            raise
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        config = AutoConfig.from_pretrained(name, **options)
        return without_video(PROCESSOR_MAPPING[type(config)]).from_pretrained(name, **options)


def without_video(cls: type) -> type:
    """The processor class with its video processor left out of what it is made of."""

    class StillImages(cls):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args, processor_dict, **options):
            return super().from_args_and_dict([*args, None], processor_dict, **options)

    StillImages.__name__ = StillImages.__qualname__ = cls.__name__
    return StillImages
