"""Two scorings beside each other: true figures, refusals, the terminal, JSON and the page."""

import json

import numpy as np
import pytest
import tiny
from scipy.stats import spearmanr
from test_report import Checked
from typer.testing import CliRunner

from vig.cli import app
from vig.data.files import StoreError
from vig.reporting.compare_page import comparison_page
from vig.selection.compare import compare, mean_ranks
from vig.selection.select import select
from vig.store.folder import SettingsDiffer
from vig.store.rows import ScoreRow
from vig.store.scores import ScoreWriter

SETTINGS = {"model": "m", "data_fingerprint": "f", "null": {"kind": "blur", "params": {"sigma": 0.1}}}
BLACK = {"null": {"kind": "black", "params": {}}}


def scored(folder, seed=0, order=None, sources="ab", **changed):
    """Scores of 60 samples whose null pass is noisier for other seeds, written in two windows; their folder."""
    rng, own = np.random.default_rng(0), np.random.default_rng(seed)
    rows = []
    for number in range(60):
        n = int(rng.integers(2, 9))
        image, gain = rng.exponential(1, n), rng.normal(0.5, 1, n)
        null = image + gain + (own.normal(0, 0.4, n) if seed else 0)
        ids = rng.integers(5, 99, n).tolist()
        status = "ok" if number % 9 != 4 else "error: gone"
        values = (ids, range(n), image, null) if status == "ok" else ()
        rows.append(
            ScoreRow(f"d.json#{number}", f"i{number}", sources[number % len(sources)], status, *values)
        )
    rows = rows if order is None else [rows[place] for place in order]
    with ScoreWriter(folder, {**SETTINGS, **changed}) as writer:
        writer.write(0, rows[:25])
        writer.write(1, rows[25:])
        writer.mark_complete()
    return folder


def vig_of(folder):
    from vig.store.scores import read_scores

    rows = [row for batch in read_scores(folder) for row in batch.to_pylist()]
    return {row["key"]: row["vig"] for row in rows if row["vig"] is not None}


def test_figures_are_true(tmp_path):
    a, b = scored(tmp_path / "a"), scored(tmp_path / "b", 3, **BLACK)
    found = compare(a, b, 50, moved=5)
    one, two = vig_of(a), vig_of(b)
    keys = list(one)
    assert found.samples == len(keys) == 53 and (found.only_a, found.only_b) == (0, 0) and not found.identical
    values = np.array([[one[key], two[key]] for key in keys])
    assert found.rank_correlation == pytest.approx(spearmanr(values[:, 0], values[:, 1]).statistic)
    assert found.mean_vig == pytest.approx(tuple(values.mean(0)))
    assert [name for name, *_ in found.differences] == ["null.kind", "null.params.sigma"]
    chosen = [select(scores, 50).table() for scores in (a, b)]
    kept = [{key for key in keys if table[key].keep} for table in chosen]
    assert found.sample_overlap[50] == pytest.approx(len(kept[0] & kept[1]) / len(kept[0] | kept[1]))
    tokens = [
        {(key, t) for key in keys for t in np.flatnonzero(table[key].token_keep).tolist()} for table in chosen
    ]
    assert found.token_overlap == pytest.approx(len(tokens[0] & tokens[1]) / len(tokens[0] | tokens[1]))
    ranks = np.stack([mean_ranks(column) for column in values.T])
    change = dict(zip(keys, ranks[1] - ranks[0], strict=True))
    assert found.rose[0].key == max(change, key=change.get) and found.fell[0].key == min(
        change, key=change.get
    )
    assert (
        all(x.percentile_b > x.percentile_a for x in found.rose) and len(found.rose) == len(found.fell) == 5
    )
    assert (found.rose[0].vig_a, found.rose[0].vig_b) == (one[found.rose[0].key], two[found.rose[0].key])
    (first, second) = found.sources
    assert {first.source, second.source} == {"a", "b"} and first.samples + second.samples == 53
    mine = np.array([int(key.split("#")[1]) % 2 == "ab".index(first.source) for key in keys])
    assert first.rank_correlation == pytest.approx(spearmanr(*values[mine].T).statistic)
    assert first.mean_vig_b == pytest.approx(values[mine, 1].mean())


def test_identical_scorings_are_called_so(tmp_path):
    a, b = scored(tmp_path / "a"), scored(tmp_path / "b", library_version="other")
    found = compare(a, b)
    assert (
        found.identical and not found.rose and not found.fell and found.rank_correlation == pytest.approx(1)
    )
    assert "identical: every token has the same VIG in both" in found.lines()
    assert "  no setting differs" in found.lines()
    nearly = compare(a, scored(tmp_path / "c", 1))
    assert not nearly.identical and "identical:" not in str(nearly.lines())


def test_rows_in_another_order_and_missing_ones_are_matched_by_key(tmp_path):
    order = np.random.default_rng(1).permutation(60)[:50]
    a, b = scored(tmp_path / "a"), scored(tmp_path / "b", 3, order)
    whole, found = compare(a, scored(tmp_path / "c", 3)), compare(a, b)
    assert found.samples + found.only_a == 53 and found.only_b == 0 and found.token_overlap is None
    assert not found.identical and whole.token_overlap is not None
    one, two = vig_of(a), vig_of(b)
    assert found.rank_correlation == pytest.approx(
        spearmanr([one[k] for k in two], list(two.values())).statistic
    )


def test_other_data_are_refused(tmp_path):
    a = scored(tmp_path / "a")
    with pytest.raises(
        SettingsDiffer, match=r"content of the data: A has 'f', B 'g'(.|\n)*Score the same data"
    ):
        compare(a, scored(tmp_path / "b", data_fingerprint="g"))
    rows = [ScoreRow("e.json#0", "", "", "ok", [5], [0], [0.1], [0.2])]
    with ScoreWriter(tmp_path / "c", {"model": "m"}) as writer:
        writer.write(0, rows)
    with pytest.raises(StoreError, match="share no sample that has a VIG in both"):
        compare(a, tmp_path / "c")
    chosen = select(a, 50, out=tmp_path / "chosen").out
    with pytest.raises(StoreError, match=r"chosen is a selection.* join them by key"):
        compare(a, chosen)
    for p in (0, 101):
        with pytest.raises(ValueError, match="p is the percentage"):
            compare(a, a, p)


def test_the_command_prints_lines_or_json_and_writes_a_page(tmp_path):
    a, b = scored(tmp_path / "a"), scored(tmp_path / "b", 3, **BLACK)
    done = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert (
        done.exit_code == 0 and "null.kind: A 'blur', B 'black'" in done.output and "rose most" in done.output
    )
    done = CliRunner().invoke(app, ["compare", str(a), str(b), "--json", "--p", "50"])
    found = json.loads(done.output)
    assert found["rank_correlation"] == compare(a, b).rank_correlation and "50" in found["sample_overlap"]
    assert CliRunner().invoke(app, ["compare", str(a), str(b), "--p", "0"]).exit_code == 2
    done = CliRunner().invoke(
        app, ["compare", str(a), str(b), "-o", str(tmp_path / "page.html"), "--moved", "3"]
    )
    assert done.exit_code == 0 and len(Checked((tmp_path / "page.html").read_text()).samples) == 6


def test_the_page_shows_both_scorings_and_both_nulls(tmp_path):
    (tmp_path / "model").mkdir()
    processor = tiny.llava_processor()
    processor.save_pretrained(tmp_path / "model")
    tiny.llava_model().config.save_pretrained(tmp_path / "model")
    records = []
    for number in range(60):
        tiny.save_picture(tmp_path / f"{number}.png", number)
        turns = [{"from": "human", "value": f"<image>\nwhat is {number}?"}, {"from": "gpt", "value": "x"}]
        records.append({"id": f"i{number}", "image": f"{number}.png", "conversations": turns})
    (tmp_path / "d.json").write_text(json.dumps(records))
    about = {"model": str(tmp_path / "model"), "data": str(tmp_path / "d.json")}
    a, b = scored(tmp_path / "a", **about), scored(tmp_path / "b", 3, **about, **BLACK)
    found = compare(a, b, moved=2)
    shown = Checked(comparison_page(found, a, b, tmp_path / "page.html", title="both").read_text())
    text = "".join(shown.text)
    assert f"{found.rank_correlation:.3f}" in text and "null imageblurblack" in text and "By source" in text
    assert shown.state["passes"] == ["A", "B"] and shown.state["nullNames"] == ["blurred", "black"]
    assert [sample["k"] for sample in shown.samples] == [row.key for row in (*found.rose, *found.fell)]
    for sample, row in zip(shown.samples, (*found.rose, *found.fell), strict=True):
        assert sample["v"] == [row.vig_a, row.vig_b] and sample["q"].startswith("what is")
        assert len(sample["a"]) == len(sample["b"]) == 2 and sample["b"][0] != sample["b"][1]
        (image,), (blurred,), (black,) = sample["im"], *sample["nu"]
        assert np.asarray(shown.images[black].convert("RGB")).max() == 0 and len({image, blurred, black}) == 3
    same = compare(a, a)
    page = Checked(comparison_page(same, a, a, tmp_path / "same.html").read_text())
    assert "The two scorings are identical" in "".join(page.text) and not page.samples
