"""Easy tokens: kept whatever their VIG, in dropped samples too; by selections, training, export, report, comparison."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_trainer import processor, samples  # noqa: F401 - a fixture
from typer.testing import CliRunner

from vig import SelectiveCollator, SelectiveLabels, export_records, keep_samples, mask_row, read_selection
from vig.cli import app
from vig.models.prompts import Encoder
from vig.reporting.facts import gather
from vig.reporting.report import rules_of
from vig.selection.compare import compare
from vig.selection.select import select
from vig.store.folder import SettingsDiffer
from vig.store.rows import ScoreRow
from vig.store.scores import ScoreWriter, read_scores
from vig.store.selections import selection_metadata

EASY = 0.5
STOP = 2


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """400 samples of two sources; a third of their tokens are easy, their last one may end the turn."""
    folder, rng, rows = tmp_path_factory.mktemp("scores"), np.random.default_rng(0), []
    for number in range(400):
        n = int(rng.integers(1, 9))
        null = np.where(rng.random(n) < 0.3, rng.choice([0.0, 0.25, 0.5], n), rng.integers(5, 40, n) / 8)
        image, kl = np.maximum(null - rng.integers(-4, 12, n) / 8, 0), rng.random(n)
        ids = np.append(rng.integers(5, 99, n - 1), STOP if number % 3 else 7)
        status = "text_only" if number % 9 == 4 else "error: gone" if number % 17 == 3 else "ok"
        values = {"ok": (ids, range(n), image, null), "text_only": (ids, range(n), image)}.get(status, ())
        stats = {"token_kl": kl} if status == "ok" else {}
        rows.append(
            ScoreRow(f"d.json#{number}", f"i{number}", "ab"[number % 2], status, *values, token_stats=stats)
        )
    with ScoreWriter(folder, {"model": "m", "stop_ids": [STOP], "stats": ["kl"]}) as writer:
        writer.write(0, rows[:150])
        writer.write(1, rows[150:])
        writer.mark_complete()
    return folder


def rows_of(batches) -> dict[str, tuple[bool, list[bool]]]:
    return {row["key"]: (row["keep"], row["token_keep"]) for batch in batches for row in batch.to_pylist()}


@pytest.mark.filterwarnings("ignore:.*tau")
@pytest.mark.parametrize("p", [5, 60])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"level": "sample"}, {"level": "token"}, {"by": "source"}, {"by": "kl"}, {"clip": -0.3},
        {"stop_tokens": "select"}, {"mean": "content"},
    ],
)  # fmt: skip
def test_the_definition(scores, tmp_path, p, options):
    """What the rule keeps without them, and the tokens under EASY in every sample with an image."""
    plain = select(scores, p, **options)
    chosen = select(scores, p, keep_easy=EASY, out=tmp_path, **options)
    before, after = rows_of(plain.batches()), rows_of(chosen.batches())
    easy_samples = easy_tokens = 0
    for row in (row for batch in read_scores(scores) for row in batch.to_pylist()):
        keep, tokens = before[row["key"]]
        if row["status"] == "ok":
            easy = [nll < EASY for nll in row["token_nll_null"]]
            easy_samples += any(easy) and not keep
            easy_tokens += sum(one and not kept for one, kept in zip(easy, tokens, strict=True))
            keep, tokens = keep or any(easy), [a or b for a, b in zip(tokens, easy, strict=True)]
        assert after[row["key"]] == (keep, tokens)
    assert chosen.tau == plain.tau and easy_samples > 0 and easy_tokens > easy_samples
    assert (chosen.counts["samples_easy"], chosen.counts["tokens_easy"]) == (easy_samples, easy_tokens)
    assert chosen.counts["samples_kept"] == plain.counts["samples_kept"] + easy_samples
    assert chosen.counts["tokens_kept"] == plain.counts["tokens_kept"] + easy_tokens
    if options.get("by") == "source":
        assert sum(row["tokens_kept"] for row in chosen.sources) == chosen.counts["tokens_kept"]
    assert "tokens_easy" not in plain.counts and plain.metadata["selection"]["keep_easy"] is None
    recorded = selection_metadata(tmp_path)["selection"]
    assert recorded["keep_easy"] == EASY and recorded["counts"] == chosen.counts
    stored = {key: (entry.keep, entry.token_keep.tolist()) for key, entry in read_selection(tmp_path).items()}
    assert stored == {key: (keep, tokens or []) for key, (keep, tokens) in after.items()}
    with pytest.raises(SettingsDiffer, match=r"keep_easy.*0\.5"):
        select(scores, p, out=tmp_path, **options)


def test_the_summary_says_what_was_kept_as_easy(scores, tmp_path):
    asked = ["select", str(scores), "-o", str(tmp_path), "--p", "40", "--keep-easy", "0.5"]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    n = select(scores, 40, keep_easy=0.5).counts
    by_vig = n["samples_kept"] - n["samples_easy"], n["tokens_kept"] - n["tokens_easy"]
    assert f"by VIG         {by_vig[0]:,} samples, {by_vig[1]:,} tokens" in said.output
    assert f"as easy       {n['tokens_easy']:,} more tokens, whose nll_null is under 0.5 nats" in said.output
    assert f"easy alone    {n['samples_easy']:,} samples" in said.output
    made = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert made["keep_easy"] == 0.5 and made["counts"] == n
    assert "easy" not in "\n".join(select(scores, 40).summary())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_easy": 0.0}, r"above 0 .*got 0\.0"),
        ({"keep_easy": -1}, "got -1"),
        ({"keep_easy": float("inf")}, "got inf"),
        ({"keep_easy": float("nan")}, "got nan"),
        ({"keep_easy": 0.5, "level": "random"}, r"level random .* leave out keep_easy \(--keep-easy\)"),
    ],
)
def test_what_makes_no_sense_is_refused(scores, options, said):
    with pytest.raises(ValueError, match=said):
        select(scores, **options)
    named = {"keep_easy": "--keep-easy", "level": "--level"}
    flags = [str(part) for name, value in options.items() for part in (named[name], value)]
    assert CliRunner().invoke(app, ["select", str(scores), "-o", "none", *flags]).exit_code == 2


@pytest.mark.filterwarnings("ignore:.*tau")
@pytest.mark.parametrize("level", ["both", "sample", "token"])
@pytest.mark.parametrize("more", [{}, {"clip": -0.3, "mean": "content"}, {"stop_tokens": "select"}])
def test_the_reports_slider_keeps_what_select_keeps(scores, level, more):
    chosen = select(scores, 60, level=level, keep_easy=EASY, **more)
    rules = rules_of(chosen.metadata["selection"], chosen.metadata)
    assert rules.keep_easy == EASY and rules.options.endswith(" --keep-easy 0.5") != ("mean" in more)
    curve = gather(scores, 0, rules=rules).keep
    for p in (0.5, 30, 60, 100):
        place = int(np.searchsorted(curve.p, p))
        for by, rule in ((None, "all"), ("source", "source")):
            chosen = select(scores, p, level=level, by=by, keep_easy=EASY, **more)
            assert curve.samples[rule][:, place].sum() == chosen.counts["samples_kept"]
            assert curve.tokens[rule][:, place].sum() == chosen.counts["tokens_kept"]
            if by is None:
                assert curve.taus[-1][place] == chosen.tau


def test_a_comparison_counts_them(scores, tmp_path):
    with ScoreWriter(tmp_path, {"model": "n"}) as writer:
        for window, batch in enumerate(read_scores(scores)):
            rows = []
            for row in batch.to_pylist():
                lists = [
                    row[name] or ()
                    for name in ("token_ids", "positions", "token_nll_image", "token_nll_null")
                ]
                null = np.array(lists[3], np.float32)
                lists[3] = np.where(np.arange(len(null)) % 2 == 0, null, null + 1) if len(null) else ()
                rows.append(ScoreRow(row["key"], row["id"], row["source"], row["status"], *map(list, lists)))
            writer.write(window, rows)
        writer.mark_complete()
    found, plain = compare(scores, tmp_path, 50, keep_easy=EASY), compare(scores, tmp_path, 50)
    kept = [select(one, 50, keep_easy=EASY).table() for one in (scores, tmp_path)]
    shared = [key for key in kept[0] if gather_status(scores)[key] == "ok"]
    tokens = [
        {(key, t) for key in shared for t in np.flatnonzero(one[key].token_keep).tolist()} for one in kept
    ]
    assert found.token_overlap == pytest.approx(len(tokens[0] & tokens[1]) / len(tokens[0] | tokens[1]))
    assert found.token_overlap != plain.token_overlap and found.sample_overlap == plain.sample_overlap
    assert "at p = 50, with the tokens under 0.5 nats without the image" in "\n".join(found.lines())
    assert found.as_dict()["keep_easy"] == EASY
    with pytest.raises(ValueError, match="got -2"):
        compare(scores, tmp_path, keep_easy=-2)


def gather_status(scores) -> dict[str, str]:
    return {row["key"]: row["status"] for batch in read_scores(scores) for row in batch.to_pylist()}


# ---- training


@pytest.fixture(scope="module")
def taught(processor, tmp_path_factory):  # noqa: F811
    """Four samples and a selection: VIG keeps the first, easy tokens two of the others, nothing the last."""
    folder, encoder, items, rows = tmp_path_factory.mktemp("taught"), Encoder(processor), samples(5), []
    items = [item for item in items if item.images]
    for number, sample in enumerate(items):
        ids = encoder.encode(sample).answer_ids
        null, image = np.full(len(ids), 3.0), np.full(len(ids), 0.5 if number == 0 else 3.5)
        if number in (1, 2):
            null[:number] = image[:number] = 0.25
        rows.append(ScoreRow(sample.key, sample.id, "s", "ok", ids, range(len(ids)), image, null))
    with ScoreWriter(folder / "scores", {"model": "m", "data": str(folder / "data.json")}) as writer:
        writer.write(0, rows)
        writer.mark_complete()
    chosen = select(folder / "scores", 1, keep_easy=EASY, out=folder / "selection")
    assert chosen.counts["samples_easy"] == 2 and chosen.counts["tokens_easy"] == 3
    return items, chosen, folder


def test_a_dropped_sample_is_trained_on_its_easy_tokens_alone(processor, taught):  # noqa: F811
    items, chosen, folder = taught
    kept = keep_samples(items, folder / "selection")
    assert [sample.key for sample in kept.samples] == [
        sample.key for sample in items[:3]
    ] and kept.dropped == 1
    assert kept.answers[1:] == [1, 2]
    plain = SelectiveCollator(processor, cut=False)(items)["labels"]
    wanted = torch.full_like(plain, -100)
    for row, count in enumerate((plain.shape[1], 1, 2, 0)):
        at = (plain[row] != -100).nonzero()[:count, 0]
        wanted[row, at] = plain[row, at]
    assert torch.equal(SelectiveCollator(processor, folder / "selection", cut=False)(items)["labels"], wanted)

    def base(features):
        return SelectiveCollator(processor, cut=False)([feature["sample"] for feature in features])

    features = [{"key": sample.key, "sample": sample} for sample in items]
    ours = SelectiveLabels(base, chosen, processor=processor, cut=False)(features)["labels"]
    assert torch.equal(ours, wanted)
    for row, sample in enumerate(items):
        assert mask_row(plain[row].tolist(), sample.key, folder / "selection") == wanted[row].tolist()


def test_the_export_holds_them(taught):
    items, chosen, folder = taught
    records = [
        {"id": f"id{row}", "image": f"{row}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]}
        for row in range(5)
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(records))
    assert export_records(chosen, folder / "kept.json") == 3
    rows = [int(sample.key.rpartition("#")[2]) for sample in items[:3]]
    assert json.loads((folder / "kept.json").read_text()) == [records[row] for row in rows]
