"""The README.md of a published model or selection: a card as the hub reads it, filled from what the run recorded."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml

from vig.data.files import write_atomically
from vig.selection.advice import tau_warnings
from vig.selection.measures import measure_of, unit_of
from vig.store.selections import read_selection, selection_files, selection_metadata

HERE = Path(__file__).parent
CARD = "README.md"
TAGS = ["visual-information-gain", "selective-training", "vig-kernels"]
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"))  # fmt: skip
ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
UNSAID = "say it here"
NEVER_FILLED_IN, EARLIER = "the form that PEFT had put there, never filled in", "the README.md that was there"
WITHOUT_HEAD = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
PEFT_VERSION = re.compile(r"^### Framework versions\s+- PEFT \S+\s*\Z", re.MULTILINE)


class ChosenBy(NamedTuple):
    """What a card says of the measure that a selection ranks by."""

    name: str
    claim: str  # tokens that ...
    text: str


PAPER = "[arXiv 2602.17186](https://arxiv.org/abs/2602.17186)"
CHOSEN_BY = {  # by the names of vig.selection.measures
    "vig": ChosenBy(
        "Visual Information Gain",
        "need the image",
        f"Visual Information Gain ({PAPER}): the negative log-likelihood of a token with a null image in the place of "
        "the image, minus that with the image",
    ),
    "kl": ChosenBy(
        "KL divergence",
        "the image changes",
        "KL divergence, of the distribution over the next token with the image from that with a null image in its "
        "place",
    ),
    "loss": ChosenBy(
        "loss",
        "have a low loss",
        "loss: the samples with the lowest mean negative log-likelihood of their answers, the image being seen",
    ),
}


def card(folder: str | Path) -> str:
    """The card of a folder of `vig train` or of `vig select`: YAML for the hub, then Markdown.

    Models and data are named as they are on the hub, else by the last part of their path: where they lay on the
    machine is nobody's concern. What no run knows (license, evaluation, intended use) is left to be said, and marked.
    Raises ValueError for another folder.
    """
    from vig.training.folder import RECORD

    folder = Path(folder)
    if (folder / RECORD).is_file():
        return _model_card(folder, json.loads((folder / RECORD).read_text(encoding="utf-8")))
    if folder.is_dir() and any(folder.glob("selection-*.parquet")):
        return _dataset_card(folder)
    raise ValueError(
        f"{folder} holds neither {RECORD} nor a selection. Give a folder of vig train or vig select"
    )


class WrittenCard(NamedTuple):
    path: Path
    replaced: str | None  # what was there: NEVER_FILLED_IN, EARLIER, or nothing


def write_card(folder: str | Path, overwrite: bool = False) -> WrittenCard:
    """Writes `card` to README.md of the folder.

    Raises ValueError where there is one, unless overwrite is set, or it is the form that peft put there and nobody
    filled in.
    """
    text, path = card(folder), Path(folder) / CARD
    replaced = None
    if path.exists():
        replaced = NEVER_FILLED_IN if is_empty_form(path.read_text(encoding="utf-8")) else EARLIER
    if replaced == EARLIER and not overwrite:
        raise ValueError(
            f"{path} is there already, and somebody may have edited it. Move it away, or replace it with --overwrite"
        )
    write_atomically(path, text.encode())
    return WrittenCard(path, replaced)


def is_empty_form(text: str) -> bool:
    """Whether a README.md is the form of huggingface_hub as peft saves it beside an adapter, with nothing filled in.

    peft changes the YAML at its head, and names its version at its end.
    """
    from huggingface_hub import ModelCard, ModelCardData

    def lines(card: str) -> list[str]:
        body = WITHOUT_HEAD.sub("", card, count=1)
        body = PEFT_VERSION.sub("", body)
        return [line.strip() for line in body.splitlines() if line.strip()]

    return lines(text) == lines(str(ModelCard.from_template(ModelCardData())))


def _model_card(folder: Path, record: dict[str, Any]) -> str:
    from vig.training.settings import loss_ends

    base, is_adapter = _named(record.get("model")), (folder / "adapter_config.json").is_file()
    head: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
    }
    if ON_THE_HUB.fullmatch(base):
        head |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    scored = record.get("selection")
    settings = {name: value for name, value in record["settings"].items() if value is not None}
    evals, choice = record.get("evals", []), (scored or {}).get("selection")
    return _filled(
        "model_card.md.j2", head, base=base, record=record, data=_named(record.get("data")), is_adapter=is_adapter,
        scored=scored, choice=choice, settings=_yaml(settings), **_measured(choice or {}),
        losses=loss_ends(record.get("losses", ())), evals=evals[:1] + evals[1:][-1:],
    )  # fmt: skip


def _dataset_card(folder: Path) -> str:
    scored = selection_metadata(folder)
    rows = len(read_selection(folder))
    data, choice = _named(scored.get("data")), scored.get("selection", {})
    measured = _measured(choice)
    head = {
        "pretty_name": f"A selection of {data} by {measured['how'].name}",
        "task_categories": ["image-text-to-text"],
        "size_categories": [next((name for most, name in SIZES if rows < most), "100M<n<1B")],
        "configs": [{"config_name": "default", "data_files": "selection-*.parquet"}],
    }
    return _filled(
        "dataset_card.md.j2", head, data=data, base=_named(scored.get("model")), scored=scored, rows=rows,
        choice=choice, files=len(selection_files(folder)), **measured, warned=_warned(choice, scored),
    )  # fmt: skip


def _measured(choice: dict[str, Any]) -> dict[str, Any]:
    """What the templates say of the measure that a selection ranks by, and the unit of its tau."""
    by = choice.get("by")
    return {"how": CHOSEN_BY[measure_of(by)], "unit": unit_of(by)}


def _warned(choice: dict[str, Any], scored: dict[str, Any]) -> list[str]:
    """What `vig select` warned of tau."""
    measure = measure_of(choice.get("by"))
    return tau_warnings(choice["tau"], scored, choice["counts"], choice.get("sources"), measure)


def _named(value: Any) -> str:
    """A name of the hub as it is, a path by its last part."""
    if not value:
        return "unnamed"
    text = str(value)
    return text if ON_THE_HUB.fullmatch(text) and not Path(text).exists() else Path(text).name


def _filled(template: str, head: dict[str, Any], **values: Any) -> str:
    body = _environment().get_template(template).render(unsaid=UNSAID, **values)
    return f"---\n{_yaml(head | {'tags': TAGS})}---\n\n{body}"


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, allow_unicode=True)


@cache
def _environment() -> jinja2.Environment:
    """Markdown, not HTML: nothing is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["grouped"] = lambda n: f"{n:,}"
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    return environment
