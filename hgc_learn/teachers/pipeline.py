"""The parts of a teacher: a small `StableDiffusionControlNetPipeline`, shaped like SD1.5."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hgc_learn.demo.scenes import COLORS, CONNECTIVES, IMAGE_SIZE, KINDS, TEMPLATES

SCENE_WORDS = sorted({*KINDS, *COLORS, *CONNECTIVES, "an", *" ".join(TEMPLATES).replace("{}", "").split()})
SCENE_ALPHABET = [*"abcdefghijklmnopqrstuvwxyz", ","]
MAX_TOKENS = 16  # the longest caption has 14 words and commas, plus start and end
HIDDEN_SIZE = 64  # of the text encoder
LATENT_CHANNELS = 4
LATENT_SIZE = IMAGE_SIZE // 4
BLOCK_CHANNELS = (32, 64, 128, 128)
LAYERS_PER_BLOCK = 2
NUM_HEADS = (2, 4, 8, 8)  # 16 channels per head; the UNet calls this attention_head_dim, as SD1.5 does
SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}
ZERO_CONVOLUTION_STD = 0.05
GUIDANCE_SCALE = 7.5  # as for SD1.5; lower values obey as well but hardly bend the sampler's path


def build_tokenizer(
    words: Iterable[str] = SCENE_WORDS, alphabet: Sequence[str] = SCENE_ALPHABET, max_tokens: int = MAX_TOKENS
) -> CLIPTokenizer:
    """A CLIP tokenizer in which every one of `words` is one token; other words fall apart into letters of the
    `alphabet`."""
    bpe = BpeTokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=[*alphabet], end_of_word_suffix="</w>",
        continuing_subword_prefix="", show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([*words, *alphabet], trainer)
    merges = [tuple(merge) for merge in _merges(bpe)]
    vocabulary = sorted(bpe.get_vocab(), key=lambda token: (len(token), token))
    known = set(vocabulary)
    vocabulary += [f"{letter}</w>" for letter in alphabet if f"{letter}</w>" not in known]
    ids = {token: index for index, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_tokens)


def build_caption_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the captions is one token and the longest caption fits, up to CLIP's own
    77 tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    rules = build_tokenizer([], alphabet).backend_tokenizer
    parts = [
        [word for word, _ in rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(caption))]
        for caption in captions
    ]
    max_tokens = min(77, 2 + max(map(len, parts)))  # with start and end
    return build_tokenizer(sorted({word for words in parts for word in words}), alphabet, max_tokens)


def _merges(bpe: BpeTokenizer) -> Iterable[list[str]]:
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder for the given tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=2 * HIDDEN_SIZE,
            projection_dim=HIDDEN_SIZE,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """An autoencoder [B, 3, 64, 64] in [-1, 1] <-> [B, 4, 16, 16]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        force_upcast=False,
    )


def build_unet(
    block_out_channels: tuple[int, ...] = BLOCK_CHANNELS, layers_per_block: int = LAYERS_PER_BLOCK
) -> UNet2DConditionModel:
    """The denoiser: SD1.5's four levels, with two layers each and at a tenth of its width unless others are asked
    for."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=NUM_HEADS,
        norm_num_groups=8,
    )


def build_controlnet(
    block_out_channels: tuple[int, ...] = BLOCK_CHANNELS, layers_per_block: int = LAYERS_PER_BLOCK
) -> ControlNetModel:
    """The ControlNet of such a UNet, to be trained together with the UNet and not as a frozen UNet's copy.

    Its zero convolutions and the last layer of the condition embedding start small instead of at zero. Zero is for
    leaving a trained UNet unharmed; beside an untrained one it only keeps the control from being learned.
    """
    controlnet = ControlNetModel(
        in_channels=LATENT_CHANNELS,
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=NUM_HEADS,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(16, 32, 64),
    )
    for convolution in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        nn.init.normal_(convolution.weight, std=ZERO_CONVOLUTION_STD)
    controlnet.controlnet_cond_embedding.conv_out.reset_parameters()
    return controlnet


def build_pipeline(
    *,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
) -> StableDiffusionControlNetPipeline:
    """Put the parts together, without a safety checker (the teacher draws only what its few training pictures show) and
    without progress bars."""
    pipeline = StableDiffusionControlNetPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        controlnet=controlnet,
        scheduler=UniPCMultistepScheduler(**SCHEDULER_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids of the captions, padded: int64 [len(captions), tokenizer.model_max_length]."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
