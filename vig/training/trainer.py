"""Selective training with Hugging Face's trainers: the fused masked loss as a mixin.

    selection = read_selection("selection/")  # or what `select` returned
    samples = keep_samples(read_samples("data.json"), selection).samples
    collator = SelectiveCollator(processor, selection)
    SelectiveTrainer(model, args, train_dataset=samples, data_collator=collator).train()

Any other Trainer subclass gets the loss from the mixin: ``class MySFT(FusedLossMixin, SFTTrainer): ...``; TRL's take
``keep_samples(...).dataset()``.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vig.models.lm_head import count_kept
from vig.training.collator import SelectiveCollator
from vig.training.loss import selective_loss


class FusedLossMixin:
    """Gives a Hugging Face Trainer the fused masked loss: ``class MySFT(FusedLossMixin, SFTTrainer): ...``

    - The loss of a step is the sum over its kept tokens divided by their number over all micro-batches and (with
      ``average_tokens_across_devices``, the default) all devices, whatever the model class says about
      ``accepts_loss_kwargs``. So how a step is cut into micro-batches does not change it.
    - The evaluation loss is the mean over the kept tokens of the evaluation set, not the mean of batch means.
    - The logits are built only where ``compute_metrics`` asks for them.
    - A `SelectiveCollator` counts the kept tokens (no GPU synchronisation), and ``remove_unused_columns``, which
      would take the fields of its records away, is turned off.

    z_loss: weight of lse^2, a class attribute.
    Raises ValueError for what the loss does not have: label smoothing, compute_loss_func, router losses, other
    loss types of TRL, context parallelism; and for a resumed run that would go on from the initial weights. TRL's
    entropy and accuracy metrics are not computed.
    """

    loss_is_scaled_for_ga = True
    z_loss = 0.0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.truncated_samples = self.unreadable_samples = 0
        self._evaluated: list[float] | None = None
        self._resuming = False
        if isinstance(self.data_collator, SelectiveCollator):
            self.args.remove_unused_columns = False
            # accelerate's dispatcher, which serves iterable datasets, concatenates tensors only
            self.data_collator.counts = not isinstance(self.train_dataset, torch.utils.data.IterableDataset)

    def _refuse_unsupported(self) -> None:
        parallel = getattr(self.accelerator, "parallelism_config", None)
        unsupported = {
            f"label_smoothing_factor = {self.args.label_smoothing_factor}": self.args.label_smoothing_factor,
            "compute_loss_func": self.compute_loss_func is not None,
            f"loss_type = {getattr(self.args, 'loss_type', 'nll')!r}": getattr(self.args, "loss_type", "nll")
            != "nll",
            "a router loss (output_router_logits)": getattr(self, "aux_loss_enabled", False),
            "use_liger_kernel": self.args.use_liger_kernel,
            "context or sequence parallelism": parallel is not None
            and (parallel.cp_enabled or parallel.sp_enabled),
        }
        for name, found in unsupported.items():
            if found:
                raise ValueError(f"{type(self).__name__} has a loss of its own, without {name}. Turn it off")

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._resuming = True
        try:
            super()._load_from_checkpoint(*args, **kwargs)
        finally:
            self._resuming = False

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """transformers 5 saves some vision-language models under names that a resumed run does not know, and warns."""
        missing, unknown = load_result.missing_keys, load_result.unexpected_keys
        if self._resuming and missing and unknown:  # missing alone may be tied
            raise ValueError(
                f"the checkpoint's weights would not be loaded: it names them {unknown[0]}, ..., the model "
                f"{missing[0]}, .... Load the model from the checkpoint (from_pretrained) and start a new run"
            )
        super()._issue_warnings_after_load(load_result)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        num_kept = inputs.pop("num_kept", None)
        truncated, unreadable = inputs.pop("num_truncated", 0), inputs.pop("num_unreadable", 0)
        token_weight = inputs.pop("token_weight", None)
        evaluating = self._evaluated is not None
        result = selective_loss(
            model,
            inputs,
            num_items=None if evaluating else num_items_in_batch,
            num_kept=num_kept,
            token_weight=token_weight,
            z_loss=self.z_loss,
            return_outputs=return_outputs,
        )
        loss = result[0] if return_outputs else result
        if evaluating:
            kept = count_kept(inputs["labels"]) if num_kept is None else num_kept
            self._evaluated[0] += loss.item() * kept
            self._evaluated[1] += kept
        else:
            self.truncated_samples += truncated
            self.unreadable_samples += unreadable
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                # num_items counts the tokens of every device, and DDP averages the gradients over them
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, result[1]) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not prediction_loss_only or "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = [0.0, 0.0]
        try:
            output = super().evaluation_loop(*args, **kwargs)
            totals = torch.tensor(self._evaluated, dtype=torch.float32, device=self.args.device)
        finally:
            self._evaluated = None
        summed, kept = self.accelerator.reduce(totals, "sum").tolist()
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if kept and name in output.metrics:
            output.metrics[name] = summed / kept
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.truncated_samples:
            logs["truncated_samples"] = self.truncated_samples
        if self.unreadable_samples:
            logs["unreadable_samples"] = self.unreadable_samples
        super().log(logs, *args, **kwargs)


class SelectiveTrainer(FusedLossMixin, transformers.Trainer):
    """Hugging Face's Trainer with the fused masked loss; use it with `SelectiveCollator`."""
