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


@app.command(cls=Command)
def mmhal(
    model: Model,
    data: Annotated[Path, typer.Argument(help="MMHal-Bench's response_template.json.")],
    file: Annotated[
        Path, typer.Option("-o", "--out", help="The answers, as the benchmark's judge reads them.")
    ],
    image_root: Annotated[
        Path | None,
        typer.Option(help="Folder of the pictures. Default: the template's own, or images/ in it."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    dtype: Dtype = "auto",
    device: Device = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Rows x longest row of a batch.")] = 8192,
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Answer MMHal-Bench's questions in its published form. Its judge, a language model, is not part of this."""
    from vig.evaluation.mmhal import read_questions, write_mmhal
    from vig.scoring.scorer import Scorer
    from vig.scoring.settings import ScoreSettings

    scoring = usage(
        ScoreSettings, dtype=dtype, device=device, batch_tokens=batch_tokens, workers=None, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    read_questions(data, image_root)  # before a model is loaded
    terminal.quiet_libraries()
    with terminal.waiting(err, f"loading {model}"):
        scorer = Scorer(model, **vars(scoring))
    with terminal.share(err, "answering") as on_share:
        found = write_mmhal(
            scorer, data, file, image_root=image_root, max_new_tokens=max_new_tokens, on_share=on_share
        )
    about = f"{len(found):,} answers: {file}\nthe judge is not part of this package: give them to the benchmark's own"
    summarise(as_json, lambda: out.print(about, markup=False), lambda: {"answers": len(found), "out": file})


@app.command("lmms-eval", cls=Command)
def lmms_eval(
    model: Model,
    folder: Annotated[Path, typer.Option("-o", "--out", help="Folder of its results and log.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lmms-eval, such as pope,mmvet.")],
    env: Annotated[
        Path | None,
        typer.Option(
            help="Virtual environment with lmms-eval, or where to make one. Default: below ~/.cache/vig."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own, for local data.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many questions of a task.")
    ] = None,
    lmms_model: Annotated[
        str | None,
        typer.Option(help="lmms-eval's name of the model class. Default: by the checkpoint's family."),
    ] = None,
    model_args: Annotated[
        str, typer.Option(help="More of its arguments: dtype=float32,attn_implementation=sdpa.")
    ] = "",
    device: Device = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Its own; several of its models take 1 alone.")] = 1,
    as_json: Json = False,
) -> None:
    """Run lmms-eval on a checkpoint, in an environment of its own (made at first: several GB). See docs/probes.md."""
    import sys

    from vig.evaluation.lmms_eval import LmmsRun, figures, run_lmms_eval
    from vig.models.loading import check_device, device_for

    check_device(device)
    run = usage(
        LmmsRun,
        model,
        _names(tasks),
        include_path,
        limit,
        lmms_model,
        model_args,
        str(device_for(device)),
        batch_size,
    )

    def show(piece: bytes) -> None:
        sys.stderr.write(piece.decode("utf-8", "replace"))
        sys.stderr.flush()

    found = run_lmms_eval(run, folder, env, say=lambda text: err.print(text, markup=False), show=show)

    def table() -> None:
        for task, measure, value, error in figures(found["results"]):
            spread = "" if error is None else f" +- {error:.4f} (standard error)"
            out.print(f"{task} {measure}: {value:.4f}{spread}", markup=False)
        for one in found["provenance"]["untried"]:
            out.print(f"note: tried with another version than {one}: see docs/probes.md", markup=False)
        out.print(f"results: {folder}", markup=False)

    summarise(as_json, table, lambda: found)
