"""Any model class of transformers, small: the default of its configuration class, shrunk by rules.

`shrunk(model_type)` takes what the configuration class gives without arguments and makes each size
in it small, by its name: layers, widths, heads, experts, vocabulary, images. `EXCEPTIONS` holds
what the rules do not say of one model. The model is random, its sequence BATCH x LENGTH.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

VOCABULARY, BATCH, LENGTH, WIDTH, HEAD = 2048, 2, 64, 128, 32
# The last ids stand for images, sounds and their borders; no input has them, nor the first ids.
SPECIAL, FIRST = 128, 16
MOST_PARAMETERS = 110_000_000
KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


class CannotBuild(Exception):
    """Of a class that has no small instance here, and why."""


def at_most(limit: int) -> Callable[[Any], Any]:
    return lambda value: min(value, limit)


# What a name means, first match first; a number or a function of the default.
NAMED: list[tuple[str, Any]] = [
    (r"(src_|tgt_|decoder_|unpadded_|model_)?vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"vocab_offset", VOCABULARY - SPECIAL),
    (r"type_vocab_size|num_labels|num_channels|in_channels|chunk_size_feed_forward", None),
    (r".*vocab_size(_base)?|.*num_embeddings|codebook_size|.*codebook_dim", at_most(64)),
    (r"max_2d_position_embeddings|num_position_embeddings|position_embedding_size", at_most(1024)),
    (r".*max.*position.*|n_positions|max_seq_len|n_ctx|context_length|max_(source|target)_.*|seq_len"
     r"|model_max_length|max_vit_seq_len|max_pos_emb", at_most(256)),
    (r"sliding_window|sliding_window_size|attention_window_size|keep_window_size", at_most(32)),
    # Heads and their widths
    (r"(swa_|decoder_)?(num_key_value_heads|num_kv_heads|kv_n_heads|multi_query_group_num)", "kv"),
    (r"num_attention_heads_per_layer", None),
    (r".*(num_.*attention_heads|attention_heads|num_heads|n_heads?|num_query_groups)|resampler_heads"
     r"|linear_num_(key|value)_heads", "heads"),
    (r"(qk_nope|v|swa_v|linear_.*|.*index|o)_head_dim|.*head_dim|d_kv|dim_head|d_head|kv_channels"
     r"|(attention_)?head_size|resampler_dim_head|attention_head_dim|mamba_d_head|mamba_headdim",
     HEAD),
    (r".*lora_rank|.*_rank|lowrank|adapter_rank|rotary_dim|hc_lowrank", at_most(16)),
    # Layers
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_.*mtp.*layers|t2u_.*layers", 0),
    (r"(conf_|speech_)?.*num_(hidden_|encoder_|decoder_)?(layers|blocks)|n_layers?|.*_layers|depth"
     r"|.*_depth|layers|decoder_num_layers|num_self_attends_per_block", "layers"),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", at_most(1)),
    (r"moe_layer_end_index", 1),
    (r"attn_layer_(period|offset)|expert_layer_(period|offset)|.*_interval|.*_sparse_step",
     at_most(2)),
    # Experts
    (r"n_group|topk_group|num_expert_group|n_shared_experts|.*num_shared_experts", at_most(1)),
    (r".*experts_per_tok(en)?|moe_top_?k|top_k.*|moe_k", at_most(2)),
    (r"(moe_)?(num_|n_)(local_|routed_)?experts|zero_expert_num", at_most(4)),
    # State spaces
    (r".*(state_size|d_state)", at_most(16)),
    (r".*n_?groups|mamba_n_groups", at_most(1)),
    (r"time_step_rank|mamba_dt_rank", at_most(8)),
    (r"mamba_d_ssm", 2 * WIDTH),
    # Images and sounds
    (r"image_size|resolution|crop_size|max_image_size|max_img_size|min_image_size", at_most(64)),
    (r"image_seq_length|num_image_tokens|mm_tokens_per_image|num_query_tokens|latent_query_num"
     r"|resampler_.*latents|num_latents|video_seq_length|num_patches|max_num_patches", at_most(16)),
    # Widths
    (r".*(hidden_size|hidden_dim|embed_dim|embedding_size|emb_dim|embedding_dim|prediction_head_size)"
     r"|d_model|n_embd|dim|out_hidden_size|.*proj_dim|.*_output_dim|pooler_output_size"
     r"|lru_width|hidden_size_global|true_hidden_size|projection_dim|output_dim|d_latents|input_size"
     r"|attention_hidden_size|.*_hidden_dimension|channels_last_dim|projector_.*_dim|mlp_input_dim",
     "width"),
    (r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|feed_forward_size|mlp_dim|d_ff|d_inner|dff"
     r"|dim_ff|ffn_size|share_expert_dim|shared_experts_intermediate_size)", 2 * WIDTH),
]  # fmt: skip
RULES = [(re.compile(name), value) for name, value in NAMED]
# Tried in turn: what one model asks for is refused by another.
TRIES: list[dict[str, int]] = [
    {"layers": 2, "kv": 2, "heads": 4, "width": WIDTH},
    {"layers": 2, "kv": 4, "heads": 4, "width": WIDTH},
    {"layers": 4, "kv": 4, "heads": 4, "width": WIDTH},
]
# What a model asks for that its default, or the name of a size, does not say.
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": HEAD}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "deepseek_v2": {"num_experts_per_tok": 2, "head_dim": HEAD},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6},
    "dots3_note": {"adapter_in_dim": WIDTH},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [64, 64],
            "rope_parameters": SECTIONS | {"mrope_section": [6, 6, 4]},
        }
    },
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": HEAD, "mamba_d_ssm": 2 * WIDTH},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm46v": {"text_config": {"rope_parameters": SECTIONS}},
    "glm4v": {"text_config": {"rope_parameters": SECTIONS}},
    "glm4v_moe": {"text_config": {"rope_parameters": SECTIONS | {"partial_rotary_factor": 1.0}}},
    "glm_ocr": {"text_config": {"rope_parameters": SECTIONS}},
    "glmga": {"text_config": {"rope_parameters": SECTIONS}},
    "granitemoehybrid": MAMBA,
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "led": {"attention_window": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 2 * HEAD},
    "mamba2": {"num_heads": 8, "head_dim": HEAD},
    "mistral4": {"qk_head_dim": 2 * HEAD, "head_dim": HEAD},
    "mobilebert": {"hidden_size": 2 * WIDTH},  # wider than its embeddings, as the default is
    "nemotron": {"num_key_value_heads": 4},
    "paddleocr_vl": {"text_config": {"rope_parameters": SECTIONS}},
    "qwen2_vl": {"text_config": {"rope_parameters": SECTIONS}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": SECTIONS}},
    "qwen2_5_omni_thinker": {
        "text_config": {"rope_parameters": SECTIONS},
        "vision_start_token_id": VOCABULARY - 60,
        "vision_end_token_id": VOCABULARY - 61,
    },
    "qwen3_omni_moe_thinker": {
        "text_config": {"rope_parameters": SECTIONS},
        "vision_start_token_id": VOCABULARY - 60,
        "vision_end_token_id": VOCABULARY - 61,
    },
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [64, 64]},
    "step3p7": {"text_config": {"sliding_window": 32}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": {
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 64,
        "n_mamba_heads": 8,
    },
}
# Of these a masked model is bidirectional.
ENCODERS = {"reformer"}


def shrunk(model_type: str, kind: str, sizes: dict[str, int]) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    fields = _Shrinker(sizes).config(config_class().to_dict())
    if kind == "causal" and "is_decoder" in fields and not fields.get("is_encoder_decoder"):
        fields["is_decoder"] = True
    if kind == "masked" and model_type in ENCODERS:
        fields["is_decoder"] = False
    _update(fields, EXCEPTIONS.get(model_type, {}))
    return config_class(**fields)


def _update(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            _update(fields[name], value)
        else:
            fields[name] = value


class _Shrinker:
    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.ids: dict[int, int] = {}

    def config(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Of one configuration or a part of one."""
        kept = _kept_layers(fields, self.sizes["layers"])
        small = {
            name: self.field(name, value, kept)
            for name, value in fields.items()
            if name != "per_layer_config"
        }
        if kept:
            for name in small:
                if name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
                    small[name] = len(kept)
        _fit_rotary_sections(small)
        return small

    def field(self, name: str, value: Any, kept: list[int]) -> Any:
        if isinstance(value, dict):
            return self.config(value) if name not in ("id2label", "label2id") else value
        if isinstance(value, list):
            return self.list(name, value, kept)
        if value is None and name == "head_dim":
            return HEAD
        if name == "use_cache":  # some caches fail in a model of two layers
            return False
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return value
        if "drop" in name or name.endswith("pdrop"):
            return 0.0 if isinstance(value, float) else 0
        if isinstance(value, float):
            return value
        if re.search(r"token_(id|index)$|_(id|idx|index)$|^(unk|mask)_index$|im_.*id$", name):
            return self.token(value)
        for pattern, small in RULES:
            if pattern.fullmatch(name):
                if isinstance(small, str):
                    return min(value, self.sizes[small]) if value > 0 else value
                if callable(small):
                    return small(value)
                return value if small is None else small
        return value

    def token(self, value: int) -> int:
        if value < FIRST:
            return value
        return self.ids.setdefault(value, VOCABULARY - 1 - len(self.ids) % SPECIAL)

    def list(self, name: str, value: list[Any], kept: list[int]) -> list[Any]:
        if kept and len(value) > max(kept) and len(value) > len(kept) and len(value) >= 4:
            return [value[i] for i in kept]
        if re.search("token_ids?$", name):
            return [self.token(v) if isinstance(v, int) else v for v in value]
        if re.search("index|layers|idxs|layer_ids|layer$", name) and all(
            type(v) is int for v in value
        ):
            return [-1] * len(value) if min(value, default=0) < 0 else value and [1]
        return value


def _kept_layers(fields: dict[str, Any], count: int) -> list[int]:
    """Which layers of a list of layers stay: one of each kind, and the first ones."""
    for name in (
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "attn_layers",
        "attention_layers",
    ):
        kinds = fields.get(name)
        if isinstance(kinds, list) and len(kinds) >= 4 and isinstance(kinds[0], str):
            both = [kinds]
            other = fields.get("mlp_layer_types")
            if isinstance(other, list) and len(other) == len(kinds):
                both.append(other)
            first = {kinds.index(kind) for each in both for kind in each for kinds in [each]}
            rest = [i for i in range(len(kinds)) if i not in first]
            return sorted([*first, *rest[: max(count - len(first), 0)]])
    return []


def _fit_rotary_sections(fields: dict[str, Any]) -> None:
    """Sections of the rotary frequencies: as many as half of a head is wide."""
    for rope in fields.values():
        if isinstance(rope, dict) and isinstance(rope.get("mrope_section"), list):
            part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor")) or 1.0
            half, old = int(HEAD * part) // 2, rope["mrope_section"]
            new = [max(half * n // sum(old), 1) for n in old]
            new[0] += half - sum(new)
            rope["mrope_section"] = new


def build(model_type: str, kind: str, class_name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of the class, in training mode, and inputs that it accepts."""
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise CannotBuild("transformers has no such class")
    reasons = []
    for sizes in TRIES:
        try:
            config = _part_of(shrunk(model_type, kind, sizes), model_class)
            _check_size(model_class, config)
            torch.manual_seed(0)
            model = model_class(config).float().train()
        except Exception as error:
            reasons.append(_one_line(error))
            continue
        for given in inputs(model, kind):
            try:
                model(**given)
                return model, given
            except Exception as error:
                reasons.append(_one_line(error))
    raise CannotBuild(reasons[-1] if len(TRIES) == len(reasons) else reasons[0])


def _one_line(error: Exception) -> str:
    if isinstance(error, CannotBuild):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _part_of(config: PreTrainedConfig, model_class: Any) -> PreTrainedConfig:
    """The part of a configuration that the class takes: of its text, where it is a text model."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name) for name in config.sub_configs]
    return next((part for part in parts if isinstance(part, wanted)), config)


def _check_size(model_class: Any, config: PreTrainedConfig) -> None:
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    except Exception:  # a class that computes with its own weights
        return
    if count > MOST_PARAMETERS:
        raise CannotBuild(f"{count / 1e6:.0f} million parameters after shrinking")


def inputs(model: nn.Module, kind: str) -> Iterator[dict[str, Tensor]]:
    """Inputs with labels; where the model refuses one, the next has more arguments."""
    names = inspect.signature(type(model).forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST, VOCABULARY - SPECIAL, (BATCH, LENGTH), generator=generator)
    labels = ids.clone()
    if kind == "masked":  # other tokens: a model with tied weights knows those that it sees
        labels = labels.flip(1)
        labels[torch.rand(labels.shape, generator=generator) > 0.15] = -100
    else:
        labels[:, :5] = -100
    main = "input_ids" if "input_ids" in names else getattr(model, "main_input_name", "input_ids")
    given = {main: ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if "labels" not in names and not any(p.kind is p.VAR_KEYWORD for p in names.values()):
        del given["labels"]
    if "attention_mask" not in names:
        del given["attention_mask"]
    yield given
    zeros = {
        name: torch.zeros_like(ids)
        for name in ("token_type_ids", "mm_token_type_ids")
        if name in names
    }
    if zeros:
        yield given | zeros
    pixels = {"pixel_values": torch.randn(BATCH, 3, 64, 64, generator=generator)}
    if "pixel_values" in names:
        yield given | zeros | pixels
    if "decoder_input_ids" in names:
        yield given | {"decoder_input_ids": ids}
