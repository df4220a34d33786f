"""One self-contained HTML page to work from: what the image is worth, sample by sample and word by word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vig.data.files import StoreError, explain_write_errors, write_atomically
from vig.data.sample import writable
from vig.models.null_image import NULLS
from vig.reporting.encode import sample_json, script_json
from vig.reporting.facts import WORD_ROWS, Facts, gather
from vig.reporting.figures import box_figures
from vig.reporting.keep import DEFAULT_P, Rules
from vig.reporting.null_check import check_null
from vig.reporting.page import render
from vig.reporting.scale import rounded
from vig.reporting.strata import STRATA
from vig.reporting.thumbnails import Thumbnails
from vig.reporting.viewer import Viewer
from vig.reporting.views import Page, SampleView
from vig.reporting.words import find_tagger, word_figures
from vig.selection.advice import noise_floor, tau_warnings
from vig.selection.measures import MEASURES, measure_of, unit_of
from vig.selection.select import Selection
from vig.selection.stop_tokens import Stops
from vig.store.folder import ABOUT_THE_DATA, SettingsDiffer, settings_differences
from vig.store.scores import open_scores, score_metadata, unfinished
from vig.store.selections import selection_files, selection_metadata

MEGABYTE = 1_000_000
AROUND = 150_000  # bytes kept for what is neither samples nor pictures: charts, style, script


def report(
    scores,  # folder, file, list of them, what `Scorer.score` returned, or a pyarrow Table of scores
    out: str | Path = "report.html",
    *,
    selection: str | Path | Selection | None = None,
    data: str | Path | None = None,
    samples: int = 500,
    image_root: str | Path | None = None,
    processor: Any = None,
    title: str | None = None,
    budget: float = 15.0,
    seed: int = 0,
    hide_values: bool = False,
) -> Path:
    """Write the report on a folder of scores and return its path.

    The page needs nothing beside itself and opens from disk: style, script, charts and pictures are inside. All its
    figures come from every row of the scores, which are streamed three times; words from at most 20,000 answers.
    selection: marks the tokens trained on, and tau. data, image_root, processor: default to those that the
    scores name; what cannot be read is left out, and the page says so. samples: how many to show: the highest and
    lowest VIG, both sides of tau, dropped ones, some of each source and at random (the same ones for the same seed).
    title: the data's name unless given. budget: size of the file in MB (10^6 bytes); pictures are shrunk until they
    fit, and left out where the text alone is larger.
    hide_values: the list begins without values, colours and marks of the selection, in the order of the data, so that
    answers are judged unswayed; a box beside the order shows them.

    Raises StoreError where the scores cannot be read, the selection was made from others, or ``out`` cannot be
    written; ValueError for a budget that is not positive.
    """
    out = Path(out)
    if out.is_dir():
        raise StoreError(f"{out} is a folder: name the page, {out / 'report.html'} for example")
    check_budget(budget)
    scores = open_scores(scores)
    metadata = score_metadata(scores)
    chosen, batches = open_selection(selection, metadata)
    rules = rules_of(chosen, metadata)
    facts = gather(scores, samples, seed, rules)
    viewer = Viewer(metadata, processor=processor, data=data or metadata.get("data"), image_root=image_root)
    viewer.find({row["key"]: number for number, row in facts.rows.items()})
    kept = _kept_tokens({row["key"] for row in facts.rows.values()}, batches)
    views = [_view(viewer, facts, number, kept, rules) for number in sorted(facts.rows)]
    encoded, pictures = with_pictures(views, viewer, facts.sources.names, int(budget * MEGABYTE))
    figures = word_figures(facts.words, viewer.tokenizer, facts.multimodal > WORD_ROWS, find_tagger())
    null_check = check_null(facts.words, viewer.tokenizer, metadata.get("null") or {})
    page = Page(
        title=title or Path(str(metadata.get("data") or metadata.get("model", "Scores"))).name,
        subtitle=subtitle(metadata),
        figures=_figures(facts, metadata, chosen),
        sample_histogram=facts.compared[0].histogram(facts.tau),
        token_histogram=facts.compared[1].histogram(facts.tau),
        measures=rules.measures,
        boxes=box_figures(facts, figures),
        words=figures,
        null_check=null_check,
        keep=facts.keep,
        tau=facts.tau,
        p=chosen.get("p", DEFAULT_P),
        null_names=[null_caption(metadata)],
        notes=[
            *unfinished(scores),
            *_stale_notes(chosen, facts),
            *_tau_notes(chosen, metadata),
            *(_sentence(line) for line in ([] if null_check is None else null_check.warnings)),
            *viewer.notes,
            *_left_out(pictures, budget),
        ],
        errors=sorted(facts.errors.values(), key=lambda group: -group.count),
        settings=_settings(metadata, chosen),
        strata=[(name, STRATA[name][0], f"{n:,} {STRATA[name][1]}") for name, n in facts.strata.items() if n],
    )
    page.state = _state(page, facts, scores, chosen, metadata) | {"hide": hide_values}
    with explain_write_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, writable(render(page, encoded, pictures.images)).encode())
    return out


def check_budget(budget: float) -> None:
    """Raises ValueError for a budget that holds no page."""
    if not budget > 0:
        raise ValueError(f"the budget is the page's size in MB, above 0; got {budget!r}")


def rules_of(chosen: dict, scored: dict) -> Rules:
    """What the slider follows: the selection's own settings, or `select`'s defaults. scored: metadata of the scores."""
    names = ("p", "level", "by", "tau_floor", "clip", "tau", "keep_easy")
    given = {name: chosen[name] for name in names if chosen.get(name) is not None}
    if given.get("level") == "random":
        given["level"] = "both"  # it keeps as many
    if given.get("by") == "source":
        given.pop("tau", None)  # there is one a source
    if measure_of(given.get("by")) != "vig":  # the page's axes are of VIG
        given = {name: given[name] for name in ("p", "level", "keep_easy") if name in given}
    stop_tokens = chosen.get("stop_tokens", "select") if chosen else "keep"
    return Rules(**given, stops=Stops.of(scored, stop_tokens, chosen.get("mean", "all")))


def _view(viewer: Viewer, facts: Facts, number: int, kept: dict[str, list[bool]], rules: Rules) -> SampleView:
    row = facts.rows[number]
    view = viewer.view(row, kept.get(row["key"]))
    view.row, view.picked = number, facts.picked[number]
    view.selected_vig = facts.selected_vig.get(number)
    if rules.stops.keep and row["token_ids"]:
        ends = rules.stops.ends_of_turns(np.array(row["token_ids"]), np.array(row["positions"]))
        view.stop = np.flatnonzero(ends).tolist()
    return view


def with_pictures(
    views: list[SampleView], viewer: Viewer, sources: list[str], budget: int
) -> tuple[list[dict], Thumbnails]:
    """The samples as the page's script takes them, and their pictures, within a budget of bytes for both."""
    codes = {name: code for code, name in enumerate(sources)}
    encoded = [sample_json(view, codes.get(view.source, len(sources) - 1)) for view in views]
    text = len(script_json(encoded).encode("utf-8", "backslashreplace"))
    expected = sum(2 * viewer.n_images(view.key) for view in views)
    pictures = Thumbnails(budget - text - AROUND, expected)
    for view, sample in zip(views, encoded, strict=True):
        viewer.add_pictures(view)
        sample["cr"] = view.cropped
        sample["im"] = [pictures.add(image) for image in view.images]
        sample["nu"] = [[image and pictures.add(image) for image in nulls] for nulls in view.nulls]
        sample["o"] = view.note
        view.images, view.nulls = [], []
    return encoded, pictures


def _left_out(pictures: Thumbnails, budget: float) -> list[str]:
    if not pictures.left_out:
        return []
    return [
        f"{pictures.left_out:,} pictures are left out, since the page would exceed its budget of {budget:g} MB. "
        "Give a larger budget or fewer samples."
    ]


def open_selection(selection: str | Path | Selection | None, scored: dict) -> tuple[dict, Any]:
    """Its settings, and its rows in a stream.

    Raises StoreError for a selection that was made from scores of other settings."""
    if selection is None:
        return {}, ()
    if isinstance(selection, Selection):
        metadata, batches = selection.metadata, selection.batches()
    else:
        metadata = selection_metadata(selection)
        columns = ["key", "token_keep"]
        files = (pq.ParquetFile(file) for file in selection_files(selection))
        batches = (batch for file in files for batch in file.iter_batches(8192, columns=columns))
    _refuse_selection_of_others(scored, metadata)
    return metadata["selection"], batches


def _kept_tokens(keys: set[str], batches: Any) -> dict[str, list[bool]]:
    """Token masks of the samples that are shown. Raises StoreError where the selection knows none of them."""
    wanted, kept, read = pa.array(sorted(keys), pa.string()), {}, False
    for batch in batches:
        read = True
        for row in batch.filter(pc.is_in(batch["key"], wanted)).to_pylist():
            kept[row["key"]] = row["token_keep"] or []
    if keys and read and not kept:
        raise StoreError(
            f"the selection knows none of the samples, {min(keys)} for one. Give the one made from these scores"
        )
    return kept


def _refuse_selection_of_others(scored: dict, chosen: dict) -> None:
    """Of what both name; a selection may be of several data sets, and names the first."""
    both = scored.keys() & chosen.keys() - ABOUT_THE_DATA - {"notes", "selection"}
    differences = settings_differences(
        *({name: settings[name] for name in both} for settings in (scored, chosen))
    )
    if differences:
        raise SettingsDiffer(
            "the selection was made from scores with other settings",
            ("the scores have", "the selection"),
            sorted(differences),
            "Give the selection that was made from these scores.",
        )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def null_caption(metadata: dict) -> str:
    """What stands below a null image."""
    kind = (metadata.get("null") or {}).get("kind")
    return NULLS[kind].caption if kind in NULLS else "null image"


def subtitle(metadata: dict) -> str:
    """Model, null image and data in one line."""
    null = metadata.get("null") or {}
    params = ", ".join(f"{name} {value}" for name, value in (null.get("params") or {}).items())
    parts = [f"model: {Path(str(metadata['model'])).name}"] if metadata.get("model") else []
    parts.append(f"null image: {null.get('kind', 'unknown')}" + (f" ({params})" if params else ""))
    if metadata.get("data"):
        parts.append(f"data: {Path(str(metadata['data'])).name}")
    return "; ".join(parts)


def _figures(facts: Facts, metadata: dict, chosen: dict) -> list[tuple[str, str, str]]:
    rest = ["with an image", f"{facts.text_only:,} text only" if facts.text_only else ""]
    rest.append(f"{facts.n_errors:,} not scored" if facts.n_errors else "")
    figures = [
        ("samples", fitting(facts.multimodal), "; ".join(part for part in rest if part)),
        ("answer tokens", fitting(facts.tokens.count), _of_these_samples(facts)),
        ("mean sample VIG", rounded(facts.samples.mean), "nats"),
    ]
    figures += [
        (f"mean {label}", rounded(total / max(count, 1)), "nats; over these answer tokens")
        for label, (total, count) in facts.stats.items()
    ]
    if chosen:
        counts, tau = chosen["counts"], chosen["tau"]
        remark = f"{unit_of(chosen.get('by'))}; level {chosen['level']}, p\u202f=\u202f{chosen['p']:g}"
        if chosen.get("by") == "source":
            remark += f"; the lowest of {len(chosen['sources'])} sources"
        figures.append(("threshold τ", "none" if tau is None else rounded(tau), remark))
        figures += [_trained_on(what, counts) for what in ("samples", "tokens")]
    floor = noise_floor(metadata)
    if floor is not None:
        figures.append(("noise floor", rounded(floor, 2), "nats; same image scored twice"))
    return figures


def _of_these_samples(facts: Facts) -> str:
    text = facts.text_only_tokens
    share = f"; {text:,} more text only, {_percent(text, facts.tokens.count + text)} of all" if text else ""
    return "of these samples" + share


def _trained_on(what: str, counts: dict) -> tuple[str, str, str]:
    """The share of all samples or tokens, text-only ones included: they are kept whole."""
    part, whole = counts[f"{what}_kept"], counts[f"{what}_total"]
    text_only = counts["text_only" if what == "samples" else "text_only_tokens"]
    every = whole + text_only
    remark = f"{part + text_only:,} of {every:,}"
    if text_only:
        remark += f"; {_percent(part, whole)} of the {whole:,} with an image"
        remark += f"; text only make up {_percent(text_only, part + text_only)}"
    if chosen_easy := counts.get(f"{what}_easy"):
        remark += f"; {chosen_easy:,} as easy alone"
    return f"{what} trained on", _percent(part + text_only, every), remark


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def fitting(count: int) -> str:
    """A count in full, or in millions where it would not fit its column."""
    return f"{count:,}" if count < 10**7 else f"{count / 1e6:,.1f}\u202fM"


def _stale_notes(chosen: dict, facts: Facts) -> list[str]:
    """Scores that have more samples than when the selection was made, by its counts (after `--retry failed`, say).

    A selection of more rows than these scores is one of several folders, and tells nothing.
    """
    if not chosen:
        return []
    counts = chosen["counts"]
    then, now = counts["samples_total"] + counts["text_only"], facts.multimodal + facts.text_only
    if then == now or then + counts["errors"] > now + facts.n_errors:
        return []
    return [
        f"The scores have changed since this selection: {then:,} samples were scored then, and {now:,} are now. "
        "Run vig select again."
    ]


def _tau_notes(chosen: dict, metadata: dict) -> list[str]:
    """What `select` warned of."""
    if not chosen:
        return []
    measure = measure_of(chosen.get("by"))
    notes = tau_warnings(chosen["tau"], metadata, chosen["counts"], chosen.get("sources"), measure)
    if measure != "vig":
        notes.append(
            f"The selection ranks by {MEASURES[measure].label}. The slider, the figures and the threshold in them are "
            "of VIG; marks on tokens, and the counts of what is trained on, are the selection's."
        )
    return notes


def _settings(metadata: dict, chosen: dict) -> list[tuple[str, str]]:
    shown = {
        name: value for name, value in metadata.items() if name not in ("notes", "null") and value is not None
    }
    null = metadata.get("null") or {}
    rows = [*shown.items(), ("null image", null.get("kind")), *(null.get("params") or {}).items()]
    rows += [
        (f"selection: {name}", value)
        for name, value in sorted(chosen.items())
        if name not in ("counts", "sources")
    ]
    return [(name.replace("_", " "), str(value)) for name, value in rows if value is not None]


def _state(page: Page, facts: Facts, scores: Any, chosen: dict, metadata: dict) -> dict[str, Any]:
    """What the page's script knows beside samples and pictures."""
    where = "SCORES" if isinstance(scores, pa.Table) else str(scores)
    rules = rules_of(chosen, metadata)
    place = 0 if page.keep is None else int(page.keep.p.searchsorted(page.p))
    return {
        "level": rules.level,
        "clip": rules.clip,
        "easy": rules.keep_easy,
        "rule": "source" if rules.by == "source" else "all",
        "place": place,
        "selected": bool(chosen),
        "sources": facts.sources.names,
        "command": f"vig select {where} --p {{p}}{rules.options}",
        "file": re.sub(r"[^\w-]+", "-", Path(page.title).stem)[:60].strip("-") + "-samples",
        "data": str(metadata.get("data") or ""),
        "fingerprint": metadata.get("data_fingerprint"),
        "scores": where,
        "embedded": len(facts.rows),
        "total": facts.multimodal + facts.text_only + facts.n_errors,
    }
