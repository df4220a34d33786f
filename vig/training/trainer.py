"""Selective training with Hugging Face's trainers: the fused masked loss as a mixin.

    selection = read_selection("selection/")  # or what `select` returned
    samples = keep_samples(read_samples("data.json"), selection).samples
    collator = SelectiveCollator(processor, selection)
    SelectiveTrainer(model, args, train_dataset=samples, data_collator=collator).train()

Any other Trainer subclass gets the loss from the mixin: ``class MySFT(FusedLossMixin, SFTTrainer): ...``; TRL's take
``keep_samples(...).dataset()``.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from vig.models.lm_head import HeadError, find_head, unwrap
from vig.training.collator import SelectiveCollator
from vig.training.labels import SelectiveLabels
from vig.training.loss import row_losses, selective_loss

TOKEN_STATS = ("entropy", "mean_token_accuracy")  # TRL's names
COUNTS = ("num_kept", "num_truncated", "num_unreadable")  # what our collators add to a batch
COUNTED = ("num_tokens", "num_kept_tokens", "truncated_samples", "unreadable_samples")  # in the log


class FusedLossMixin:
    """Gives a Hugging Face Trainer the fused masked loss: ``class MySFT(FusedLossMixin, SFTTrainer): ...``

    - The loss of a step is the sum over its kept tokens divided by their number over all micro-batches and (with
      ``average_tokens_across_devices``, the default) all devices, whatever the model class says about
      ``accepts_loss_kwargs``. So how a step is cut into micro-batches does not change it. A step without a kept token
      leaves the weights alone; under DeepSpeed, which steps by itself, AdamW still decays them.
    - The evaluation loss is the mean over the kept tokens of the evaluation set, not the mean of batch means, and
      counts every sample once on any number of processes. Without a kept token it is NaN.
    - The logits are built only where ``compute_metrics`` or ``predict`` asks for them.
    - A `SelectiveCollator` or `SelectiveLabels` counts the kept tokens (no GPU synchronisation), and
      ``remove_unused_columns``, which would take the fields of their records away, is turned off.
    - ``use_liger_kernel`` keeps Liger's norms, RoPE and MLPs; its loss alone is turned off.
    - A run resumes, and ``load_best_model_at_end`` loads, by transformers' own key conversion where a family's
      checkpoint names its weights in another way than the model.
    - Logged beside the loss: ``num_tokens`` (seen so far, TRL's name), ``num_kept_tokens`` (trained on so far) and
      ``train_tokens_per_second`` (since the last log). A resumed run counts on from its checkpoint.
    - With ``log_token_stats`` also ``entropy`` (nats) and ``mean_token_accuracy``, TRL's names, of the kept tokens
      since the last log, and ``eval_entropy`` and ``eval_mean_token_accuracy`` of the evaluation set: means over all
      tokens on all processes (TRL's are means of batch means). They come from the loss's own sweep, which keeps its
      bits; on GPUs the logits of the kept tokens are formed once more for them. Where no token is kept they are left
      out (NaN in an evaluation).

    z_loss: weight of lse^2; log_token_stats: class attributes both, as ``class MySFT(...): log_token_stats = True``.
    Raises ValueError for what the loss does not have: label smoothing, compute_loss_func, router losses, other loss
    types of TRL, context parallelism, prompt tuning, adapters on the head.
    """

    loss_is_scaled_for_ga = True
    z_loss = 0.0
    log_token_stats = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._token_stats = _TokenStats()
        self._evaluated: list[float] | None = None  # summed loss and weight of all samples
        self._loading: Path | None = None  # the checkpoint whose weights are being loaded
        self._is_empty_step = False
        self.add_callback(_LeaveWeightsAlone(self))
        self.add_callback(TokenCounts)
        if self.args.use_liger_kernel:
            own_loss = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.args.liger_kernel_config = (self.args.liger_kernel_config or {}) | own_loss
        if isinstance(self.data_collator, SelectiveCollator | SelectiveLabels):
            self.args.remove_unused_columns = False
            # accelerate's dispatcher, which serves iterable datasets, concatenates tensors only
            self.data_collator.counts = not isinstance(self.train_dataset, torch.utils.data.IterableDataset)

    def _refuse_unsupported(self) -> None:
        parallel = getattr(self.accelerator, "parallelism_config", None)
        loss_type = getattr(self.args, "loss_type", "nll")
        unsupported = {
            f"label_smoothing_factor = {self.args.label_smoothing_factor}": self.args.label_smoothing_factor,
            "compute_loss_func": self.compute_loss_func is not None,
            f"loss_type = {loss_type!r}": loss_type != "nll",
            "a router loss (output_router_logits)": getattr(self, "aux_loss_enabled", False),
            "context or sequence parallelism": parallel is not None
            and (parallel.cp_enabled or parallel.sp_enabled),
        }
        for name, found in unsupported.items():
            if found:
                raise ValueError(f"{type(self).__name__} has a loss of its own, without {name}. Turn it off")
        adapters = getattr(self.model, "peft_config", {})
        for adapter in adapters.values() if isinstance(adapters, dict) else ():
            if getattr(adapter, "is_prompt_learning", False):
                raise HeadError(
                    f"{adapter.peft_type.value}: its virtual tokens stand in front of each row and have no label, so "
                    "that labels and hidden states do not line up. Use LoRA (peft.LoraConfig), or train with the "
                    "model's own loss"
                )
        find_head(self.model)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """A text-only batch leaves vision tower and projector without gradients, with gradient checkpointing too.

        Trainer stops looking for such parameters where it checkpoints, since reentrant checkpointing cannot have it.
        """
        options = super()._build_accelerator_args(**kwargs)
        reentrant = (self.args.activation_checkpointing_kwargs or {}).get("use_reentrant", False)
        if self.args.ddp_find_unused_parameters is None and not reentrant and _has_vision(self.model):
            for handler in options.get("kwargs_handlers", ()):
                if hasattr(handler, "find_unused_parameters"):
                    handler.find_unused_parameters = True
        return options

    # --- the loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        counts = {name: inputs.pop(name, None) for name in COUNTS}
        options = {
            "num_kept": counts["num_kept"],
            "token_weight": inputs.pop("token_weight", None),
            "z_loss": self.z_loss,
            "return_outputs": return_outputs,
        }
        if self._evaluated is not None:
            return self._evaluation_loss(model, inputs, options)
        on_stats = self._token_stats.add if self.log_token_stats and model.training else None
        result = selective_loss(model, inputs, num_items=num_items_in_batch, on_stats=on_stats, **options)
        loss = result[0] if return_outputs else result
        if model.training:
            self._counts.add(inputs, counts)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items counts the tokens of every device, and DDP averages the gradients over them
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, result[1]) if return_outputs else loss

    def _evaluation_loss(self, model: nn.Module, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
        """The mean of this batch; its samples are added to the evaluation's sums, each once over all processes."""
        result = row_losses(model, inputs, stats=self.log_token_stats, **options)
        rows, outputs = result if options["return_outputs"] else (result, None)
        everywhere = self._rows_everywhere(rows).sum(0).tolist()
        self._evaluated = [one + other for one, other in zip(self._evaluated, everywhere, strict=True)]
        total, weight = rows.sum(0)[:2]
        loss = torch.where(weight > 0, total / weight, total)
        return (loss, outputs) if options["return_outputs"] else loss

    def _rows_everywhere(self, rows: Tensor) -> Tensor:
        """The rows (B, n) of all processes, each sample's once: a tensor-parallel group holds the same ones."""
        padded = self.accelerator.pad_across_processes(rows, dim=0)  # with rows that weigh nothing
        copies = self.get_tp_size()
        if copies == 1:
            return self.accelerator.gather_for_metrics(padded)
        every = self.accelerator.gather(padded).unflatten(0, (-1, copies, len(padded)))[:, 0].flatten(0, 1)
        state = self.accelerator.gradient_state  # the last batch is filled up with samples of the first
        left = state.remainder if state.end_of_dataloader else 0
        return every[:left] if left > 0 else every

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits (B, T, V) and labels. What else a model returns (features of its images) differs in shape from
        batch to batch, so that Trainer could not join it.
        """
        inputs = self._prepare_inputs(inputs)
        loss = outputs = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if "labels" not in inputs:
                if not prediction_loss_only:
                    outputs = model(**{name: value for name, value in inputs.items() if name not in COUNTS})
            elif prediction_loss_only:
                loss = self.compute_loss(model, inputs)
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if outputs is None:
            return loss, None, None
        return loss, outputs.logits.detach(), inputs.get("labels")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = [0.0] * (5 if self.log_token_stats else 2)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            total, weight, *stats = self._evaluated
        finally:
            self._evaluated = None
        prefix = kwargs.get("metric_key_prefix", "eval")
        if f"{prefix}_loss" in output.metrics:
            output.metrics[f"{prefix}_loss"] = total / weight if weight else math.nan
            for name, value in zip(TOKEN_STATS, stats[:-1], strict=False):  # none unless asked for
                output.metrics[f"{prefix}_{name}"] = value / stats[-1] if stats[-1] else math.nan
        return output

    # --- the step ---

    def get_batch_samples(
        self, *args: Any, **kwargs: Any
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._is_empty_step = bool(batches) and num_items is not None and self._is_empty(batches, num_items)
        return batches, num_items

    def _is_empty(self, batches: list[dict[str, Any]], num_items: Tensor | int) -> bool:
        """Whether no process has a token in this step."""
        if self.accelerator.num_processes == 1 and all("num_kept" in batch for batch in batches):
            return not any(batch["num_kept"] for batch in batches)  # no wait for a GPU
        if self.accelerator.num_processes > 1 and not self.args.average_tokens_across_devices:
            num_items = self.accelerator.reduce(torch.as_tensor(num_items, device=self.args.device), "sum")
        return not bool(torch.as_tensor(num_items).any())

    # --- checkpoints ---

    @property
    def _counts(self) -> TokenCounts:
        """Trainer may put a new one in the place of the callback when it resumes."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, TokenCounts))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._counts.sum_up(self.accelerator, self.get_tp_size())
        self.state.stateful_callbacks.setdefault(TokenCounts.__name__, {})  # of a resumed run that had none
        super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self._loading = Path(resume_from_checkpoint)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._loading = None

    def _load_best_model(self) -> None:
        self._loading = Path(self.state.best_model_checkpoint)
        try:
            super()._load_best_model()
        finally:
            self._loading = None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """transformers 5 saves some vision-language models under names that Trainer does not find in the model."""
        missing, unknown = load_result.missing_keys, load_result.unexpected_keys
        if self._loading is None or not (missing and unknown):  # missing alone may be tied
            return super()._issue_warnings_after_load(load_result)
        model = self.model if isinstance(self.model, PreTrainedModel) else unwrap(self.model)
        load_converted(model, self._loading, unknown[0], missing[0])
        return None

    # --- the log ---

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and "learning_rate" in logs:  # Trainer's own, which every process writes
            logs |= self._counts.figures(self.accelerator, self.get_tp_size())
            if self.log_token_stats:
                logs |= self._token_stats.figures(self.accelerator)
        logs |= self._counts.lost()
        super().log(logs, *args, **kwargs)


def _has_vision(model: nn.Module | None) -> bool:
    config = getattr(model, "config", None)
    return getattr(config, "vision_config", None) is not None


def load_converted(model: PreTrainedModel, checkpoint: Path, saved_name: str, model_name: str) -> None:
    """Puts the weights of a checkpoint into the model, renamed as ``from_pretrained`` renames them.

    saved_name, model_name: of one weight, as the checkpoint and the model call it, for the error.
    Raises ValueError where a weight of the model is not in it.
    """
    loaded, found = type(model).from_pretrained(
        checkpoint, config=copy.deepcopy(model.config), dtype=model.dtype, output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(
            f"{checkpoint} cannot be resumed from: it names its weights {saved_name}, ..., the model {model_name}, "
            f"..., and transformers' own conversion leaves {len(found['missing_keys'])} of them out. Load the model "
            "from the checkpoint (from_pretrained) and start a new run"
        )
    model.load_state_dict(loaded.state_dict())


class _LeaveWeightsAlone(TrainerCallback):
    """Drops the zero gradients of a step without a kept token, since AdamW would decay weights and moments."""

    def __init__(self, trainer: FusedLossMixin):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer._is_empty_step:
            return
        if self.trainer.accelerator.scaler is not None:
            self.trainer.accelerator.unscale_gradients()  # a GradScaler insists on having seen some
        for parameter in self.trainer.model.parameters():
            parameter.grad = None


class TokenCounts(TrainerCallback, ExportableState):
    """Tokens seen and trained on, samples cut short and unreadable ones: Trainer keeps them in its checkpoints.

    A public name, since it stands in trainer_state.json.
    """

    def __init__(self):
        self.totals = dict.fromkeys(COUNTED, 0)  # over all processes, when last summed up
        self._begin()

    def _begin(self) -> None:
        self.before = dict(self.totals)  # of earlier runs
        self.here: list[Tensor | int] = [0] * len(COUNTED)  # since then, by this process
        self.logged, self.since = self.totals["num_tokens"], time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"totals": self.totals}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.totals = dict.fromkeys(COUNTED, 0) | held.get("attributes", {}).get("totals", {})
        self._begin()

    def add(self, inputs: dict[str, Any], counts: dict[str, int | None]) -> None:
        """Counts a micro-batch, without waiting for a GPU."""
        labels, num_kept = inputs["labels"], counts["num_kept"]
        mask = inputs.get("attention_mask")
        more = (
            labels.numel() if mask is None or mask.shape != labels.shape else mask.sum(),
            (labels[:, 1:] != -100).sum() if num_kept is None else num_kept,
            counts["num_truncated"] or 0,
            counts["num_unreadable"] or 0,
        )
        self.here = [one + other for one, other in zip(self.here, more, strict=True)]

    def sum_up(self, accelerator: Any, copies: int) -> None:
        """Over all processes, which must all ask. copies: of them that hold the same batch (tensor parallelism)."""
        here = torch.stack([torch.as_tensor(n, device=accelerator.device).long() for n in self.here])
        everywhere = accelerator.reduce(here, "sum").tolist()
        self.totals = {
            name: self.before[name] + n // copies for name, n in zip(COUNTED, everywhere, strict=True)
        }

    def figures(self, accelerator: Any, copies: int) -> dict[str, float]:
        """What a log line says of the tokens."""
        self.sum_up(accelerator, copies)
        now, seen = time.monotonic(), self.totals["num_tokens"]
        speed = (seen - self.logged) / max(now - self.since, 1e-9)
        self.logged, self.since = seen, now
        tokens = {name: self.totals[name] for name in COUNTED[:2]}
        return tokens | {"train_tokens_per_second": round(speed, 1)}

    def lost(self) -> dict[str, int]:
        """The samples that were cut short, and those left out, if any."""
        return {name: self.totals[name] for name in COUNTED[2:] if self.totals[name]}


class _TokenStats:
    """Summed entropy, hits and number of the tokens that this process trained on since the last log."""

    def __init__(self):
        self.sums: Tensor | None = None  # (3,) float64

    def add(self, figures: Tensor) -> None:
        """Adds the kept rows of a micro-batch, (N, 3), without waiting for a GPU."""
        sums = figures.sum(0, dtype=torch.float64)
        self.sums = sums if self.sums is None else self.sums.to(sums.device) + sums

    def figures(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes, which must all ask; begins anew."""
        sums = torch.zeros(3) if self.sums is None else self.sums
        self.sums = None
        *totals, count = accelerator.reduce(sums.to(accelerator.device).double(), "sum").tolist()
        return {name: total / count for name, total in zip(TOKEN_STATS, totals, strict=True)} if count else {}


class SelectiveTrainer(FusedLossMixin, transformers.Trainer):
    """Hugging Face's Trainer with the fused masked loss; use it with `SelectiveCollator` or `SelectiveLabels`."""
