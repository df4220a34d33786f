"""Step: one optimiser step of a 1B text tower, the stock loss against the fused one.

The form is Llama 3.2 1B's (16 layers x 2048, vocabulary 128256) with random weights, made on the device: 4 rows of
2048 tokens, a third of them without a label, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from benchmarks.gpu import device
from benchmarks.gpu.end_to_end import on_device
from benchmarks.gpu.session import Session
from benchmarks.harness import Check, Contender
from vig.models.lm_head import count_kept
from vig.training.loss import selective_loss

ROWS, LENGTH = 4, 2048
CLOSE = 2e-2  # relative: the stock loss comes from logits in 16 bits
STOCK, FUSED = "transformers' loss", "vig.training.loss.selective_loss"


def configuration(rehearse: bool) -> transformers.LlamaConfig:
    if rehearse:
        return transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=320
        )
    return transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip


def training_step(session: Session) -> None:
    config = configuration(session.rehearse)
    dtype = torch.float32 if session.rehearse else torch.bfloat16
    model = on_device(config, transformers.LlamaForCausalLM, session.device, dtype).train()
    rows, length = (2, 16) if session.rehearse else (ROWS, LENGTH)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (rows, length), generator=draw)
    labels = ids.masked_fill(torch.rand(rows, length, generator=draw) < 1 / 3, -100)
    kept = count_kept(labels)
    inputs = {"input_ids": ids.to(session.device), "labels": labels.to(session.device)}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=session.device == "cuda")

    def step(loss_of: Callable[[], torch.Tensor]) -> Callable[[object], Callable[[], torch.Tensor]]:
        def run() -> torch.Tensor:
            optimiser.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            optimiser.step()
            return loss.detach()

        return lambda _: run

    with torch.no_grad():
        exact = float(model(**inputs).loss)

    def judge(contender: Contender, loss: torch.Tensor) -> Check:
        error = abs(float(loss) - exact) / abs(exact)
        return Check(error, error / CLOSE)

    field = [
        Contender(STOCK, step(lambda: model(**inputs).loss), baseline=True),
        Contender(
            FUSED, step(lambda: selective_loss(model, inputs, num_kept=kept, backend="triton")), ours=True
        ),
    ]
    result = session.contest(field, None, judge, rounds=7, seconds=6.0)
    tokens = rows * length
    for row in result["rows"]:
        if row["status"] == "ok":
            row["tokens_s"] = 1e3 * tokens / row["p50_ms"]
    session.case(
        {
            "suite": "training step",
            "label": f"1B text tower, {rows} x {length} tokens, {kept} with a label, AdamW",
            "model": "Llama 3.2 1B's form",
            "ratio_to": "/ transformers' loss",
            "rows": result["rows"],
        }
    )
    device.release(session.device)
