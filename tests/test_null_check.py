"""The check of the null image: blind, showing the image, or confidently wrong."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vig.cli import app
from vig.data.samples import read_samples
from vig.demo.arms import CHECKPOINT
from vig.demo.dataset import tuning_records, write_records
from vig.reporting.facts import WordRow, gather
from vig.reporting.null_check import FAR, LIKELY, check_null, check_scores, summary
from vig.reporting.report import report
from vig.scoring.scorer import Scorer
from vig.selection.select import select
from vig.store.rows import ScoreRow
from vig.store.scores import ScoreWriter

BLUR = {"kind": "blur", "params": {"sigma": 0.1}}
TINY = 0.01  # nats


class Pieces:
    """A tokenizer of given pieces: decoding joins them."""

    pieces = ("", " the", " red", " green", " te", "al", " cup", " tree", " two", ".", "</s>", " quick")

    def __call__(self, text, **_):
        return {"input_ids": [0]}

    def decode(self, ids, **_):
        return "".join(self.pieces[id] for id in ids)


THE, RED, GREEN, TE, AL, CUP, TREE, TWO, DOT, END, QUICK = range(1, 12)


def said(*tokens: tuple[int, float, float]) -> WordRow:
    """(id, NLL with the image, NLL with the null) of each token."""
    ids, image, null = (np.array(values) for values in zip(*tokens, strict=True))
    return WordRow(ids.astype(np.int32), null - image, null.astype(np.float32))


def test_a_case_worked_by_hand():
    rows = [
        said((THE, TINY, TINY), (RED, TINY, 0.3), (CUP, TINY, 9.0), (DOT, TINY, 5.0), (END, 0, 9.0)),
        said((RED, TINY, 2.0), (RED, TINY, 0.0), (TWO, TINY, 9.0)),  # red again tells nothing new
        said(
            (GREEN, TINY, 1.39 + FAR - 0.01), (QUICK, TINY, 9.0), (TREE, TINY, 0.1)
        ),  # chance of green: log 4
        said((TE, 0.1, 1.7), (AL, 0.1, 1.7)),  # teal, chance log 4
        said((GREEN, 3.0, 9.0)),  # the image does not make it likely: perhaps a wrong answer
        said((TE, 0.6, 0.2), (AL, 0.6, 0.2)),  # teal: 1.2 nats with the image
    ]
    check = check_null(rows, Pieces(), BLUR)
    assert [kind.name for kind in check.kinds] == ["colour"]  # two objects and one number are too few to tell
    (colour,) = check.kinds
    assert colour.words == 4
    chances = [math.log(3), math.log(3), math.log(3), math.log(3)]  # red, red, green, teal: each 2 of 6
    assert colour.chance == pytest.approx(np.mean(chances))
    nulls = [0.3, 2.0, 1.39 + FAR - 0.01, 3.4]
    assert colour.nll_null == pytest.approx(np.mean(nulls)) and colour.nll_image == pytest.approx(0.0575)
    assert colour.likely == np.mean([nll < LIKELY for nll in nulls]) == 0.25
    assert colour.wrong == np.mean([nll > math.log(3) + FAR for nll in nulls]) == 0.5
    assert replace(check.total, name="colour") == colour
    assert not check.warnings  # too few words to be warned by
    assert summary(check).endswith("than chance: these are too few to tell, under 50 words")


def test_where_there_is_nothing_to_judge():
    row = said((THE, TINY, TINY), (QUICK, TINY, 9.0), (END, 0, 0))
    assert check_null([row], Pieces(), BLUR) is None
    assert check_null([], Pieces(), BLUR) is None
    assert check_null([row], None, BLUR) is None
    assert check_null([WordRow(np.empty(0, np.int32), np.empty(0), np.empty(0))], Pieces(), BLUR) is None


@pytest.mark.parametrize(
    ("null", "nll_null", "warned"),
    [
        (
            BLUR,
            0.1,
            "null blur, sigma 0.1 leaves 100 % of the words that need sight likely: it shows the image",
        ),
        ({"kind": "drop"}, 0.1, "likely: the text gives them away"),
        (BLUR, 1.1, None),
        (BLUR, 4.0, "over 7 times less likely than by chance.* Try a larger --sigma, or --null mean$"),
        ({"kind": "noise"}, 4.0, "null noise makes 100 % .* Try --null mean or blur$"),
        (
            {"kind": "shuffle", "params": {"donor": "next"}},
            4.0,
            "by rank, not in nats, or try --null mean or blur$",
        ),
        ({}, 4.0, "null unknown makes"),
    ],
)
def test_warnings_say_the_cure(null, nll_null, warned):
    rows = [said((word, TINY, nll_null)) for word in (RED, GREEN, CUP) for _ in range(25)]
    rows += [said((TE, TINY, nll_null / 2), (AL, 0.0, nll_null / 2))] * 25
    found = check_null(rows, Pieces(), null).warnings
    assert len(found) == (warned is not None)
    if warned is not None:
        assert re.search(warned, found[0])


# ---- on the miniature


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"), "tune", tuning_records(160, 7))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(CHECKPOINT))


@pytest.mark.parametrize(
    ("null", "sigma", "warned"), [("blur", 0.02, "leaves"), ("blur", 0.1, None), ("noise", 0.1, "makes")]
)
def test_the_miniatures_nulls(data, tokenizer, null, sigma, warned):
    """A weak blur shows the picture, noise is taken for one; the default is near blind."""
    rows = Scorer(str(CHECKPOINT), null=null, sigma=sigma).score(read_samples(data))
    params = {"sigma": sigma} if null == "blur" else {}
    rows = [ScoreRow(**(vars(row) | {"source": "s"})) for row in rows]
    check = check_null(_word_rows(rows), tokenizer, {"kind": null, "params": params})
    assert {kind.name for kind in check.kinds} == {"colour", "number", "object"} and check.total.words > 200
    assert [line.split(" of ")[0].split()[-3] for line in check.warnings] == ([warned] if warned else [])
    assert (check.total.likely > 0.55) == (warned == "leaves") and (check.total.wrong > 0.36) == (
        warned == "makes"
    )


def _word_rows(rows: list[ScoreRow]) -> list[WordRow]:
    found = []
    for row in rows:
        if row.vig is not None:
            null = np.asarray(row.token_nll_null)
            found.append(
                WordRow(np.asarray(row.token_ids), null - np.asarray(row.token_nll_image, float), null)
            )
    return found


def test_score_report_and_select_say_it(data, tmp_path):
    scores, page = tmp_path / "scores", tmp_path / "report.html"
    asked = ["score", str(CHECKPOINT), str(data), "-o", str(scores), "--sigma", "0.02", "--limit", "100"]
    ran = CliRunner().invoke(app, asked)
    assert ran.exit_code == 0, ran.output
    check = check_scores(scores, AutoTokenizer.from_pretrained(str(CHECKPOINT)))
    lines = ran.output.splitlines()
    assert lines[-1] == f"scores: {scores}" and [line for line in check.lines() if line not in lines] == []
    total = check.null.total
    assert (
        f"null check: of {total.words:,} words that need sight the null leaves {100 * total.likely:.1f} % likely and "
        f"makes {100 * total.wrong:.1f} % far less likely than chance" in ran.output
    )
    assert "warning: null blur, sigma 0.02 leaves" in ran.output
    made = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)["check"]
    assert made["null"]["likely"] == total.likely and made["null"]["warnings"] == check.null.warnings

    table = select(scores).table()
    text = [entry for key, entry in table.items() if key in _text_only(scores)]
    tokens = sum(len(entry.token_ids) for entry in text)
    assert (check.samples, check.text_only, check.text_only_tokens) == (100, len(text), tokens) and len(
        text
    ) > 10
    every = sum(len(entry.token_ids) for entry in table.values())
    assert check.tokens == every and made["text_only_tokens"] == tokens
    share = f"{100 * tokens / every:.1f} %"
    assert (
        f"text-only: {len(text)} of 100 ({len(text):.1f} %) samples, {tokens} of {every:,} ({share})"
        in ran.output
    )
    chosen = select(scores, 50)
    of_kept = 100 * tokens / (tokens + chosen.counts["tokens_kept"])
    assert f"{tokens:,} tokens, all kept: {of_kept:.1f} % of the tokens trained on" in "\n".join(
        chosen.summary()
    )

    html = report(scores, page, selection=chosen, data=data, samples=3).read_text()
    assert f"{tokens} more text only, {share} of all" in html
    assert f"; text only make up {of_kept:.1f} %" in html
    assert "Is the null image blind?" in html and "Null blur, sigma 0.02 leaves" in html
    for row in [*check.null.kinds, total]:
        assert f'<th scope="row">{row.name}</th><td class="n">{row.words:,}</td>' in html
    said = "too few to tell"
    assert total.words >= 50 and said not in html and said not in ran.output
    few = report(pq.read_table(scores).slice(0, 12), page, data=data, samples=1).read_text()
    assert "Is the null image blind?" in few and said in few


def _text_only(scores) -> set[str]:
    from vig.store.scores import read_scores

    rows = (row for batch in read_scores(scores, ["key", "status"]) for row in batch.to_pylist())
    return {row["key"] for row in rows if row["status"] == "text_only"}


def test_many_rows_are_judged_by_a_seeded_sample_that_is_the_reports(tmp_path, monkeypatch):
    rng, rows = np.random.default_rng(0), []
    for number in range(3000):
        ids = rng.choice([RED, GREEN, TE, CUP, TREE, TWO, DOT], int(rng.integers(1, 5)))
        image, null = rng.exponential(0.3, len(ids)), rng.exponential(2, len(ids))
        status = ("ok", "ok", "text_only", "error: lost")[number % 4]
        values = {"ok": (ids, range(len(ids)), image, null), "text_only": (ids, range(len(ids)), image)}
        rows.append(ScoreRow(f"d#{number}", "", "s", status, *values.get(status, ())))
    with ScoreWriter(tmp_path, {"model": "m", "null": BLUR}) as writer:
        for window in range(6):
            writer.write(window, rows[500 * window : 500 * window + 500])
        writer.mark_complete()
    for module in ("facts", "null_check"):
        monkeypatch.setattr(f"vig.reporting.{module}.WORD_ROWS", 200)
    monkeypatch.setattr(Pieces, "pieces", (*Pieces.pieces[:4], " teal", "", *Pieces.pieces[6:]))
    check = check_scores(tmp_path, Pieces())
    assert (check.samples, check.text_only) == (2250, 750)
    words = gather(tmp_path, 0).words
    assert len(words) == 200 and check.null == check_null(words, Pieces(), BLUR)
    assert check == check_scores(tmp_path, Pieces()) != check_scores(tmp_path, Pieces(), seed=1)
    assert check_scores(tmp_path, None).null is None
