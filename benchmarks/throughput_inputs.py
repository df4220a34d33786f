"""What the suite `throughput` scores: random models of the form of real ones, and samples of drawn photographs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vig.data.sample import Sample

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)


def tokenizer(special: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=list(special[3:]),
    )  # fmt: skip


def text_config(layers: int, vocabulary: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def llava() -> tuple[Any, Any]:
    """CLIP 6 x 256, 224 px, patch 16; Llama 12 x 576; vocabulary 49152."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=224,
        patch_size=16,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text_config(12, 49152),
        image_token_id=3,
        vision_feature_layer=-1,
    )
    size = {"height": 224, "width": 224}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size=size, crop_size=size), tokenizer(["<pad>", "<s>", "</s>", "<image>"]),
        patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    """SigLIP 12 x 768, 512 px, patch 16, one tile an image; Llama 30 x 576; vocabulary 49280; 64 tokens an image."""
    vision = transformers.SmolVLMVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512,
        patch_size=16,
    )  # fmt: skip
    config = transformers.SmolVLMConfig(
        vision_config=vision,
        text_config=text_config(30, 49280),
        image_token_id=3,
        scale_factor=4,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    special = [
        "<pad>",
        "<s>",
        "</s>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
    ]
    edge = {"longest_edge": 512}
    images = transformers.Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    # SmolVLM's own processor differs in videos only, and asks for torchvision
    processor = transformers.Idefics3Processor(
        images, tokenizer(special), image_seq_len=64, chat_template=TEMPLATE
    )
    return transformers.SmolVLMForConditionalGeneration(config), processor


def make_samples(folder: Path, n_samples: int, questions: int) -> list[Sample]:
    """Questions of 8 to 32 tokens, answers of 3 to 80 (short ones are more frequent), photographs of 320 x 240."""
    draw = random.Random(0)
    samples = []
    for number in range(n_samples):
        path = folder / f"{number // questions}.jpg"
        if not path.exists():
            noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(path)
        question = "q" * draw.randint(8, 32)
        answer = "a" * round(3 * (80 / 3) ** draw.random())
        messages = (
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        )
        samples.append(Sample(f"made#{number}", str(number), (path,), messages, "made"))
    return samples
