"""`vig eval` end to end on the demo's model: published forms in, predictions and measures out, whatever interrupts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_benchmarks
import tiny_families
import torch
from tiny_benchmarks import CHECKPOINT
from typer.testing import CliRunner

from vig.cli import app
from vig.data.files import StoreError, lock_folder
from vig.evaluation.answering import Answerer, Asked
from vig.evaluation.folder import PredictionFolder, read_predictions
from vig.evaluation.generation import left_padded, prompt_of
from vig.evaluation.questions import Record
from vig.evaluation.run import evaluate
from vig.evaluation.settings import AnswerSettings, EvalSpec
from vig.evaluation.tasks import TASKS
from vig.models.families import FAMILIES
from vig.models.loading import as_loaded
from vig.models.prompts import Encoder
from vig.scoring.loader import load_records
from vig.store.folder import SettingsDiffer

HERE = Path(__file__).parent


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", str(CHECKPOINT), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pope")
    data, options = tiny_benchmarks.pope(folder)
    return data, Path(options[1])


# --- every task ---


def test_every_task_has_its_tiny_twin_and_is_in_the_help():
    assert set(tiny_benchmarks.WRITERS) == set(TASKS)
    help = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "4000"}).output
    help = " ".join(help.split())
    for task in TASKS.values():
        assert f"{task.name}: {task.measures}" in help and f"{task.name}: {', '.join(task.rules)}" in help


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_end_to_end(task, tmp_path):
    data, options = tiny_benchmarks.WRITERS[task](tmp_path / "data")
    said = call(data, "--task", task, *options, "-o", tmp_path / "out", "--resamples", 100)
    measures = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert measures["task"] == task and measures["rule"] == TASKS[task].rule
    assert measures["counts"]["errors"] == 0 and measures["counts"]["answered"] == len(
        rows_of(tmp_path / "out")
    )
    for figure in measures["figures"]:
        assert figure["low"] <= figure["high"]
        assert figure["name"].replace("_", " ") in said
    about = measures["provenance"]
    assert about["model"] == str(CHECKPOINT) and about["prompt"] and len(about["data_fingerprint"]) == 16
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "predictions.jsonl", "measures.json", "_manifest.json",
    }  # fmt: skip
    again = call(data, "--task", task, *options, "-o", tmp_path / "again", "--resamples", 100, "--json")
    assert json.loads(again[again.index("{") :])["figures"] == measures["figures"]
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out")


# --- rules, errors, baselines ---


def test_pope_says_what_says_neither(pope, tmp_path):
    data, images = pope
    arguments = (data, "--task", "pope", "--image-root", images, "-o", tmp_path / "out", "--resamples", 100)
    said = call(*arguments)
    assert "24 answers say neither yes nor no; rule pope calls 24 of them yes" in said
    measures = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert measures["counts"]["abstained_read"] == 24
    groups = [figure["group"] for figure in measures["figures"] if figure["name"] == "accuracy"]
    assert groups == ["mean", "random", "popular", "adversarial"]
    before = [row["prediction"] for row in rows_of(tmp_path / "out")]
    said = call(*arguments, "--rule", "strict")  # read anew, not asked anew
    assert "24 were done before" in said and "rule strict counts them as wrong" in said
    rows = rows_of(tmp_path / "out")
    assert [row["prediction"] for row in rows] == before
    assert not any(row["right"] for row in rows) and {row["parsed"] for row in rows} == {None}


def test_records_that_cannot_be_asked_are_error_rows(pope, tmp_path):
    data, images = pope
    lines = (data / "coco_pope_random.json").read_text().splitlines()
    wrong = [json.loads(line) for line in lines[:4]]
    wrong[0]["image"] = "nowhere.png"
    wrong[1]["label"] = "perhaps"
    wrong[2].pop("text")
    file = tmp_path / "coco_pope_random.json"
    file.write_text("\n".join(map(json.dumps, wrong)) + "\n{'question_id': 5}\n")
    arguments = (file, "--task", "pope", "--image-root", images, "-o", tmp_path / "out")
    said = call(*arguments, "--errors", tmp_path / "errors.jsonl", code=3)
    assert "no image at" in said and "Check --image-root" in said
    assert "the label is 'perhaps'. Write yes or no" in said
    assert "no text in the field text or question (fields: image, label, question_id)" in said
    assert "line 5 is not JSON" in said and "4 questions could not be asked, and are in no figure" in said
    rows = rows_of(tmp_path / "out")
    assert [row.get("error") is None for row in rows] == [False, False, False, True, False]
    assert len((tmp_path / "errors.jsonl").read_text().splitlines()) == 4
    assert call(*arguments, "--dry-run", code=3).count("likewise") == 0
    said = call(*arguments, code=3)
    assert "5 were done before" in said
    (images / "nowhere.png").write_bytes((images / "0.png").read_bytes())
    try:
        said = call(*arguments, "--retry", "failed", code=3)
    finally:
        (images / "nowhere.png").unlink()
    assert "answered 1 questions" in said and "3 questions could not be asked" in said
    assert "prediction" in rows_of(tmp_path / "out")[0]


def test_a_file_of_another_task_is_refused(pope, tmp_path):
    data, _ = pope
    other, _ = tiny_benchmarks.exact(tmp_path / "exact")
    with pytest.raises(
        ValueError, match=r"none of the 4 records can be asked. The first is .*Task pope reads"
    ):
        call(other, "--task", "pope", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "got 'popes', expected" in call(data, "--task", "popes", "-o", tmp_path, code=2)
    assert "rule = 'plain', but task pope has pope" in call(
        data, "--task", "pope", "--rule", "plain", "-o", tmp_path, code=2
    )
    assert "expected {question} in it" in call(
        data, "--task", "pope", "--prompt", "Look!", "-o", tmp_path, code=2
    )


def test_baseline_gives_paired_tests_and_refuses_other_data(pope, tmp_path):
    data, images = pope
    arguments = (data, "--task", "pope", "--image-root", images, "--resamples", 200)
    call(*arguments, "-o", tmp_path / "a")
    rows = rows_of(tmp_path / "a")
    for row in rows[: len(rows) // 2]:
        row["prediction"] = row["label"]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = call(*arguments, "-o", tmp_path / "a", "--baseline", tmp_path / "b.jsonl")
    found = json.loads((tmp_path / "a" / "measures.json").read_text())["comparison"]
    accuracy = next(one for one in found["changes"] if (one["group"], one["name"]) == ("mean", "accuracy"))
    assert accuracy["value"] == 0.5 and accuracy["baseline"] == 0.75 and accuracy["difference"] == -0.25
    assert found["mcnemar"] == {"p_value": 2 / 2**6, "only_here": 0, "only_baseline": 6}
    assert "McNemar: 0 right here alone, 6 in the baseline alone, p = 0.0312" in said
    assert rows[2]["label"] == "yes"
    rows[2]["label"] = "no"
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(StoreError, match=r"adversarial.json#2 differs: label 'no' there, 'yes' here"):
        call(*arguments, "-o", tmp_path / "a", "--baseline", tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    with pytest.raises(StoreError, match="it has no answer to"):
        call(*arguments, "-o", tmp_path / "a", "--baseline", tmp_path / "b.jsonl")


def test_another_model_or_prompt_needs_another_folder(pope, tmp_path):
    data, images = pope
    spec = EvalSpec("pope", data, image_root=images, resamples=20)
    evaluate(str(CHECKPOINT), spec, tmp_path / "out")
    with pytest.raises(SettingsDiffer, match=r"predictions made with other settings.*\n.*prompt"):
        evaluate(
            str(CHECKPOINT), EvalSpec("pope", data, image_root=images, prompt="{question}"), tmp_path / "out"
        )


def test_python_and_the_longest_answer(pope, tmp_path):
    data, images = pope
    spec = EvalSpec("pope", data, image_root=images, resamples=20, limit=3)
    states = []
    done = evaluate(
        str(CHECKPOINT), spec, tmp_path / "out", AnswerSettings(max_new_tokens=2),
        on_progress=lambda state: states.append((state.done, state.total)),
    )  # fmt: skip
    assert states[0] == (0, 3) and states[-1] == (3, 3)
    assert done.measures["counts"]["cut"] == 3 and all(
        row["tokens"] == 2 for row in rows_of(tmp_path / "out")
    )
    with pytest.raises(
        ValueError, match="max_new_tokens = 300 leaves no room for a prompt in the context of 256"
    ):
        evaluate(str(CHECKPOINT), spec, tmp_path / "long", AnswerSettings(max_new_tokens=300))


def test_answers_may_hold_what_separates_lines(tmp_path):
    separators = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    rows = [
        {"key": f"d.json#{n}", "id": f"{n}", "answer": f"two.{one}three."} for n, one in enumerate(separators)
    ]
    with lock_folder(tmp_path):
        folder = PredictionFolder(tmp_path, {"task": "exact"})
        folder.begin({})
        folder.append(rows)
        assert list(PredictionFolder(tmp_path, {"task": "exact"}).rows.values()) == rows
        folder.finish(rows, {})
        assert read_predictions(tmp_path) == rows
        assert list(PredictionFolder(tmp_path, {"task": "exact"}).rows.values()) == rows


def test_drawn_answers_are_drawn_again(pope, tmp_path):
    data, images = pope
    spec = EvalSpec("pope", data, image_root=images, resamples=20, limit=6)
    written = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluate(str(CHECKPOINT), spec, tmp_path / name, AnswerSettings(temperature=2.0, seed=seed))
        written.append([row["prediction"] for row in rows_of(tmp_path / name)])
    assert written[0] == written[1] != written[2]


def test_a_batch_that_does_not_fit_is_halved_and_a_question_alone_is_an_error_row(
    pope, tmp_path, monkeypatch
):
    data, images = pope
    write = Answerer._write

    def small(self, batch):
        if len(batch) > 2 or batch[0].question.id == "3":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return write(self, batch)

    monkeypatch.setattr(Answerer, "_write", small)
    spec = EvalSpec("pope", data / "coco_pope_random.json", image_root=images, resamples=20)
    done = evaluate(str(CHECKPOINT), spec, tmp_path / "out")
    assert done.progress.splits > 0 and done.progress.failed == 1
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows if "error" in row] == ["3"] and len(rows) == 8
    assert rows[2]["error"].startswith("it does not fit into memory (CUDA out of memory.")
    assert "larger device" in rows[2]["error"]


# --- killed ---


def test_killed_and_resumed_gives_the_same_predictions(pope, tmp_path):
    data, images = pope
    command = [sys.executable, HERE / "killed_evaluation.py", data, images, tmp_path, "0"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kills"] >= 9 and {0, 1, 2} & set(said["batches_at_kill"]), said
    whole = {
        name: (tmp_path / "whole" / name).read_bytes() for name in ("predictions.jsonl", "measures.json")
    }
    planned = set(Path(f"{tmp_path}/whole.batches").read_text().splitlines())
    for run in range(2):
        for name, content in whole.items():
            assert (tmp_path / f"killed-{run}" / name).read_bytes() == content, (run, name)
        here = Path(f"{tmp_path}/killed-{run}.batches").read_text().splitlines()
        assert set(here) == planned  # the same batches, whatever came between


# --- batches ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_writes_what_each_prompt_alone_would(family, tmp_path):
    """Padded on the left, in float32, for every family; and as many tokens as were asked for."""
    loaded = as_loaded(tiny_families.model(family), tiny_families.processor(family), device="cpu")
    answerer = Answerer(loaded, AnswerSettings(dtype="float32"), 6)
    tiny_benchmarks.pictures(tmp_path, 3)
    samples = []
    for number, text in enumerate(("What?", "Is there a longer question here?", "Which colour")):
        record = Record({"image": f"{number}.png"}, f"d#{number}", tmp_path, "d")
        samples.append(record.ask(text, record.images("image")))
    items = sorted(load_records(samples, answerer.encoder, "pixels"), key=lambda item: item.place)
    assert [item.error for item in items] == [None] * 3
    asked = [Asked(None, [item]) for item in items]
    together = answerer.answer(asked)
    assert together == [answerer.answer([one])[0] for one in asked]
    assert all(0 < answer["tokens"] <= 6 for answer in together)


def test_the_prompt_is_the_templates_own():
    """What stands before the answer is what the template writes for a generation."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there ?"}]},
    ]
    image = tiny_benchmarks.scenes.draw(tiny_benchmarks.scenes.Scene((), 0))
    record = Record({}, "k", HERE, "s")
    encoded = Encoder(processor).encode(record.ask("what is there ?", [image]), [image])
    prompt = prompt_of(encoded)
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    expected = processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False)
    assert prompt.input_ids == expected["input_ids"][0].tolist()
    batch = left_padded([prompt, prompt._replace(input_ids=prompt.input_ids[-20:])], 0)
    assert batch["attention_mask"].sum(1).tolist() == [len(prompt.input_ids), 20]
    assert batch["input_ids"][1].tolist()[-20:] == prompt.input_ids[-20:]
    assert torch.equal(batch["pixel_values"][0], expected["pixel_values"][0])
