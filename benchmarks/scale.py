"""Suite `scale`: one million samples. Writing scores, selecting from them, their page, and starting on the records.

    python -m benchmarks.scale [--quick]

Scores are synthetic, 150 answer tokens a sample on average; records are LLaVA's, about 600 bytes each. What is
timed for memory runs in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

SAMPLES, QUICK_SAMPLES = 1_000_000, 20_000
TOKENS = 150  # answer tokens a sample, on average
PROMPT = 32  # tokens before the answer
WINDOW = 8192
BOUNDS = {  # what the figures of a million samples must keep
    "write_samples_per_s": (">=", 40_000),
    "select_s": ("<=", 30),
    "select_peak_mib": ("<=", 2048),
    "report_s": ("<=", 60),
    "report_peak_mib": ("<=", 2048),
    "first_batch_s": ("<=", 60),
}


def run(threads: int, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """One case a step, each {"label", "samples", "rows": [{"name", "value", "status", "sign", "promised"}]}."""
    samples = QUICK_SAMPLES if quick else SAMPLES
    with tempfile.TemporaryDirectory(prefix="vig-scale-") as name:
        folder = Path(name)
        steps = (
            ("write scores", lambda: write_scores(folder / "scores", samples)),
            ("select", lambda: in_process("select", threads, folder / "scores", folder / "selection")),
            ("report", lambda: in_process("report", threads, folder / "scores", folder / "report.html")),
            ("start on a dataset", lambda: start(folder, samples, threads)),
        )
        cases = []
        for label, step in steps:
            say(f"{label}, {samples:,} samples")
            cases.append({"label": label, "samples": samples, "rows": rows_of(step(), quick)})
    return cases


def rows_of(figures: dict[str, float], quick: bool = False) -> list[dict]:
    """A row a figure, with what is asked of it for a million samples."""
    return [
        {"name": name, "value": value, "status": "ok"}
        | ({} if quick or name not in BOUNDS else dict(zip(("sign", "promised"), BOUNDS[name], strict=True)))
        for name, value in figures.items()
    ]


def tables(cases: Sequence[dict]) -> list[list[list[str]]]:
    """One table, a list of rows, the first of them the head."""
    rows = [
        [
            f"{case['label']}, {case['samples']:,} samples",
            row["name"].replace("_", " "),
            f"{row['value']:,.1f}",
            f"{row['sign']} {row['promised']:,}" if "promised" in row else "",
        ]
        for case in cases
        for row in case["rows"]
    ]
    return [[["step", "figure", "measured", "asked for"], *rows]]


def in_words(cases: Sequence[dict]) -> str:
    """For the README."""
    figures = {row["name"]: row["value"] for case in cases for row in case["rows"]}
    samples = cases[0]["samples"]
    stored, selected = samples / figures["write_samples_per_s"], figures["select_s"]
    return f"{samples:,} scored samples are stored in {stored:.0f} s and selected in {selected:.0f} s"


def write_scores(folder: Path, samples: int) -> dict:
    """Rows as the scorer makes them, then stored: samples a second of `ScoreWriter.write`, and bytes a sample.

    Also a second of processor time, which the load of the machine leaves alone; and what the rows themselves take to
    make of token lists and likelihoods (`vig.scoring.scorer.scored_row`), before they are stored."""
    from vig.scoring.scorer import scored_row
    from vig.store.scores import ScoreWriter

    making = seconds = processor = 0.0
    with ScoreWriter(folder, {"model": "synthetic"}) as writer:
        for window, start in enumerate(range(0, samples, WINDOW)):
            scored = synthetic_samples(start, min(WINDOW, samples - start))
            begun = time.perf_counter()
            rows = [scored_row(item, value) for item, value in scored]
            making += time.perf_counter() - begun
            begun, spent = time.perf_counter(), time.process_time()
            writer.write(window, rows)
            seconds += time.perf_counter() - begun
            processor += time.process_time() - spent
        writer.mark_complete()
    size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    return {
        "write_samples_per_s": samples / seconds,
        "write_samples_per_processor_s": samples / processor,
        "make_rows_samples_per_s": samples / making,
        "bytes_per_sample": size / samples,
    }


def synthetic_samples(start: int, rows: int) -> list[tuple]:
    """The same scores as the model's passes leave them: (LoadedRecord, TokenNLL) a sample, for `scored_row`."""
    from vig.data.sample import Sample
    from vig.models.prompts import Encoded
    from vig.scoring.dual_pass import TokenNLL
    from vig.scoring.loader import LoadedRecord

    block = synthetic_block(start, rows)
    cuts = np.cumsum(block.n_tokens)[:-1]
    columns = (block.token_ids, block.positions, block.token_nll_image, block.token_nll_null)
    found = []
    for key, name, ids, places, image, null in zip(
        block.key, block.id, *(np.split(column, cuts) for column in columns), strict=True
    ):
        item = LoadedRecord(Sample(key, name, (b"",), (), "data.json"))
        answer = list(range(PROMPT, PROMPT + len(ids)))
        item.encoded = Encoded(item.record, [0] * PROMPT + ids.tolist(), answer, places.tolist(), {})
        found.append((item, TokenNLL(image, null)))
    return found


def synthetic_block(start: int, rows: int):
    """Scores with the entropy of real ones: token ids of a 32,000 vocabulary, NLLs of a gamma distribution."""
    from vig.store.rows import ScoreBlock

    draw = np.random.default_rng(start)
    lengths = draw.integers(1, 2 * TOKENS, rows)
    total = int(lengths.sum())
    image = draw.standard_gamma(0.5, total, np.float32)
    keys = [f"data.json#{number}" for number in range(start, start + rows)]
    return ScoreBlock(
        keys, [str(number) for number in range(rows)], ["data.json"] * rows, ["ok"] * rows, lengths,
        draw.zipf(1.3, total) % 32_000, np.concatenate([np.arange(n) for n in lengths]), image,
        image + draw.standard_gamma(0.3, total, np.float32),
    )  # fmt: skip


def start(folder: Path, samples: int, threads: int) -> dict:
    """Seconds from the call to the first scored batch, and memory early and late in reading the records."""
    from PIL import Image

    for number in range(64):
        Image.new("RGB", (64, 64), (number * 4, 128, 255 - number * 4)).save(folder / f"{number}.png")
    answer = "a red ball lies left of the blue cup . " * 12
    with (folder / "data.json").open("w") as file:
        for number in range(samples):
            turns = [{"from": "human", "value": "<image>\ndescribe ."}, {"from": "gpt", "value": answer}]
            record = {"id": str(number), "image": f"{number % 64}.png", "conversations": turns}
            file.write(("," if number else "[") + json.dumps(record) + "\n")
        file.write("]")
    found = in_process("start", threads, folder / "data.json", folder / "started")
    return found | in_process("read", threads, folder / "data.json", folder)


def in_process(job: str, threads: int, source: Path, out: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "--job", job, str(source), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


# --- jobs in processes of their own ---


def select_job(source: Path, out: Path) -> dict:
    from vig.selection.select import select

    begun = time.perf_counter()
    select(source, 70, out=out)
    return {"select_s": time.perf_counter() - begun, "select_peak_mib": peak_mib()}


def report_job(source: Path, out: Path) -> dict:
    """The page, imports included, and beside its seconds those of processor time, which other programs leave alone."""
    begun, spent = time.perf_counter(), time.process_time()
    from vig.reporting.report import report

    report(source, out)
    return {
        "report_s": time.perf_counter() - begun,
        "report_processor_s": time.process_time() - spent,
        "report_peak_mib": peak_mib(),
    }


class Started(Exception):
    pass


def start_job(source: Path, out: Path) -> dict:
    from vig.scoring.run import score_dataset
    from vig.scoring.scorer import Scorer

    checkpoint = Path(__file__).parent.parent / "vig" / "demo" / "checkpoint"
    scorer = Scorer(checkpoint)

    def stop(_) -> None:
        raise Started

    begun = time.perf_counter()
    with suppress(Started):
        score_dataset(scorer, source, out, on_progress=stop)
    return {"first_batch_s": time.perf_counter() - begun}


def read_job(source: Path, _: Path) -> dict:
    """Reads all windows as the engine does, without scoring them."""
    from vig.data.samples import read_samples
    from vig.scoring import batching

    begun, peaks, records = time.perf_counter(), [peak_mib()], 0
    for window in batching.chunks(read_samples(source), WINDOW):
        records += len(window)
        peaks.append(peak_mib())
    seconds = time.perf_counter() - begun
    early = peaks[min(3, len(peaks) - 1)]
    return {
        "read_samples_per_s": records / seconds,
        "read_peak_mib_after_3_windows": early,
        "read_peak_mib_at_the_end": peaks[-1],
    }


def peak_mib() -> float:
    """Of this process. What getrusage says begins with the peak of the process that started it, hence the file."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


JOBS = {"select": select_job, "report": report_job, "start": start_job, "read": read_job}


def broken_bounds(cases: list[dict]) -> list[str]:
    """Which figures of a million samples do not keep what is asked of them."""
    return [
        f"{row['name']} = {row['value']:,.1f}, expected {row['sign']} {row['promised']:,}"
        for case in cases
        for row in case["rows"]
        if "promised" in row
        and (row["value"] < row["promised"] if row["sign"] == ">=" else row["value"] > row["promised"])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="One million samples: write, select, report, start.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLES:,} samples")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--job", nargs=3, metavar=("JOB", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(JOBS[given.job[0]](Path(given.job[1]), Path(given.job[2]))))
        return 0
    cases = run(given.threads, given.quick, lambda text: print(text, file=sys.stderr, flush=True))
    for case in cases:
        figures = ", ".join(f"{row['name']} {row['value']:,.1f}" for row in case["rows"])
        print(f"{case['label']} ({case['samples']:,}): {figures}")
    broken = broken_bounds(cases)
    for line in broken:
        print(line, file=sys.stderr)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
