"""The report's figures against plain computations over all rows, and the parts that they are drawn from."""

import math
import sys
import types
import warnings

import numpy as np
import pyarrow as pa
import pytest
import tiny
from PIL import Image

from vig.data.error_log import masked
from vig.reporting.charts import box_row, histogram
from vig.reporting.counters import REACH, Counter
from vig.reporting.facts import LENGTHS, POSITIONS, WordRow, gather
from vig.reporting.keep import Rules
from vig.reporting.report import fitting, rules_of
from vig.reporting.scale import height_ticks, legend, places, readable, rounded, shade, signed, ticks
from vig.reporting.strata import STRATA, Pool
from vig.reporting.thumbnails import EXACT_PIXELS, Thumbnails
from vig.reporting.views import Box
from vig.reporting.words import Words, class_of, find_tagger, word_classes, word_figures
from vig.selection.select import select
from vig.selection.stop_tokens import Stops
from vig.store.rows import ScoreBlock, ScoreRow
from vig.store.scores import ScoreWriter, read_scores


def block(rows: int, seed: int, sources: str = "abc", scale: float = 1.0) -> ScoreBlock:
    """Mixed rows; token VIG of source b is lower."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, rows)
    total = int(lengths.sum())
    source = [sources[i % len(sources)] for i in range(rows)]
    shift = np.repeat([-0.5 if name == "b" else 0.5 for name in source], lengths)
    image = rng.exponential(1.0, total)
    null = image + (rng.normal(0, 1.5, total) + shift) * scale
    status = [
        "text_only" if i % 7 == 3 else "error: no image at x.png" if i % 11 == 5 else "ok"
        for i in range(rows)
    ]
    keys = [f"d.json#{seed}-{i}" for i in range(rows)]
    positions = np.concatenate([np.arange(n) for n in lengths])
    return ScoreBlock(keys, keys, source, status, lengths, rng.integers(5, 99, total), positions, image, null)


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    with ScoreWriter(folder, {"model": "m"}) as writer:
        for window, size in enumerate([900, 1, 600]):
            writer.write(window, block(size, window))
        writer.mark_complete()
    return folder


@pytest.fixture(scope="module")
def rows(scores):
    return [row for batch in read_scores(scores) for row in batch.to_pylist()]


# ---- counters


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


def test_counts_depend_on_neither_order_nor_batches():
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, 4000) * 10.0 ** rng.integers(-6, 2, 4000)
    groups = rng.integers(0, 3, 4000)
    one, two = Counter(3), Counter(3)
    one.add(values, groups)
    for part in np.array_split(rng.permutation(4000), 13):
        two.add(values[part], groups[part])
    assert one.exponent == two.exponent and np.array_equal(one.grid, two.grid)
    assert one.counts.tolist() == np.bincount(groups).tolist()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 20.0])
def test_boxes_are_the_quantiles_of_each_group(scale):
    rng = np.random.default_rng(2)
    values, groups = rng.normal(0.3, 1, 9000) * scale, rng.integers(0, 2, 9000)
    counter = Counter(2)
    counter.add(values, groups)
    for group in (0, 1):
        box, mine = counter.box(group), values[groups == group]
        wanted = np.percentile(mine, [5, 25, 50, 75, 95])
        found = [box.low, box.first, box.median, box.third, box.high]
        assert np.abs(np.array(found) - wanted).max() < 3 * max(counter.unit, np.ptp(mine) / 4000)
        assert box.mean == pytest.approx(mine.mean()) and box.count == len(mine)
    assert counter.unit < 1e-2 * scale and [name for name, _ in counter.boxes(["x", "y"])] == ["x", "y"]
    assert Counter(2).box(1) is None and Counter().unit < 1e-9 and REACH == 64


@pytest.mark.parametrize("scale", [1e-7, 3e-4, 1.0, 30.0])
def test_charts_of_any_scale_have_marks_that_are_not_clipped(scale):
    counter = Counter()
    counter.add(np.random.default_rng(3).normal(0.5, 1, 3000) * scale)
    drawn = str(histogram(counter.histogram(0.4 * scale), 0.4 * scale, "samples"))
    tree = __import__("xml.etree.ElementTree", fromlist=["fromstring"]).fromstring(drawn)
    along = [mark for mark in tree.findall("text") if mark.get("x").endswith("%")]
    assert 3 <= len(along) <= 9 and len({mark.text for mark in along}) == len(along)
    for mark in along:
        place = float(mark.get("x").rstrip("%"))
        assert 0 <= place <= 100 and mark.get("text-anchor") == (
            "start" if place < 4 else "end" if place > 96 else "middle"
        )
    labels = [title.text for title in tree.iter("title")]
    assert all(label.split(" to ")[0] != label.split(" to ")[1].split(" nats")[0] for label in labels)


# ---- all rows


def test_figures_are_of_every_row(scores, rows):
    facts = gather(scores, 0)
    ok = [row for row in rows if row["status"] == "ok"]
    vig = np.array([row["vig"] for row in ok])
    assert (facts.multimodal, facts.text_only, facts.n_errors) == (
        len(ok), sum(row["status"] == "text_only" for row in rows), sum("error" in row["status"] for row in rows),
    )  # fmt: skip
    assert facts.samples.mean == pytest.approx(vig.mean()) and facts.tau == np.percentile(vig, 30)
    for name, box in facts.by_source.boxes(facts.sources.names):
        mine = [row["vig"] for row in ok if row["source"] == name]
        assert box.count == len(mine) and box.median == pytest.approx(np.median(mine), abs=0.03)
    lengths = {name: box.count for name, box in facts.samples.boxes([name for name, _ in LENGTHS])}
    assert lengths["17-32"] == sum(17 <= row["n_tokens"] <= 32 for row in ok) and sum(
        lengths.values()
    ) == len(ok)
    tokens = dict(facts.tokens.boxes([name for name, _ in POSITIONS]))
    first = [row["token_nll_null"][0] - row["token_nll_image"][0] for row in ok]
    assert tokens["first"].count == len(ok) and tokens["first"].mean == pytest.approx(np.mean(first))
    assert tokens["5-8"].count == sum(min(max(row["n_tokens"] - 4, 0), 4) for row in ok)
    (group,) = facts.errors.values()
    assert group.reason == "no image at …" and group.count == facts.n_errors and len(group.examples) == 3


@pytest.mark.parametrize("level", ["both", "sample", "token"])
@pytest.mark.parametrize("more", [{}, {"clip": -2.0}, {"tau_floor": 0.3}])
def test_the_slider_keeps_what_select_keeps(scores, level, more):
    curve = gather(scores, 0, rules=Rules(p=33.3, level=level, **more)).keep
    assert 33.3 in curve.p and len(curve.p) == 201
    for p in (0.5, 10, 33.3, 70, 99.5, 100):
        place = int(np.searchsorted(curve.p, p))
        for by, rule in ((None, "all"), ("source", "source")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chosen = select(scores, p, level=level, by=by, **more)
            if by is None:
                assert curve.taus[-1][place] == chosen.tau
            else:
                taus = [row["tau"] for row in chosen.sources]
                assert curve.taus[:-1, place].tolist() == taus
                assert curve.tokens[rule][:, place].tolist() == [row["tokens_kept"] for row in chosen.sources]
            assert curve.samples[rule][:, place].sum() == chosen.counts["samples_kept"]
            assert curve.tokens[rule][:, place].sum() == chosen.counts["tokens_kept"]
    assert curve.totals[:, 1].sum() == chosen.counts["tokens_total"]


@pytest.mark.parametrize("level", ["both", "sample", "token"])
@pytest.mark.parametrize("mean", ["all", "content"])
def test_the_slider_keeps_end_of_turn_tokens_as_select_does(tmp_path, level, mean):
    about = {"model": "m", "stop_ids": list(range(5, 30))}
    with ScoreWriter(tmp_path, about) as writer:
        writer.write(0, block(600, 3))
        writer.mark_complete()
    for stop_tokens in ("keep", "select"):
        for p in (0.5, 40, 99.5):
            chosen = select(tmp_path, p, level=level, mean=mean, stop_tokens=stop_tokens)
            rules = rules_of(chosen.metadata["selection"], about)
            assert rules == Rules(p, level, stops=Stops.of(about, stop_tokens, mean), tau=chosen.tau)
            curve = gather(tmp_path, 0, rules=rules).keep
            place = int(np.searchsorted(curve.p, p))
            assert curve.taus[-1][place] == chosen.tau
            assert curve.tokens["all"][:, place].sum() == chosen.counts["tokens_kept"]
    assert rules_of({}, about) == Rules(stops=Stops.of(about, "keep", "all"))


def test_an_end_of_turn_token_stays_with_its_sample(scores, rows):
    stop = set(range(5, 50))  # at the end of a turn alone
    curve = gather(scores, 0, rules=Rules(stops=Stops(tuple(stop), keep=True))).keep
    place = int(np.searchsorted(curve.p, 70))
    tau, wanted = curve.taus[-1][place], 0
    for row in rows:
        if row["status"] == "ok" and row["vig"] >= tau:
            pairs = zip(row["token_ids"], row["token_nll_null"], row["token_nll_image"], strict=True)
            wanted += sum(null - image >= tau for _, null, image in pairs)
            last = row["token_nll_null"][-1] - row["token_nll_image"][-1]
            wanted += row["token_ids"][-1] in stop and last < tau
    assert curve.tokens["all"][:, place].sum() == wanted


def test_a_mean_of_the_content_leaves_end_of_turn_tokens_out(scores, rows):
    stop, values = set(range(5, 50)), []
    for row in rows:
        if row["status"] == "ok":
            vig = np.array(row["token_nll_null"]) - np.array(row["token_nll_image"])
            cut = row["token_ids"][-1] in stop and len(vig) > 1
            values.append(float(vig[:-1].mean() if cut else vig.mean()))
    curve = gather(scores, 0, rules=Rules(stops=Stops(tuple(stop), in_mean=False))).keep
    assert curve.taus[-1] == pytest.approx(np.percentile(values, 100 - curve.p))


def test_the_slider_begins_where_the_selection_stands(scores):
    chosen = select(scores, 40, level="sample", tau_floor=0.1).metadata["selection"]
    assert rules_of(chosen, {}) == Rules(40, "sample", None, 0.1, tau=chosen["tau"])
    assert rules_of({}, {}) == Rules()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = select(scores, 40, by="source").metadata["selection"]
    assert rules_of(chosen, {}) == Rules(40, "both", "source")


@pytest.mark.parametrize("rules", [Rules(clip=-0.5), Rules(stops=Stops(tuple(range(5, 50)), in_mean=False))])
def test_strata_and_histograms_follow_the_mean_that_tau_is_compared_with(scores, rows, rules):
    values = {}
    for number, row in enumerate(rows):
        if row["status"] == "ok":
            null, image = np.array(row["token_nll_null"]), np.array(row["token_nll_image"])
            vig = np.minimum(null, 0.5) - np.minimum(image, 0.5) if rules.clip else null - image
            cut = not rules.clip and row["token_ids"][-1] in range(5, 50) and len(vig) > 1
            values[number] = float(vig[:-1].mean() if cut else vig.mean())
    facts = gather(scores, 100, rules=rules)
    ok = sorted(values, key=values.get)
    of = {name: {number for number, names in facts.picked.items() if name in names} for name in STRATA}
    assert of["lowest"] == set(ok[:20])
    assert of["above"] == set([number for number in ok if values[number] >= facts.tau][:10])
    assert of["below"] == set([number for number in ok if values[number] < facts.tau][-10:])
    assert facts.selected_vig == pytest.approx(
        {number: values[number] for number in facts.picked if number in values}
    )
    samples, tokens = facts.compared
    assert samples.mean == pytest.approx(np.mean(list(values.values()))) and samples is not facts.samples
    assert tokens.count == facts.tokens.count and (tokens.mean == facts.tokens.mean) == (rules.clip is None)
    assert facts.samples.mean == pytest.approx(np.mean([rows[number]["vig"] for number in values]))
    plain = gather(scores, 100)
    assert plain.compared == (plain.samples, plain.tokens) and not plain.selected_vig


# ---- strata


def test_strata_are_the_extremes_the_edges_and_random_ones(scores, rows):
    facts = gather(scores, 100)
    assert len(facts.picked) == len(facts.rows) == 100
    ok = sorted((row["vig"], number) for number, row in enumerate(rows) if row["status"] == "ok")
    of = {name: {number for number, names in facts.picked.items() if name in names} for name in STRATA}
    assert of["lowest"] == {number for _, number in ok[:20]} and of["highest"] == {
        number for _, number in ok[-20:]
    }
    above = [number for vig, number in ok if vig >= facts.tau]
    below = [number for vig, number in ok if vig < facts.tau]
    assert of["above"] == set(above[:10]) and of["below"] == set(below[-10:]) and of["dropped"] <= set(below)
    assert len(of["errors"]) == 5 and all("error" in rows[number]["status"] for number in of["errors"])
    assert {rows[number]["source"] for number in of["source"]} == set("abc")
    assert facts.strata == {name: len(numbers) for name, numbers in of.items()}
    assert all(facts.rows[number] == rows[number] for number in facts.picked)
    again, other = gather(scores, 100), gather(scores, 100, seed=1)
    assert again.picked == facts.picked != other.picked


@pytest.mark.parametrize("few", [1, 5, 10, None])
def test_a_page_of_all_samples_says_of_none_that_it_is_the_highest(scores, rows, few):
    table = pa.Table.from_batches(read_scores(scores)).slice(0, few)
    everything = gather(table, len(table))
    assert list(everything.picked) == list(everything.rows) == list(range(len(table))), "the lost ones too"
    assert not any(everything.picked.values()) and everything.strata == {}
    fewer = gather(table, len(table) - 1)
    assert len(fewer.picked) < len(table) and all(fewer.picked.values())


def test_a_few_values_have_no_box():
    two, five = (Box(-1.0, -0.5, 0.0, 0.5, 1.0, mean=0.2, count=count) for count in (2, 5))
    assert "rect" not in box_row(two, -1, 1) and "whisker" not in box_row(two, -1, 1)
    assert "mean +0.200 of 2 alone" in box_row(two, -1, 1) and 'class="mean"' in box_row(two, -1, 1)
    assert "rect" in box_row(five, -1, 1) and "25 %" in box_row(five, -1, 1)


def test_a_pool_keeps_the_best_whatever_the_batches():
    rng = np.random.default_rng(4)
    ranks = rng.integers(0, 50, 1000).astype(float)
    pool = Pool(30)
    for part in np.array_split(np.arange(1000), 9):
        pool.offer(ranks[part], part)
    assert pool.rows.tolist() == np.argsort(ranks, kind="stable")[:30].tolist()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("no image at /data/a b/7.png. Check --image-root", "no image at … Check --image-root"),
        ("no image at gone.png", "no image at …"),
        ("the image of 17 x 9 pixels is too large", "the image of … x … pixels is too large"),
        ("role 'bot' is unknown", "role … is unknown"),
    ],
)
def test_errors_are_grouped_by_what_they_share(message, reason):
    assert masked(message) == reason


# ---- words


class Pieces:
    """A tokenizer of given pieces: decoding joins them."""

    pieces = ("", "", " the", " app", "le", "s", ".", " red", " don", "'", "t", " 日", "本", "</s>", "\n")

    def __call__(self, text, **_):
        return {"input_ids": [0]}

    def decode(self, ids, **_):
        return "".join(self.pieces[id] for id in ids)


def words_of(tokenizer, *answers) -> list[str]:
    words = Words(tokenizer)
    rows = [WordRow(np.array(ids, np.int32), np.ones(len(ids)), np.ones(len(ids))) for ids in answers]
    numbers, vig = words.read(rows)
    assert vig.sum() == sum(map(len, answers))
    return [words.texts[number] for number in numbers]


def test_words_are_whole_words():
    ids = [2, 7, 3, 4, 5, 6, 8, 9, 10, 11, 12, 14, 13]
    found = words_of(Pieces(), ids)
    assert found == ["the", "red", "apples", ".", "don't", "\u65e5", "\u672c", "\\n", "</s>"]
    ids = tiny.byte_tokenizer()("a naïve café, no", add_special_tokens=False)["input_ids"]
    assert words_of(tiny.byte_tokenizer(), ids) == ["a", "naïve", "café", ",", "no"]
    assert words_of(None, [5, 6]) == ["5", "6"]
    assert words_of(Pieces(), [3], [4, 5], [], [0, 5]) == ["app", "les", "s"]  # answers are not joined


def test_a_words_vig_is_the_sum_of_its_tokens():
    row = WordRow(np.array([2, 7, 3, 4, 13]), np.array([0.1, 2.0, 3.0, 0.5, 0.0]), np.full(5, 4.0))
    found = word_figures([row] * 5, Pieces(), sampled=False)
    assert [(word.text, word.count) for word in found.highest] == [("apple", 5), ("red", 5)]
    assert found.highest[0].vig == pytest.approx(3.5) and found.lowest[0].text == "</s>"
    boxes = dict(found.classes)
    assert boxes.keys() == {"colour", "object", "function"} and boxes["object"].count == 5
    assert boxes["object"].median == pytest.approx(3.5, abs=1e-3) and not found.parts_of_speech
    rare = WordRow(np.array([11]), np.array([9.0]), np.array([9.5]))
    assert "\u65e5" not in [word.text for word in word_figures([row] * 5 + [rare], Pieces(), False).highest]


def test_classes_are_looked_up_in_the_committed_list():
    known = {
        "teal": "colour",
        "Red": "colour",
        "three": "number",
        "17": "number",
        "1,200": "number",
        "tiny": "size",
    }
    known |= {"left": "spatial", "dogs": "object", "boxes": "object", "riding": "action", "the": "function"}
    known |= {",": "function", "quixotic": "other words", "": "other words"}
    assert {word: class_of(word) for word in known} == known
    assert set(word_classes().values()) == {
        "colour", "number", "size", "spatial", "object", "action", "function",
    }  # fmt: skip


def test_parts_of_speech_come_from_spacy_where_it_is(monkeypatch):
    """A stand-in for spaCy, with its interface as `find_tagger` uses it."""

    class Token:
        def __init__(self, idx, pos):
            self.idx, self.pos_ = idx, pos

    def tag(text):
        kinds = {"the": "DET", "red": "ADJ"}
        places, place = [], 0
        for word in text.split(" "):
            places.append(Token(place, kinds.get(word, "NOUN")))
            place += len(word) + 1
        return places

    asked = []
    spacy = types.ModuleType("spacy")
    spacy.util = types.SimpleNamespace(get_installed_models=lambda: ["de_core_news_sm", "en_core_web_sm"])
    spacy.load = lambda name, disable: asked.append(name) or tag
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    tagger = find_tagger()
    assert asked == ["en_core_web_sm"]
    row = WordRow(np.array([2, 7, 3, 4, 13]), np.array([0.1, 2.0, 3.0, 0.5, 0.0]), np.full(5, 4.0))
    found = word_figures([row] * 4, Pieces(), False, tagger)
    assert {name: (box.count, round(box.median, 2)) for name, box in found.parts_of_speech} == {
        "determiner": (4, 0.1), "adjective": (4, 2.0), "noun": (4, 3.5),
    }  # fmt: skip
    spacy.util.get_installed_models = list
    assert find_tagger() is None
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert find_tagger() is None


def test_words_come_from_a_seeded_sample_of_many_rows(monkeypatch, scores):
    monkeypatch.setattr("vig.reporting.facts.WORD_ROWS", 40)
    one, two, other = gather(scores, 0), gather(scores, 0), gather(scores, 0, seed=5)
    assert len(one.words) == 40
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(one.words, two.words, strict=True))
    assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(one.words, other.words, strict=True))


# ---- pictures and numbers


def noisy(seed: int, size=(600, 480)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def test_pictures_fit_their_budget_and_are_stored_once():
    pictures = Thumbnails(400_000, 40)
    numbers = [pictures.add(noisy(seed)) for seed in range(20)]
    assert pictures.add(noisy(3)) == numbers[3] and pictures.left_out == 0
    numbers += [pictures.add(noisy(seed)) for seed in range(20, 39)]
    sizes = [len(picture["src"]) for picture in pictures.images]
    assert len(set(numbers)) == 39 and sum(sizes) <= 400_000 and sum(sizes) > 100_000
    none = Thumbnails(-5, 3)
    assert none.add(noisy(0)) is None and none.left_out == 1 and not none.images


def test_small_pictures_keep_their_pixels_and_large_ones_shrink():
    pictures = Thumbnails(10**6, 2)
    small, large = tiny.picture(3, (24, 16)), tiny.picture(4, (2000, 1000))
    pictures.add(small), pictures.add(large)
    first, second = pictures.images
    assert first["exact"] and (first["w"], first["h"]) == (24, 16)
    assert not second["exact"] and EXACT_PIXELS < second["w"] <= 448 and second["h"] == second["w"] // 2


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
    assert [signed(value, 4) for value in (-0.00031, 1e-9)] == ["−0.0003", "0.0000"]
    assert [rounded(value) for value in (-0.06243, 2.4e-6, 1.5, -4.741e-4, 0)] == [
        "−0.0624", "2.4e−6", "1.5", "−4.74e−4", "0",
    ]  # fmt: skip
    assert (fitting(9_999_999), fitting(142_284_115)) == ("9,999,999", "142.3\u202fM")
    assert np.allclose(ticks(-0.3, 3.9), np.arange(0, 4)) and np.allclose(ticks(0, 0.05), np.arange(6) * 0.01)
    assert [places(width) for width in (5, 0.1, 0.002, 3e-8, 0)] == [2, 2, 4, 9, 2]
    assert readable("a\x00\x7f\u202eb") == "a␀␡⟨U+202E⟩b"


@pytest.mark.parametrize("most", [1, 3, 9, 40, 700, 10**6])
def test_every_histogram_has_marks_of_its_height(most):
    for logarithmic in (False, True):
        marks = height_ticks(most, logarithmic)
        assert marks and marks == sorted(set(marks)) and 0 < marks[0] <= marks[-1] <= most and len(marks) <= 6


def test_no_rows_at_all_make_facts_too():
    facts = gather(ScoreBlock.from_rows([]).table(), 5)
    assert facts.keep is None and facts.tau is None and not facts.picked
    lost = ScoreBlock.from_rows([ScoreRow("k", "k", "s", "error: gone")]).table()
    facts = gather(lost, 5)
    assert (
        facts.n_errors == 1 and facts.picked == {0: []} and facts.strata == {} and isinstance(lost, pa.Table)
    )
    assert math.isclose(facts.samples.mean, 0.0)
