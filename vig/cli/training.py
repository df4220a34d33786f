"""vig train."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from vig import terminal
from vig.cli.options import (
    SOME_FAILED,
    STOPPED,
    Columns,
    Command,
    Data,
    Device,
    ImageRoot,
    Json,
    Limit,
    MaxLength,
    Model,
    RemoteCode,
    Roles,
    Split,
    any_of,
    app,
    err,
    out,
    source,
    summarise,
    usage,
)
from vig.models.end_of_turn import END_OF_TURN
from vig.models.launch import Launch


def _options_of_file(context: typer.Context, path: Path | None) -> Path | None:
    """--config, which is read before the other options."""
    if path is not None:
        from vig.training.config import take_options

        usage(take_options, context, path)
    return path


@app.command(cls=Command)
def train(
    context: typer.Context,
    model: Model,
    data: Data,
    folder: Annotated[Path, typer.Option("-o", "--out", help="Folder of the trained checkpoint.")],
    selection: Annotated[
        Path | None, typer.Option(help="Folder of the selection. Without: all tokens.")
    ] = None,
    image_root: ImageRoot = None,
    split: Split = None,
    columns: Columns = None,
    roles: Roles = None,
    epochs: Annotated[float, typer.Option(help="Passes over the kept samples, more than 0.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after N steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per micro-batch.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    schedule: Annotated[
        str, typer.Option(help="cosine, linear, constant, constant_with_warmup, ...")
    ] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps, 0 to 1.")] = 0.03,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    max_grad_norm: Annotated[float, typer.Option()] = 1.0,
    z_loss: Annotated[float, typer.Option(help="Weight of lse^2.")] = 0.0,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern of frozen parameters; repeat. Default: the vision tower. none: nothing is frozen."
        ),
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Train LoRA adapters of this rank (needs peft).")] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the forward: bfloat16 (autocast over float32 weights), float32, or auto by the device."
        ),
    ] = "auto",
    device: Device = None,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    fsdp: Annotated[
        bool,
        typer.Option(
            "--fsdp", help="Spread one model over the processes of torchrun (FSDP2). Default: one each."
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes that prefetch samples; an image that crashes its decoder kills one of them, not the run.",
        ),
    ] = 0,
    end_of_turn: Annotated[
        str | None, typer.Option(help=f"{any_of(END_OF_TURN)}. Default: as the selection was scored.")
    ] = None,
    max_length: MaxLength = None,
    seed: Annotated[int, typer.Option()] = 0,
    limit: Limit = None,
    save_every: Annotated[
        int,
        typer.Option(
            min=0, help="Steps between two checkpoints; run again to resume. 0: only the trained model."
        ),
    ] = 0,
    eval_data: Annotated[
        Path | None, typer.Option("--eval", help="Held-out data: the loss on all its answer tokens.")
    ] = None,
    eval_every: Annotated[
        int, typer.Option(min=0, help="Steps between two evaluations. 0: only at both ends.")
    ] = 0,
    eval_on_start: Annotated[bool, typer.Option(help="With --eval: also before the first step.")] = True,
    log_every: Annotated[
        int, typer.Option(min=1, help="Steps between two reports, whose loss is the mean over them.")
    ] = 10,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, trackio or wandb (accelerate's trackers); repeat.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_options_of_file,
            dir_okay=False,
            help="Take options from this YAML file, such as an earlier checkpoint's train.yaml.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Train anew: replace the checkpoint in the folder, resume none."),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Revision of a model on the hub. Default: the one that the selection was scored at."
        ),
    ] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation, such as sdpa.")] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train on the selected tokens of the selected samples, with the fused masked loss.

    `torchrun --nproc-per-node 8 -m vig train ...` trains on eight GPUs, a model on each; with `--fsdp` one on them all.
    """
    from accelerate import PartialState

    from vig.training.config import write_options
    from vig.training.train import train as run

    begins = f"starting: {data}, {model}"
    if split or columns or roles:  # else as the selection was scored
        data = source(data, split, columns, roles)
    terminal.quiet_libraries()
    first = Launch.here().rank == 0  # the others have nothing to show
    with terminal.training(err, begins) if first else nullcontext() as on_progress:
        result = run(
            model, data, selection, folder, image_root=image_root, limit=limit, overwrite=overwrite,
            on_progress=on_progress, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
            accumulate=accumulate, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay,
            max_grad_norm=max_grad_norm, z_loss=z_loss, freeze=tuple(freeze) if freeze else None, lora_rank=lora_rank,
            dtype=dtype, end_of_turn=end_of_turn, max_length=max_length, seed=seed,
            gradient_checkpointing=gradient_checkpointing, fsdp=fsdp, workers=workers, save_every=save_every,
            device=device, revision=revision, attn=attn, trust_remote_code=trust_remote_code, eval_data=eval_data,
            eval_every=eval_every, eval_on_start=eval_on_start, log_every=log_every, report_to=tuple(report_to or ()),
        )  # fmt: skip
    if PartialState().is_main_process:
        if not result.was_finished:
            write_options(context, folder)
        summarise(
            as_json, lambda: terminal.show_training(out, result), lambda: terminal.training_summary(result)
        )
    if result.interrupted:
        if not save_every:
            terminal.say_after_stop(
                f"{folder} holds the weights of step {result.steps}, from which no run goes on. Train anew with "
                "--overwrite, and with --save-every N if it may be stopped again"
            )
        raise typer.Exit(STOPPED)
    if result.errors:
        raise typer.Exit(SOME_FAILED)
