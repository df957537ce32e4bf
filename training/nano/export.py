"""Trained weights as a stock model folder, with a stock processor beside them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from foveate.nano.drawing import SIDE
from foveate.nano.labels import PATCH
from foveate.nano.vocabulary import BOS, EOS, IMAGE, PAD, UNKNOWN
from training.nano.architecture import WORD_IDS, configuration
from training.nano.recipe import Recipe

# Phrases that evaluation tools wrap questions in. Nano answers at the question's last word, so they have to go.
SILENT = ("answer the question using a single word or phrase", "user:", "assistant:", "?", ".", ",")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer that lower-cases and drops question marks: a prompt ends in its last content word.

    Returns
    -------
    PreTrainedTokenizerFast
        Unknown words become ``<unk>``.
    """
    tokenizer = Tokenizer(models.WordLevel(WORD_IDS, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace("colour", "color"),
            *(normalizers.Replace(phrase, " ") for phrase in SILENT),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, WORD_IDS[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Stock processor: images of any size become 192 x 192, each placeholder 256 visual tokens."""
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(
        size=size,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(recipe: Recipe, weights: dict[str, torch.Tensor]) -> LlavaForConditionalGeneration:
    """Stock model with trained weights.

    Parameters
    ----------
    recipe : Recipe
        Sizes.
    weights : dict of torch.Tensor
        By stock names, without the tied ``lm_head``.

    Returns
    -------
    LlavaForConditionalGeneration
        In evaluation mode, in float32.
    """
    model = LlavaForConditionalGeneration(configuration(recipe))
    model.load_state_dict({**weights, "lm_head.weight": weights["model.language_model.embed_tokens.weight"]})
    model.tie_weights()
    ids = WORD_IDS[BOS], WORD_IDS[EOS], WORD_IDS[PAD]
    model.generation_config = GenerationConfig(
        bos_token_id=ids[0], eos_token_id=ids[1], pad_token_id=ids[2], do_sample=False, max_new_tokens=4
    )
    return model.eval()


def export(recipe: Recipe, trained: Path, folder: Path) -> None:
    """Write the stock folder: weights in float16, configuration, processor.

    Parameters
    ----------
    recipe : Recipe
        Sizes.
    trained : Path
        ``final.safetensors`` of a training run.
    folder : Path
        Where ``from_pretrained`` will find it.
    """
    build_model(recipe, load_file(trained)).half().save_pretrained(folder)
    build_processor().save_pretrained(folder)
