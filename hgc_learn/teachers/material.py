"""What a teacher is trained on: drawn scenes, or the photographs of an imagefolder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from hgc_learn.demo.scenes import COLORS, KINDS, SceneDataset
from hgc_learn.teachers.data import draw_training_scenes
from hgc_learn.teachers.modules import CaptionModule, DenoiserModule, SceneDenoiserModule, WordsModule
from hgc_learn.teachers.photographs import PhotographDataset, Photographs, cut_photographs
from hgc_learn.teachers.pipeline import build_caption_tokenizer, build_tokenizer


class Material(ABC):
    """What the stages of the training ask of it.

    Attributes:
        controls: name of the file of the controls.
        turned: whether the autoencoder sees pictures on their sides too.
        denoiser: module of the last stage.
    """

    controls: ClassVar[str]
    turned: ClassVar[bool]
    denoiser: ClassVar[type[DenoiserModule]]

    @abstractmethod
    def prepare(self, folder: Path, num_pictures: int) -> None:
        """Write pictures, controls and captions into `folder`, unless they are there."""

    @abstractmethod
    def tokenizer(self, captions: Sequence[str]) -> CLIPTokenizer:
        """In which every word of the captions is one token."""

    @abstractmethod
    def text_stage(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> CaptionModule | WordsModule:
        """The module that pretrains the text encoder."""

    @abstractmethod
    def validation(self, num_pictures: int) -> Dataset[dict[str, Any]]:
        """Held-out samples, at most so many."""


class SceneMaterial(Material):
    """Scenes of `hgc_learn.demo.scenes`."""

    controls, turned, denoiser = "label_maps", True, SceneDenoiserModule

    def prepare(self, folder: Path, num_pictures: int) -> None:
        draw_training_scenes(folder, num_pictures)

    def tokenizer(self, captions: Sequence[str]) -> CLIPTokenizer:
        return build_tokenizer()

    def text_stage(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> CaptionModule:
        vocabulary = tokenizer.get_vocab()
        nouns, colors = ([vocabulary[f"{word}</w>"] for word in words] for words in (KINDS, COLORS))
        return CaptionModule(text_encoder, nouns, colors)

    def validation(self, num_pictures: int) -> Dataset[dict[str, Any]]:
        return SceneDataset("validation", num_pictures)


@dataclass(frozen=True)
class PhotographMaterial(Material):
    """Photographs, those to train on and held-out ones."""

    controls: ClassVar[str] = "controls"
    turned: ClassVar[bool] = False
    denoiser: ClassVar[type[DenoiserModule]] = DenoiserModule
    train: Photographs
    held_out: Photographs

    def prepare(self, folder: Path, num_pictures: int) -> None:
        cut_photographs(self.train, folder, num_pictures)

    def tokenizer(self, captions: Sequence[str]) -> CLIPTokenizer:
        return build_caption_tokenizer(captions)

    def text_stage(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> WordsModule:
        return WordsModule(text_encoder)

    def validation(self, num_pictures: int) -> Dataset[dict[str, Any]]:
        return PhotographDataset(self.held_out, num_pictures)
