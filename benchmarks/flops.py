"""FLOP of scoring: what the plain loop spends, and what cannot be avoided. The bound of the suite `throughput`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vig.models.prompts import Encoded
from vig.scoring.batching import chunks
from vig.scoring.prefix_sharing import View, shared_by

BATCH = 8  # of the plain loop


@dataclass(frozen=True)
class Flops:
    """FLOP of a model's parts, a product of (m, k) and (k, n) counted as 2 m k n; norms and activations as none."""

    token: float  # the text layers' products, one token
    pair: float  # attention, one query and one key
    head: float  # one row of logits
    image: float  # the tower and what joins it to the text, one image
    last: float  # of `token`, the feed-forward part of the last layer

    @classmethod
    def of(cls, model: Any) -> Flops:
        text, vision = model.config.get_text_config(), model.config.vision_config
        head = model.get_output_embeddings().weight
        language = next(
            module
            for name, module in model.named_modules()
            if name.endswith(("language_model", "text_model"))
        )
        patches = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
        tower = model.model.vision_tower if hasattr(model.model, "vision_tower") else model.model.vision_model
        attention = 4 * vision.hidden_size * vision.num_hidden_layers * patches**2
        join = getattr(model.model, "multi_modal_projector", None) or model.model.connector
        joined = sum(weights(join)) * patches / getattr(model.config, "scale_factor", 1) ** 2
        return cls(
            token=2.0 * sum(weights(language.layers)),
            pair=4.0
            * text.num_attention_heads
            * language.layers[0].self_attn.head_dim
            * text.num_hidden_layers,
            head=2.0 * head.numel(),
            image=2.0 * (sum(weights(tower)) * patches + joined) + attention,
            last=2.0 * sum(weights(language.layers[-1].mlp)),
        )

    def plain(self, encoded: Sequence[Encoded]) -> float:
        """Both passes of the plain loop."""
        total = 0.0
        for batch in chunks(encoded, BATCH):
            length = max(len(item.input_ids) for item in batch)
            total += len(batch) * (length * (self.token + self.head) + length**2 * self.pair + self.image)
        return 2 * total

    def least(self, views: Sequence[View], image_token_id: int) -> float:
        """What both passes cannot do without: each image and prefix once, no padding, the last rows for answers."""
        seen: Counter = Counter()
        total = 0.0
        for view in views:
            key = shared_by(view, image_token_id)
            shared, fed = len(key[1]), view.encoded.n_fed
            if not seen[key]:
                total += self.image + shared * (self.token - self.last) + shared**2 / 2 * self.pair
            seen[key] += 1
            own = fed - shared
            total += own * (self.token - self.last) + own * (shared + own / 2) * self.pair
            total += len(view.encoded.answer_index) * (self.head + self.last)
        return 2 * total


def weights(module: torch.nn.Module) -> Iterator[int]:
    """Elements of each weight that multiplies."""
    for part in module.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
            yield part.weight.numel()
