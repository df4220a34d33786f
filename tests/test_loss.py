"""selective_loss against stock masked cross-entropy on the model's own logits, for every family at hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor, init_device_mesh

from vig.models.lm_head import HeadError, HeadTransform, count_kept, find_head, shifted_rows, verify_head
from vig.training.loss import selective_loss

V, B, T = 90, 3, 12
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def llava():
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**TEXT, tie_word_embeddings=True),
            image_token_id=3,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )


def qwen2_5_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            vision_config={
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 24,
                "depth": 1,
                "num_heads": 2,
                "patch_size": 4,
                "fullatt_block_indexes": [0],
            },
            text_config=TEXT | {"rope_parameters": rope},
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
    )


def gemma3():
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            vision_config=transformers.SiglipVisionConfig(**VISION),
            text_config=transformers.Gemma3TextConfig(**TEXT, final_logit_softcapping=3.0),
            mm_tokens_per_image=4,
            image_token_index=3,
        )
    )


def idefics3():
    return transformers.Idefics3ForConditionalGeneration(
        transformers.Idefics3Config(
            vision_config=VISION,
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=3,
            scale_factor=1,
        )
    )


def llava_next():
    return transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=3,
            vision_feature_layer=-1,
            image_grid_pinpoints=[[16, 16]],
        )
    )


def llava_onevision():
    return transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**VISION),
            text_config=transformers.Qwen2Config(**TEXT),
            image_token_id=3,
            video_token_id=4,
        )
    )


def qwen3_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            vision_config={
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 24,
                "depth": 1,
                "num_heads": 2,
                "patch_size": 4,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            text_config=TEXT | {"rope_parameters": rope},
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
    )


def smolvlm():
    return transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(
            vision_config=VISION,
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=3,
            scale_factor=1,
        )
    )


def internvl():
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            vision_config=VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
            text_config=transformers.Qwen2Config(**TEXT),
            image_token_id=3,
        )
    )


class CappedLlava(transformers.LlavaForConditionalGeneration):
    """A vision-language model that applies the softcap of its text config, as Gemma3n's does."""

    def forward(self, *args, **kwargs):
        outputs, cap = super().forward(*args, **kwargs), self.config.text_config.final_logit_softcapping
        outputs.logits = cap * torch.tanh(outputs.logits / cap)
        return outputs


def capped_llava():
    return CappedLlava(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.Gemma2Config(**TEXT, final_logit_softcapping=4.0),
            image_token_id=3,
        )
    )


def text(name: str, **more):
    config = getattr(transformers, f"{name}Config")(**TEXT, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def phi():  # its head has a bias
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**TEXT))
    nn.init.normal_(model.lm_head.bias)
    return model


# family -> (builder, what it does to its logits)
FAMILIES = {
    "llava": (llava, HeadTransform()),
    "llava-next": (llava_next, HeadTransform()),
    "llava-onevision": (llava_onevision, HeadTransform()),
    "qwen2.5-vl": (qwen2_5_vl, HeadTransform()),
    "qwen3-vl": (qwen3_vl, HeadTransform()),
    "smolvlm": (smolvlm, HeadTransform()),
    "internvl": (internvl, HeadTransform()),
    "idefics3": (idefics3, HeadTransform()),
    "gemma3": (gemma3, HeadTransform()),  # its config has a softcap, which this class ignores
    "gemma3-text": (
        lambda: (
            text("Gemma3Text", final_logit_softcapping=3.0)
            if hasattr(transformers, "Gemma3TextForCausalLM")
            else transformers.Gemma3ForCausalLM(
                transformers.Gemma3TextConfig(**TEXT, final_logit_softcapping=3.0)
            )
        ),
        HeadTransform(softcap=3.0),
    ),
    "gemma2": (lambda: text("Gemma2", final_logit_softcapping=5.0), HeadTransform(softcap=5.0)),
    "capped llava": (capped_llava, HeadTransform(softcap=4.0)),
    "cohere": (lambda: text("Cohere", logit_scale=0.3), HeadTransform(scale=0.3)),
    "granite": (lambda: text("Granite", logits_scaling=7.0), HeadTransform(scale=1 / 7)),
    "phi": (phi, HeadTransform()),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=T, bos_token_id=1, eos_token_id=2
            )
        ),
        HeadTransform(),
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name][0]().eval()
    with torch.no_grad():  # logits large enough for a softcap to bite
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(0, 0.5)
    return model


def batch(name: str = "", *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens with ragged lengths and masked labels; an image a row for llava and qwen2.5-vl."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(10, V, (B, T), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 9:] = 0
    labels = torch.where(torch.rand((B, T), generator=generator) < 0.4, input_ids, -100)
    labels[0, 0] = input_ids[0, 0]  # predicted by nothing
    labels[:, 1:7] = -100
    labels = labels.where(attention_mask == 1, -100)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if name == "llava":
        input_ids[:, 2:6] = 3
        inputs["pixel_values"] = torch.randn((B, 3, 16, 16), generator=generator)
    if name == "qwen2.5-vl":
        input_ids[:, 1], input_ids[:, 2:6], input_ids[:, 6] = 5, 3, 6
        inputs["pixel_values"] = torch.randn((B * 16, 3 * 2 * 16), generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * B)
        inputs["mm_token_type_ids"] = (input_ids == 3).long()
    if name == "gemma3":
        inputs["token_type_ids"] = torch.zeros_like(input_ids)
    return inputs


def stock(model, inputs, *, num_items=None, token_weight=None, z_loss=0.0):
    """Masked cross-entropy in float32 on the model's own logits, rows picked one by one."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits.float()
    total, divisor = 0.0, 0.0
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                weight = 1.0 if token_weight is None else token_weight[b, t]
                row = logits[b, t - 1]
                nll = F.cross_entropy(row[None], labels[b, t][None])
                total = total + weight * (nll + z_loss * row.logsumexp(-1) ** 2)
                divisor = divisor + weight
    return total / (divisor if num_items is None else num_items)


def gradients(loss, model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, model, tolerance=1e-5):
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    ours, theirs = gradients(ours, model), gradients(theirs, model)
    assert ours.keys() == theirs.keys() and ours
    least = 1e-3 * max(grad.norm() for grad in theirs.values())  # a key bias has no gradient but rounding
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp(min=least)
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_models_own_logits(name):
    model, inputs = build(name), batch(name)
    token_weight = torch.rand((B, T), generator=torch.Generator().manual_seed(1))
    for options in ({}, {"num_items": 29, "token_weight": token_weight, "z_loss": 0.1}):
        ours = selective_loss(model, inputs, num_kept=count_kept(inputs["labels"]), **options)
        assert_same(ours, stock(model, inputs, **options), model)
    scale, softcap = verify_head(model, inputs)
    assert (pytest.approx(scale), softcap) == tuple(FAMILIES[name][1])
    assert "forward" not in model.get_output_embeddings().__dict__  # the head is itself again


def test_shift():
    labels = torch.tensor([[7, -100, 8, -100], [-100, -100, -100, 9]])
    index, target = shifted_rows(labels)
    assert index.tolist() == [1, 6] and target.tolist() == [8, 9]
    assert labels.reshape(-1)[index + 1].tolist() == [8, 9]
    assert count_kept(labels) == 2
    with pytest.raises(ValueError, match="num_kept is 3, but the labels keep 2"):
        shifted_rows(labels, 3)


def test_nothing_kept_is_zero_with_zero_gradients():
    model, inputs = build("llava"), batch("llava")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = selective_loss(model, inputs)
    assert loss.item() == 0.0
    found = gradients(loss, model)
    assert found and all(not grad.any() for grad in found.values())


def test_frozen_head_and_eval_outputs():
    model, inputs = build("cohere"), batch()
    model.get_output_embeddings().requires_grad_(False)
    expected = stock(model, inputs)
    assert_same(selective_loss(model, inputs), expected, model)
    with torch.no_grad():
        loss, outputs = selective_loss(model, inputs, return_outputs=True)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(outputs.logits, logits)
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        selective_loss(model, inputs, return_outputs=True)


# --- wrappers ---


def lora(model, **more):
    config = LoraConfig(r=2, target_modules=r".*self_attn\.[qv]_proj", init_lora_weights=False, **more)
    return get_peft_model(model, config)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft(saved):
    model, inputs = lora(build("qwen2.5-vl"), modules_to_save=saved), batch("qwen2.5-vl")
    if saved:  # the trained copy counts, not the original
        nn.init.normal_(find_head(model).weight)
    assert_same(selective_loss(model, inputs), stock(model, inputs), model)


def test_adapter_on_the_head_is_refused_until_merged():
    model = build("cohere")
    model.config.tie_word_embeddings = False
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(HeadError, match="modules_to_save"):
        selective_loss(model, batch())
    model.merge_adapter()
    assert selective_loss(model, batch()).item() == pytest.approx(stock(model, batch()).item(), rel=1e-5)


def test_ddp_hooks_fire(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, inputs = build("qwen2.5-vl"), batch("qwen2.5-vl")
        expected = gradients(stock(model, inputs), model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        reduced = []

        def hook(state, bucket):
            reduced.append(bucket.buffer().numel())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped.register_comm_hook(None, hook)
        found = gradients(selective_loss(wrapped, inputs), model)
        assert all(torch.allclose(found[name], grad, rtol=1e-4, atol=1e-6) for name, grad in expected.items())
        assert sum(reduced) == sum(parameter.numel() for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["qwen2.5-vl", "cohere"])
def test_fsdp2_gathers_the_head_and_gets_the_gradient(name, tmp_path):
    """Its hooks hang on the model's outputs; the head's weight is whole only while the head is called."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, inputs = build(name), batch(name)
        expected, loss = gradients(stock(model, inputs), model), stock(model, inputs).item()
        for layer in model.model.modules():
            if type(layer).__name__.endswith("DecoderLayer"):
                fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for _ in range(2):
            model.zero_grad()  # before the forward, which leaves the root's weights whole until the backward
            ours = selective_loss(model, inputs)
            assert ours.item() == pytest.approx(loss, rel=1e-5)
            found = gradients(ours, model)
        assert found.keys() == expected.keys()
        for parameter, grad in expected.items():
            assert torch.allclose(found[parameter].full_tensor(), grad, rtol=1e-4, atol=1e-6), parameter
    finally:
        torch.distributed.destroy_process_group()


def test_the_gradient_leaves_through_the_outputs():
    model, inputs, fired = build("cohere"), batch(), []

    def hook(module, args, outputs):
        if outputs.logits.requires_grad:
            outputs.logits.register_hook(lambda grad: fired.append(grad.item()))

    model.register_forward_hook(hook)
    selective_loss(model, inputs).backward()
    assert fired == [1.0]


def test_autocast_of_a_wrapper_reaches_the_model():
    AcceleratorState._reset_state()  # other tests have made accelerators without autocast
    model, inputs = build("llava"), batch("llava")
    exact = stock(model, inputs).item()
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    loss = selective_loss(prepared, inputs)
    assert loss.dtype == torch.float32
    assert loss.item() != pytest.approx(exact, rel=1e-5)  # the layers ran in bfloat16
    assert loss.item() == pytest.approx(exact, rel=2e-2)
    AcceleratorState._reset_state()


# --- refusals ---


def test_unknown_transform_is_refused_with_the_values():
    model = build("llava")
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: logits + 2.0)
    with pytest.raises(HeadError, match=r"turns the logit \S+ into \S+; no scale and softcap"):
        selective_loss(model, batch("llava"))


def test_a_router_loss_is_refused():
    model = build("llava")

    def routed(module, args, outputs):
        outputs.aux_loss = torch.ones(())

    model.register_forward_hook(routed)
    with pytest.raises(HeadError, match="output_router_logits = False"):
        selective_loss(model, batch("llava"))


def test_nan_weights_of_the_head_are_named():
    model = build("llava")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(HeadError, match="holds NaN or infinite weights"):
        selective_loss(model, batch("llava"))


@pytest.mark.parametrize(
    ("weight", "message"),
    [(torch.empty(0), "ZeRO-3"), (torch.zeros((4, 4), dtype=torch.uint8), "quantisation")],
)
def test_unusable_weights_are_refused(weight, message):
    model, inputs = build("gemma2"), batch()
    verify_head(model, inputs)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(HeadError, match=message):
        selective_loss(model, inputs)


def test_sharded_weight_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, inputs = build("gemma2"), batch()
        verify_head(model, inputs)
        weight = distribute_tensor(model.lm_head.weight.data, init_device_mesh("cpu", (1,)))
        model.lm_head.weight = nn.Parameter(weight)
        with pytest.raises(HeadError, match="sharded"):
            selective_loss(model, inputs)
    finally:
        torch.distributed.destroy_process_group()


def test_memory_and_backend_are_handed_on():
    model, inputs = build("llava"), batch("llava")
    with pytest.raises(ValueError, match="memory='some' is not one of"):
        selective_loss(model, inputs, memory="some")
    with pytest.raises(ValueError, match="backend='some' is not one of"):
        selective_loss(model, inputs, backend="some")


def test_missing_labels_and_missing_head():
    model, inputs = build("llava"), batch("llava")
    with pytest.raises(HeadError, match="LlamaModel has no LM head"):
        selective_loss(model.model.language_model, inputs)
    del inputs["labels"]
    with pytest.raises(ValueError, match="no labels among the inputs"):
        selective_loss(model, inputs)
