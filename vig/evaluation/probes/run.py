"""Runs probes over a dataset and stores what they found; compares it with what a baseline's model gave.

out/NAME.json            figures with intervals, settings, where they come from
out/NAME.samples.jsonl   one line a sample (a pair, for `match`), which `--baseline` reads
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from vig.data.files import check_writable, write_atomically
from vig.data.sample import DataError
from vig.evaluation.probes.data import ProbeData, read_probe_data
from vig.evaluation.probes.findings import Change, Figure, Findings, Unit, compare, estimate
from vig.evaluation.probes.settings import ProbeSettings
from vig.evaluation.probes.table import PROBES, check_probes
from vig.scoring.scorer import Scorer
from vig.scoring.settings import RunSpec
from vig.store.fingerprints import data_fingerprint


@dataclass
class ProbeResult:
    """What one probe gave. changes: beside a baseline, over the units that both have; else empty."""

    probe: str
    figures: list[Figure]
    findings: Findings
    changes: list[Change] = field(default_factory=list)
    unpaired: int = 0  # units of either side that the other lacks

    def summary(self) -> dict[str, Any]:
        """As it is stored, without the sample lines."""
        return {
            "probe": self.probe,
            "units": len(self.findings.units),
            "figures": [figure._asdict() for figure in self.figures],
            "changes": [change._asdict() for change in self.changes],
            "unpaired": self.unpaired,
            "notes": self.findings.notes,
            "errors": len(self.findings.errors),
        }


def run_probes(
    scorer: Scorer,
    run: RunSpec,
    names: Iterable[str],
    out: str | Path | None = None,
    settings: ProbeSettings | None = None,
    *,
    baseline: str | Path | None = None,
    on_share: Callable[[str, float], None] | None = None,
) -> list[ProbeResult]:
    """Runs the named probes (`PROBES`) on the samples of `run` that have an image; one result each, stored in `out`.

    baseline: the `out` of another model, whose samples are paired with these by key. on_share: told the probe and the
    share of it that is done. Raises ValueError for a probe that is not in the table; DataError for data without an
    image, without a field that a probe asks for, and for a baseline that was probed in another way; ModelError for a
    model that a probe cannot read.
    """
    names = check_probes(names)
    settings = settings or ProbeSettings()
    null = {"null": scorer.null.metadata()}
    drawn = {"limit": run.limit}  # claims are drawn among the samples that are read
    about = {
        name: settings.stored(name)
        | (null if uses_null(name) else {})
        | (drawn if "seed" in PROBES[name].settings else {})
        for name in names
    }
    before = (
        {} if baseline is None else {name: read_units(baseline, name, about[name], run) for name in names}
    )
    if out is not None:
        check_writable(Path(out))
    data = read_probe_data(
        run, [name for probe in names for name in settings.fields_of(probe)], settings.fields
    )
    results = []
    for name in names:
        findings = _function(name)(scorer, data, settings, partial(on_share or _nobody, name))
        result = _result(name, findings, data, settings, before.get(name))
        if not result.figures or (baseline is not None and not result.changes):
            raise DataError(_why_nothing(result, run, baseline))
        if out is not None:
            told = {"settings": about[name], "baseline": None if baseline is None else str(baseline)}
            _write(
                Path(out), result, told | {"provenance": scorer.provenance(run.data, run.image_root)}, data
            )
        results.append(result)
    return results


def _nobody(name: str, share: float) -> None:
    pass


def _result(
    name: str, findings: Findings, data: ProbeData, settings: ProbeSettings, baseline: list[Unit] | None
) -> ProbeResult:
    """Figures of what was found, and changes from the baseline's units."""
    findings.errors[:0] = [(one.key, one.id, f"{one.error.reason}. {one.error.cure}") for one in data.broken]
    draws = (settings.resamples, settings.seed)
    result = ProbeResult(name, estimate(findings.units, *draws), findings)
    if baseline is not None:
        result.changes = compare(findings.units, baseline, *draws)
        ours, theirs = ({unit.key for unit in units} for units in (findings.units, baseline))
        result.unpaired = len(ours ^ theirs)
    return result


def _why_nothing(result: ProbeResult, run: RunSpec, baseline: str | Path | None) -> str:
    if result.figures:
        return f"{baseline} has no sample of {run.data}: probe the same data"
    errors, notes = result.findings.errors, result.findings.notes
    reason = "; ".join(notes)
    if errors:
        key, id, message = errors[0]
        reason = f"{len(errors):,} errors, the first of {key} (id {id!r}): {message}"
    return f"the probe {result.probe} could use no sample of {run.data}: {reason}"


def uses_null(name: str) -> bool:
    """Whether its measures depend on the null image."""
    return any("VIG" in measure.name for measure in PROBES[name].measures)


def _function(name: str) -> Callable[..., Findings]:
    module, _, function = PROBES[name].function.partition(":")
    return getattr(import_module(module), function)


# --- on disk ---


def _write(out: Path, result: ProbeResult, about: Mapping[str, Any], data: ProbeData) -> None:
    """The figures last: a folder that has them has the samples too."""
    lines = [json.dumps(unit._asdict(), ensure_ascii=False) for unit in result.findings.units]
    write_atomically(out / f"{result.probe}.samples.jsonl", "".join(f"{line}\n" for line in lines).encode())
    errors = [{"key": key, "id": id, "message": text} for key, id, text in result.findings.errors]
    counts = {"samples": len(data.samples), "text_only": data.text_only, "broken": len(data.broken)}
    stored = result.summary() | counts | about | {"errors": errors}
    text = json.dumps(stored, indent=1, ensure_ascii=False, default=str)
    write_atomically(out / f"{result.probe}.json", f"{text}\n".encode())


def read_units(folder: str | Path, probe: str, settings: Mapping[str, Any], run: RunSpec) -> list[Unit]:
    """What a probe found in a folder of `run_probes`.

    Raises DataError where it was run with other settings, or on other data: keys are numbers of records.
    """
    folder = Path(folder)
    try:
        stored = json.loads((folder / f"{probe}.json").read_text(encoding="utf-8"))
        lines = (folder / f"{probe}.samples.jsonl").read_text(encoding="utf-8").split("\n")
        units = [Unit(**json.loads(line)) for line in lines if line]
    except FileNotFoundError as error:
        cure = f"Run `vig probe ... --probe {probe} -o {folder}` with the model to compare with"
        raise DataError(f"{folder} holds no {Path(error.filename).name}. {cure}") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{folder}: {probe}.json or its samples cannot be read ({error}). Probe it again"
        ) from None
    if stored["provenance"]["data_fingerprint"] != data_fingerprint(run.data):
        raise DataError(
            f"{folder} was probed on other data than {run.data}. Probe both models on the same data"
        )
    given = json.loads(json.dumps(settings, default=str))
    for name, value in given.items():
        if (theirs := stored["settings"].get(name)) != value:
            cure = f"Give the same --{name.replace('_', '-')}, or probe the baseline again"
            raise DataError(f"{folder} was probed with {name} = {theirs!r}, this run has {value!r}. {cure}")
    return units


def by_group(figures: Sequence[Figure | Change]) -> dict[str, dict[str, Figure | Change]]:
    """group -> measure -> figure, in order."""
    found: dict[str, dict[str, Figure | Change]] = {}
    for figure in figures:
        found.setdefault(figure.group, {})[figure.measure] = figure
    return found
