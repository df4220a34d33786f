"""The throughput suite on a model of a few layers: what it counts, verifies and shows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import audit, machine, report, results, scale, throughput, throughput_inputs
from benchmarks.throughput import Flops, ours, plain_loop
from benchmarks.throughput_inputs import make_samples


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """LLaVA's form with 2 text layers, a small vocabulary and a tower of 4 layers; 12 samples of 4 images."""
    patch = pytest.MonkeyPatch()
    text, vision = throughput_inputs.text_config, throughput_inputs.transformers.CLIPVisionConfig
    patch.setattr(throughput_inputs, "text_config", lambda layers, vocabulary: text(2, 400))
    patch.setattr(
        throughput_inputs.transformers, "CLIPVisionConfig",
        lambda **named: vision(**named | {"num_hidden_layers": 4, "image_size": 128}),
    )  # fmt: skip
    size = {"height": 128, "width": 128}
    images = throughput_inputs.transformers.CLIPImageProcessorPil
    patch.setattr(
        throughput_inputs.transformers, "CLIPImageProcessorPil", lambda **_: images(size=size, crop_size=size)
    )
    try:
        yield throughput.make_scorer("llava"), make_samples(tmp_path_factory.mktemp("made"), 12, 3)
    finally:
        patch.undo()


def test_the_counted_flop_are_those_that_torch_counts(small):
    scorer, samples = small
    views = throughput.views_of(scorer, samples)
    encoded = [view.encoded for view in views]
    counted = replace(
        Flops.of(scorer.loaded.model), pair=0.0
    )  # attention on a CPU is unknown to torch's counter
    with FlopCounterMode(display=False) as found:
        plain_loop(scorer, samples)
    assert counted.plain(encoded) == pytest.approx(found.get_total_flops(), rel=0.02)
    scorer.score(samples)  # the self-check
    with FlopCounterMode(display=False) as found:
        ours(scorer, samples)
    rows = sum(len(item.answer_index) for item in encoded)
    head = 2 * rows * counted.head  # linear_vig is no operation that torch's counter knows
    least = counted.least(views, scorer.encoder.image_token_id)
    assert 0.98 < (found.get_total_flops() + head) / least < 1.05


def test_both_contenders_give_the_same_values(small):
    scorer, samples = small
    assert throughput.largest_difference(ours(scorer, samples), plain_loop(scorer, samples)) < 1e-5
    table = throughput.profile(scorer, samples)
    assert sum(table.values()) == pytest.approx(1) and all(share >= 0 for share in table.values())
    for step in ("images: the tower", "text: the layers", "head: linear_vig", "rows, masks, padding"):
        assert table[step] > 0, step
    assert throughput.outside(table) == pytest.approx(
        1 - sum(share for step, share in table.items() if ":" in step)
    )


def test_values_that_differ_are_not_timed(small, monkeypatch):
    scorer, _ = small
    monkeypatch.setattr(throughput, "make_scorer", lambda name: scorer)
    monkeypatch.setattr(
        throughput, "plain_loop", lambda *given: [(one + 0.1, two) for one, two in plain_loop(*given)]
    )
    with pytest.raises(RuntimeError, match=r"values differ from the plain loop's by 0\.1"):
        throughput.measured(throughput.CASES[0]._replace(samples=4, parts=2), 1, lambda text: None)


def test_a_case_from_samples_to_the_page(small, monkeypatch, tmp_path):
    scorer, _ = small
    monkeypatch.setattr(throughput, "make_scorer", lambda name: scorer)
    monkeypatch.setattr(
        throughput, "peak_mib", lambda case, name, threads: (80.0 if name == "plain" else 40.0, 1.0)
    )
    case = throughput.measured(throughput.CASES[1]._replace(samples=12, parts=2), 1, lambda text: None)
    assert case["ratio"] > 1 and case["bound"] > 1 and len(case["ratios"]) == 2
    assert case["promised"] == 4.0
    stored = machine.header("throughput", torch.get_num_threads(), False) | {"cases": [case]}
    measured = scale.rows_of({"write_samples_per_s": 50_000.0, "select_s": 29.0, "read": 2.0})
    figures = [{"label": "select", "samples": 1_000_000, "rows": measured}]
    paths = report.Paths(tmp_path / "README.md", tmp_path / "results", tmp_path / "plots")
    page = tmp_path / "docs" / "throughput.md"
    page.parent.mkdir()
    blocks = {
        name: f"<!-- benchmarks:{name} -->\n<!-- /benchmarks:{name} -->\n"
        for name in (*report.ON_OWN_PAGE, report.SCORING)
    }
    paths.readme.write_text(blocks.pop(report.SCORING))
    page.write_text("# Page\n" + "".join(blocks.values()))
    results.write(stored, paths.results)
    results.write(machine.header("scale", 1, False) | {"cases": figures}, paths.results)
    assert len(report.disagreements(paths)) == 3
    assert page in report.write(paths)
    assert report.disagreements(paths) == []
    text, first = page.read_text(), paths.readme.read_text()
    ratio = json.loads(results.path_of(stored, paths.results).read_text())["cases"][0]["ratio"]
    assert f"| {ratio:.2f} (at least 4.00) |" in text and "0.50 x (at most 0.6)" in text
    assert f"six questions an image: {ratio:.1f} times (bound by FLOP: {case['bound']:.1f})" in first
    assert "1,000,000 scored samples are stored in 20 s and selected in 29 s." in first
    assert "| text: the layers |" in text and "| 29.0 | <= 30 |" in text
    page.write_text(text.replace("<= 30", "<= 40"))
    assert "scale: throughput.md differs" in report.disagreements(paths)[0]
    page.unlink()
    assert "throughput.md does not exist" in report.disagreements(paths)[0]


def test_bounds_of_full_runs():
    full = throughput.CASES[0]
    case = {
        "label": full.label, "samples": full.samples, "ratio": 1.6, "promised": 1.5, "memory": 0.6, "rows": [],
        "peak_mib": {"ours": 50.0, "plain": 100.0}, "profile": {"text: the layers": 0.95, "else": 0.05},
    }  # fmt: skip
    result = {"suite": "throughput", "cases": [case]}
    assert audit.broken(result) == []
    case |= {"ratio": 1.4, "memory": 0.4, "profile": {"text: the layers": 0.9, "else": 0.1}}
    assert len(audit.broken(result)) == 3
    assert f"{full.label}: plain / ours = 1.40, at least 1.50 was asked for" in audit.broken(result)
    assert audit.broken({"suite": "throughput", "cases": [case | {"samples": 48}]}) == []
    million = [{"label": "select", "samples": 1_000_000, "rows": scale.rows_of({"select_s": 31.0})}]
    assert audit.broken({"suite": "scale", "cases": million}) == ["select_s = 31.0, expected <= 30"]
