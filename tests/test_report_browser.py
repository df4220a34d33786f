"""The report in a headless Chromium: search, filters, order, slider, links, downloads, keys, pictures, hostile text."""

import csv
import json
import time

import browser
import numpy as np
import pytest
import tiny

from vig.reporting.compare_page import comparison_page
from vig.reporting.report import report
from vig.selection.compare import compare
from vig.selection.select import select
from vig.store.rows import ScoreRow
from vig.store.scores import ScoreWriter, read_scores

pytestmark = pytest.mark.skipif(browser.why_not() is not None, reason=str(browser.why_not()))

EVIL = [
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 2'>",
    "\"quotes\" 'and' `more` ${window.broken = 3}",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "nul \x00 bell \x07 end",
    '=HYPERLINK("http://x")',
]
LONG = "word " * 20_000  # 100,000 characters
ROWS = 150


def scored(root, seed, **changed):
    """Scores of ROWS questions about small pictures, three sources; some texts are hostile."""
    rng = np.random.default_rng(seed)
    tokenizer = tiny.byte_tokenizer()
    records, rows = [], []
    for number in range(ROWS):
        answer = EVIL[number] if number < len(EVIL) else f"a {'red' if number % 3 else 'teal'} cup {number}."
        question = (
            LONG if number == 20 else EVIL[number] if number < len(EVIL) else f"what is number {number}?"
        )
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        record = {"id": f"id{number}", "conversations": turns, "image": f"{number}.png"}
        if number == 30:
            record["image"] = ["30.png", "31.png"]
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        status = (
            "text_only" if number % 19 == 18 else "error: no image at gone.png" if number % 23 == 22 else "ok"
        )
        if status == "text_only":
            turns[0]["value"] = question
            del record["image"]
        if not (root / f"{number}.png").exists():
            tiny.save_picture(root / f"{number}.png", number)
        records.append(record)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        image = rng.exponential(0.5, len(ids))
        gain = rng.normal(rng.normal(0.4, 0.6), 0.5, len(ids)) - (0.8 if number % 3 == 1 else 0)
        values = (ids, range(len(ids)), image, image + gain)
        values = {"ok": values, "text_only": values[:3]}.get(status, ())
        rows.append(ScoreRow(f"data.json#{number}", f"id{number}", "abc"[number % 3], status, *values))
    (root / "data.json").write_text(json.dumps(records))
    about = {
        "model": str(root / "model"),
        "data": str(root / "data.json"),
        "null": {"kind": "blur", "params": {}},
    }
    folder = root / f"scores-{seed}"
    if folder.exists():
        return folder
    with ScoreWriter(folder, {**about, **changed}) as writer:
        writer.write(0, rows)
        writer.mark_complete()
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    (root / "model").mkdir()
    tiny.llava_processor().save_pretrained(root / "model")
    tiny.llava_model().config.save_pretrained(root / "model")
    return root


@pytest.fixture(scope="module")
def scores(root):
    return scored(root, 0)


@pytest.fixture(scope="module")
def rows(scores):
    return {row["key"]: row for batch in read_scores(scores) for row in batch.to_pylist()}


@pytest.fixture(scope="module")
def page(root, scores):
    return report(scores, root / "page.html", selection=select(scores, 60), samples=ROWS)


@pytest.fixture(scope="module")
def chrome():
    with browser.chromium() as driver:
        yield driver


@pytest.fixture
def opened(chrome, page):
    """The page, freshly opened; afterwards nothing may have been complained of, nor run."""
    browser.resize(chrome, 1280, 1000)
    browser.media(chrome)
    chrome.get("about:blank")
    chrome.get_log("browser")
    chrome.get(page.as_uri())
    yield chrome
    chrome.execute_script("localStorage.clear()")  # marks
    assert chrome.execute_script("return window.broken") is None
    assert chrome.get_log("browser") == []


def js(driver, script, *arguments):
    return driver.execute_script(script, *arguments)


def put(driver, id, value):
    """Set a control as a user would, and wait until the list has followed."""
    js(
        driver,
        "const node = document.getElementById(arguments[0]); node.value = arguments[1];"
        "node.dispatchEvent(new Event('input', {bubbles: true}));",
        id,
        str(value),
    )
    time.sleep(0.25)


def count(driver) -> int:
    return int(
        js(driver, "return document.getElementById('count').textContent").split(" ")[0].replace(",", "")
    )


def shown(driver) -> list[str]:
    """Keys of the samples in the document, in order."""
    js(driver, "document.getElementById('samples-heading').scrollIntoView()")
    time.sleep(0.25)
    return js(driver, "return [...document.querySelectorAll('#list .key')].map((node) => node.textContent)")


def press(driver, key):
    js(
        driver,
        "(document.activeElement || document.body).dispatchEvent("
        "new KeyboardEvent('keydown', {key: arguments[0], bubbles: true, cancelable: true}))",
        key,
    )
    time.sleep(0.1)


def test_search_and_filters_find_what_they_should(opened, rows):
    assert count(opened) == len(rows) == ROWS
    put(opened, "find", "NUMBER 47?")
    assert shown(opened) == ["data.json#47"]
    put(opened, "find", "")
    ok = {key: row for key, row in rows.items() if row["status"] == "ok"}
    for id, value, wanted in (
        (
            "word",
            "teal",
            [key for key in rows if int(key.split("#")[1]) % 3 == 0 and int(key.split("#")[1]) > 5],
        ),
        ("word", "tea", []),
        ("source", 1, [key for key, row in rows.items() if row["source"] == "b"]),
        ("status", "text_only", [key for key, row in rows.items() if row["status"] == "text_only"]),
        ("status", "error", [key for key, row in rows.items() if "error" in row["status"]]),
        ("vig-to", -0.5, [key for key, row in ok.items() if row["vig"] <= -0.5]),
        ("vig-from", 0.25, [key for key, row in ok.items() if row["vig"] >= 0.25]),
        ("length-to", 14, [key for key, row in rows.items() if row["n_tokens"] <= 14]),
    ):
        put(opened, id, value)
        found = count(opened)
        if id == "word":  # error rows have no answer here
            wanted = [key for key in wanted if "error" not in rows[key]["status"]]
        assert found == len(wanted), (id, value)
        assert js(opened, "return document.getElementById('none').hidden") == bool(wanted)
        put(opened, id, "")
    put(opened, "source", 1)
    put(opened, "vig-to", 0)
    wanted = [key for key, row in ok.items() if row["source"] == "b" and row["vig"] <= 0]
    assert count(opened) == len(wanted)
    js(opened, "document.getElementById('reset').click()")
    assert count(opened) == ROWS and js(opened, "return document.getElementById('reset').hidden")


def test_the_list_is_in_the_order_that_is_asked_for(opened, rows):
    ok = sorted((key for key, row in rows.items() if row["status"] == "ok"), key=lambda key: rows[key]["vig"])
    assert shown(opened)[:8] == ok[:8]  # lowest first
    put(opened, "order", "highest")
    assert shown(opened)[:8] == ok[::-1][:8]
    put(opened, "order", "row")
    assert shown(opened)[:8] == [f"data.json#{number}" for number in range(8)]
    put(opened, "order", "longest")
    assert shown(opened)[0] == max(rows, key=lambda key: rows[key]["n_tokens"])


def test_only_what_is_near_the_window_is_in_the_document(opened):
    assert len(shown(opened)) < 40
    js(opened, "document.getElementById('list').lastElementChild.scrollIntoView()")
    time.sleep(0.4)
    last = js(opened, "return document.querySelector('#list .chunk:last-child .key') !== null")
    assert last and js(opened, "return document.querySelectorAll('#list article').length") < 60


def test_the_slider_counts_as_select_does(opened, scores, rows):
    for p in (10, 33.5, 85):
        put(opened, "p", round(p * 2) - 1)
        chosen = select(scores, p)
        said = {id: js(opened, f"return document.getElementById('{id}-value').textContent") for id in
                ("p", "tau", "samples", "tokens")}  # fmt: skip
        assert float(said["p"]) == p and float(said["tau"].replace("−", "-")) == pytest.approx(
            chosen.tau, rel=6e-3
        )
        assert int(said["samples"]) == chosen.counts["samples_kept"]
        assert int(said["tokens"].replace(",", "")) == chosen.counts["tokens_kept"]
        put(opened, "kept", "kept")
        assert count(opened) == chosen.counts["samples_kept"] + chosen.counts["text_only"]
        put(opened, "kept", "")
        sample = js(opened, "document.querySelector('#list').scrollIntoView(); return null")
        assert sample is None
    table = chosen.table()
    js(opened, "location.hash = '#data.json%2350'")
    time.sleep(0.3)
    marks = js(
        opened,
        "return [...document.querySelectorAll('.current .t')].map((node) => node.classList.contains('kept'))",
    )
    assert sum(marks) == int(table["data.json#50"].token_keep.sum())
    js(opened, "document.querySelector('input[value=source]').click()")
    time.sleep(0.2)
    by_source = select(scores, 85, by="source")
    said = int(js(opened, "return document.getElementById('tokens-value').textContent").replace(",", ""))
    assert said == by_source.counts["tokens_kept"]
    assert "--p 85 --by source" in js(opened, "return document.getElementById('command').textContent")
    cells = js(
        opened,
        "return [...document.querySelectorAll('#by-source tbody tr')].map((row) => row.cells[2].innerText)",
    )
    assert [int(cell.split(" ")[0].replace(",", "")) for cell in cells] == [
        row["tokens_kept"] for row in by_source.sources
    ]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"clip": -0.6}, "--clip 0.548812"),
        ({"mean": "content", "tau_floor": 0.1}, "--tau-floor 0.1 --mean content"),
        ({"level": "token"}, "--level token"),
        ({"keep_easy": 0.3}, "--keep-easy 0.3"),
    ],
)
def test_marks_follow_the_mean_and_level_of_the_selection(chrome, root, options, flags):
    stop = tiny.byte_tokenizer()("a.", add_special_tokens=False)["input_ids"][-1]
    scores = scored(root, 2, stop_ids=[stop])
    page = report(scores, root / "own.html", selection=select(scores, 60, **options), samples=ROWS)
    chrome.get(page.as_uri())
    for p in (60, 25):
        put(chrome, "p", round(p * 2) - 1)
        chosen = select(scores, p, **options)
        said = js(
            chrome,
            "return Object.fromEntries(['samples', 'tokens'].map((id) =>"
            " [id, document.getElementById(id + '-value').textContent]))",
        )
        assert int(said["samples"]) == chosen.counts["samples_kept"]
        assert int(said["tokens"].replace(",", "")) == chosen.counts["tokens_kept"]
        put(chrome, "kept", "kept")
        assert count(chrome) == chosen.counts["samples_kept"] + chosen.counts["text_only"]
        put(chrome, "kept", "")
        table = chosen.table()
        for number in (48, 49, 50, 51, 52):
            js(chrome, f"location.hash = '#data.json%23{number}'")
            time.sleep(0.1)
            marks = js(
                chrome, "return [...document.querySelectorAll('.current .t')].map((n) => n.matches('.kept'))"
            )
            assert marks == table[f"data.json#{number}"].token_keep.tolist(), (p, number)
    text, own_mean = js(chrome, "return document.body.innerText"), bool({"clip", "mean"} & options.keys())
    assert f"--p 25 {flags}" in text
    assert ("NLL under the null image is below 0.3 nats" in text) == ("keep_easy" in options)
    assert ("by VIG as selected" in text) == own_mean
    assert ("as selected" in text) == own_mean
    assert chrome.get_log("browser") == []


def test_a_key_is_a_link(chrome, opened, page):
    chrome.get("about:blank")
    chrome.get(page.as_uri() + "#data.json%23101")
    time.sleep(0.4)
    assert js(chrome, "return document.querySelector('.current .key').textContent") == "data.json#101"
    top = js(chrome, "return document.querySelector('.current').getBoundingClientRect().top")
    assert -5 < top < 200
    put(chrome, "find", "nothing has this")
    js(chrome, "location.hash = '#data.json%2377'")  # what the filters hide is shown all the same
    time.sleep(0.4)
    assert js(chrome, "return document.querySelector('.current .key').textContent") == "data.json#77"


def test_keys_move_search_mark_and_enlarge(opened, rows):
    ok = sorted((key for key, row in rows.items() if row["status"] == "ok"), key=lambda key: rows[key]["vig"])
    here = "return document.querySelector('.current .key').textContent"
    for _ in range(3):
        press(opened, "j")
    assert js(opened, here) == ok[2]
    press(opened, "k")
    assert js(opened, here) == ok[1]
    press(opened, "x")
    put(opened, "marks", "marked")
    assert shown(opened) == [ok[1]]
    put(opened, "marks", "")
    press(opened, "/")
    assert js(opened, "return document.activeElement.id") == "find"
    press(opened, "j")  # typed, not followed
    press(opened, "Escape")
    press(opened, "?")
    assert js(opened, "return document.getElementById('help').open")
    js(opened, "document.getElementById('help-close').click()")


def test_values_can_be_hidden_from_who_is_to_judge(opened, root, scores, rows):
    told = (
        "const list = document.getElementById('list'); const tokens = [...list.querySelectorAll('.t')];"
        "return {text: list.innerText, looks: [...new Set(tokens.map((node) => node.className))],"
        " titles: tokens.filter((node) => node.title).length, opens: list.querySelectorAll('details').length,"
        " legend: document.querySelector('.legend').checkVisibility()}"
    )
    tick = "document.getElementById('hide').click()"
    lowest = shown(opened)[:8]
    before = js(opened, told)
    assert "VIG" in before["text"] and len(before["looks"]) > 2 and before["titles"] and before["legend"]
    js(opened, tick)
    assert shown(opened)[:8] == [f"data.json#{number}" for number in range(8)]
    after = js(opened, told)
    assert "VIG" not in after["text"] and "trained on" not in after["text"] and "mark" in after["text"]
    assert after["looks"] == ["t"] and after["titles"] == after["opens"] == 0 and not after["legend"]
    assert js(opened, "return document.getElementById('order').disabled")
    js(opened, tick)
    assert shown(opened)[:8] == lowest and js(opened, told)["looks"] == before["looks"]
    opened.get(report(scores, root / "hidden.html", samples=ROWS, hide_values=True).as_uri())
    assert shown(opened)[:2] == ["data.json#0", "data.json#1"] and js(opened, told)["looks"] == ["t"]


def test_marks_outlive_a_reload(opened, page):
    marked = "return document.getElementById('marks').options[1].text"
    for _ in range(2):
        press(opened, "j")
        press(opened, "x")
    assert js(opened, marked) == "marked (2)"
    keys = shown(opened)[:2]
    opened.refresh()
    assert js(opened, marked) == "marked (2)"
    put(opened, "marks", "marked")
    assert shown(opened) == keys
    assert js(opened, "return document.querySelectorAll('.mark[aria-pressed=true]').length") == 2
    js(opened, "for (const node of document.querySelectorAll('.mark')) node.click()")
    opened.refresh()
    assert js(opened, marked) == "marked (0)"


def test_marks_that_cannot_be_kept_are_asked_about(chrome, page):
    """As from a disk in a browser that gives such pages no storage."""
    refused = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'x'); }});"
    script = chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refused})
    asked = (
        "const event = new Event('beforeunload', {cancelable: true}); window.dispatchEvent(event);"
        "return event.defaultPrevented"
    )
    try:
        chrome.get("about:blank")
        chrome.get(page.as_uri())
        assert not js(chrome, asked)
        press(chrome, "j")
        press(chrome, "x")
        assert js(chrome, asked)
        assert "export them before you leave" in js(
            chrome, "return document.getElementById('help').textContent"
        )
        put(chrome, "marks", "unmarked")
        js(chrome, "document.getElementById('save-json').click()")
        assert js(chrome, asked) and json.loads(_downloaded(chrome, "*.json"))["marked"] == []
        put(chrome, "marks", "marked")
        js(chrome, "document.getElementById('save-json').click()")
        assert not js(chrome, asked)
        assert len(json.loads(_downloaded(chrome, "*.json"))["marked"]) == 1
    finally:
        chrome.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def _downloaded(driver, pattern: str) -> str:
    """What the file holds that was downloaded; it is taken away."""
    for _ in range(50):
        found = list(driver.downloads.glob(pattern))
        if found:
            break
        time.sleep(0.1)
    (file,) = found
    text = file.read_text()
    file.unlink()
    return text


def test_downloads_hold_what_is_filtered(opened, rows):
    put(opened, "status", "ok")
    put(opened, "first", 50)
    for id in ("save-csv", "save-json"):
        js(opened, f"document.getElementById('{id}').click()")
    files = {}
    for _ in range(50):
        files = {file.suffix: file for file in opened.downloads.iterdir() if file.suffix in (".csv", ".json")}
        if len(files) == 2:
            break
        time.sleep(0.1)
    ok = sorted((key for key, row in rows.items() if row["status"] == "ok"), key=lambda key: rows[key]["vig"])
    made = json.loads(files[".json"].read_text())
    assert made["keys"] == ok[:50] and made["filters"] == {"status": "ok", "order": "lowest"}
    with files[".csv"].open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["key"] for row in table] == ok[:50]
    assert [float(row["vig"]) for row in table] == [rows[key]["vig"] for key in ok[:50]]
    assert {row["question"] for row in table if row["key"] == "data.json#47"} <= {"what is number 47?"}
    for file in files.values():
        file.unlink()
    put(opened, "find", "HYPERLINK")  # no spreadsheet takes text for a formula
    js(opened, "document.getElementById('save-csv').click()")
    for _ in range(50):
        found = list(opened.downloads.glob("*.csv"))
        if found:
            break
        time.sleep(0.1)
    with found[0].open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["question"] == "'" + EVIL[5] and row["answer"] == "'" + EVIL[5]
    found[0].unlink()


def test_a_picture_is_enlarged_and_wiped_to_its_null(opened):
    js(opened, "location.hash = '#data.json%2330'")
    time.sleep(0.4)
    assert js(opened, "return document.querySelectorAll('.current img').length") == 4  # two images, two nulls
    press(opened, "z")
    assert js(opened, "return document.getElementById('zoom').open && document.activeElement.id") == "wipe"
    over = "return document.querySelector('#stage .over').style.clipPath"
    put(opened, "wipe", 80)
    assert "80%" in js(opened, over)
    src = "return document.querySelector('#stage img').src"
    first = js(opened, src)
    js(opened, "document.getElementById('zoom-next').click()")
    assert js(opened, src) != first and "image 2 of 2" in js(
        opened, "return document.getElementById('zoom-label').textContent"
    )
    js(opened, "document.getElementById('zoom-close').click()")
    assert not js(opened, "return document.getElementById('zoom').open")


def test_hostile_text_is_inert_and_readable(opened):
    for number, text in enumerate(EVIL):
        js(opened, f"location.hash = '#data.json%23{number}'")
        time.sleep(0.3)
        question, answer = (
            js(opened, f"return document.querySelector('.current .{kind}').textContent")
            for kind in ("question", "answer")
        )
        wanted = text.replace("\x00", "␀").replace("\x07", "␇").replace("\u202e", "⟨U+202E⟩")
        assert question == wanted and answer == wanted
    assert js(opened, "return document.querySelectorAll('script').length") == 4
    js(opened, "location.hash = '#data.json%2320'")
    time.sleep(0.3)
    length = "return document.querySelector('.current .question').textContent.length"
    assert js(opened, length) < 4000 and "show all 99,9" in js(
        opened, "return document.querySelector('.current .more').textContent"
    )
    js(opened, "document.querySelector('.current .more').click()")
    assert js(opened, length) > 99_000


def test_values_can_be_read_without_pointing(opened, rows):
    js(opened, "location.hash = '#data.json%2350'")
    time.sleep(0.3)
    js(opened, "document.querySelector('.current details').open = true")
    time.sleep(0.2)
    cells = js(
        opened,
        "return [...document.querySelectorAll('.current tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))",
    )
    row = rows["data.json#50"]
    assert len(cells) == row["n_tokens"]
    null, image = row["token_nll_null"][0], row["token_nll_image"][0]
    assert float(cells[0][1].replace("−", "-")) == pytest.approx(null - image, abs=0.006)
    assert [float(cell) for cell in cells[0][2:4]] == pytest.approx([null, image], abs=6e-4)
    kinds = js(opened, "return [...document.querySelectorAll('.current .t')].map((node) => node.className)")
    values = np.array(row["token_nll_null"]) - np.array(row["token_nll_image"])
    negative = [any(name.startswith("n") and name[1:].isdigit() for name in kind.split()) for kind in kinds]
    assert negative == (values <= -0.1).tolist()
    rule = "return getComputedStyle(document.querySelector('.t.n1, .t.n2, .t.n3')).textDecorationLine"
    assert js(opened, rule) == "overline"  # the sign once more, without colour


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (320, "dark")]
)
def test_nothing_collides_at_any_width(opened, width, scheme):
    browser.media(opened, prefers_color_scheme=scheme)
    browser.resize(opened, width, 900)
    assert js(opened, "return document.documentElement.scrollWidth") <= width
    for selector in (
        "svg.plot:not(.curves) > text",
        ".words tr:nth-child(2) td",
        "#by-source tr:nth-child(2) td",
    ):
        overlap = js(
            opened,
            """const overlaps = [];
            const groups = new Map();
            for (const node of document.querySelectorAll(arguments[0])) {
              if (!node.textContent.trim()) continue;
              const range = document.createRange(); range.selectNodeContents(node);
              const box = range.getBoundingClientRect();
              const near = groups.get(node.parentNode) || [];
              for (const other of near) {
                const across = box.left < other.right - 1 && other.left < box.right - 1;
                const along = box.top < other.bottom - 3 && other.top < box.bottom - 3;
                if (across && along) overlaps.push(node.textContent);
              }
              groups.set(node.parentNode, [...near, box]);
            }
            return overlaps;""",
            selector,
        )
        assert overlap == [], (selector, overlap)
    ink, paper = js(opened, "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    bright = [sum(int(part) for part in colour[4:-1].split(",")) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) == (scheme == "dark")


def test_on_paper_the_first_samples_stand_and_the_tools_do_not(opened):
    browser.media(opened, media="print")
    js(opened, "window.dispatchEvent(new Event('beforeprint'))")
    assert js(opened, "return document.querySelectorAll('#list article').length") >= 48
    assert js(opened, "return getComputedStyle(document.querySelector('.tools')).display") == "none"
    assert "The first 48 of 150" in js(opened, "return document.getElementById('print-note').innerText")
    js(opened, "window.dispatchEvent(new Event('afterprint'))")


def test_every_control_has_a_name(opened):
    shown(opened)
    unnamed = js(
        opened,
        """return [...document.querySelectorAll('input, select, button, svg[role=img], img')].filter((node) =>
          !(node.labels && node.labels.length) && !node.getAttribute('aria-label') && !node.textContent.trim()
          && !node.getAttribute('alt')).map((node) => node.outerHTML.slice(0, 80))""",
    )
    assert unnamed == []


def test_the_page_of_a_comparison(chrome, root, scores):
    other = scored(root, 1, null={"kind": "black", "params": {}})
    found = compare(scores, other, moved=6)
    page = comparison_page(found, scores, other, root / "compare.html")
    chrome.get("about:blank")
    chrome.get_log("browser")
    chrome.get(page.as_uri())
    keys = [row.key for row in (*found.rose, *found.fell[::-1])]
    assert shown(chrome)[: len(found.rose)] == keys[:6]
    assert js(
        chrome,
        "return [...document.querySelectorAll('#list article')[0].querySelectorAll('.pass')].map((n) => n.textContent)",
    ) == ["A", "B"]
    put(chrome, "stratum", "fell")
    put(chrome, "order", "fell")
    assert shown(chrome) == [row.key for row in found.fell]
    assert chrome.get_log("browser") == []
