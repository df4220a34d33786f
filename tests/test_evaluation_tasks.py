"""Each task by hand: how its files are read, how answers are read, what figures come of them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_benchmarks
import torch
from tiny_benchmarks import CHECKPOINT

from vig.data.sample import BrokenRecord, DataError
from vig.evaluation import chair, choice, docvqa, pope
from vig.evaluation.answering import Answerer
from vig.evaluation.coco_objects import Synonyms, singular
from vig.evaluation.figures import Tally, accuracy, compare, estimate
from vig.evaluation.measuring import measure
from vig.evaluation.run import blocks, evaluate, survey
from vig.evaluation.settings import AnswerSettings, EvalSpec
from vig.evaluation.show import remarks
from vig.evaluation.similarity import anls, similarity


def figures_of(tally: Tally) -> dict[tuple[str, str], float]:
    return {(one.group, one.name): one.value for one in estimate(tally, resamples=10)}


def asked(spec: EvalSpec) -> list:
    found = list(spec.questions())
    assert not [one for one in found if isinstance(one, BrokenRecord)]
    return found


def text_of(question) -> str:
    return question.sample.messages[0]["content"][-1]["text"]


# --- figures ---


def test_figures_and_their_intervals_by_hand():
    """Two images of two questions each: a draw holds one twice, or both; so accuracy* is 0.5, 0.75 or 1."""
    right = np.array([1.0, 1, 1, 0])
    tally = Tally(list("abcd"), ["i", "i", "j", "j"], {"right": right}, accuracy, right=right > 0)
    (found,) = estimate(tally, resamples=4000)
    assert found.value == 0.75 and (found.low, found.high) == (0.5, 1.0)
    alone = Tally(list("abcd"), ["i"] * 4, {"right": right}, accuracy)
    assert estimate(alone)[0][2:] == (0.75, None, None)
    assert estimate(tally) == estimate(tally) and estimate(tally, seed=1)[0].value == 0.75


def test_intervals_cover_and_know_that_questions_of_an_image_hang_together():
    rng = np.random.default_rng(0)
    images, each = 300, 6
    chance = rng.random(images)
    right = (rng.random((images, each)) < chance[:, None]).astype(float)
    keys = [str(number) for number in range(images * each)]
    together = Tally(
        keys, np.repeat(np.arange(images), each).astype(str).tolist(), {"right": right.ravel()}, accuracy
    )
    apart = Tally(keys, keys, {"right": right.ravel()}, accuracy)
    wide, narrow = estimate(together)[0], estimate(apart)[0]
    spread = right.mean(1).std() / np.sqrt(images)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert narrow.high - narrow.low < 0.7 * (wide.high - wide.low)


def test_differences_use_the_same_draws():
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.6
    better = right | (rng.random(200) < 0.2)
    keys = [str(number) for number in range(200)]
    a, b = (Tally(keys, keys, {"right": one.astype(float)}, accuracy, right=one) for one in (better, right))
    (change,) = compare(a, b)
    assert change.difference == pytest.approx(better.mean() - right.mean()) and change.low > 0
    assert change.p_value < 0.01
    gain = better.astype(float) - right
    assert change.high - change.low == pytest.approx(2 * 1.96 * gain.std() / np.sqrt(200), rel=0.15)
    (same,) = compare(a, a)
    assert same[4:] == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="other questions"):
        compare(a, Tally(keys[::-1], keys, {"right": right.astype(float)}, accuracy))


# --- pope ---


def test_pope_by_split_and_mean():
    answers = {"random": ("yes", "no", "yes", "no"), "popular": ("yes", "no", "no", "no")}
    labels = ("yes", "no", "no", "yes")
    rows = [
        {
            "key": f"{split}{n}",
            "image": str(n),
            "label": label,
            "split": split,
            "parsed": said,
            "right": said == label,
        }
        for split, several in answers.items()
        for n, (said, label) in enumerate(zip(several, labels, strict=True))
    ]
    found = figures_of(pope.tally(rows))
    assert [found["random", name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")] == [
        0.5
    ] * 5
    assert found["popular", "accuracy"] == 0.75 and found["popular", "f1"] == pytest.approx(2 / 3)
    assert found["mean", "f1"] == pytest.approx((1 / 2 + 2 / 3) / 2) and ("", "f1") not in found


def test_pope_of_the_hub_names_its_split_in_a_field(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tiny_benchmarks.pictures(tmp_path / "p", 2)
    image = {"bytes": (tmp_path / "p" / "0.png").read_bytes(), "path": None}
    rows = [
        {"id": str(n), "question_id": "1", "question": "Is there a cup ?", "answer": answer, "image": image,
         "image_source": "COCO_1", "category": category}
        for n, (answer, category) in enumerate((("yes", "popular"), ("no", "adversarial")))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    found = asked(EvalSpec("pope", tmp_path / "test.parquet"))
    assert [one.truth for one in found] == [
        {"label": "yes", "split": "popular"}, {"label": "no", "split": "adversarial"},
    ]  # fmt: skip
    assert {one.image for one in found} == {"COCO_1"} and found[0].sample.images == (image["bytes"],)


# --- docvqa ---


def test_docvqa_by_hand():
    """A distance of exactly one half: nothing by the paper, one half by lmms-eval."""
    assert similarity("ab", ["ac"]) == 0 and similarity("ab", ["ac"], rule="lmms-eval") == 0.5
    assert similarity("abc", ["abd", "x"]) == pytest.approx(2 / 3)
    assert similarity("a  b", ["a b"]) == 0.75 and similarity("a  b", ["a b"], rule="lmms-eval") == 1
    assert similarity("", [""]) == 1 and similarity("a", []) == 0
    assert anls(["ab"], [["ac"]], rule="lmms-eval") == 0.5
    row = {"prediction": " Blue ", "answers": ["blue", "BLUES"]}
    judged = docvqa.judge(row, "paper", None)
    assert judged == {"parsed": "blue", "anls": 1.0, "right": True}
    rows = [row | judged | {"key": "a", "image": "1"}]
    other = {"prediction": "bl", "answers": ["blue"], "key": "b", "image": "2"}
    for rule, value in (("paper", 0.5), ("lmms-eval", 0.75)):
        both = [*rows, other | docvqa.judge(other, rule, None)]
        assert figures_of(docvqa.tally(both)) == {("", "anls"): value, ("", "accuracy"): 0.5}


def test_docvqa_reads_the_published_file(tmp_path):
    data, _ = tiny_benchmarks.docvqa(tmp_path)
    first = asked(EvalSpec("docvqa", data))[0]
    assert first.id == "300" and first.image == "documents/0.png" and len(first.truth["answers"]) == 2
    assert text_of(first).endswith("?\nAnswer the question using a single word or phrase.")
    content = json.loads(data.read_text())
    content["data"][1].pop("answers")
    data.write_text(json.dumps(content))
    broken = next(one for one in EvalSpec("docvqa", data).questions() if isinstance(one, BrokenRecord))
    assert "the test split has none, and is measured on its server" in str(broken.error)


# --- chair ---

COCO = """person, girl, boy, man, woman, kid, child, people, baby, adult, passenger
car, automobile, sedan
traffic light, street light
train
dog, puppy
bear, panda
teddy bear, stuffed bear
chair, seat, stool
toilet, urinal
tie, bow
knife
wine glass
glove
bus
"""


@pytest.fixture
def synonyms(tmp_path) -> Synonyms:
    (tmp_path / "synonyms.txt").write_text(COCO)
    return Synonyms(tmp_path / "synonyms.txt")


@pytest.mark.parametrize(
    ("caption", "mentioned"),
    [
        ("Two men and a woman's puppies.", ["person", "person", "dog"]),
        ("A teddy bear beside a BEAR", ["teddy bear", "bear"]),
        ("a baby bear, an adult dog and a passenger train", ["bear", "dog", "train"]),
        ("a baby and a passenger", ["person", "person"]),
        ("street lights at the train tracks", ["traffic light"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("a toilet seat; the toilet has a white seat", ["toilet", "toilet"]),
        ("a seat", ["chair"]),
        ("knives, buses and wine glasses", ["knife", "bus", "wine glass"]),
        ("home plate", []),
        ("", []),
    ],
)
def test_chair_reads_a_caption(synonyms, caption, mentioned):
    assert synonyms.mentioned(caption) == mentioned


def test_a_line_of_synonyms_ends_where_lines_of_files_do(tmp_path):
    (tmp_path / "words.txt").write_bytes("\ufeffperson, a\u2028man\r\ndog, puppy\n".encode())
    assert Synonyms(tmp_path / "words.txt").category == {
        "person": "person", "a man": "person", "dog": "dog", "puppy": "dog",
    }  # fmt: skip


def test_singulars():
    words = "dogs buses glasses cherries knives boxes potatoes bus glass children benches ties horses"
    single = "dog bus glass cherry knife box potato bus glass child bench tie horse"
    assert [singular(word) for word in words.split()] == single.split()


def test_chair_by_hand(tmp_path):
    """The image holds what its instances are and what its captions mention."""
    data, options = tiny_benchmarks.chair(tmp_path)
    files = {"image_root": Path(options[1]), "synonyms": Path(options[3])}
    spec = EvalSpec("chair", data, **files)
    first = asked(spec)[0]
    drawn = tiny_benchmarks.pictures(tmp_path / "again", 4)[0]
    assert first.truth["objects"] == sorted(item.name for item in drawn.items) and first.id == "100"
    there = first.truth["objects"][0]
    gone = next(name for name in tiny_benchmarks.scenes.OBJECTS if name not in first.truth["objects"])
    rows = []
    for key, caption in (
        ("a", f"a {there} and a {there} with a tiny {gone}"),
        ("b", f"a {there}"),
        ("c", "nothing"),
    ):
        row = {"key": key, "image": key, "prediction": caption, "objects": [there]}
        rows.append(row | chair.judge(row, "chair", spec.data_spec))
    assert rows[0]["hallucinated"] == [gone] and [row["right"] for row in rows] == [False, True, True]
    found = figures_of(chair.tally(rows))
    assert found["", "chair_i"] == 1 / 4 and found["", "chair_s"] == pytest.approx(1 / 3)
    assert found["", "recall"] == pytest.approx(2 / 3) and found["", "length"] == pytest.approx(
        (9 + 2 + 1) / 3
    )


def test_chair_names_what_is_missing(tmp_path):
    data, options = tiny_benchmarks.chair(tmp_path)
    files = {"image_root": Path(options[1]), "synonyms": Path(options[3])}
    with pytest.raises(ValueError, match="task chair needs --synonyms"):
        EvalSpec("chair", data)
    (tmp_path / "few.txt").write_text("apple\nbanana\n")
    with pytest.raises(DataError, match=r"does not know 14 categories of instances_val2014.json: cup, pan"):
        survey(EvalSpec("chair", data, image_root=files["image_root"], synonyms=tmp_path / "few.txt"))
    (data / "captions_val2014.json").rename(data / "others.json")
    with pytest.raises(
        DataError, match=r"no captions file at .*captions_val2014.json. Give it with --captions"
    ):
        survey(EvalSpec("chair", data, **files))
    assert len(survey(EvalSpec("chair", data, **files, captions=data / "others.json", limit=2))) == 2


# --- choice ---


@pytest.mark.parametrize(
    ("answer", "letter", "strict"),
    [
        ("B", "B", "B"),
        ("b.", "B", "B"),
        ("(B)", "B", "B"),
        ("B. dark red", "B", None),
        ("The answer is (B).", "B", None),
        ("Option B", "B", None),
        ("A dog is there", None, None),  # an article
        ("The answer is a blue one", "C", None),  # and here
        ("I. The red one", "A", None),  # no option is called I
        ("it is red", "A", None),
        ("it is dark red", "B", None),  # which holds "red", too
        ("blue or red", None, None),
        ("reddish", None, None),
        ("D", None, None),  # there are three
        ("", None, None),
    ],
)
def test_choice_reads_an_answer(answer, letter, strict):
    row = {"prediction": answer, "options": ["red", "dark red", "blue"], "answer": "B"}
    for rule, expected in (("letter", letter), ("strict", strict)):
        found = choice.judge(row, rule, None)
        assert found == {"parsed": expected, "right": expected == "B", "abstained": expected is None}


def test_mmbench_is_circular(tmp_path):
    data, _ = tiny_benchmarks.mmbench(tmp_path)
    found = asked(EvalSpec("choice", data))
    assert [one.key.partition("@")[2] for one in found[:4]] == ["0", "1", "2", "3"] and len(found) == 15
    texts = {one.truth["options"]["ABCD".index(one.truth["answer"])] for one in found[:4]}
    assert len(texts) == 1 and {one.truth["answer"] for one in found[:4]} == set("ABCD")
    lines = text_of(found[0]).splitlines()
    assert lines[0] == "there are things" and [line[:2] for line in lines[2:6]] == ["A.", "B.", "C.", "D."]
    rows = [
        {"key": one.key, "image": one.image, **one.truth, "right": number != 1}
        for number, one in enumerate(found)
    ]
    figures = figures_of(choice.tally(rows))
    assert figures["", "circular_accuracy"] == 0.75 and figures["", "accuracy"] == 1
    assert figures["colour", "circular_accuracy"] == 0.5 and figures["object", "circular_accuracy"] == 1
    assert ("", "circular_accuracy") in figures_of(
        choice.tally(rows[:-1])
    )  # an incomplete question is left out
    assert len(choice.tally(rows[:-1]).keys) == 3
    spec = EvalSpec("choice", data)
    nothing = measure(rows[:3], spec, {})  # three rotations of four, and no whole question
    assert nothing["figures"] == [] and nothing["counts"]["answered"] == 3 and nothing["counts"]["units"] == 0
    assert len(asked(EvalSpec("choice", data, rotate=False))) == 4


def test_questions_without_an_image_are_not_counted_as_images(tmp_path):
    tiny_benchmarks.pictures(tmp_path, 1)
    of_text = {"question": "what ?", "options": ["red", "blue"], "answer": "A"}
    (tmp_path / "a.json").write_text(json.dumps([of_text, of_text | {"image": "0.png"}, of_text]))
    for turns in (False, True):
        spec = EvalSpec("choice", tmp_path / "a.json", rotate=turns)
        rows = [{"key": one.key, "image": one.image, **one.truth, "right": True} for one in asked(spec)]
        measures = measure(rows, spec, {})
        assert len(rows) == (6 if turns else 3)
        assert measures["counts"]["images"] == 1 and measures["counts"]["text_only"] == 2
        assert "about 1 images" in remarks(measures)[0] and "2 without an image" in remarks(measures)[0]


def test_mmbench_with_its_own_rotations_and_shared_images(tmp_path):
    """Rotation k of question i is row i + k million; its image field is the index of the row that has it."""
    tiny_benchmarks.pictures(tmp_path, 1)
    image = base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
    lines = [
        "index\tquestion\tA\tB\tanswer\tcategory\timage",
        f"7\twhat ?\tred\tblue\tA\tcolour\t{image}",
        "1000007\twhat ?\tblue\tred\tB\tcolour\t7",
    ]
    (tmp_path / "mmbench.tsv").write_text("\n".join(lines) + "\n")
    found = asked(EvalSpec("choice", tmp_path / "mmbench.tsv"))
    assert len(found) == 2 and found[0].sample.images == found[1].sample.images
    rows = [{"key": one.key, "image": one.image, **one.truth, "right": True} for one in found]
    rows[1]["right"] = False
    tally = choice.tally(rows)
    assert len(tally.keys) == 1 and figures_of(tally)["", "circular_accuracy"] == 0
    assert figures_of(tally)["", "accuracy"] == 1 and found[0].image == found[1].image


def test_cv_bench_is_the_mean_of_2d_and_3d(tmp_path):
    data = tiny_benchmarks.cv_bench(tmp_path)
    found = asked(EvalSpec("choice", data))
    assert len(found) == 6 and {one.truth["source"] for one in found} == {"2D ADE20K", "2D COCO", "3D Omni3D"}
    rights = (True, False, True, True, True, False)
    rows = [
        {"key": one.key, "image": one.image, **one.truth, "right": right}
        for one, right in zip(found, rights, strict=True)
    ]
    figures = figures_of(choice.tally(rows))
    assert figures["2D ADE20K", "accuracy"] == 1 and figures["2D COCO", "accuracy"] == 0.5
    assert figures["2D", "accuracy"] == 0.75 and figures["3D", "accuracy"] == 0.5
    assert figures["CV-Bench", "accuracy"] == 0.625 and figures["", "accuracy"] == pytest.approx(4 / 6)
    assert figures["Depth", "accuracy"] == 0.5


def test_plain_records_name_the_right_option_in_any_way(tmp_path):
    tiny_benchmarks.pictures(tmp_path, 1)
    base = {"image": "0.png", "question": "what ?", "options": ["red", "blue"]}
    answers = ["B", "(B)", "b", 1, "1", "blue", "green", 2, None]
    lines = [json.dumps(base | {"answer": answer}) for answer in answers]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    found = list(EvalSpec("choice", tmp_path / "q.jsonl").questions())
    read = [one.truth["answer"] if not isinstance(one, BrokenRecord) else None for one in found]
    assert read == ["B", "B", None, "B", "B", "B", None, None, None]
    assert "the answer is 'green', which is none of the 2 options" in str(found[6].error)


def test_likelihoods_are_those_of_the_models_own_logits(tmp_path):
    """Sums of log-probabilities of each option, without the end-of-turn token, from plain transformers."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    data, _ = tiny_benchmarks.mmbench(tmp_path / "data")
    spec = EvalSpec("choice", data, way="likelihood", resamples=20)
    done = evaluate(str(CHECKPOINT), spec, tmp_path / "out", AnswerSettings(batch_size=2))
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {one["name"] for one in done.measures["figures"]} == {
        "accuracy",
        "accuracy_by_sum",
    }
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    for row, question in zip(rows, asked(spec), strict=True):
        image = tiny_benchmarks.scenes.draw(tiny_benchmarks.pictures(tmp_path / "x", 4)[int(row["id"])])
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text_of(question)}]}],
            add_generation_prompt=True,
        )
        for option, nll, count in zip(row["options"], row["nll"], row["token_counts"], strict=True):
            inputs = processor(
                text=[prompt + option], images=[image], return_tensors="pt", add_special_tokens=False
            )
            with torch.no_grad():
                logits = model(**inputs).logits[0, -count - 1 : -1].log_softmax(-1)
            ids = inputs["input_ids"][0, -count:]
            assert nll == pytest.approx(-float(logits.gather(1, ids[:, None]).sum()), abs=2e-4)
        best = int(np.argmin(np.array(row["nll"]) / row["token_counts"]))
        assert row["parsed"] == "ABCD"[best] and row["prediction"] == row["options"][best]


def test_the_candidates_of_a_question_stay_together(tmp_path):
    """A question is answered whole, in one batch, whatever the batch size."""
    data, _ = tiny_benchmarks.mmbench(tmp_path)
    spec = EvalSpec("choice", data, way="likelihood")
    answerer = Answerer(str(CHECKPOINT), AnswerSettings(batch_size=1), 0)
    (block,) = blocks(spec, answerer, set(survey(spec)))
    assert [len(one.items) for one in block] == [4, 4, 4, 3]
