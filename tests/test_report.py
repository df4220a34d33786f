"""The report: one file, true values, and what it says when something is missing."""

import base64
import hashlib
import io
import json
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image
from transformers import AutoProcessor

from vig.data.files import StoreError
from vig.demo.arms import CHECKPOINT
from vig.models.token_texts import token_texts
from vig.reporting.report import report
from vig.selection.select import select
from vig.store.folder import SettingsDiffer
from vig.store.rows import ScoreBlock, ScoreRow
from vig.store.scores import ScoreWriter, read_scores, score_metadata

VOID = {"meta", "img", "path", "rect", "line", "circle", "polyline", "input", "col"}


class Checked(HTMLParser):
    """Reads a page; refuses tags that do not nest, inline styles and handlers, and anything that would be fetched.

    state, samples, pictures: what the page's script is given. images: the pictures, decoded."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.scripts, self.styles, self.policy = [], [], {}, [], ""
        self.feed(text)
        assert not self.open
        self.state, self.samples, pictures = (
            json.loads(self.scripts[id]) for id in ("state", "samples", "pictures")
        )
        self.images = []
        for picture in pictures:
            kind, data = picture["src"].split(";base64,")
            assert kind == "data:image/webp"
            self.images.append(Image.open(io.BytesIO(base64.b64decode(data))))
        self._check_policy()

    def _check_policy(self):
        """The script and the style are allowed by what they are, and nothing else is."""
        allowed = dict(part.strip().split(" ", 1) for part in self.policy.split(";"))
        assert allowed["default-src"] == "'none'" and allowed["img-src"] == "data:"
        for name, text in (("script-src", self.scripts[""]), ("style-src", "".join(self.styles))):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert allowed[name] == f"'sha256-{digest}'"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("link", "iframe", "a") and not {"href", "src", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag == "script":
            assert attributes.get("type") == "application/json" or not attributes
            self.script = attributes.get("id", "")
            self.scripts[self.script] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self.script] += data
        elif self.open and self.open[-1] == "style":
            self.styles.append(data)
        else:
            self.text.append(data)

    def sample(self, key: str) -> dict:
        return next(sample for sample in self.samples if sample["k"] == key)


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


def test_the_whole_page(scored, tmp_path):
    selection = select(scored / "scores", 50, out=tmp_path / "selection")
    path = report(scored / "scores", tmp_path / "new" / "report.html", selection=tmp_path / "selection")
    shown = Checked(path.read_text(encoding="utf-8"))
    text = "".join(shown.text)
    assert f"τ = {selection.tau:.3g}" in text and "50.0 %" in text and "noise floor" in text
    assert "12 of 12" in text and len(shown.samples) == 12
    assert "no image at …" in text and "data.json#6" in text and ": no image at gone.png" in text
    two, text_only, lost = (shown.sample(f"data.json#{row}") for row in (2, 5, 6))
    assert two["q"] == "what is number 2?" and [question for _, question in two["u"]] == ["how many?"]
    assert text_only["st"] == "text_only" and text_only["v"] == [None] and text_only["b"] == [[]]
    assert lost["st"].startswith("error: ") and not lost["t"] and lost["w"] == []
    entries, rows = selection.table(), [row for b in read_scores(scored / "scores") for row in b.to_pylist()]
    for row in rows[:6] + rows[7:]:
        sample, ids = shown.sample(row["key"]), row["token_ids"]
        assert "".join(sample["t"]) == tiny.byte_tokenizer().decode(ids) and len(sample["t"]) == len(ids)
        assert sample["m"] == ["".join("01"[bool(kept)] for kept in entries[row["key"]].token_keep)]
        assert np.allclose(np.array(sample["a"][0]) * 1e-4, row["token_nll_image"], atol=6e-5)
        assert np.allclose(np.array(sample["b"][0]) * 1e-4, row["token_nll_null"] or [], atol=6e-5)
        assert len(sample["im"]) == len(sample["nu"][0] if sample["nu"] else []) == (row["status"] == "ok")
    assert len(shown.images) == 2 * 10  # as the model sees them: 32 x 32, and their nulls
    for row in (0, 11):
        sample = shown.sample(f"data.json#{row}")
        image, null = shown.images[sample["im"][0]], shown.images[sample["nu"][0][0]]
        assert image.size == null.size == (32, 32)
        assert np.asarray(null.convert("RGB"), float).std() < np.asarray(image.convert("RGB"), float).std()
    counts = selection.counts
    part, whole = (counts[name] + counts["text_only_tokens"] for name in ("tokens_kept", "tokens_total"))
    assert (
        counts["text_only_tokens"]
        and f"{part:,} of {whole:,}; " in text
        and "6 of 11; 50.0 % of the 10" in text
    )
    bare = Checked(report(scored / "scores", tmp_path / "bare.html", samples=0).read_text())
    assert not bare.samples and "Distribution" in "".join(bare.text)
    in_memory = report(scored / "scores", tmp_path / "same.html", selection=selection)
    assert in_memory.read_bytes() == path.read_bytes()


def test_title_samples_and_budget(scored, tmp_path):
    shown = Checked(
        report(scored / "scores", tmp_path / "a.html", samples=4, title="<b>mine</b>").read_text()
    )
    assert "<b>mine</b>" in shown.text and len(shown.samples) == 4 and "4 of 12" in "".join(shown.text)
    assert "data.json" in Checked(report(scored / "scores", tmp_path / "b.html", samples=1).read_text()).text
    small = Checked(report(scored / "scores", tmp_path / "c.html", budget=0.15).read_text())
    assert "20 pictures are left out" in "".join(small.text) and not small.images
    assert small.sample("data.json#0")["im"] == [None]
    for budget in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="the budget is the page's size in MB, above 0"):
            report(scored / "scores", tmp_path / "d.html", budget=budget)


def test_every_image_of_a_sample_is_shown(scored, tmp_path):
    turns = [{"from": "human", "value": "<image>\n<image>\nwhich?"}, {"from": "gpt", "value": "b"}]
    record = {"id": "0", "image": ["3.png", "7.png"], "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    rows = ScoreBlock.from_rows([ScoreRow("data.json#0", "0", "data.json", "ok", [9], [0], [0.1], [0.4])])
    settings = {**score_metadata(scored / "scores"), "data": str(tmp_path / "data.json")}
    with ScoreWriter(tmp_path / "scores", settings) as writer:
        writer.write(0, rows)
    shown = Checked(report(tmp_path / "scores", tmp_path / "page.html", image_root=scored).read_text())
    (sample,) = shown.samples
    assert len(sample["im"]) == len(sample["nu"][0]) == 2 and len({*sample["im"], *sample["nu"][0]}) == 4


def test_hostile_text_stays_text(scored, tmp_path):
    evil = (
        "</script><script>alert(1)</script>\u2028<img src=x onerror=alert(2)> \"'&amp; \u202e evil \x00 ]]>"
    )
    turns = [{"from": "human", "value": "<image>\n" + evil}, {"from": "gpt", "value": evil}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": evil, "image": "3.png", "conversations": turns}]))
    ids = tiny.byte_tokenizer()(evil, add_special_tokens=False)["input_ids"]
    values = ([0.1] * len(ids), [0.4] * len(ids))
    lost = ScoreRow("data.json#1", evil, evil, f"error: {evil}")
    row = ScoreRow("data.json#0", evil, evil, "ok", ids, range(len(ids)), *values)
    settings = {**score_metadata(scored / "scores"), "data": str(tmp_path / "data.json"), "model_note": evil}
    with ScoreWriter(tmp_path / "scores", settings) as writer:
        writer.write(0, [row, lost])
    page = report(tmp_path / "scores", tmp_path / "page.html", image_root=scored, title=evil).read_text()
    shown = Checked(page)
    assert page.count("<script") == 4 and "onerror" not in re.sub(r"<script.*?</script>", "", page, flags=re.S).replace(
        "&gt;", "").replace("&lt;img src=x onerror", "")  # fmt: skip
    sample = shown.sample("data.json#0")
    assert sample["q"] == evil and "".join(sample["t"]) == evil and sample["i"] == evil
    title = "".join(shown.text)
    assert "⟨U+202E⟩ evil ␀" in title and "\x00" not in page


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


def test_a_selection_older_than_its_scores_is_told(scored, tmp_path):
    """A sample that failed, and was scored by `--retry failed` after the selection."""
    old, said = select(scored / "scores", 50), "The scores have changed since this selection"
    page = tmp_path / "page.html"
    assert said not in report(scored / "scores", page, selection=old).read_text()
    rows = pq.read_table(scored / "scores").to_pylist()
    names = ("token_ids", "positions", "token_nll_image", "token_nll_null")
    rows[6] |= {name: rows[7][name] for name in names} | {"status": "ok"}
    columns = ("key", "id", "source", "status", *names)
    with ScoreWriter(tmp_path / "scores", score_metadata(scored / "scores")) as writer:
        writer.write(0, [ScoreRow(*(row[c] if row[c] is not None else () for c in columns)) for row in rows])
        writer.mark_complete()
    html = report(tmp_path / "scores", page, selection=old).read_text()
    assert f"{said}: 11 samples were scored then, and 12 are now. Run vig select again." in html
    part = pq.read_table(tmp_path / "scores").slice(0, 5)
    assert (
        said not in report(part, page, selection=old).read_text()
    )  # a selection may be of more than is shown


def test_a_cropped_image_is_called_so(tmp_path):
    """Of a picture twice as wide as high the model sees the middle; a square one it sees whole."""
    write = {
        "model": str(CHECKPOINT),
        "null": {"kind": "black", "params": {}},
        "data": str(tmp_path / "d.json"),
    }
    records, rows = [], []
    for name, size in (("wide", (128, 64)), ("square", (90, 90))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cup"}]
        records.append({"id": name, "image": f"{name}.png", "conversations": turns})
        rows.append(ScoreRow(f"d.json#{len(rows)}", name, "", "ok", [5, 6], [0, 1], [0.1, 0.1], [0.2, 0.2]))
    (tmp_path / "d.json").write_text(json.dumps(records))
    with ScoreWriter(tmp_path / "scores", write) as writer:
        writer.write(0, rows)
        writer.mark_complete()
    page = Checked(report(tmp_path / "scores", tmp_path / "page.html").read_text())
    assert [sample["cr"] for sample in page.samples] == [[0], []]


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
    assert '<ul class="notes">' not in high.read_text()


def test_missing_things_are_said(scored, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = ScoreBlock.from_rows([ScoreRow("k#1", "i", "", "ok", [5, 6], [0, 1], [0.1, 0.2], [0.3, 0.4])])
    settings = {"model": str(tmp_path / "nowhere")}
    with ScoreWriter(tmp_path / "bare", settings) as writer:
        writer.write(0, rows)
    bare = Checked(report(tmp_path / "bare", tmp_path / "bare.html").read_text())
    text = "".join(bare.text)
    assert "token ids: the processor could not be loaded" in text and "do not name their data" in text
    assert "scoring is unfinished" in text and bare.samples[0]["t"] == ["5", " 6"]
    (tmp_path / "fewer.json").write_text(json.dumps(json.loads((scored / "data.json").read_text())[:4]))
    moved = tmp_path / "data.json"
    (tmp_path / "fewer.json").rename(moved)
    shown = report(scored / "scores", tmp_path / "moved.html", data=moved, image_root=tmp_path)
    shown = Checked(shown.read_text())
    assert "8 of the samples shown are not in" in "".join(shown.text)
    assert (
        "no image at" in shown.sample("data.json#0")["o"]
        and shown.sample("data.json#9")["o"] == "sample not found"
    )
    moved.rename(tmp_path / "other.json")
    page = report(
        scored / "scores", tmp_path / "other.html", data=tmp_path / "other.json", image_root=tmp_path
    )
    said = "".join(Checked(page.read_text()).text)
    assert "the scores are of data.json" in said and "and other.json is given" in said
    page = report(scored / "scores", tmp_path / "gone.html", data=tmp_path / "gone.json", image_root=tmp_path)
    assert "Give it with --data (data=), under its old name" in "".join(Checked(page.read_text()).text)
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
    assert (
        shown.samples[0]["o"] == "no image at all"
        and shown.samples[0]["nu"] == [[None]]
        and len(shown.images) == 1
    )


def test_null_shuffle_shows_the_picture_that_stood_there(scored, tmp_path):
    def of(place):
        page = null_page(scored, tmp_path / str(place), "blur", f"data.json#{place}", data)
        return np.asarray(page.images[page.samples[0]["im"][0]].convert("RGB"))

    data = scored / "data.json"
    for place, donor in ((0, 1), (4, 7), (11, 0)):  # 5 is text only, the picture of 6 is gone, 11 is the last
        shown = null_page(scored, tmp_path / f"shuffle-{place}", "shuffle", f"data.json#{place}", data)
        assert shown.state["nullNames"] == ["another image"]
        assert np.array_equal(
            np.asarray(shown.images[shown.samples[0]["nu"][0][0]].convert("RGB")), of(donor)
        )
    alone = tmp_path / "data.json"
    alone.write_text(json.dumps(json.loads(data.read_text())[:1]))
    shown = null_page(scored, tmp_path / "alone", "shuffle", "data.json#0", alone)
    (sample,) = shown.samples
    assert sample["o"] == "another sample’s image, which could not be found" and sample["nu"] == [[None]]


def test_token_texts_add_up_to_the_answer():
    tokenizer = tiny.byte_tokenizer()
    text = "a naïve café 日本 .\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text and "ï" in texts and "本" in texts
    cut = token_texts(tokenizer, ids[:4])
    assert len(cut) == 4 and "".join(cut).startswith("a na")


def test_token_texts_of_long_answers_take_linear_time():
    tokenizer = tiny.byte_tokenizer()
    text = "ein Kaffee, 日本 – naïve\n" * 400
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = [0]

    class Counting:
        def decode(self, ids, **options):
            decoded[0] += len(ids)
            return tokenizer.decode(ids, **options)

    texts = token_texts(Counting(), ids)
    assert len(texts) == len(ids) == 12_000 and "".join(texts) == text
    assert decoded[0] < 20 * len(ids)
