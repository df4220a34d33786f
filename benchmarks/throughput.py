"""Suite `throughput`: scoring from image files to token values, against a plain loop over full logits.

The plain loop: batches of 8 in reading order, padded, two forward calls, logits and log_softmax at every position,
image tokens included (transformers' `logits_to_keep` would spare most of them: docs/throughput.md). Both read the
same files, use the same encoder and the same blur, in one process, part by part in turn; a part's ratio is
plain / ours in seconds of the clock (and, beside it, in processor seconds, which other work on the machine stretches
less). The figure is the median part's. Beside each stands the bound: the FLOP of the plain loop over the FLOP that
cannot be avoided (each image and prefix once a pass, no padding, causal attention by halves, the head and the last
layer's feed-forward on answer rows only). A ratio over the bound is possible: log_softmax counts no FLOP.
The models are random and have the form of real ones; values are compared before anything is timed.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.flops import BATCH, Flops
from benchmarks.throughput_inputs import llava, make_samples, smolvlm
from vig.data.sample import Sample
from vig.scoring import dual_pass, packed_attention, prefix_sharing
from vig.scoring import scorer as scoring
from vig.scoring.batching import chunks
from vig.scoring.prefix_sharing import View
from vig.scoring.scorer import Scorer

BATCH_TOKENS = 4096
OUTSIDE = 0.08  # of the time outside the model's own layers, at most


class Case(NamedTuple):
    """A model, and how many questions each image has. at_least: the promised ratio, or part of the bound."""

    name: str
    label: str
    questions: int
    samples: int
    parts: int
    at_least: float
    of_bound: bool = False
    memory: float | None = None  # of the plain loop's peak, at most


CASES = (
    Case("llava", "LLaVA's form, each image once", 1, 300, 5, 1.5, memory=0.6),
    Case("llava", "LLaVA's form, six questions an image", 6, 300, 5, 4.0, memory=0.6),
    Case("smolvlm", "SmolVLM-256M's form, six questions an image", 6, 36, 3, 0.9, of_bound=True),
)


# --- contenders ---


def make_scorer(name: str, share: bool = True) -> Scorer:
    torch.manual_seed(0)
    model, processor = {"llava": llava, "smolvlm": smolvlm}[name]()
    return Scorer(model.eval(), processor, batch_tokens=BATCH_TOKENS, share=share)


@torch.inference_mode()
def plain_loop(scorer: Scorer, samples: Sequence[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What one writes without a library for it: (nll_image, nll_null) of each sample's answer tokens."""
    results = []
    for batch in chunks(samples, BATCH):
        encoded = [scorer.encoder.encode(sample) for sample in batch]
        inputs = scorer.encoder.collate(encoded)
        labels = inputs.pop("labels")
        sizes = [item.sizes for item in encoded]
        both = []
        for given in (inputs, scorer.passes.null_pixels(inputs, sizes, ["0"] * len(batch))):
            logits = scorer.loaded.model(**given, use_cache=False).logits
            logp = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            both.append(-logp.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0])
            del logits, logp
        for row, label in enumerate(labels[:, 1:] != -100):
            results.append(tuple(values[row, label].numpy() for values in both))
    return results


def ours(scorer: Scorer, samples: Sequence[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = scorer.score_window(samples)
    return [(np.asarray(row.token_nll_image), np.asarray(row.token_nll_null)) for row in rows]


# --- the suite ---


def run(threads: int, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """The cases of the suite, measured. quick: the two with LLaVA's form, on 48 samples."""
    cases = [case._replace(samples=48, parts=2) for case in CASES[:2]] if quick else CASES
    return [measured(case, threads, say) for case in cases]


def measured(case: Case, threads: int, say: Callable[[str], None]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(Path(folder), case.samples, case.questions)
        scorer = make_scorer(case.name)
        bound = flop_bound(scorer, samples)
        say(f"{case.label}: values")
        checked = samples[: 2 * max(case.questions, 2)]
        error = largest_difference(ours(scorer, checked), plain_loop(scorer, checked))
        if not error <= 2e-4:
            raise RuntimeError(f"{case.label}: values differ from the plain loop's by {error:.3g} nats")
        seconds: dict[str, list[Seconds]] = {"plain": [], "ours": []}
        size = case.samples // case.parts
        for part, some in enumerate(chunks(samples, size)):
            contenders = [("plain", plain_loop), ("ours", ours)]
            for name, contender in contenders[:: 1 if part % 2 else -1]:
                say(f"{case.label}: part {part + 1} of {case.parts}, {name}")
                seconds[name].append(timed(partial(contender, scorer, some)))
        table = profile(scorer, samples[:size])
    ratios, of_processor = (
        [getattr(slow, kind) / getattr(fast, kind) for slow, fast in zip(*seconds.values(), strict=True)]
        for kind in Seconds._fields
    )
    ratio = statistics.median(ratios)
    say(f"{case.label}: memory")
    peaks = {name: peak_mib(case, name, threads) for name in seconds}
    return {
        "label": case.label,
        "unit": "samples/s",
        "model": case.name,
        "samples": case.samples,
        "ratio": ratio,
        "ratios": ratios,
        "ratio_of_processor_time": statistics.median(of_processor),
        "bound": bound,
        "promised": case.at_least * (bound if case.of_bound else 1.0),
        "memory": case.memory,
        "max_error": error,
        "peak_mib": {name: total for name, (total, _) in peaks.items()},
        "beyond_loaded_mib": {name: extra for name, (_, extra) in peaks.items()},
        "profile": table,
        "rows": [
            {
                "name": name,
                "status": "ok",
                "ours": name == "ours",
                "value": case.samples / sum(part.clock for part in taken),
            }
            for name, taken in seconds.items()
        ],
    }


class Seconds(NamedTuple):
    """Of one call. processor: of the whole process over its threads."""

    clock: float
    processor: float


def timed(call: Callable[[], Any]) -> Seconds:
    gc.collect()
    clock, processor = time.perf_counter(), time.process_time()
    call()
    processor = (time.process_time() - processor) / torch.get_num_threads()
    return Seconds(time.perf_counter() - clock, processor)


def views_of(scorer: Scorer, samples: Sequence[Sample]) -> list[View]:
    """The samples encoded; equal paths are equal images."""
    return [View(scorer.encoder.encode(one), tuple(map(str, one.images))) for one in samples]


def flop_bound(scorer: Scorer, samples: Sequence[Sample]) -> float:
    views = views_of(scorer, samples)
    count = Flops.of(scorer.loaded.model)
    plain = count.plain([view.encoded for view in views])
    return plain / count.least(views, scorer.encoder.image_token_id)


def largest_difference(one: Sequence[tuple], other: Sequence[tuple]) -> float:
    return max(
        float(np.abs(left - right).max())
        for pair, twin in zip(one, other, strict=True)
        for left, right in zip(pair, twin, strict=True)
    )


# --- where the time goes ---


def profile(scorer: Scorer, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the processor time of one run that each step takes; "else" is what is in none of them."""
    spent: Counter = Counter()
    model = scorer.loaded.model.model
    towers = [getattr(model, name) for name in ("vision_tower", "vision_model") if hasattr(model, name)]
    texts = [getattr(model, name) for name in ("language_model", "text_model") if hasattr(model, name)]
    steps = {
        "images: the tower": [(tower, "forward") for tower in towers],
        "text: the layers": [(text, "forward") for text in texts],
        "head: linear_vig": [(dual_pass, "linear_vig")],
        "decoding, processor, tokens": [(scoring, "load_records")],
        "null images": [(scorer.passes, "null_pixels")],
        "rows, masks, padding": [(prefix_sharing, "row_inputs"), (packed_attention, "packed_inputs")],
    }
    with ExitStack() as stack:
        for step, places in steps.items():
            for owner, name in places:
                stack.enter_context(clocked(owner, name, step, spent))
        start = time.process_time()
        scorer.score_window(samples)
        total = time.process_time() - start
    spent["else"] = total - sum(spent.values())
    return {step: spent[step] / total for step in (*steps, "else")}


@contextmanager
def clocked(owner: Any, name: str, step: str, spent: Counter) -> Iterator[None]:
    """While it lasts, the time of owner.name counts for `step`; of an iterator, the time to its next item."""
    original = getattr(owner, name)

    def call(*args, **options):
        start = time.process_time()
        result = original(*args, **options)
        spent[step] += time.process_time() - start
        return clocked_items(result, step, spent) if isinstance(result, Iterator) else result

    with patch.object(owner, name, call):
        yield


def clocked_items(items: Iterator[Any], step: str, spent: Counter) -> Iterator[Any]:
    while True:
        start = time.process_time()
        item = next(items, None)
        spent[step] += time.process_time() - start
        if item is None:
            return
        yield item


def outside(table: dict[str, float]) -> float:
    """The share of the time that is spent outside the model's own layers."""
    return sum(
        share for step, share in table.items() if step.partition(":")[0] not in ("images", "text", "head")
    )


# --- what is shown ---


def cells(case: dict) -> dict[str, str]:
    """Column -> text: each figure with what is asked of it in brackets, and the bound beside."""
    values = {row["name"]: row["value"] for row in case["rows"]}
    memory = case["peak_mib"]["ours"] / case["peak_mib"]["plain"]
    return {
        "model, questions an image": case["label"],
        "samples": str(case["samples"]),
        "ours, samples/s": f"{values['ours']:.2f}",
        "plain / ours": f"{case['ratio']:.2f} (at least {case['promised']:.2f})",
        "bound by FLOP": f"{case['bound']:.2f}",
        "in processor time": f"{case['ratio_of_processor_time']:.2f}",
        "peak memory": f"{memory:.2f} x" + (f" (at most {case['memory']})" if case["memory"] else ""),
        "outside the model's layers": f"{100 * outside(case['profile']):.1f} % (at most {100 * OUTSIDE:.0f} %)",
    }


def in_words(cases: Sequence[dict]) -> str:
    """For the README."""
    parts = [
        f"{case['label']}: {case['ratio']:.1f} times (bound by FLOP: {case['bound']:.1f})" for case in cases
    ]
    return "Against a plain loop over full logits, " + "; ".join(parts)


def tables(cases: Sequence[dict]) -> list[list[list[str]]]:
    """Tables, each a list of rows and the first row the head: the figures, and where the time goes."""
    figures = [cells(case) for case in cases]
    steps = list(cases[0]["profile"])
    return [
        [list(figures[0]), *(list(row.values()) for row in figures)],
        [
            ["step", *(case["label"] for case in cases)],
            *([step, *(f"{100 * case['profile'][step]:.1f} %" for case in cases)] for step in steps),
        ],
    ]


def broken_bounds(cases: Sequence[dict]) -> list[str]:
    """What is asked of a full run and does not hold."""
    full = {case.label: case.samples for case in CASES}
    return [
        f"{case['label']}: {name} = {value:.2f}, {sign} {asked:.2f} was asked for"
        for case in cases
        if case["samples"] >= full.get(case["label"], 0)
        for name, value, sign, asked in _asked(case)
        if not (value >= asked if sign == "at least" else value <= asked)
    ]


def _asked(case: dict) -> Iterator[tuple[str, float, str, float]]:
    yield "plain / ours", case["ratio"], "at least", case["promised"]
    yield "the share outside the model's layers", outside(case["profile"]), "at most", OUTSIDE
    if case["memory"]:
        yield "peak memory", case["peak_mib"]["ours"] / case["peak_mib"]["plain"], "at most", case["memory"]


# --- memory ---


def peak_mib(case: Case, name: str, threads: int) -> tuple[float, float]:
    """(peak resident memory of a fresh process that runs one part, how much of it came after loading), in MiB."""
    samples = case.samples // case.parts
    command = [
        sys.executable,
        "-m",
        "benchmarks.throughput",
        case.name,
        name,
        str(samples),
        str(case.questions),
    ]
    found = subprocess.run([*command, str(threads)], check=True, capture_output=True, text=True)
    total, extra = map(float, found.stdout.split()[-2:])
    return total, extra


def main(model: str, name: str, n_samples: int, questions: int, threads: int) -> None:
    """Runs one contender alone and prints its peak."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(Path(folder), n_samples, questions)
        scorer = make_scorer(model)
        loaded = resident_mib("VmRSS")
        {"plain": plain_loop, "ours": ours}[name](scorer, samples)
    peak = resident_mib("VmHWM")
    print(peak, peak - loaded)


def resident_mib(name: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process; getrusage would count the parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
