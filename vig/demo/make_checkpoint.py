"""Make the tiny LLaVA that ships with the package: `python -m vig.demo.make_checkpoint FOLDER`.

Three stages, one thread, some ten minutes, every number drawn from one seed:

1. The vision tower learns to see: a linear head on each patch names the object and the colour there. This stands for
   a pretrained tower such as CLIP.
2. Alignment: tower, projector and language model learn captions, "what is in row two, column three?", "how many
   things are there?" and, without a picture, what colour a thing usually has.
3. A taste, a few steps long, of the one kind of question that tuning is to teach: "what colour is in row two, column
   three?", answered "the cup is red.". The checkpoint gets about two in three right. In these steps some pictures
   are blurred, by a random amount, and keep their true answers, as happens in data from the web: the model learns to
   fall back on what is usual when it cannot see, which is what a null image asks of it.

Written is a Hugging Face folder: LlavaForConditionalGeneration, its processor and its chat template.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vig.demo import scenes
from vig.demo.scenes import Scene, Turn
from vig_kernels import gaussian_blur

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|user|>", "<|assistant|>", "\n")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' %}{% generation %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% elif message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<image>\n' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXTS_PER_IMAGE = 3  # questions asked about each scene in one step
ALIGN_STEPS, TASTE_STEPS = 700, 70
BATCH = 32  # pictures of a step of stages 2 and 3
BLURRED = 6  # of them, in stage 3
PIXEL_MEAN = PIXEL_STD = 0.5


def make_processor():
    """Word-level tokenizer, CLIP image processor (Pillow) and chat template as a LlavaProcessor.

    The tokenizer is lossless: a word carries the blank before it, and decoding joins the pieces again.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    signs = {",", ".", "?", ":"}
    vocabulary = [*SPECIALS, *(word if word in signs else "▁" + word for word in scenes.words())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<|user|>", "<|assistant|>"],
        model_max_length=256,
        padding_side="right",
    )
    fast.add_tokens([AddedToken("\n", normalized=False)])
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": scenes.SIDE},
        crop_size={"height": scenes.SIDE, "width": scenes.SIDE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=scenes.CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(processor, seed: int):
    """An untrained LlavaForConditionalGeneration of 1.06 million parameters."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        image_size=scenes.SIDE,
        patch_size=scenes.CELL,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=scenes.GRID**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def pixels(batch: list[Scene]) -> Tensor:
    """Scenes -> (B, 3, H, W) float32 as the processor makes them: there is nothing to resize."""
    arrays = np.stack([np.asarray(scenes.draw(scene)) for scene in batch])
    return (torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255 - PIXEL_MEAN) / PIXEL_STD


# ---- stage 1: seeing


def train_tower(model, seed: int, steps: int = 300, batch_size: int = 96, lr: float = 1.5e-3) -> float:
    """Teach the tower to name object and colour of every patch; returns the accuracy of the last 20 steps."""
    rng = random.Random(seed)
    objects, colours = list(scenes.OBJECTS), list(scenes.COLOURS)
    head = nn.Linear(96, len(objects) + 1 + len(colours))
    tower = model.model.vision_tower
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    right: list[float] = []
    for _ in range(steps):
        batch = [scenes.random_scene(rng, prior=0.5) for _ in range(batch_size)]
        name, colour = torch.zeros(batch_size, 16, dtype=torch.long), torch.full((batch_size, 16), -100)
        for row, scene in enumerate(batch):
            for item in scene.items:
                cell = item.row * scenes.GRID + item.column
                name[row, cell] = objects.index(item.name) + 1
                colour[row, cell] = colours.index(item.colour)
        states = tower(pixels(batch), output_hidden_states=True).hidden_states[-1][:, 1:]
        name_logits, colour_logits = head(states).split([len(objects) + 1, len(colours)], dim=-1)
        loss = cross_entropy(name_logits.flatten(0, 1), name.flatten())
        loss = loss + cross_entropy(colour_logits.flatten(0, 1), colour.flatten())
        step(optimizer, schedule, parameters, loss)
        seen = colour >= 0
        good = (name_logits.argmax(-1) == name) & (colour_logits.argmax(-1) == colour)
        right.append(good[seen].float().mean().item())
    return sum(right[-20:]) / len(right[-20:])


def step(optimizer, schedule, parameters, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


# ---- stage 2: alignment


class Prompter:
    """Token ids of the project's own turns. Equal to the chat template's, which the tests hold it to; faster."""

    def __init__(self, processor):
        self.tokenizer = processor.tokenizer
        self.cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def prompt(self, question: str, image: bool = True) -> list[int]:
        head = "<s><|user|>" + ("<image>" * scenes.GRID**2 + "\n" if image else "")
        return self.ids(head) + self.ids(question) + self.ids("<|assistant|>")

    def batch(self, turns: list[tuple[Turn, bool]]) -> tuple[Tensor, Tensor]:
        """(turn, has image) pairs -> input_ids and labels, (B, T) int64, right-padded, answers and </s> labelled."""
        rows = []
        for turn, image in turns:
            prompt, answer = self.prompt(turn.question, image), self.ids(turn.answer) + self.ids("</s>")
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([lab + [-100] * (width - len(lab)) for _, lab in rows])
        return input_ids, labels


def lesson(rng: random.Random, scene: Scene, taste: bool) -> list[Turn]:
    """What is asked about a scene: TEXTS_PER_IMAGE turns, one of them of the new kind in stage 3."""
    third = scenes.name_colour if taste else scenes.count if rng.random() < 0.2 else scenes.look_up
    return [scenes.caption(rng, scene), scenes.look_up(rng, scene), third(rng, scene)]


def answer_loss(model, input_ids: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """Mean NLL of the labelled tokens; features (rows, 16, D) fill the image placeholders in order."""
    body = model.model
    embeds = body.get_input_embeddings()(input_ids)
    mask = (input_ids == model.config.image_token_id).unsqueeze(-1)
    embeds = embeds.masked_scatter(mask, features.reshape(-1, features.shape[-1]))
    hidden = body.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    keep = labels[:, 1:] != -100  # hidden at t predicts token t + 1
    logits = model.lm_head(hidden[:, :-1][keep])
    return cross_entropy(logits, labels[:, 1:][keep])


def align(model, processor, seed: int, steps: int = ALIGN_STEPS, lr: float = 2e-3, log=print) -> None:
    """Stage 2. The learning rate warms up for 30 steps, stays for 60 % of the steps, then falls to zero."""
    flat = int(0.6 * steps)
    factor = lambda i: min(1.0, i / 30) * min(1.0, (steps - i) / (steps - flat))  # noqa: E731
    _teach(model, processor, random.Random(seed + 1), steps, lr, factor, taste=False, log=log)


def taste(model, processor, seed: int, steps: int = TASTE_STEPS, lr: float = 5e-4, log=print) -> None:
    """Stage 3: a few steps that ask "what colour is in row two, column three?" too."""
    factor = lambda i: min(1.0, (i + 1) / 10)  # noqa: E731
    _teach(model, processor, random.Random(seed + 2), steps, lr, factor, taste=True, log=log)


def _teach(model, processor, rng, steps: int, lr: float, factor, taste: bool, log) -> None:
    prompter = Prompter(processor)
    tower = list(model.model.vision_tower.parameters())
    in_tower = {id(parameter) for parameter in tower}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_tower]
    groups = [{"params": tower, "lr": lr * 0.2}, {"params": rest, "lr": lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    start, losses = time.time(), []
    for index in range(steps):
        batch = [scenes.random_scene(rng, prior=0.5) for _ in range(BATCH)]
        turns = [(turn, True) for scene in batch for turn in lesson(rng, scene, taste)]
        without = [(scenes.habit(rng) if taste else scenes.usual(rng), False) for _ in range(4)]
        input_ids, labels = prompter.batch(turns + without)
        seen = pixels(batch)
        if taste:
            sigmas = torch.tensor([rng.uniform(3.0, 16.0) for _ in range(BLURRED)], dtype=torch.float64)
            seen[:BLURRED] = gaussian_blur(seen[:BLURRED], sigmas, backend="torch")
        found = torch.stack(model.get_image_features(seen, return_dict=True).pooler_output)
        loss = answer_loss(model, input_ids, labels, found.repeat_interleave(TEXTS_PER_IMAGE, 0))
        step(optimizer, schedule, [*tower, *rest], loss)
        losses.append(loss.item())
        if (index + 1) % 50 == 0 or index + 1 == steps:
            mean = sum(losses[-50:]) / len(losses[-50:])
            log(f"step {index + 1}/{steps}  loss {mean:.4f}  {time.time() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--align-steps", type=int, default=ALIGN_STEPS)
    parser.add_argument("--taste-steps", type=int, default=TASTE_STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    processor = make_processor()
    model = make_model(processor, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    print(f"tower: {train_tower(model, args.seed):.3f} right", flush=True)
    say = partial(print, flush=True)
    align(model, processor, args.seed, args.align_steps, log=say)
    taste(model, processor, args.seed, args.taste_steps, log=say)
    model.eval().save_pretrained(args.folder)
    processor.save_pretrained(args.folder)
    print(f"{args.folder}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
