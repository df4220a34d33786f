"""What users rely on: Python names and their parameters, commands and their options, exit codes.

A name may be added, and a parameter behind the others; none may go or change its kind without a line in the
CHANGELOG.
"""

from __future__ import annotations

import inspect

import pytest
import typer

import vig
import vig_kernels
from vig import cli

# A parameter behind * is given by keyword.
PYTHON = {
    "FusedLossMixin": "*args, **kwargs",
    "Sample": "key, id, images, messages, source",
    "Scorer": (
        "model, processor, *, null, sigma, dtype, device, batch_tokens, batch_size, backend, "
        "end_of_turn, max_length, workers, revision, attn, share, trust_remote_code"
    ),
    "SelectiveCollator": (
        "processor, selection, *, end_of_turn, max_length, image_root, counts, skip_unreadable"
    ),
    "SelectiveTrainer": "*args, **kwargs",
    "export_records": "selection, path, *, data",
    "inspect": "scorer, sample, window",
    "keep_samples": "records, selection",
    "read_samples": "path, *, image_root, limit, wanted",
    "read_selection": "path",
    "report": "scores, out, *, selection, data, samples, image_root, processor, title, seed",
    "score_dataset": "scorer, data, out, *, image_root, limit, shard, retry_failed, window, on_progress",
    "select": "scores, p, *, level, clip, tau_floor, seed, out, overwrite, progress",
    "train": (
        "model, data, selection, out, *, processor, image_root, limit, overwrite, device, revision, "
        "attn, trust_remote_code, on_progress, **settings"
    ),
}
KERNELS = {
    "BackendUnavailable": "",
    "TokenVIG": "vig, nll_image, nll_null",
    "backends": "",
    "gaussian_blur": "images, sigma, *, truncate, border, precision, out, backend",
    "linear_cross_entropy": (
        "hidden, weight, target, *, token_weight, reduction, num_items, z_loss, num_kept, memory, bias, "
        "logit_scale, logit_softcap, ignore_index, backend"
    ),
    "linear_nll": "hidden, weight, target, *, bias, logit_scale, logit_softcap, ignore_index, stats, backend",
    "linear_vig": (
        "hidden_image, hidden_null, weight, target, *, bias, logit_scale, logit_softcap, ignore_index, "
        "backend"
    ),
}
COMMANDS = {
    "inspect": (
        "--answer --device --dtype --end-of-turn --image-root --index --key --null --out --question "
        "--sigma --trust-remote-code -o data model"
    ),
    "score": (
        "--actors --attn --backend --batch-size --batch-tokens --device --dry-run --dtype --end-of-turn "
        "--engine --image-root --limit --max-length --no-share --null --out --retry --revision --shard "
        "--sigma --trust-remote-code --window --workers -o data model"
    ),
    "select": "--clip --data --export --level --out --overwrite --p --seed --tau-floor -o scores",
    "train": (
        "--accumulate --attn --batch-size --device --dtype --end-of-turn --epochs --freeze "
        "--gradient-checkpointing --image-root --limit --lora-rank --lr --max-grad-norm --max-length --max-steps "
        "--out --overwrite --revision --save-every --schedule --seed --selection --trust-remote-code "
        "--warmup --weight-decay --workers --z-loss -o data model"
    ),
    "eval": (
        "--attn --backend --baseline --batch-size --batch-tokens --by --captions --circular --columns --device "
        "--dry-run --dtype --errors --image-root --json --limit --max-length --max-new-tokens --no-circular --out "
        "--prompt --resamples --retry --revision --roles --rule --seed --split --synonyms --task --temperature "
        "--trust-remote-code --workers -o data model"
    ),
    "report": "--data --image-root --out --processor --samples --selection -o scores",
    "demo": "--out -o",
}
EXIT_CODES = {"SOME_FAILED": 3, "STOPPED": 130}


def parameters(item) -> tuple[list[str], set[str]]:
    """Those that may be given by position, in order, and those that are given by keyword."""
    found = inspect.signature(item).parameters.values()
    positional = [one.name for one in found if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return positional, {one.name for one in found if one.kind is one.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("module", "name"), [*((vig, n) for n in PYTHON), *((vig_kernels, n) for n in KERNELS)]
)
def test_python_names_take_what_they_took(module, name):
    item = getattr(module, name)
    assert name in module.__all__
    before = (PYTHON if module is vig else KERNELS)[name]
    if "**kwargs" in before or not before:
        return
    positional, _, keywords = before.replace(", **settings", "").partition("*, ")
    here, by_keyword = parameters(item)
    wanted = [part for part in positional.rstrip(", ").split(", ") if part]
    assert here[: len(wanted)] == wanted
    assert by_keyword | set(here) >= {part for part in keywords.split(", ") if part}


@pytest.mark.parametrize("module", [vig, vig_kernels], ids=lambda module: module.__name__)
def test_star_import_and_version(module):
    everything: dict = {}
    exec(f"from {module.__name__} import *", everything)
    assert everything.keys() >= set(module.__all__) and module.__version__[0].isdigit()
    assert not hasattr(module, "a_name_that_is_not_there")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_the_options_they_took(name):
    command = typer.main.get_command(cli.app).commands[name]
    options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    assert options >= set(COMMANDS[name].split())


def test_exit_codes():
    assert {name: getattr(cli, name) for name in EXIT_CODES} == EXIT_CODES
