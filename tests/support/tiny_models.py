"""Models of transformers with few weights, each for something that it does with its logits.

`build(name)` gives a model in training mode and inputs with labels. Rows x classes are more than
linear_cross_entropy keeps in memory at once, so its tiles run. No dropout: a fused model and an
unfused one see the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

VOCABULARY, BATCH, LENGTH, WIDTH = 16384, 2, 96, 64
IMAGE, IMAGE_START, IMAGE_END = VOCABULARY - 1, VOCABULARY - 2, VOCABULARY - 3
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama_like(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 128, **SPECIAL, **more,
    }  # fmt: skip


def gpt_like(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **SPECIAL, **more,
    }  # fmt: skip


def bert_like(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 130,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, **more,
    }  # fmt: skip


def modernbert_like(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
        "cls_token_id": 1, "sep_token_id": 2, **SPECIAL, **more,
    }  # fmt: skip


def t5_like(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2,
        "num_heads": 4, "dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0, **more,
    }  # fmt: skip


def bart_like(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128, "max_position_embeddings": 128, "dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "decoder_start_token_id": 2,
        "forced_eos_token_id": 2, **SPECIAL, **more,
    }  # fmt: skip


NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
NO_PDROP = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "vision_use_head": False,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "projection_dim": 32,
}  # fmt: skip
QWEN_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}

# Name: its first word is the model type.
CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": gpt_like(),
    "gpt_bigcode": gpt_like(attention_softmax_in_fp32=False),
    "gptj": gpt_like(rotary_dim=8),  # a bias in the head
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128,
        "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, **SPECIAL,
    },
    "gpt_neox": llama_like(**NO_DROPOUT),
    "llama": llama_like(),
    "llama tied": llama_like(tie_word_embeddings=True),
    "mistral": llama_like(),
    "qwen2": llama_like(),
    "qwen3": llama_like(),
    "smollm3": llama_like(),
    "glm4": llama_like(),
    "gemma": llama_like(),
    "gemma2": llama_like(query_pre_attn_scalar=16, final_logit_softcapping=30.0),
    "gemma3_text": llama_like(query_pre_attn_scalar=16, final_logit_softcapping=5.0),
    "granite": llama_like(logits_scaling=8.0, embedding_multiplier=2.0),
    "cohere": llama_like(logit_scale=0.0625),
    "cohere2": llama_like(logit_scale=0.25),
    "phi": llama_like(**NO_PDROP),  # a bias in the head
    "phi3": llama_like(**NO_PDROP),
    "olmo": llama_like(),
    "olmo2": llama_like(),
    "olmo3": llama_like(),
    "starcoder2": llama_like(residual_dropout=0.0, embedding_dropout=0.0),
    "stablelm": llama_like(),
    "falcon": {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4, **NO_DROPOUT,
    },
    "opt": {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "ffn_dim": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": WIDTH,
        "dropout": 0.0, "pad_token_id": 0,
    },
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
    "mpt": {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": 2, "n_heads": 4, "max_seq_len": 128,
    },
    "mamba": {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8,
    },
    "mixtral": llama_like(**LOCAL_EXPERTS, router_aux_loss_coef=0.5),
    "qwen3_moe": llama_like(**EXPERTS, moe_intermediate_size=64, router_aux_loss_coef=0.5),
    "olmoe": llama_like(**EXPERTS) | {"num_key_value_heads": 4},
    "gpt_oss": llama_like(**LOCAL_EXPERTS, layer_types=["full_attention"] * 2),
}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {
    "bert": bert_like(),
    "roberta": bert_like(),
    "xlm-roberta": bert_like(),
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 128, "n_layers": 2, "n_heads": 4,
        "max_position_embeddings": 128, "dropout": 0.0, "attention_dropout": 0.0,
    },
    "electra": bert_like(embedding_size=WIDTH),
    "albert": bert_like(embedding_size=32),  # a head of another width than the model
    "deberta-v2": bert_like(),
    "mpnet": bert_like(),
    "modernbert": modernbert_like(),
    "modernbert sparse": modernbert_like(sparse_prediction=True),  # logits of the masked alone
}  # fmt: skip
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": t5_like(),  # tied: hidden states scaled before the head
    "t5 untied": t5_like(tie_word_embeddings=False),
    "bart": bart_like(),  # a bias added to the logits
    "marian": bart_like(decoder_start_token_id=0),
}
IMAGE_TEXT: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": llama_like(model_type="llama"), "vision_config": CLIP,
        "image_token_id": IMAGE, "image_seq_length": 16,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
    },
    "paligemma": {
        "text_config": llama_like(model_type="gemma"),
        "vision_config": SIGLIP | {"projection_dim": WIDTH},
        "image_token_id": IMAGE, "hidden_size": WIDTH, "projection_dim": WIDTH,
    },
    "gemma3": {
        "text_config": llama_like(
            model_type="gemma3_text", query_pre_attn_scalar=16, final_logit_softcapping=5.0
        ),
        "vision_config": SIGLIP, "image_token_id": IMAGE, "mm_tokens_per_image": 4,
        "boi_token_id": IMAGE_START, "eoi_token_id": IMAGE_END,
    },
    "idefics3": {
        "text_config": llama_like(model_type="llama"),
        "vision_config": SIGLIP | {"model_type": "idefics3_vision"},
        "image_token_id": IMAGE, "scale_factor": 2,
    },
    "qwen2_vl": {
        "text_config": llama_like(model_type="qwen2_vl_text", rope_parameters=QWEN_SECTIONS),
        "vision_config": {
            "depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 14,
        },
        "image_token_id": IMAGE, "vision_start_token_id": IMAGE_START,
        "vision_end_token_id": IMAGE_END, "video_token_id": VOCABULARY - 4,
    },
    "qwen2_5_vl": {
        "text_config": llama_like(model_type="qwen2_5_vl_text", rope_parameters=QWEN_SECTIONS),
        "vision_config": {
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": WIDTH,
            "num_heads": 2, "patch_size": 14, "fullatt_block_indexes": [0],
        },
        "image_token_id": IMAGE, "vision_start_token_id": IMAGE_START,
        "vision_end_token_id": IMAGE_END, "video_token_id": VOCABULARY - 4,
    },
}  # fmt: skip
GROUPS = {
    "AutoModelForCausalLM": CAUSAL,
    "AutoModelForMaskedLM": MASKED,
    "AutoModelForSeq2SeqLM": SEQ2SEQ,
    "AutoModelForImageTextToText": IMAGE_TEXT,
}
NAMES = [name for group in GROUPS.values() for name in group]


def build(name: str, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model `name`, with `changes` of its configuration; inputs with labels."""
    auto, group = next((auto, group) for auto, group in GROUPS.items() if name in group)
    config = AutoConfig.for_model(name.split(" ")[0], **(group[name] | changes))
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager")
    ids, labels = tokens(config.get_text_config().vocab_size, masked=group is MASKED)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if group is IMAGE_TEXT:
        _add_images(name, given)
    return model.train(), given


def tokens(vocabulary: int, *, masked: bool, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and labels; a masked model's are other tokens at 15% of the positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary - 8, (BATCH, LENGTH), generator=generator)
    labels = ids.clone()
    if masked:
        labels = labels.flip(1)
        labels[torch.rand(BATCH, LENGTH, generator=generator) > 0.15] = -100
    else:
        labels[:, :7] = -100
    return ids, labels


def _add_images(name: str, given: dict[str, Tensor]) -> None:
    """One image for each sequence: its tokens stand from position 8 on."""
    generator = torch.Generator().manual_seed(2)
    count = 16 if name in ("llava", "paligemma") else 4
    ids = given["input_ids"]
    ids[:, 7], ids[:, 8 : 8 + count], ids[:, 8 + count] = IMAGE_START, IMAGE, IMAGE_END
    given["labels"][:, 7 : 9 + count] = -100
    image = (ids == IMAGE).long()
    if name.startswith("qwen2"):
        given["pixel_values"] = torch.randn(BATCH * 16, 3 * 2 * 14 * 14, generator=generator)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * BATCH)
        given["mm_token_type_ids"] = image
        return
    shape = (BATCH, 1, 3, 32, 32) if name == "idefics3" else (BATCH, 3, 32, 32)
    given["pixel_values"] = torch.randn(shape, generator=generator)
    if name == "paligemma":  # 1 where the answer is
        given["token_type_ids"] = (given["labels"] != -100).long()
    if name == "gemma3":
        given["token_type_ids"] = image
