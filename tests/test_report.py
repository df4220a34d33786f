"""The page: one file, true values, and what it says when something is missing."""

import base64
import io
import json
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
from PIL import Image
from transformers import AutoProcessor

from vig.data.files import StoreError
from vig.reporting.facts import Counter, gather
from vig.reporting.page import EXACT_PIXELS, height_ticks, legend, rounded, shade, signed, ticks
from vig.reporting.report import Page, SampleView, Word, _fitting, render, report
from vig.reporting.viewer import token_texts, words
from vig.selection.select import select
from vig.store.folder import SettingsDiffer
from vig.store.rows import ScoreBlock, ScoreRow
from vig.store.scores import ScoreWriter, read_scores, score_metadata

VOID = {"meta", "img", "path", "rect"}


class Checked(HTMLParser):
    """Refuses tags that do not nest, scripts, and anything that would be fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tokens, self.images, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe") and "href" not in attributes
        if tag == "img":
            assert attributes["src"].startswith("data:image/")
            _, data = attributes["src"].split(";base64,")
            self.images.append((attributes, Image.open(io.BytesIO(base64.b64decode(data)))))
        if tag == "span" and attributes.get("title"):
            self.tokens.append([attributes["class"].split(), attributes["title"], ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "span" and self.tokens and not self.tokens[-1][2]:
            self.tokens[-1][2] = data


def view(**changes) -> SampleView:
    values = {
        "key": "d.json#1", "id": "7", "question": "what is <it>?", "tokens": ["a", " red", " cup", "</s>"],
        "vig": [0.01, 4.2, -0.7, 0.0], "nll_image": [0.1, 0.2, 1.0, 0.0], "nll_null": [0.11, 4.4, 0.3, 0.0],
        "kept": [False, True, False, False],
    }  # fmt: skip
    return SampleView(**{**values, **changes})


def page(*views: SampleView, **changes) -> Checked:
    return Checked(render(Page("model", "null", [("n", "1", "")], [("Highest", "", list(views))], **changes)))


def test_tokens_are_coloured_marked_and_explained():
    shown = page(view(), tau=0.5)
    kinds = [(classes, text) for classes, _, text in shown.tokens]
    assert kinds == [
        (["t", "z", "left"], "a"),
        (["t", "p5", "kept"], "red"),
        (["t", "n2", "left"], "cup"),
        (["t", "z", "special", "left"], "</s>"),
    ]
    assert shown.tokens[1][1] == "VIG +4.20 = 4.400 (null) − 0.200 (image) nats; trained on"
    joined = "".join(shown.text)
    assert "what is <it>?" in joined and "trained on 1 of 4 tokens" in joined and "a red cup</s>" in joined


def test_markup_in_the_data_is_text():
    evil = '<script>alert("x")</script><img src="http://x">'
    shown = page(view(question=evil, key=evil, tokens=[evil, " red", "&amp;", "\n"]))
    assert "".join(shown.text).count(evil) == 4  # the token stands in the list of values too
    assert [text for *_, text in shown.tokens] == [evil, "red", "&amp;", "⏎"]


def test_turns_are_split_where_they_begin():
    shown = render(Page("m", "", [], [("x", "", [view(turns=[(2, "and then?")])])]))
    first, second = re.findall(r'<p class="answer">(.*?)</p>', shown, re.DOTALL)
    assert "red" in first and "cup" not in first and second.startswith("<span") and "cup" in second
    assert shown.index("red</span>") < shown.index("and then?") < shown.index("cup</span>")


def test_colour_scale_and_numbers():
    assert [shade(value) for value in (0.0999, 0.1, -0.1, 0.5, 1, -2, 3.99, 4, -99)] == [
        "z", "p1", "n1", "p2", "p3", "n4", "p4", "p5", "n5",
    ]  # fmt: skip
    labels = legend()
    assert (
        len(labels) == 11
        and labels[0] == ("n5", "−4")
        and labels[5] == ("z", "0")
        and labels[-1] == ("p5", "+4")
    )
    assert [signed(value) for value in (1.005, -0.004, -3.2, 0)] == ["+1.00", "0.00", "−3.20", "0.00"]
    assert [rounded(value) for value in (-0.06243, 2.4e-6, 1.5)] == ["−0.0624", "2.4e−6", "1.5"]
    assert (_fitting(9_999_999), _fitting(142_284_115)) == ("9,999,999", "142.3\u202fM")
    assert np.allclose(ticks(-0.3, 3.9), np.arange(0, 4)) and np.allclose(ticks(0, 0.05), np.arange(6) * 0.01)


def test_values_can_be_read_without_pointing():
    text = render(
        Page("m", "", [], [("x", "", [view(tokens=["a", " red", "\n", "</s>"]), view(vig=[], nll_null=[])])])
    )
    two, one = re.findall(r"<details.*?</details>", text, re.DOTALL)
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", two)]
    assert rows[0] == ["token", "VIG", "NLL null", "NLL image", "trained on"]
    assert rows[2] == ["red", "+4.20", "4.400", "0.200", "yes"] and rows[3][:2] == ["⏎", "−0.70"]
    assert len(rows) == 5 and "VIG" not in one and "<td>0.200</td><td>yes</td>" in one


def test_negative_values_have_a_mark_beside_their_colour():
    text = render(Page("m", "", [], [("x", "", [view()])]))
    rule = re.search(r":is\(.t, .scale span\):is\((.*?)\) \{ text-decoration: overline dotted", text)
    assert rule[1].split(", ") == [f".{kind}" for kind, label in reversed(legend()) if label.startswith("−")]
    assert "dotted above" in text


def test_bars_and_rods_have_the_colour_of_the_legend():
    style = re.search(r"<style>(.*?)</style>", render(Page("m", "", [], [])), re.DOTALL)[1]
    for kind, _ in legend():
        own = "--paper" if kind == "z" else f"--{kind}"
        assert f"rect.{kind} {{ fill: var({own}); }}" in style
    words = [Word("up", 0.37, 9), Word("none", 0.004, 9), Word("down", -4.5, 9)]
    text = render(Page("m", "", [], [], highest=words))
    assert re.findall(r'<span class="rod (..)" style="width: ([\d.]+)%', text) == [
        ("p1", "8.2"),
        ("n5", "100.0"),
    ]


@pytest.mark.parametrize("most", [1, 3, 9, 40, 700, 10**6])
def test_every_histogram_has_marks_of_its_height(most):
    for logarithmic in (False, True):
        marks = height_ticks(most, logarithmic)
        assert marks and marks == sorted(set(marks)) and 0 < marks[0] <= marks[-1] <= most and len(marks) <= 6


def test_small_pictures_keep_their_pixels_and_large_ones_shrink():
    small, large = tiny.picture(3, (24, 16)), tiny.picture(4, (2000, 1000))
    shown = page(view(image=small, null_image=large))
    (first, kept), (second, shrunk) = shown.images
    assert first["class"] == "pixels" and np.array_equal(np.asarray(kept), np.asarray(small))
    assert second["class"] == "photo" and max(shrunk.size) < 500 and max(shrunk.size) > EXACT_PIXELS
    assert (first["width"], first["height"], second["height"]) == ("168", "112", "84")


def test_histograms_hold_every_value_and_are_cut_at_zero():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.8, 1, 5000), [99.0, -99.0, 0.0]])
    counter = Counter()
    for part in np.array_split(values, 7):
        counter.add(part)
    drawn = counter.histogram(tau=1.0)
    assert drawn.counts.sum() == 5003 and counter.mean == pytest.approx(values.mean())
    edges = drawn.low + drawn.width * np.arange(len(drawn.counts) + 1)
    assert np.abs(edges).min() < 1e-9 and edges[0] > -4 and edges[-1] < 5
    inside = np.histogram(values, edges)[0]
    assert np.array_equal(drawn.counts[1:-1], inside[1:-1])
    assert Counter().histogram() is None
    alone = Counter()
    alone.add(np.zeros(9))
    assert alone.histogram(tau=2.5).high > 2.5 and alone.histogram().counts.sum() == 9


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A tiny dataset on disk, its processor as a checkpoint would hold it, and scores of it."""
    root = tmp_path_factory.mktemp("report")
    (root / "model").mkdir()
    processor = tiny.llava_processor()
    processor.save_pretrained(root / "model")
    tiny.llava_model().config.save_pretrained(root / "model")
    records, rows = [], []
    for index in range(12):
        answers = ["a red cup.", "two."] if index == 2 else [f"a cup no. {index}."]
        turns = [{"from": "human", "value": f"what is number {index}?"}, {"from": "gpt", "value": answers[0]}]
        if index == 2:
            turns += [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": answers[1]}]
        record = {"id": f"id{index}", "conversations": turns}
        status = "text_only" if index == 5 else "error: no image at gone.png" if index == 6 else "ok"
        if status != "text_only":
            name = f"{index}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["image"] = name if status == "ok" else "gone.png"
            tiny.save_picture(root / name, index)
        records.append(record)
        ids = [processor.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        positions = [place for turn in ids for place in range(len(turn))]
        flat = [id for turn in ids for id in turn]
        image = np.linspace(0.1, 1, len(flat))
        gain = np.where(np.arange(len(flat)) % 3 == 1, 1 + index, 0.0)
        values = (image, image + gain) if status == "ok" else (image,)
        key = f"data.json#{index}"
        if status.startswith("error"):
            rows.append(ScoreRow(key, f"id{index}", "data.json", status))
        else:
            rows.append(ScoreRow(key, f"id{index}", "data.json", status, flat, positions, *values))
    (root / "data.json").write_text(json.dumps(records))
    settings = {
        "model": str(root / "model"), "data": str(root / "data.json"), "image_root": str(root),
        "null": {"kind": "blur", "params": {"sigma": 0.1}}, "noise_floor": 2e-6,
    }  # fmt: skip
    with ScoreWriter(root / "scores", settings) as writer:
        writer.write(0, rows[:7])
        writer.write(1, rows[7:])
        writer.mark_complete()
    return root


def test_picks_are_the_extremes_and_none_comes_twice(scored):
    facts = gather(scored / "scores", 6)
    keys = {name: [row["key"].split("#")[1] for row in rows] for name, rows in facts.groups.items()}
    vig = {
        row["key"].split("#")[1]: row["vig"] for b in read_scores(scored / "scores") for row in b.to_pylist()
    }
    order = sorted((key for key in vig if vig[key] is not None), key=vig.get)
    assert keys["lowest"] == order[:2] and keys["highest"] == order[::-1][:2]
    every = [key for group in keys.values() for key in group]
    assert len(every) == len(set(every)) == 6 and "6" not in every
    assert gather(scored / "scores", 6).groups == facts.groups
    assert len([row for rows in gather(scored / "scores", 99).groups.values() for row in rows]) == 11
    assert (facts.multimodal, facts.text_only, facts.n_errors) == (10, 1, 1)


def test_a_selection_made_from_other_scores_is_refused(scored, tmp_path):
    rows = [row for batch in read_scores(scored / "scores") for row in batch.to_pylist()]
    columns = ("id", "source", "status", "token_ids", "positions", "token_nll_image", "token_nll_null")

    def other(name, key, **changed):
        made = [
            ScoreRow(key(row["key"]), *(row[c] if row[c] is not None else () for c in columns))
            for row in rows
        ]
        with ScoreWriter(tmp_path / name, score_metadata(scored / "scores") | changed) as writer:
            writer.write(0, made)
        return select(tmp_path / name, 50, out=tmp_path / f"{name}-selection").out

    page = tmp_path / "page.html"
    black = other("black", str, null={"kind": "black", "params": {}})
    with pytest.raises(SettingsDiffer, match=r"null.kind: the scores have 'blur', the selection 'black'"):
        report(scored / "scores", page, selection=black)
    strangers = other("strangers", lambda key: f"other-{key}")
    with pytest.raises(StoreError, match=r"the selection knows none of the samples, data.json#"):
        report(scored / "scores", page, selection=strangers)
    assert not page.exists()


def test_the_whole_page(scored, tmp_path):
    selection = select(scored / "scores", 50, out=tmp_path / "selection")
    path = report(scored / "scores", tmp_path / "new" / "report.html", selection=tmp_path / "selection")
    shown = Checked(path.read_text(encoding="utf-8"))
    text = "".join(shown.text)
    assert f"τ = {selection.tau:.3g}" in text and "50.0 %" in text and "noise floor" in text
    assert "1 sample could not be scored: data.json#6: no image at gone.png" in text
    assert "text only" in text and "how many?" in text and "what is number 11?" in text
    assert len(shown.images) == 2 * 10  # as the model sees them: 32 x 32, and their nulls
    for (_, image), (_, null) in zip(shown.images[::2], shown.images[1::2], strict=True):
        assert image.size == null.size == (32, 32)
        assert np.asarray(null, float).std() < np.asarray(image, float).std()
    kept = sum("kept" in classes for classes, *_ in shown.tokens)
    entries = selection.table().values()
    assert kept == sum(int(entry.token_keep.sum()) for entry in entries)
    assert (
        sum("left" in classes for classes, *_ in shown.tokens)
        == sum(len(e.token_keep) for e in entries) - kept
    )
    counts = selection.counts
    part, whole = (counts[name] + counts["text_only_tokens"] for name in ("tokens_kept", "tokens_total"))
    assert (
        counts["text_only_tokens"]
        and f"{part:,} of {whole:,}; " in text
        and "6 of 11; 50.0 % of the 10" in text
    )
    bare = report(scored / "scores", tmp_path / "bare.html", samples=0)
    assert not Checked(bare.read_text()).tokens and "Distribution" in bare.read_text()
    in_memory = report(scored / "scores", tmp_path / "same.html", selection=selection)
    assert in_memory.read_bytes() == path.read_bytes()


def test_a_low_tau_is_told_as_select_tells_it(scored, tmp_path):
    with pytest.warns(UserWarning, match="at or under 0.001"):
        low = select(scored / "scores", 100, clip=-1e-9)
    assert low.warnings
    notes = re.search(
        r'<ul class="notes">(.*?)</ul>',
        report(scored / "scores", tmp_path / "low.html", selection=low).read_text(),
        re.DOTALL,
    )[1]
    assert all(line in notes for line in low.warnings)
    high = report(scored / "scores", tmp_path / "high.html", selection=select(scored / "scores", 50))
    assert "tau" not in re.search(r'<ul class="notes">(.*?)</ul>', high.read_text(), re.DOTALL)[1]


def test_missing_things_are_said(scored, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = ScoreBlock.from_rows([ScoreRow("k#1", "i", "", "ok", [5, 6], [0, 1], [0.1, 0.2], [0.3, 0.4])])
    settings = {"model": str(tmp_path / "nowhere")}
    with ScoreWriter(tmp_path / "bare", settings) as writer:
        writer.write(0, rows)
    text = "".join(Checked(report(tmp_path / "bare", tmp_path / "bare.html").read_text()).text)
    assert "token ids: the processor could not be loaded" in text and "do not name their data" in text
    assert "scoring is unfinished" in text and "5 6" in text
    (tmp_path / "fewer.json").write_text(json.dumps(json.loads((scored / "data.json").read_text())[:4]))
    moved = tmp_path / "data.json"
    (tmp_path / "fewer.json").rename(moved)
    shown = report(scored / "scores", tmp_path / "moved.html", data=moved, image_root=tmp_path)
    text = "".join(Checked(shown.read_text()).text)
    assert "7 of the samples shown are not in" in text and "no image at" in text
    settings = {**score_metadata(scored / "scores"), "model": str(tmp_path / "moved")}
    with ScoreWriter(tmp_path / "elsewhere", settings) as writer:
        writer.write(
            0, ScoreBlock.from_rows([ScoreRow("data.json#0", "i", "", "ok", [9], [0], [0.1], [0.4])])
        )
    processor = AutoProcessor.from_pretrained(scored / "model")
    shown = report(tmp_path / "elsewhere", tmp_path / "elsewhere.html", processor=processor)
    assert len(Checked(shown.read_text()).images) == 2
    with pytest.raises(StoreError, match="does not exist"):
        report(tmp_path / "nothing", tmp_path / "x.html")


def test_data_whose_name_is_not_utf8_are_shown(tmp_path):
    rows = ScoreBlock.from_rows([ScoreRow("k#1", "i", "", "ok", [5], [0], [0.1], [0.3])])
    with ScoreWriter(tmp_path / "scores", {"model": "nowhere", "data": "/data/caf\udce9.json"}) as writer:
        writer.write(0, rows)
    assert r"caf\udce9.json" in report(tmp_path / "scores", tmp_path / "page.html").read_text()


def null_page(scored, folder, kind: str, key: str, data) -> Checked:
    """The page on one sample scored with another null image."""
    base = {"model": str(scored / "model"), "data": str(data), "image_root": str(scored)}
    rows = ScoreBlock.from_rows([ScoreRow(key, "i", "", "ok", [9], [0], [0.1], [0.4])])
    with ScoreWriter(folder / "scores", {**base, "null": {"kind": kind, "params": {}}}) as writer:
        writer.write(0, rows)
    return Checked(report(folder / "scores", folder / "page.html").read_text())


def test_null_drop_says_that_there_is_no_image(scored, tmp_path):
    shown = null_page(scored, tmp_path, "drop", "data.json#0", scored / "data.json")
    assert "no image at all" in "".join(shown.text) and len(shown.images) == 1


def test_null_shuffle_shows_the_picture_that_stood_there(scored, tmp_path):
    def of(place):
        return np.asarray(
            null_page(scored, tmp_path / str(place), "blur", f"data.json#{place}", data).images[0][1]
        )

    data = scored / "data.json"
    for place, donor in ((0, 1), (4, 7), (11, 0)):  # 5 is text only, the picture of 6 is gone, 11 is the last
        shown = null_page(scored, tmp_path / f"shuffle-{place}", "shuffle", f"data.json#{place}", data)
        assert "another image" in "".join(shown.text)
        assert np.array_equal(np.asarray(shown.images[1][1]), of(donor))
    alone = tmp_path / "data.json"
    alone.write_text(json.dumps(json.loads(data.read_text())[:1]))
    shown = null_page(scored, tmp_path / "alone", "shuffle", "data.json#0", alone)
    assert (
        "another sample’s image, which could not be found" in "".join(shown.text) and len(shown.images) == 1
    )


def test_token_texts_add_up_to_the_answer():
    tokenizer = tiny.byte_tokenizer()
    text = "a naïve café 日本 .\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text and "ï" in texts and "本" in texts
    cut = token_texts(tokenizer, ids[:4])
    assert len(cut) == 4 and "".join(cut).startswith("a na")


def test_words_are_ranked_by_mean_and_rare_ones_left_out(scored):
    facts = gather(scored / "scores", 3)
    highest, lowest = words(facts, tiny.byte_tokenizer())
    assert highest[0].vig == max(word.vig for word in highest) and highest[0].vig > 1 > lowest[0].vig
    assert min(word.count for word in [*highest, *lowest]) >= 3
    everything = [r for b in read_scores(scored / "scores") for r in b.to_pylist() if r["status"] == "ok"]
    id = tiny.byte_tokenizer()(highest[0].text, add_special_tokens=False)["input_ids"][0]
    values = [
        null - image
        for r in everything
        for token, image, null in zip(r["token_ids"], r["token_nll_image"], r["token_nll_null"], strict=True)
        if token == id
    ]
    assert highest[0].count == len(values) and highest[0].vig == pytest.approx(np.mean(values))
