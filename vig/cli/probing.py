"""vig probe, vig mmhal, vig lmms-eval."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vig import terminal
from vig.cli.options import (
    SOME_FAILED,
    Columns,
    Command,
    Data,
    Device,
    Dtype,
    ImageRoot,
    Json,
    Limit,
    Model,
    Null,
    RemoteCode,
    Roles,
    Sigma,
    Split,
    any_of,
    app,
    err,
    out,
    source,
    summarise,
    usage,
)
from vig.data.error_log import ErrorLog
from vig.evaluation.probes.settings import SOURCE, STATEMENT
from vig.evaluation.probes.table import JUDGES, MATCHES, NEAR_ZERO, PROBES, check_probes
from vig.models.null_image import BLUR_SIGMA


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@contextmanager
def _shares():
    """on_share(probe, share): a bar of each probe on a terminal, a line elsewhere."""
    with terminal.share(err, "probing") as bar:
        told: set[str] = set()

        def tell(name: str, share: float) -> None:
            if bar is not None:
                bar(share)
            elif name not in told:
                told.add(name)
                err.print(f"probing: {name}", markup=False)

        yield tell


@app.command(cls=Command)
def probe(
    model: Model,
    data: Data,
    folder: Annotated[Path, typer.Option("-o", "--out", help="Folder of the figures.")],
    probe: Annotated[list[str], typer.Option(help=f"{any_of(PROBES)}; repeat for several.")],
    baseline: Annotated[
        Path | None,
        typer.Option(help="Folder of the same probes with another model, such as the one before tuning."),
    ] = None,
    by: Annotated[
        str, typer.Option(help="modality, misleading-text: field of the records that is the source or kind.")
    ] = SOURCE,
    fields: Annotated[
        Path | None,
        typer.Option(help="JSON file {id: {field: value}}, where the records do not hold the fields."),
    ] = None,
    claim: Annotated[
        str | None,
        typer.Option(
            help="misleading-text: field with the claimed answer. Default: another sample's answer."
        ),
    ] = None,
    statement: Annotated[
        str, typer.Option(help="misleading-text: what stands before the question.")
    ] = STATEMENT,
    judge: Annotated[
        list[str] | None, typer.Option(help=f"misleading-text: {any_of(JUDGES)}; repeat. Default: both.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a generated answer.")] = 64,
    group: Annotated[str, typer.Option(help="match: field that names the group of a picture.")] = "match",
    pair: Annotated[str, typer.Option(help="match: field that names the pair.")] = "pair",
    order: Annotated[str, typer.Option(help="match: the groups, from best to worst fit.")] = ",".join(
        MATCHES
    ),
    near_zero: Annotated[
        float, typer.Option(help="modality: nats under which |VIG| counts as none.")
    ] = NEAR_ZERO,
    image_root: ImageRoot = None,
    split: Split = None,
    columns: Columns = None,
    roles: Roles = None,
    null: Null = "blur",
    sigma: Sigma = BLUR_SIGMA,
    dtype: Dtype = "auto",
    device: Device = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Rows x longest row of a batch.")] = 8192,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of claims and intervals.")] = 0,
    errors: Annotated[
        Path | None, typer.Option(help="Write all errors here, one JSON object a line.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Probe what a model takes from the image: misleading text, attention, match, modality. Before and after tuning."""
    from vig.evaluation.probes.run import run_probes
    from vig.evaluation.probes.settings import ProbeSettings
    from vig.evaluation.probes.show import show_result
    from vig.scoring.scorer import Scorer
    from vig.scoring.settings import RunSpec, ScoreSettings

    names = usage(check_probes, probe)
    settings = usage(
        ProbeSettings, by=by, fields=fields, claim=claim, statement=statement, judges=tuple(judge or JUDGES),
        max_new_tokens=max_new_tokens, group=group, pair=pair, order=_names(order), near_zero=near_zero, seed=seed,
    )  # fmt: skip
    scoring = usage(
        ScoreSettings, null=null, sigma=sigma, dtype=dtype, device=device, batch_tokens=batch_tokens, workers=None,
        revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    run = RunSpec(source(data, split, columns, roles), image_root, limit)
    run.check_data()
    terminal.quiet_libraries()
    with terminal.waiting(err, f"loading {model}"):
        scorer = Scorer(model, **vars(scoring))
    with _shares() as on_share:
        results = run_probes(scorer, run, names, folder, settings, baseline=baseline, on_share=on_share)
    with ErrorLog(errors) as log:
        for result in results:
            log.extend(result.findings.errors)

    def show() -> None:
        for result in results:
            show_result(out, result)
        for line in log.lines(terminal.SHOWN_REASONS):
            out.print(line, style="red", markup=False)
        out.print(f"figures: {folder}", markup=False)

    about = {"out": folder, "errors": log.summary()}
    summarise(as_json, show, lambda: {"probes": [result.summary() for result in results]} | about)
    if log.count:
        raise typer.Exit(SOME_FAILED)
