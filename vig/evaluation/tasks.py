"""The table of tasks: one row is all that the rest of the package knows of a benchmark.

A row says what is measured, which files it reads, and how an answer is read. Functions are named by their import path:
the command line reads the table before anything heavy is loaded. Help and error texts, docs/evaluate.md and the tests
read it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any, NamedTuple

SHORT = "{question}\nAnswer the question using a single word or phrase."
WAYS = {
    "letter": "the model writes its answer, of which the option's letter is read",
    "likelihood": "the option whose text is likeliest, by mean nats a token",
}


class Task(NamedTuple):
    """One benchmark.

    questions: import path of f(DataSpec) -> its `Question`s in order, a `BrokenRecord` for each that cannot be asked.
    judge: import path of f(row, rule) -> what is read of a stored row's answer: `parsed`, `right`, ...
    tally: import path of f(rows) -> the `Tally` that its figures are computed of.
    rules: how an answer is read, name -> what it does; the first is the default. silence: what answers do that cannot
        be read, where that is counted.
    prompt: what the model is asked; `{question}` stands for the record's own. prompts: the same for other `ways`.
    options: of the command line, that this task alone takes; those in `needs` must be given.
    """

    name: str
    measures: str  # for the help and docs/evaluate.md
    reads: str  # likewise: its published files
    questions: str
    judge: str
    tally: str
    rules: Mapping[str, str]
    prompt: str
    max_new_tokens: int
    ways: tuple[str, ...] = ()
    prompts: Mapping[str, str] = {}
    silence: str = ""
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        return next(iter(self.rules))

    def resolve(self, what: str) -> Callable[..., Any]:
        """Its function `questions`, `judge` or `tally`."""
        return resolve_name(getattr(self, what))

    def asks(self, way: str | None) -> str:
        """The prompt, unless another one is given."""
        return self.prompts.get(way or "", self.prompt)


TASKS = {
    task.name: task
    for task in (
        Task(
            "pope",
            "objects by yes/no questions: accuracy, precision, recall, F1, share of yes, by split and their mean",
            "POPE's JSON lines of `question_id`, `image`, `text`, `label`, a file or a folder with one file a split; "
            "its Parquet on the hub (`question`, `answer`, `category`)",
            "vig.evaluation.pope:questions",
            "vig.evaluation.pope:judge",
            "vig.evaluation.pope:tally",
            {
                "pope": "the benchmark's own: no where the first sentence holds the word No, no or not, else yes",
                "lmms-eval": "the whole answer is yes or no, in any case; anything else is neither",
                "strict": "the answer's first word is yes or no, in any case; anything else is neither",
            },
            SHORT,
            16,
            silence="say neither yes nor no",
        ),
        Task(
            "chair",
            "objects in captions that the image does not hold: CHAIR_i, CHAIR_s, recall, words a caption",
            "COCO's `instances_*.json`, or the folder of it, with `captions_*.json` beside it, and the benchmark's "
            "synonyms (`--synonyms`), one category a line",
            "vig.evaluation.chair:questions",
            "vig.evaluation.chair:judge",
            "vig.evaluation.chair:tally",
            {"chair": "words and synonyms as the benchmark reads them"},
            "Please describe this image in detail.",
            512,
            options=("synonyms", "captions"),
            needs=("synonyms",),
        ),
        Task(
            "docvqa",
            "short answers about pages: ANLS, and the share that equals an accepted answer",
            "DocVQA's JSON of `data` with `questionId`, `question`, `image`, `answers`; its Parquet on the hub",
            "vig.evaluation.docvqa:questions",
            "vig.evaluation.docvqa:judge",
            "vig.evaluation.docvqa:tally",
            {
                "paper": "ANLS by the paper's equation: a distance of exactly 0.5 gives 0",
                "lmms-eval": "ANLS as lmms-eval computes it: a distance of exactly 0.5 gives 0.5",
            },
            SHORT,
            64,
        ),
        Task(
            "choice",
            "multiple choice: accuracy by category, circular for MMBench, by source for CV-Bench",
            "MMBench's TSV of `index`, `question`, `hint`, `A`, `B`, ..., `answer`, `category`, `image`; CV-Bench's "
            "Parquet; any records with `question`, `choices` or `options`, `answer` (letter, place from 0, or text)",
            "vig.evaluation.choice:questions",
            "vig.evaluation.choice:judge",
            "vig.evaluation.choice:tally",
            {
                "letter": "the letter that the answer begins with or names, else the one option whose text it holds",
                "strict": "the answer is one letter, but for brackets, colons and full stops",
            },
            "{question}\nAnswer with the option's letter from the given choices directly.",
            16,
            ways=tuple(WAYS),
            prompts={"likelihood": "{question}"},
            silence="name no option",
            options=("rotate",),
        ),
        Task(
            "exact",
            "share of answers equal to the data's last answer",
            "any data that `vig score` reads",
            "vig.evaluation.exact:questions",
            "vig.evaluation.exact:judge",
            "vig.evaluation.exact:tally",
            {
                "plain": "case, runs of white space and a final full stop do not count",
                "strict": "every character counts, but for white space at both ends",
            },
            "{question}",
            64,
        ),
    )
}  # fmt: skip


def task_named(name: str) -> Task:
    """Raises ValueError, which lists the tasks."""
    if name not in TASKS:
        raise ValueError(f"task = {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name]


def rule_lines() -> list[str]:
    """For the help: "pope: pope, lmms-eval or strict"."""
    return [f"{task.name}: {', '.join(task.rules)}" for task in TASKS.values()]
