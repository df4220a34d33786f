"""The samples that are probed, and the fields of their records that a probe asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vig.data.locate import locate
from vig.data.reading import Source
from vig.data.rows import SKIPPED, read_rows
from vig.data.sample import BrokenRecord, DataError, Sample, SampleError, writable
from vig.evaluation.probes.settings import SOURCE
from vig.scoring.settings import RunSpec


@dataclass(frozen=True)
class ProbeData:
    """Samples with images, and what was asked for of their records: key -> {field: value}."""

    samples: list[Sample]
    text_only: int = 0
    broken: list[BrokenRecord] = field(default_factory=list)
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, sample: Sample, name: str) -> str:
        """The value of a field as text. Raises SampleError where the record has none."""
        if name == SOURCE:
            return sample.source
        value = self.fields.get(sample.key, {}).get(name)
        if value is None:
            cure = "Add it to the record, or give a JSON file {id: {field: value}} with --fields"
            raise SampleError(sample.key, sample.id, f"its record has no field {name!r}", cure)
        return str(value)


def read_probe_data(run: RunSpec, names: Iterable[str] = (), fields: Path | None = None) -> ProbeData:
    """Reads the samples of a run, and the fields `names` of each record (or of its id in the JSON file `fields`).

    Text-only samples are counted and left out. Raises DataError where no record has one of the fields, and where no
    sample has an image.
    """
    samples, broken, text_only = [], [], 0
    for record in run.records():
        if isinstance(record, BrokenRecord):
            broken.append(record)
        elif record.images:
            samples.append(record)
        else:
            text_only += 1
    if not samples:
        first = f". The first of {len(broken):,} broken records: {broken[0].error}" if broken else ""
        raise DataError(f"{run.data} holds no sample with an image: {text_only:,} are text alone{first}")
    names = list(dict.fromkeys(names))
    found = {} if not names else _of_file(samples, fields) if fields else _of_records(run, names)
    for name in names:
        if not any(one.get(name) is not None for one in found.values()):
            cure = "Name another one, or give a JSON file {id: {field: value}} with --fields"
            raise DataError(f"no record of {fields or run.data} has a field {name!r}. {cure}")
    return ProbeData(samples, text_only, broken, found)


def _of_file(samples: Iterable[Sample], path: Path) -> dict[str, dict[str, Any]]:
    try:
        by_id = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Expected JSON: {{id: {{field: value}}}}") from None
    if not isinstance(by_id, dict) or not all(isinstance(value, dict) for value in by_id.values()):
        raise DataError(f"{path} holds no object of objects. Expected JSON: {{id: {{field: value}}}}")
    return {sample.key: by_id[sample.id] for sample in samples if sample.id in by_id}


def _of_records(run: RunSpec, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By key, as `vig.data.samples.read_samples` makes them."""
    source = Source.of(run.data)
    data = locate(source.path, source.reading.split)
    found: dict[str, dict[str, Any]] = {}
    total = 0
    for file, own_name in zip(data.paths, data.names, strict=True):
        number = -1
        for number, record, _problem, _cure, name, _line in read_rows(file, data.format):
            if run.limit is not None and total + number >= run.limit:
                return found
            if isinstance(record, dict) and record is not SKIPPED:
                key = f"{writable(own_name)}#{number if name is None else writable(name)}"
                found[key] = {field: record[field] for field in names if field in record}
        total += number + 1
    return found


def image_name(sample: Sample) -> str:
    """Equal for samples with the same images: equal paths, bytes or pixels. Nothing is opened."""
    digest = hashlib.blake2b(digest_size=8)
    for image in sample.images:
        if isinstance(image, Path):
            digest.update(str(image).encode("utf-8", "surrogateescape"))
        else:
            digest.update(image if isinstance(image, bytes) else image.tobytes())
        digest.update(b"\0")
    return digest.hexdigest()
