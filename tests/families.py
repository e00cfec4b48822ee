"""ReLU-bearing model families of transformers, tiny and without weights.

Not here: families whose activation is fixed to another function (BLOOM, ESM, I-BERT, CvT, EnCodec), and those
that need a second package to be built (timm, natten, causal-conv1d).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Kwargs = dict[str, Any]


class Family(NamedTuple):
    """A model: its config's name and fields, its inputs, and its class where it is not the base model."""

    config: str
    fields: Kwargs
    inputs: str = "text"
    model: str = ""


def build(family: Family) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config = getattr(transformers, f"{family.config}Config")(**family.fields)
    for name, value in vars(config).items():
        if isinstance(value, dict) and "model_type" in value:
            setattr(config, name, transformers.AutoConfig.for_model(**value))
    make = getattr(transformers, family.model)._from_config if family.model else transformers.AutoModel.from_config
    return make(config)


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 40, shape)


def inputs_of(family: Family) -> Kwargs:
    kind, _, size = family.inputs.partition(" ")
    side = int(size or 32)
    decoder = {"decoder_input_ids": ids(2, 5)}
    return {
        "text": lambda: {"input_ids": ids(2, 7)},
        "text8": lambda: {"input_ids": ids(2, 8)},
        "pair": lambda: {"input_ids": ids(2, 7), **decoder},
        "image": lambda: {"pixel_values": torch.randn(2, 3, side, side)},
        "both": lambda: {"input_ids": ids(2, 7), "pixel_values": torch.randn(2, 3, side, side)},
        "video": lambda: {"pixel_values": torch.randn(2, 2, 3, side, side)},
        "wave": lambda: {"input_values": torch.randn(2, 60)},
        "spectrum": lambda: {"input_values": torch.randn(2, 24, 16)},
        "frames": lambda: {"input_features": torch.randn(2, 20, 8), **decoder},
        "mels": lambda: {"input_features": torch.randn(2, 8, 20), **decoder},
        "vectors": lambda: {"inputs": torch.randn(2, 7, 8)},
        "series": lambda: {"past_values": torch.randn(2, 16, 2)},
        "speech": lambda: {
            "input_ids": ids(2, 7),
            "decoder_input_values": torch.randn(2, 4, 4),
            "speaker_embeddings": torch.randn(2, 4),
        },
        "future": lambda: {
            "past_values": torch.rand(2, 7),
            "past_time_features": torch.rand(2, 7, 1),
            "past_observed_mask": torch.ones(2, 7),
            "future_values": torch.rand(2, 3),
            "future_time_features": torch.rand(2, 3, 1),
        },
        "decisions": lambda: {
            "states": torch.randn(2, 4, 3),
            "actions": torch.randn(2, 4, 2),
            "rewards": torch.randn(2, 4, 1),
            "returns_to_go": torch.randn(2, 4, 1),
            "timesteps": torch.zeros(2, 4, dtype=torch.long),
            "attention_mask": torch.ones(2, 4),
        },
    }[kind]()


def _encoder(name: str, **more: Any) -> Family:
    fields = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"intermediate_size": 12, "hidden_act": "relu", "max_position_embeddings": 40}
    return Family(name, fields | more)


def _llama(name: str, **more: Any) -> Family:
    return _encoder(name, **{"num_key_value_heads": 2, **more})


def _seq2seq(name: str, inputs: str = "pair", without: tuple[str, ...] = (), **more: Any) -> Family:
    fields = {"vocab_size": 50, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    fields |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
    fields |= {"max_position_embeddings": 40, "activation_function": "relu", "pad_token_id": 1, "bos_token_id": 0}
    fields |= {"eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return Family(name, {k: v for k, v in fields.items() if k not in without} | more, inputs)


def _t5(name: str, **more: Any) -> Family:
    fields = {"vocab_size": 50, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 2}
    return Family(name, fields | {"num_heads": 2, "feed_forward_proj": "relu"} | more, "pair")


def _vit(name: str, inputs: str = "image", model: str = "", **more: Any) -> Family:
    fields = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    return Family(name, fields | {"hidden_act": "relu", "image_size": 32, "patch_size": 8} | more, inputs, model)


def _gpt(name: str, **more: Any) -> Family:
    return Family(
        name, {"vocab_size": 50, "n_embd": 8, "n_layer": 2, "n_head": 2, "activation_function": "relu"} | more
    )


def _wave(name: str) -> Family:
    fields = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    fields |= {"hidden_act": "relu", "feat_extract_activation": "relu", "conv_dim": [4, 4], "conv_kernel": [5, 3]}
    fields |= {"conv_stride": [3, 2], "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Family(name, fields | {"num_feat_extract_layers": 2, "mask_time_prob": 0.0}, "wave")


def _pyramid(name: str, stages: int = 2, inputs: str = "image", model: str = "", **more: Any) -> Family:
    fields = {"num_encoder_blocks": stages, "depths": [1] * stages, "hidden_sizes": [4, 8, 4, 4][:stages]}
    fields |= {"patch_sizes": [7, 3, 3, 3][:stages], "strides": [4, 2, 2, 2][:stages], "hidden_act": "relu"}
    fields |= {"sr_ratios": [2, 1, 1, 1][:stages], "num_attention_heads": [1, 2, 1, 1][:stages]}
    return Family(name, fields | {"mlp_ratios": [2] * stages, "decoder_hidden_size": 6} | more, inputs, model)


_RESNET: Kwargs = {"model_type": "resnet", "embedding_size": 4, "layer_type": "basic"}
_OPT: Kwargs = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 12}
_OPT |= {"max_position_embeddings": 40, "word_embed_proj_dim": 8}
_FOUR: Kwargs = {"hidden_sizes": [4, 6, 8, 8], "depths": [1, 1, 1, 1]}
_STAGES: Kwargs = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_SWIN: Kwargs = {"embed_dim": 4, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "hidden_act": "relu"}
_SWIN |= {"image_size": 32}
_TWO: Kwargs = {"hidden_sizes": [4, 6], "depths": [1, 1], "num_stages": 2, "hidden_act": "relu"}

FAMILIES: dict[str, Family] = {
    # vision
    "ResNet, basic": Family(
        "ResNet", {"embedding_size": 4, "hidden_sizes": [4, 6, 8], "depths": [2, 2, 1], "layer_type": "basic"}, "image"
    ),
    "ResNet, bottleneck": Family("ResNet", {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [2, 2]}, "image"),
    **{
        f"RegNet {kind}": Family(
            "RegNet",
            {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4, "layer_type": kind},
            "image",
        )
        for kind in "xy"
    },
    "RT-DETR backbone": Family(
        "RTDetrResNet",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
        "image",
        "RTDetrResNetBackbone",
    ),
    "BiT": Family("Bit", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_groups": 2}, "image"),
    "MobileNet v1": Family("MobileNetV1", {"depth_multiplier": 0.25, "min_depth": 4}, "image"),
    "MobileNet v2": Family("MobileNetV2", {"depth_multiplier": 0.25, "min_depth": 4, "depth_divisible_by": 4}, "image"),
    "EfficientNet": Family(
        "EfficientNet",
        {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_act": "relu", "hidden_dim": 256},
        "image",
    ),
    "ConvNeXt": Family("ConvNext", _TWO, "image"),
    "ConvNeXt v2": Family("ConvNextV2", _TWO, "image"),
    "FocalNet": Family(
        "FocalNet",
        {"embed_dim": 4, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "hidden_sizes": [4, 8]}
        | {"hidden_act": "relu", "image_size": 32},
        "image",
    ),
    "PoolFormer": _pyramid("PoolFormer", padding=[2, 1]),
    "PVT": _pyramid("Pvt", patch_sizes=[4, 2], sequence_reduction_ratios=[2, 1], image_size=32),
    "SegFormer": _pyramid("Segformer", model="SegformerForSemanticSegmentation", num_labels=3),
    "GLPN": _pyramid("GLPN", 4, "image 64", "GLPNForDepthEstimation", decoder_hidden_size=4, hidden_sizes=[4] * 4),
    "LeViT": Family(
        "Levit",
        {"image_size": 64, "hidden_sizes": [8, 12, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
        | {"key_dim": [4, 4, 4]},
        "image 64",
    ),
    "MobileViT": Family(
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [8] * 3, "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 8]}
        | {"num_attention_heads": 2, "hidden_act": "relu"},
        "image 64",
    ),
    "Swin": Family("Swin", _SWIN, "image"),
    "Swin v2": Family("Swinv2", _SWIN, "image"),
    **{name: _vit(name) for name in ("ViT", "DeiT", "Dinov2", "Beit", "ViTMAE")},
    "CLIP vision": _vit("CLIPVision", model="CLIPVisionModel"),
    "SigLIP vision": _vit("SiglipVision", model="SiglipVisionModel"),
    "VideoMAE": _vit("VideoMAE", "video", num_frames=2, tubelet_size=2),
    "ViTDet": _vit("VitDet", mlp_ratio=2),
    "SAM vision": _vit(
        "SamVision",
        model="SamVisionModel",
        output_channels=4,
        window_size=2,
        global_attn_indexes=[1],
        num_pos_feats=4,
        mlp_dim=12,
    ),
    "DPT": _vit(
        "DPT",
        model="DPTForDepthEstimation",
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4] * 4,
        fusion_hidden_size=4,
    ),
    "UPerNet": Family(
        "UperNet",
        {"backbone_config": _RESNET | _FOUR | _STAGES, "hidden_size": 4, "auxiliary_channels": 4}
        | {"auxiliary_in_channels": 8, "pool_scales": [1, 2], "num_labels": 3},
        "image 64",
        "UperNetForSemanticSegmentation",
    ),
    "DETR": Family(
        "Detr",
        {"backbone_config": _RESNET | {"hidden_sizes": [4, 8], "depths": [1, 1], "out_features": ["stage2"]}}
        | {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False, "d_model": 8}
        | {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "num_queries": 4},
        "image",
        "DetrForObjectDetection",
    ),
    "SuperPoint": Family(
        "SuperPoint",
        {"encoder_hidden_sizes": [4] * 4, "decoder_hidden_size": 4, "descriptor_decoder_dim": 4},
        "image",
        "SuperPointForKeypointDetection",
    ),
    # text encoders
    **{
        name: _encoder(name)
        for name in ("Bert", "Deberta", "DebertaV2", "MPNet", "Camembert", "XLMRoberta", "RoFormer", "LayoutLM")
    },
    **{name: _encoder(name) for name in ("Ernie", "FNet", "Yoso", "Mra", "Data2VecText", "MegatronBert", "Splinter")},
    "RoBERTa": _encoder("Roberta", pad_token_id=1),
    "ALBERT": _encoder("Albert", embedding_size=6),
    "ELECTRA": _encoder("Electra", embedding_size=6),
    "BERT generation": _encoder("BertGeneration"),
    "BigBird": _encoder("BigBird", attention_type="original_full"),
    "Longformer": _encoder("Longformer", attention_window=4),
    "Nystromformer": _encoder("Nystromformer", num_landmarks=2, segment_means_seq_len=2),
    "SqueezeBERT": _encoder(
        "SqueezeBert",
        embedding_size=8,
        **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention")},
        intermediate_groups=2,
        output_groups=2,
    ),
    "MobileBERT": _encoder("MobileBert", intra_bottleneck_size=8, embedding_size=8, true_hidden_size=8),
    "ConvBERT": _encoder("ConvBert", embedding_size=8, head_ratio=1, conv_kernel_size=3),
    "CANINE": _encoder(
        "Canine", num_hash_functions=2, num_hash_buckets=50, local_transformer_stride=2, downsampling_rate=2
    ),
    "RemBERT": _encoder("RemBert", input_embedding_size=8, output_embedding_size=8),
    "VisualBERT": _encoder("VisualBert", visual_embedding_dim=8),
    "TAPAS": _encoder("Tapas", type_vocab_sizes=[3, 4, 4, 2, 2, 2, 2]),
    "CLIP text": _encoder("CLIPText", eos_token_id=2)._replace(model="CLIPTextModel"),
    "ViLT": _encoder("Vilt", image_size=32, patch_size=8)._replace(inputs="both"),
    "DistilBERT": Family(
        "DistilBert",
        {"vocab_size": 50, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "activation": "relu"},
    ),
    "XLNet": Family(
        "XLNet", {"vocab_size": 50, "d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 12, "ff_activation": "relu"}
    ),
    "Funnel": Family(
        "Funnel",
        {"vocab_size": 50, "block_sizes": [1, 1], "block_repeats": [1, 1], "d_model": 8, "n_head": 2, "d_head": 4}
        | {"d_inner": 12, "hidden_act": "relu", "num_decoder_layers": 1},
        model="FunnelModel",
    ),
    "Reformer": Family(
        "Reformer",
        {"vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2, "attention_head_size": 4}
        | {"feed_forward_size": 12, "attn_layers": ["local", "local"], "axial_pos_embds": False, "hidden_act": "relu"}
        | {"local_attn_chunk_length": 4, "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0},
        "text8",
    ),
    **{
        name: Family(name, {"vocab_size": 50, "emb_dim": 8, "n_layers": 2, "n_heads": 2, "gelu_activation": False})
        for name in ("XLM", "Flaubert")
    },
    "Perceiver": Family(
        "Perceiver",
        {"num_latents": 4, "d_latents": 8, "d_model": 8, "num_blocks": 1, "num_self_attends_per_block": 2}
        | {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "hidden_act": "relu"},
        "vectors",
    ),
    # text decoders
    "OPT": Family("OPT", _OPT),
    "GPT-2": _gpt("GPT2"),
    "GPT-J": _gpt("GPTJ", rotary_dim=2),
    "GPT-BigCode": _gpt("GPTBigCode"),
    "CodeGen": _gpt("CodeGen", rotary_dim=2, n_head=4),
    "CTRL": _gpt("CTRL", dff=12, n_positions=40),
    "GPT-Neo": Family(
        "GPTNeo",
        {"vocab_size": 50, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "activation_function": "relu"}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "GPT-NeoX": _encoder("GPTNeoX"),
    "BioGPT": _encoder("BioGpt"),
    "Falcon": _encoder("Falcon", activation="relu"),
    "XGLM": Family(
        "XGLM",
        {"vocab_size": 50, "d_model": 8, "num_layers": 2, "attention_heads": 2, "ffn_dim": 12}
        | {"activation_function": "relu"},
    ),
    **{name: _llama(name) for name in ("Llama", "Mistral", "Qwen2", "Phi", "StableLm", "Starcoder2", "Cohere", "Olmo")},
    "Gemma": _llama("Gemma", hidden_activation="relu", head_dim=4),
    "Gemma 2": _llama("Gemma2", hidden_activation="relu", head_dim=4),
    "Phi-3": _llama("Phi3", pad_token_id=0),
    "Nemotron": _llama("Nemotron", hidden_act="relu2"),
    "Persimmon": _llama("Persimmon", hidden_act="relu2"),
    **{
        f"Mixtral, {how}": _llama("Mixtral", num_local_experts=3, experts_implementation=how)
        for how in ("eager", "batched_mm", "grouped_mm")
    },
    "OLMoE": _llama("Olmoe", num_experts=3, num_experts_per_tok=2),
    "Qwen2-MoE": _llama(
        "Qwen2Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "Mamba": Family(
        "Mamba", {"vocab_size": 50, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, "hidden_act": "relu"}
    ),
    "RWKV": Family(
        "Rwkv",
        {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "attention_hidden_size": 8}
        | {"intermediate_size": 12},
    ),
    # encoder and decoder
    **{name: _t5(name) for name in ("T5", "MT5", "UMT5")},
    "T5, gated": _t5("T5", feed_forward_proj="gated-relu"),
    "LongT5": _t5("LongT5", local_radius=3),
    "Switch": _t5("SwitchTransformers", num_experts=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    "NLLB-MoE": _seq2seq("NllbMoe", num_experts=3, encoder_sparse_step=2, decoder_sparse_step=2),
    **{
        name: _seq2seq(name)
        for name in ("Bart", "MBart", "Pegasus", "Marian", "M2M100", "Blenderbot", "BlenderbotSmall", "PLBart")
    },
    "Pegasus-X": _seq2seq("PegasusX", block_size=4, num_global_tokens=2),
    "LED": _seq2seq("LED", without=("max_position_embeddings",), attention_window=4),
    "FSMT": _seq2seq("FSMT", without=("vocab_size",), langs=["en", "de"], src_vocab_size=50, tgt_vocab_size=50),
    "ProphetNet": Family(
        "ProphetNet",
        {"vocab_size": 50, "hidden_size": 8, "num_encoder_layers": 1, "num_decoder_layers": 1}
        | {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "encoder_ffn_dim": 12}
        | {"decoder_ffn_dim": 12, "activation_function": "relu"},
        "pair",
    ),
    # sound, series, decisions
    "Speech2Text": _seq2seq(
        "Speech2Text",
        "frames",
        input_feat_per_channel=8,
        conv_channels=8,
        max_source_positions=60,
        max_target_positions=40,
    ),
    "Whisper": _seq2seq("Whisper", "mels", num_mel_bins=8, max_source_positions=10, max_target_positions=20),
    **{name: _wave(name) for name in ("Wav2Vec2", "Hubert", "WavLM")},
    "AST": _vit("AST", "spectrum", num_mel_bins=16, max_length=24),
    "SpeechT5": _seq2seq(
        "SpeechT5",
        "speech",
        hidden_size=8,
        hidden_act="relu",
        num_mel_bins=4,
        speech_decoder_prenet_units=4,
        speech_decoder_postnet_units=4,
        speech_decoder_postnet_layers=2,
        speaker_embedding_dim=4,
        positional_dropout=0.0,
    )._replace(model="SpeechT5ForTextToSpeech"),
    "VITS": Family(
        "Vits",
        {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 12}
        | {"flow_size": 8, "spectrogram_bins": 9, "hidden_act": "relu", "upsample_initial_channel": 16}
        | {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3]}
        | {"resblock_dilation_sizes": [[1, 1]], "duration_predictor_filter_channels": 8, "wavenet_dilation_rate": 1}
        | {"prior_encoder_num_wavenet_layers": 1, "posterior_encoder_num_wavenet_layers": 1}
        | {"use_stochastic_duration_prediction": False, "prior_encoder_num_flows": 1},
    ),
    "Time series transformer": Family(
        "TimeSeriesTransformer",
        {"prediction_length": 3, "context_length": 5, "lags_sequence": [1, 2], "d_model": 8, "encoder_layers": 1}
        | {"decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "activation_function": "relu"}
        | {"num_time_features": 1},
        "future",
    ),
    "PatchTST": Family(
        "PatchTST",
        {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 8}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 12, "activation_function": "relu"},
        "series",
    ),
    "Decision transformer": Family(
        "DecisionTransformer",
        {"state_dim": 3, "act_dim": 2, "hidden_size": 8, "n_layer": 2, "n_head": 2, "max_ep_len": 20},
        "decisions",
    ),
}
