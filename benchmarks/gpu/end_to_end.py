"""Step: a vision-language model scored from image files to token values, against a plain loop.

The model has LLaVA-1.5-7B's form and random weights, made on the device: its speed is that of the real one, its
values mean nothing. The plain loop is what one writes with transformers alone: batches of 8 in reading order, padded,
two forward calls, logits at the answers' positions only (`logits_to_keep`), log_softmax in float32.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks import throughput, throughput_inputs
from benchmarks.flops import BATCH, Flops
from benchmarks.gpu import device
from benchmarks.gpu.environment import product_rate, value_row
from benchmarks.gpu.session import Session
from vig.data.sample import Sample
from vig.scoring.batching import chunks
from vig.scoring.scorer import Scorer

SAMPLES, REHEARSED = 204, 4  # a multiple of six
WARM = 6
BATCH_TOKENS = 16384
ANSWER = (4, 330)  # tokens, log-uniform: 73 on average; LLaVA-665K has 88 a sample
QUESTION = (10, 60)
SIZE = (640, 480)  # of a photograph
TEMPLATE_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]


def configuration(rehearse: bool) -> transformers.LlavaConfig:
    """LLaVA-1.5-7B: CLIP ViT-L/14-336 and a Llama of 32 layers x 4096, vocabulary 32064."""
    if rehearse:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "image_size": 56, "patch_size": 14}  # fmt: skip
        text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": 320}  # fmt: skip
    else:
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                  "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
        text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064}  # fmt: skip
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(
            **text, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        image_token_id=3,
        vision_feature_layer=-2,
    )


def on_device(config: Any, build: Callable[[Any], Any], kind: str, dtype: torch.dtype) -> Any:
    """A model whose weights are drawn where it runs, in its own type: seconds, and no copy in host memory."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(kind):
            return build(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_scorer(session: Session) -> Scorer:
    config = configuration(session.rehearse)
    dtype = torch.float32 if session.rehearse else torch.bfloat16
    model = on_device(config, transformers.LlavaForConditionalGeneration, session.device, dtype)
    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    images = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = transformers.LlavaProcessor(
        images(size=size, crop_size=size), throughput_inputs.tokenizer(TEMPLATE_TOKENS),
        patch_size=config.vision_config.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=throughput_inputs.TEMPLATE,
    )  # fmt: skip
    return Scorer(
        model, processor, batch_tokens=512 if session.rehearse else BATCH_TOKENS,
        workers=0 if session.rehearse else None, backend="triton",
    )  # fmt: skip


def make_samples(folder: Path, count: int, questions: int, rehearse: bool) -> list[Sample]:
    """Photographs of noise, `questions` a picture; lengths as in LLaVA's tuning data."""
    draw = random.Random(0)
    low, high = (3, 9) if rehearse else ANSWER
    samples = []
    for number in range(count):
        path = folder / f"{number // questions}.jpg"
        if not path.exists():
            noise = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC).save(path)
        question = {"type": "text", "text": "q" * draw.randint(*((2, 6) if rehearse else QUESTION))}
        answer = {"type": "text", "text": "a" * round(low * (high / low) ** draw.random())}
        messages = (
            {"role": "user", "content": [{"type": "image"}, question]},
            {"role": "assistant", "content": [answer]},
        )
        samples.append(Sample(f"made#{number}", str(number), (path,), messages, "made"))
    return samples


@torch.inference_mode()
def plain_loop(scorer: Scorer, samples: Sequence[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(nll_image, nll_null) of each sample's answer tokens."""
    model, results = scorer.loaded.model, []
    for batch in chunks(samples, BATCH):
        encoded = [scorer.encoder.encode(sample) for sample in batch]
        given = scorer.encoder.collate(encoded)
        labels = given.pop("labels")[:, 1:]
        wanted = labels != -100
        columns = wanted.any(0).nonzero()[:, 0]  # positions that predict an answer token of any row
        target = labels[:, columns].clamp(min=0).to(model.device)
        given = {name: value.to(model.device) for name, value in given.items()}
        sizes = [item.sizes for item in encoded]
        both = []
        for inputs in (given, scorer.passes.null_pixels(given, sizes, ["0"] * len(batch))):
            inputs = inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}
            logits = model(**inputs, use_cache=False, logits_to_keep=columns.to(model.device)).logits
            logp = torch.log_softmax(logits.float(), dim=-1)
            both.append(-logp.gather(2, target[..., None])[..., 0].cpu())
            del logits, logp
        for row, mask in enumerate(wanted[:, columns]):
            results.append(tuple(values[row, mask].numpy() for values in both))
    return results


@contextmanager
def model_time(scorer: Scorer, kind: str) -> Iterator[list[Callable[[], float]]]:
    """While it lasts, the time inside the model's tower and text layers is noted; sum what the list's entries give."""
    spans: list[Callable[[], float]] = []
    model = scorer.loaded.model.model
    handles, open_spans = [], []

    def enter(*_):
        open_spans.append(_now(kind))

    def leave(*_):
        start, end = open_spans.pop(), _now(kind)
        spans.append(lambda: _between(kind, start, end))

    for name in ("vision_tower", "language_model"):
        part = getattr(model, name)
        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def _now(kind: str) -> Any:
    if kind != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(kind: str, start: Any, end: Any) -> float:
    return end - start if kind != "cuda" else start.elapsed_time(end) * 1e-3


def timed(scorer: Scorer, contender: Callable, samples: Sequence[Sample], kind: str) -> tuple[float, float]:
    """(seconds of the clock, of them inside tower and layers)."""
    device.wait(kind)
    started = time.perf_counter()
    with model_time(scorer, kind) as spans:
        contender(scorer, samples)
        device.wait(kind)
        seconds = time.perf_counter() - started
    return seconds, sum(span() for span in spans)


def end_to_end(session: Session, questions: int) -> None:
    """MFU: FLOP that scoring cannot do without, a second, over the rate of cuBLAS that the first step measured."""
    rate = product_rate(session.cases_of("environment"))
    count = REHEARSED if session.rehearse else SAMPLES
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(Path(folder), count, questions, session.rehearse)
        scorer = make_scorer(session)
        views = throughput.views_of(scorer, samples)
        encoded = [view.encoded for view in views]
        least = Flops.of(scorer.loaded.model).least(views, scorer.encoder.image_token_id)
        rows, values = _rows(session, scorer, samples, least / rate if rate else None)
        differences = [throughput.largest_difference(values[-1], found) for found in values[:-1]]
        session.case(
            {
                "suite": "end to end",
                "label": f"LLaVA-1.5-7B's form, {count} samples, {questions} question{'s' * (questions > 1)} an image",
                "unit": "samples/s",
                "answer_tokens": sum(len(item.answer_index) for item in encoded),
                "fed_tokens": sum(len(item.input_ids) for item in encoded),
                "largest_difference": max(differences, default=None),
                "rows": rows,
            }
        )


def _rows(
    session: Session, scorer: Scorer, samples: list[Sample], least_s: float | None
) -> tuple[list, list]:
    """(a row a contender, its values of the first samples). least_s: what the least FLOP take at cuBLAS' rate."""
    rows, values = [], []
    for name, contender, workers in contenders(scorer):
        if name in session.without:
            continue
        is_ours = contender is throughput.ours
        session.at(name, is_ours)
        scorer.workers = workers
        values.append(contender(scorer, samples[:WARM]))
        seconds, inside = timed(scorer, contender, samples, session.device)
        row = value_row(
            name, len(samples) / seconds, ours=is_ours, seconds=seconds, outside_s=seconds - inside
        )
        row |= {"mfu": least_s / seconds if least_s else None, "peak_gib": _peak_gib(session.device)}
        rows.append(row)
        print(row, flush=True)
    session.at(None)
    return rows, values


def contenders(scorer: Scorer) -> list[tuple[str, Callable, int]]:
    """(name, what is timed, worker processes). With workers the seconds that they take to start count as well."""
    found = [("vig, no workers", throughput.ours, 0), ("plain loop, logits_to_keep", plain_loop, 0)]
    if scorer.workers:
        found.insert(0, (f"vig, {scorer.workers} workers", throughput.ours, scorer.workers))
    return found


def _peak_gib(kind: str) -> float | None:
    if kind != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak
