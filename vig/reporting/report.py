"""One self-contained HTML page: what the image is worth, sample by sample and word by word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vig.data.files import StoreError, explain_write_errors, write_atomically
from vig.data.sample import writable
from vig.models.null_image import NULLS
from vig.reporting.facts import Facts, gather
from vig.reporting.page import render, rounded
from vig.reporting.viewer import Viewer, words
from vig.reporting.views import Histogram, Page, SampleView, Word
from vig.selection.select import Selection, noise_floor, tau_warnings
from vig.store.folder import ABOUT_THE_DATA, SettingsDiffer, settings_differences
from vig.store.scores import open_scores, score_metadata, unfinished
from vig.store.selections import selection_files, selection_metadata

__all__ = ["Histogram", "Page", "SampleView", "Word", "render", "report"]

REMARKS = {
    "highest": ("Highest VIG", "Where the image helps the answer most."),
    "lowest": ("Lowest VIG", "Where it does not help, or speaks against the answer."),
    "random": ("At random", "Drawn by a hash of the sample’s key."),
}


def report(
    scores,  # folder, file, list of them, what `Scorer.score` returned, or a pyarrow Table of scores
    out: str | Path = "report.html",
    *,
    selection: str | Path | Selection | None = None,
    data: str | Path | None = None,
    samples: int = 24,
    image_root: str | Path | None = None,
    processor: Any = None,
    title: str | None = None,
    seed: int = 0,
) -> Path:
    """Write the report on a folder of scores and return its path.

    The page needs nothing beside itself: style, charts and pictures are inside. Scores are streamed twice.
    selection: marks the tokens trained on, and tau. data, image_root, processor: default to those that the
    scores name; what cannot be read is left out, and the page says so. samples: how many to show, a third each
    of the highest VIG, the lowest, and at random (the same ones for the same seed).

    Raises StoreError where the scores cannot be read, the selection was made from others, or ``out`` cannot be
    written.
    """
    out = Path(out)
    if out.is_dir():
        raise StoreError(f"{out} is a folder: name the page, {out / 'report.html'} for example")
    scores = open_scores(scores)
    metadata = score_metadata(scores)
    facts = gather(scores, samples, seed)
    viewer = Viewer(metadata, processor=processor, data=data or metadata.get("data"), image_root=image_root)
    keys = {row["key"] for rows in facts.groups.values() for row in rows}
    viewer.find(keys)
    chosen, kept = _selection(selection, keys, metadata)
    groups = [
        (*REMARKS[name], [viewer.view(row, kept.get(row["key"])) for row in rows])
        for name, rows in facts.groups.items()
    ]
    highest, lowest = words(facts, viewer.tokenizer)
    tau = chosen.get("tau")
    page = Page(
        title=title or Path(str(metadata.get("model", "Scores"))).name,
        subtitle=_subtitle(metadata),
        figures=_figures(facts, metadata, chosen),
        groups=groups,
        sample_histogram=facts.samples.histogram(tau),
        token_histogram=facts.tokens.histogram(tau),
        highest=highest,
        lowest=lowest,
        tau=tau,
        null_name=_null_caption(metadata),
        notes=[*unfinished(scores), *_tau_notes(chosen, metadata), *viewer.notes, *_error_notes(facts)],
        settings=_settings(metadata, chosen),
    )
    with explain_write_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, writable(render(page)).encode())
    return out


def _selection(
    selection: str | Path | Selection | None, keys: set[str], scored: dict
) -> tuple[dict, dict[str, np.ndarray]]:
    """Its settings, and the token masks of the samples that are shown, read in a stream.

    Raises StoreError for a selection that was made from scores of other settings or other samples."""
    if selection is None:
        return {}, {}
    if isinstance(selection, Selection):
        metadata, batches = selection.metadata, selection.batches()
    else:
        metadata = selection_metadata(selection)
        columns = ["key", "token_keep"]
        files = (pq.ParquetFile(file) for file in selection_files(selection))
        batches = (batch for file in files for batch in file.iter_batches(8192, columns=columns))
    _refuse_selection_of_others(scored, metadata)
    wanted = pa.array(sorted(keys), pa.string())
    kept = {}
    for batch in batches:
        for row in batch.filter(pc.is_in(batch["key"], wanted)).to_pylist():
            kept[row["key"]] = np.array(row["token_keep"] or [], bool)
    if keys and not kept:
        raise StoreError(
            f"the selection knows none of the samples, {min(keys)} for one. Give the one made from these scores"
        )
    return metadata["selection"], kept


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


def _null_caption(metadata: dict) -> str:
    kind = (metadata.get("null") or {}).get("kind")
    return NULLS[kind].caption if kind in NULLS else "null image"


def _subtitle(metadata: dict) -> str:
    null = metadata.get("null") or {}
    params = ", ".join(f"{name} {value}" for name, value in (null.get("params") or {}).items())
    parts = [f"Null image: {null.get('kind', 'unknown')}" + (f" ({params})" if params else "")]
    if metadata.get("data"):
        parts.append(f"data: {Path(str(metadata['data'])).name}")
    return "; ".join(parts)


def _figures(facts: Facts, metadata: dict, chosen: dict) -> list[tuple[str, str, str]]:
    rest = ["with an image", f"{facts.text_only:,} text only" if facts.text_only else ""]
    rest.append(f"{facts.n_errors:,} not scored" if facts.n_errors else "")
    figures = [
        ("samples", _fitting(facts.multimodal), "; ".join(part for part in rest if part)),
        ("answer tokens", _fitting(facts.tokens.count), "of these samples"),
        ("mean sample VIG", rounded(facts.samples.mean), "nats"),
    ]
    if chosen:
        counts, tau = chosen["counts"], chosen["tau"]
        remark = f"nats; level {chosen['level']}, p\u202f=\u202f{chosen['p']:g}"
        figures.append(("threshold τ", "none" if tau is None else rounded(tau), remark))
        figures += [_trained_on(what, counts) for what in ("samples", "tokens")]
    floor = noise_floor(metadata)
    if floor is not None:
        figures.append(("noise floor", rounded(floor, 2), "nats; same image scored twice"))
    return figures


def _trained_on(what: str, counts: dict) -> tuple[str, str, str]:
    """The share of all samples or tokens, text-only ones included: they are kept whole."""
    part, whole = counts[f"{what}_kept"], counts[f"{what}_total"]
    text_only = counts["text_only" if what == "samples" else "text_only_tokens"]
    every = whole + text_only
    remark = f"{part + text_only:,} of {every:,}"
    if text_only:
        remark += f"; {_percent(part, whole)} of the {whole:,} with an image"
    return f"{what} trained on", _percent(part + text_only, every), remark


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def _fitting(count: int) -> str:
    """A count in full, or in millions where it would not fit its column."""
    return f"{count:,}" if count < 10**7 else f"{count / 1e6:,.1f}\u202fM"


def _tau_notes(chosen: dict, metadata: dict) -> list[str]:
    """What `select` warned of."""
    return tau_warnings(chosen["tau"], metadata, chosen["counts"]) if chosen else []


def _error_notes(facts: Facts) -> list[str]:
    if not facts.n_errors:
        return []
    more = f", and {facts.n_errors - len(facts.errors):,} more" if facts.n_errors > len(facts.errors) else ""
    what = "1 sample" if facts.n_errors == 1 else f"{facts.n_errors:,} samples"
    return [f"{what} could not be scored: " + "; ".join(facts.errors) + more]


def _settings(metadata: dict, chosen: dict) -> list[tuple[str, str]]:
    shown = {
        name: value for name, value in metadata.items() if name not in ("notes", "null") and value is not None
    }
    null = metadata.get("null") or {}
    rows = [*shown.items(), ("null image", null.get("kind")), *(null.get("params") or {}).items()]
    rows += [
        (f"selection: {name}", chosen[name])
        for name in ("p", "level", "tau", "clip", "tau_floor")
        if name in chosen
    ]
    return [(name.replace("_", " "), str(value)) for name, value in rows if value is not None]
