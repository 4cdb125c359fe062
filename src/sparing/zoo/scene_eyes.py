"""`Eyes`: how a family of vision-language models turns a picture of patches into the tokens of a prompt."""

import abc
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from sparing.anatomy.pictures_only import NoVideos, pictures_only
from sparing.worlds.grids import GridWorld
from sparing.worlds.vocabulary import closed_tokenizer
from sparing.zoo.scene_recipe import SceneRecipe

CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# Pixels go from 0..255 to -1..1.
HALF: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class Eyes(abc.ABC):
    """What training on scenes has to know of a family. Pictures are one tile of the encoder's size, patches in reading order.

    Args:
        recipe: of the model.
        world: whose words and patches they are.

    Attributes:
        around: tokens that the processor writes before a picture's own, and behind them.
        encoder: what the encoder is, in words.
        told: how a picture lies in a prompt, in words.
        filled: what an object fills, in words.
    """

    around: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    encoder: str
    told: str
    filled = "one of the encoder's patches"

    def __init__(self, recipe: SceneRecipe, world: GridWorld):
        self.recipe = recipe
        self.side: int = recipe.config["vision_config"]["image_size"]
        self.grid: tuple[int, int] = world.spec.rows, world.spec.columns
        self.longest: int = recipe.config["text_config"]["max_position_embeddings"]
        self.words = world.vocabulary()

    @abc.abstractmethod
    def processor(self) -> Any:
        """Builds the processor: pictures of the encoder's size, words of the world."""

    @abc.abstractmethod
    def config(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the model's config says of pictures, beside the recipe's fields."""

    @property
    def width(self) -> int:
        """How wide is what the projector reads of a patch."""
        return self.recipe.config["vision_config"]["hidden_size"]

    @property
    def number(self) -> int:
        """Tokens of a picture."""
        return self.grid[0] * self.grid[1]

    def places(self) -> Int[Tensor, " p"]:
        """Which of a picture's tokens each patch is."""
        return torch.arange(self.grid[0] * self.grid[1])

    @abc.abstractmethod
    def seen(self, inner: Any, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p e"]:
        """What the projector reads of each patch. `inner` is the model without its head."""

    def laid_out(self, inner: Any, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b n d"]:
        """A picture's tokens, from what the projector made of its patches."""
        return patches


class LlavaEyes(Eyes):
    """LLaVA-1.5: a patch a token; the encoder's class token is dropped."""

    encoder = "CLIP-style encoder"
    told = "100 visual tokens a picture, in reading order: patch (row, column) is token 10 row + column. The class token is dropped."

    def processor(self) -> LlavaProcessor:
        """As in `Eyes`."""
        return LlavaProcessor(
            image_processor=CLIPImageProcessorPil(
                size={"shortest_edge": self.side}, crop_size={"height": self.side, "width": self.side}, **HALF
            ),
            tokenizer=closed_tokenizer(self.words, ["<image>"], self.longest),
            patch_size=self.recipe.config["vision_config"]["patch_size"],
            vision_feature_select_strategy=self.recipe.config["vision_feature_select_strategy"],
            # The class token, which the strategy `default` drops again.
            num_additional_image_tokens=1,
            chat_template=CHAT,
        )

    def config(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """As in `Eyes`."""
        return {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}

    def seen(self, inner: Any, pixels: Tensor) -> Tensor:
        """As in `Eyes`: the encoder's last layer, which the model's configuration selects."""
        return inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


class OnevisionEyes(Eyes):
    """LLaVA-OneVision: an overview, then the one tile with a newline token behind each of its rows; both show the same."""

    encoder = "SigLIP-style encoder"
    told = (
        "210 visual tokens a picture: an overview of 100 in reading order, then the one tile, the same 100 with a newline token\n"
        "  behind each row."
    )

    def processor(self) -> Any:
        """As in `Eyes`."""
        size = {"height": self.side, "width": self.side}
        return pictures_only(LlavaOnevisionProcessor)(
            LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[self.side] * 2], **HALF),
            closed_tokenizer(self.words, ["<image>", "<video>"], self.longest),
            NoVideos({"video_processor_type": "LlavaOnevisionVideoProcessor", "size": size}),
            num_image_tokens=self.grid[0] * self.grid[1],
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            chat_template=CHAT,
        )

    def config(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """As in `Eyes`."""
        image, video = (tokenizer.convert_tokens_to_ids(word) for word in ("<image>", "<video>"))
        return {"image_token_index": image, "video_token_index": video, "image_grid_pinpoints": [[self.side] * 2]}

    @property
    def number(self) -> int:
        """As in `Eyes`: overview, tile and newlines."""
        rows, columns = self.grid
        return rows * columns + rows * (columns + 1)

    def places(self) -> Tensor:
        """As in `Eyes`: those of the tile."""
        rows, columns = self.grid
        at = torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns)
        return rows * columns + at.flatten()

    def seen(self, inner: Any, pixels: Tensor) -> Tensor:
        """As in `Eyes`: this encoder has no class token."""
        return inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]

    def laid_out(self, inner: Any, patches: Tensor) -> Tensor:
        """As in `Eyes`."""
        rows = patches.unflatten(1, self.grid)
        newline = inner.image_newline.to(patches).expand(len(rows), self.grid[0], 1, -1)
        return torch.cat([patches, torch.cat([rows, newline], 2).flatten(1, 2)], 1)


class InternVLEyes(Eyes):
    """InternVL: two by two of the encoder's patches are shuffled into one token, between two marks."""

    encoder = "InternViT-style encoder"
    filled = "the four patches of one visual token"
    told = "100 visual tokens a picture, in reading order, between `<img>` and `</img>`: each is four of the encoder's patches."

    around = (("<img>",), ("</img>",))

    def processor(self) -> Any:
        """As in `Eyes`."""
        size = {"height": self.side, "width": self.side}
        named = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<image>",
            "video_token": "<video>",
        }
        return pictures_only(InternVLProcessor)(
            GotOcr2ImageProcessorPil(size=size, crop_to_patches=False, **HALF),
            closed_tokenizer(self.words, named, self.longest),
            NoVideos({"video_processor_type": "InternVLVideoProcessor", "size": size}),
            image_seq_length=self.number,
            chat_template=CHAT,
        )

    def config(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """As in `Eyes`."""
        return {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "image_seq_length": self.number}

    @property
    def width(self) -> int:
        """As in `Eyes`: four patches."""
        return 4 * super().width

    def seen(self, inner: Any, pixels: Tensor) -> Tensor:
        """As in `Eyes`: after the shuffle."""
        patches = inner.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        return inner.pixel_shuffle(patches.unflatten(1, (side, side)), scale_factor=0.5).flatten(1, 2)


FAMILIES: dict[str, type[Eyes]] = {"llava": LlavaEyes, "llava_onevision": OnevisionEyes, "internvl": InternVLEyes}


def eyes_of(recipe: SceneRecipe, world: GridWorld) -> Eyes:
    """The eyes of a recipe's family.

    Raises:
        ValueError: none are known.
    """
    if recipe.model_type not in FAMILIES:
        raise ValueError(
            f"expected one of {', '.join(FAMILIES)} to look at scenes, got {recipe.model_type}: add its Eyes"
        )
    return FAMILIES[recipe.model_type](recipe, world)
