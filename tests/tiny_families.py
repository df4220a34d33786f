"""Tiny random models of every family with their own processors, built offline; no torchvision, no num2words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import tiny
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.smolvlm import processing_smolvlm

from vig.models import processors

TILE = 16
MEAN_STD = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


class Tiny(NamedTuple):
    """A family's model class, the config of a vocabulary and its special tokens' ids, and the processor."""

    model: type
    config: Callable[[dict, dict[str, int]], Any]
    processor: Callable[..., Any]
    image_text: str  # what the chat template writes for an image
    special: tuple[str, ...] = ()
    names: dict[str, str] = {}  # noqa: RUF012 - the tokenizer's named tokens; never written to


def tokenizer(family: str) -> tf.PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of the family."""
    entry = FAMILIES[family]
    special = [*dict.fromkeys([*tiny.SPECIAL, *entry.special, *entry.names.values()])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={token: id for id, token in enumerate([*special, *alphabet])}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = dict.fromkeys(special[3:])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(named),
        **entry.names,
    )


@functools.cache
def processor(family: str) -> Any:
    entry = FAMILIES[family]
    template = tiny.MARKED.replace("<image>\n", entry.image_text)
    return entry.processor(tokenizer(family), None if family == "paligemma" else template)


@functools.cache
def model(family: str) -> tf.PreTrainedModel:
    return model_for(family, tokenizer(family))


def model_for(family: str, named: tf.PreTrainedTokenizerFast) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    entry = FAMILIES[family]
    text = TEXT | {"vocab_size": len(named)}
    ids = {token: id for token, id in named.get_vocab().items() if token.startswith("<")}
    built = entry.model(entry.config(text, ids)).eval()
    with torch.no_grad():  # larger weights than transformers draws, so that pictures change the logits
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return built


def without_video(cls: type, *args, **options) -> Any:
    return processors.without_video(cls)(*args, video_processor=None, **options)


# --- the families ---


def llava_processor(named, template):
    size = {"height": TILE, "width": TILE}
    images = tf.CLIPImageProcessorPil(size=size, crop_size=size)
    return tf.LlavaProcessor(
        images, named, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip


def llava_config(text, ids):
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, patch_size=8), text_config=tf.LlamaConfig(**text),
        image_token_id=ids["<image>"], vision_feature_layer=-1,
    )  # fmt: skip


def llava_next_processor(named, template):
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
    )
    return tf.LlavaNextProcessor(
        images, named, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip


def llava_next_config(text, ids):
    return tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, patch_size=8), text_config=tf.LlamaConfig(**text),
        image_token_id=ids["<image>"], vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip


def onevision_processor(named, template):
    images = tf.LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS, **MEAN_STD
    )
    return without_video(
        tf.LlavaOnevisionProcessor, images, named, num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=template,
    )  # fmt: skip


def onevision_config(text, ids):
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, patch_size=4, vision_use_head=False),
        text_config=tf.Qwen2Config(**text), image_token_id=ids["<image>"], video_token_id=ids["<video>"],
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip


def qwen_processor(cls):
    def build(named, template):
        images = tf.Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 40 * 40}
        )
        return without_video(cls, images, named, chat_template=template)

    return build


def qwen_config(cls, vision):
    def build(text, ids):
        shared = {"patch_size": 4, "num_heads": 2, "depth": 2}
        return cls(
            vision_config=vision | shared, text_config=text | {"rope_parameters": ROPE},
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        )  # fmt: skip

    return build


def idefics_processor(cls, images):
    def build(named, template):
        processing_smolvlm.num2words = str  # spells the number of frames of a video
        images_processor = images(size={"longest_edge": 3 * TILE}, max_image_size={"longest_edge": TILE})
        make = (
            without_video
            if cls is tf.SmolVLMProcessor
            else lambda cls, *args, **options: cls(*args, **options)
        )
        return make(cls, images_processor, named, image_seq_len=1, chat_template=template)

    return build


def idefics_config(cls, vision):
    def build(text, ids):
        return cls(
            vision_config=vision(**VISION, patch_size=8), text_config=tf.LlamaConfig(**text),
            image_token_id=ids["<image>"], scale_factor=2, pad_token_id=0,
        )  # fmt: skip

    return build


def internvl_processor(named, template):
    images = tf.GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=6)
    return without_video(tf.InternVLProcessor, images, named, image_seq_length=4, chat_template=template)


def internvl_config(text, ids):
    vision = tf.InternVLVisionConfig(**(VISION | {"image_size": [TILE, TILE]}), patch_size=[4, 4])
    return tf.InternVLConfig(
        vision_config=vision, text_config=tf.Qwen2Config(**text), image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )  # fmt: skip


def aya_processor(named, template):
    images = tf.GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=6)
    return tf.AyaVisionProcessor(
        images, named, patch_size=4, img_size=TILE, downsample_factor=2, chat_template=template
    )


def aya_config(text, ids):
    return tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, patch_size=4, vision_use_head=False),
        text_config=tf.Cohere2Config(**text, logit_scale=0.25, sliding_window=64),
        image_token_index=ids["<|IMG_PATCH|>"], alignment_intermediate_size=32,
    )  # fmt: skip


def gemma3_processor(named, template):
    images = tf.Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE})
    return tf.Gemma3Processor(images, named, image_seq_length=4, chat_template=template)


def gemma3_config(text, ids):
    return tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION, patch_size=4),
        text_config=tf.Gemma3TextConfig(**text, sliding_window=64, final_logit_softcapping=3.0),
        mm_tokens_per_image=4, image_token_id=ids["<image_soft_token>"], boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
    )  # fmt: skip


def paligemma_processor(named, template):
    images = tf.SiglipImageProcessorPil(size={"height": TILE, "width": TILE})
    images.image_seq_length = 4
    return tf.PaliGemmaProcessor(images, named, chat_template=template)


def paligemma_config(text, ids):
    vision = tf.SiglipVisionConfig(**VISION, patch_size=8, vision_use_head=False, projection_dim=32)
    return tf.PaliGemmaConfig(
        vision_config=vision,
        text_config=tf.Gemma2Config(**text, final_logit_softcapping=4.0),
        image_token_id=ids["<image>"],
        projection_dim=32,
    )


IDEFICS = (
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)  # fmt: skip
QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

FAMILIES: dict[str, Tiny] = {
    "llava": Tiny(tf.LlavaForConditionalGeneration, llava_config, llava_processor, "<image>\n"),
    "llava_next": Tiny(
        tf.LlavaNextForConditionalGeneration, llava_next_config, llava_next_processor, "<image>\n"
    ),
    "llava_onevision": Tiny(
        tf.LlavaOnevisionForConditionalGeneration, onevision_config, onevision_processor, "<image>\n",
        ("<video>",),
    ),
    "qwen2_vl": Tiny(
        tf.Qwen2VLForConditionalGeneration,
        qwen_config(tf.Qwen2VLConfig, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
        qwen_processor(tf.Qwen2VLProcessor), QWEN_IMAGE, QWEN,
    ),
    "qwen2_5_vl": Tiny(
        tf.Qwen2_5_VLForConditionalGeneration,
        qwen_config(
            tf.Qwen2_5_VLConfig,
            {
                "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "fullatt_block_indexes": [1],
                "window_size": 16,
            },
        ),
        qwen_processor(tf.Qwen2_5_VLProcessor), QWEN_IMAGE, QWEN,
    ),
    "qwen3_vl": Tiny(
        tf.Qwen3VLForConditionalGeneration,
        qwen_config(
            tf.Qwen3VLConfig,
            {
                "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
        ),
        qwen_processor(tf.Qwen3VLProcessor), QWEN_IMAGE, QWEN,
    ),
    "idefics3": Tiny(
        tf.Idefics3ForConditionalGeneration, idefics_config(tf.Idefics3Config, tf.Idefics3VisionConfig),
        idefics_processor(tf.Idefics3Processor, tf.Idefics3ImageProcessorPil), "<image>\n", IDEFICS,
    ),
    "smolvlm": Tiny(
        tf.SmolVLMForConditionalGeneration, idefics_config(tf.SmolVLMConfig, tf.SmolVLMVisionConfig),
        idefics_processor(tf.SmolVLMProcessor, tf.SmolVLMImageProcessorPil), "<image>\n", IDEFICS,
    ),
    "internvl": Tiny(
        tf.InternVLForConditionalGeneration, internvl_config, internvl_processor, "<IMG_CONTEXT>\n", (),
        {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "aya_vision": Tiny(
        tf.AyaVisionForConditionalGeneration, aya_config, aya_processor, "<image>\n",
        ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL"),
    ),
    "gemma3": Tiny(
        tf.Gemma3ForConditionalGeneration, gemma3_config, gemma3_processor, "<start_of_image>\n", (),
        {
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        },
    ),
    "paligemma": Tiny(tf.PaliGemmaForConditionalGeneration, paligemma_config, paligemma_processor, "<image>"),
}  # fmt: skip
