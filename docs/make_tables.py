"""What the docs and the README hold of the package's own tables: `python docs/make_tables.py` writes it anew.

A table stands in its page between `<!-- table: NAME -->` and `<!-- /table: NAME -->`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from vig.data.formats import FORMATS, FORMS, Form
from vig.evaluation.probes.table import PROBES
from vig.evaluation.tasks import TASKS, Task
from vig.models.families import FAMILIES
from vig.models.null_image import NULLS
from vig.scoring.attention_kernels import KERNELS

DOCS = Path(__file__).parent


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def null_images() -> str:
    rows = ([f"`{name}`", null.stage, null.shows, null.purpose] for name, null in NULLS.items())
    return markdown(["name", "stage", "what the model sees", "use it for"], rows)


def families() -> str:
    rows = ([row.name, f"`{row.model_type}`", row.shape, row.padding] for row in FAMILIES.values())
    return markdown(["family", "model_type", "where its pixels lie", "left alone"], rows)


def family_names() -> str:
    """An item's lines, with the indent of the mark behind them."""
    names = ", ".join(
        dict.fromkeys(row.name.replace(" ", "\0").replace(",\0", ", ") for row in FAMILIES.values())
    )
    lines = textwrap.fill(f"{names}.", 120, initial_indent="  ", subsequent_indent="  ")
    return lines.replace("\0", " ") + "\n  "  # no name is cut in two


def formats() -> str:
    rows = ([row.name, ", ".join(f"`{end}`" for end in row.suffixes), row.holds] for row in FORMATS)
    return markdown(["format", "files", "what they hold"], rows)


def records() -> str:
    def example(form: Form) -> str:
        return f"`{json.dumps(form.example)}`"

    rows = ([form.name, " and ".join(f"`{field}`" for field in form.fields), example(form)] for form in FORMS)
    return markdown(["form", "known by", "a record"], rows)


def attention() -> str:
    rows = ([f"`{name}`", row.takes, row.calls] for name, row in KERNELS.items())
    return markdown(["kernel", "taken for", "calls a layer"], rows)


def probes() -> str:
    rows = (
        [f"`{name}`", probe.question, probe.needs, "; ".join(f"*{m.name}*: {m.says}" for m in probe.measures)]
        for name, probe in PROBES.items()
    )
    return markdown(["probe", "asks", "needs", "measures"], rows)


def tasks() -> str:
    rows = ([f"`{task.name}`", task.measures, task.reads, asks(task)] for task in TASKS.values())
    return markdown(["task", "measures", "reads", "asks, unless `--prompt` is given; longest answer"], rows)


def asks(task: Task) -> str:
    prompt = task.prompt.replace("\n", "⏎")
    return f"`{prompt}`; {task.max_new_tokens} tokens"


def rules() -> str:
    rows = (
        [f"`{task.name}`", f"`{rule}`", meaning]
        for task in TASKS.values()
        for rule, meaning in task.rules.items()
    )
    return markdown(["task", "`--rule`", "how an answer is read"], rows)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "null images": ("null-images.md", null_images),
    "families": ("families.md", families),
    "family names": ("../README.md", family_names),
    "formats": ("formats.md", formats),
    "records": ("formats.md", records),
    "attention kernels": ("throughput.md", attention),
    "probes": ("probes.md", probes),
    "tasks": ("evaluate.md", tasks),
    "rules": ("evaluate.md", rules),
}  # name -> its page and what makes it


def made(page: str) -> str:
    """The text of a page with its tables made anew. Raises ValueError where a table has no marks."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, (home, make) in TABLES.items():
        if home != page:
            continue
        first, last = f"<!-- table: {name} -->\n", f"<!-- /table: {name} -->"
        if first not in text or last not in text:
            raise ValueError(f"{page} has no marks {first.strip()} and {last} around a table")
        before, _, rest = text.partition(first)
        text = f"{before}{first}{make()}{last}{rest.partition(last)[2]}"
    return text


def main() -> None:
    for page in dict.fromkeys(page for page, _ in TABLES.values()):
        (DOCS / page).write_text(made(page), encoding="utf-8")


if __name__ == "__main__":
    main()
