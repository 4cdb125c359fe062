"""Questions about pictures as a model's own processor puts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from sparing.anatomy import anatomy_of, processed, question_prompt, user_turn
from sparing.execute.batches import split_rows


class PicturePrompts:
    """Makes a vision model's inputs from questions and answers.

    Args:
        model: a Hugging Face model.
        processor: its own processor.

    Raises:
        ValueError: the model sees no pictures, or there is no processor that takes any.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.family = anatomy_of(model)
        if self.family.vision_encoder is None:
            raise ValueError(
                f"this model sees no pictures (its family, {self.family.config.model_type}, reads text): profile it with "
                "--text FILE, or name a vision-language model"
            )
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(
                "the checkpoint has no processor that takes pictures: save it there with processor.save_pretrained(directory)"
            )
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.vocabulary = self.family.shape().vocabulary
        self.longest: int = getattr(self.family.text_config, "max_position_embeddings", None) or 1 << 20

    def encode(self, question: str, pictures: Sequence[Image], place: str) -> dict[str, Tensor]:
        """A prompt as a batch of one, on the CPU, floats in the model's dtype.

        Raises:
            ValueError: the processor refuses it, the words hold a placeholder of pictures, or ids that the model lacks.
        """
        self.check_words(question, f"{place}: the question")
        try:
            prompt = question_prompt(self.processor, question, len(pictures))
            made = processed(self.processor, [prompt], [pictures])
            row = {name: value for name, value in made.items() if isinstance(value, Tensor)}
            row = split_rows(self.model, row)[0]
        except Exception as error:  # a processor is other people's code
            line = " ".join(str(error).split())[:300]
            raise ValueError(f"{place}: the processor makes nothing of it that the model reads: {line}") from error
        if int(row["input_ids"].max()) >= self.vocabulary:
            raise ValueError(
                "the processor has tokens that the model does not know: they belong to different checkpoints"
            )
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in row.items()}

    def is_image(self, token: int) -> bool:
        """Whether a token stands for a part of a picture."""
        found = self.family.is_image_token(torch.tensor([[token]]))
        return found is not None and bool(found.any())

    def check_words(self, text: str, what: str) -> None:
        """Refuse words that stand for a picture.

        Raises:
            ValueError: see above.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        token = getattr(self.processor, "image_token", None) or "<image>"
        if token in text or any(map(self.is_image, ids)):
            raise ValueError(
                f"{what} has the placeholder of a picture in it ({token}): take it out, pictures are put before the question"
            )

    def check_length(self, tokens: int, place: str) -> None:
        """Refuse a prompt that is longer than the model's positions.

        Raises:
            ValueError: see above.
        """
        if tokens > self.longest:
            raise ValueError(
                f"{place}: with its pictures and its answer the prompt has {tokens} tokens, and the model has "
                f"{self.longest} positions: give fewer or smaller pictures, or shorter words"
            )

    def answer_ids(self, question: str, pictures: int, answer: str) -> list[int]:
        """The tokens of an answer where it follows the prompt, without an end token."""
        prompt = question_prompt(self.processor, question, pictures)
        text = self._between(question, pictures, prompt, answer) + answer

        def ids_of(words: str) -> list[int]:
            return self.tokenizer(words, add_special_tokens=False, verbose=False).input_ids

        # Together with what stands before it: many tokenizers write a word's space into its first token.
        before, whole = ids_of(prompt), ids_of(prompt + text)
        return whole[len(before) :] if whole[: len(before)] == before else ids_of(text)

    def _between(self, question: str, pictures: int, prompt: str, answer: str) -> str:
        """The space between a prompt and its answer: as the template writes it, else one where there is none yet."""
        if getattr(self.processor, "chat_template", None):
            turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            chat = self.processor.apply_chat_template([user_turn(question, pictures), turn])
            between, found, _ = chat.removeprefix(prompt).partition(answer)
            if chat.startswith(prompt) and found and not between.strip():
                return between
        return "" if prompt[-1:].isspace() else " "


def with_answer(row: dict[str, Tensor], answer: Sequence[int]) -> dict[str, Tensor]:
    """A prompt followed by the tokens of its answer."""
    found = dict(row)
    more = torch.tensor([list(answer)], dtype=torch.long)
    for name, value in row.items():
        if name == "input_ids":
            found[name] = torch.cat([value, more], dim=1)
        elif name == "attention_mask":
            found[name] = torch.cat([value, torch.ones_like(more)], dim=1)
        elif name == "mm_token_type_ids":
            found[name] = torch.cat([value, torch.zeros_like(more)], dim=1)
        elif name == "position_ids":
            found[name] = torch.arange(value.shape[1] + more.shape[1]).unsqueeze(0)
    return found
