"""`ask`: questions about pictures as a model takes them, through its own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image
from torch import Tensor, nn

from sparing.anatomy.registry import anatomy_of


def question_prompt(processor: Any, question: str, pictures: int) -> str:
    """The text of a prompt with its pictures first: by the chat template, else placeholders and the question."""
    if not getattr(processor, "chat_template", None):
        return f"{getattr(processor, 'image_token', '<image>')}\n" * pictures + question
    return processor.apply_chat_template([user_turn(question, pictures)], add_generation_prompt=True)


def user_turn(question: str, pictures: int) -> dict[str, Any]:
    """A turn of a chat: pictures, then the question."""
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
    return {"role": "user", "content": content}


def processed(
    processor: Any, prompts: Sequence[str], pictures: Sequence[Sequence[Image]], **more: Any
) -> Mapping[str, Any]:
    """What the processor makes of prompts, a batch; `more` goes to it (padding)."""
    given: dict[str, Any] = {"text": list(prompts), "return_tensors": "pt", **more}
    bos = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
    if bos and all(prompt.startswith(bos) for prompt in prompts):
        # The template has written the begin token already.
        given["add_special_tokens"] = False
    if any(pictures):
        given["images"] = [list(row) for row in pictures]
    return processor(**given)


def ask(
    model: nn.Module, processor: Any, questions: Sequence[str], pictures: Sequence[Sequence[Image]]
) -> dict[str, Tensor]:
    """Builds a batch of prompts, padded on the left: pictures in front, then the question.

    The processor's chat template writes the prompt where there is one; otherwise it is one image token a picture and the question.

    Args:
        model: a Hugging Face model of a known family; the batch goes to its device, pixels in its precision.
        processor: its own processor; it is left as it is.
        questions: one a row. Image tokens do not belong in them: they are put in front.
        pictures: the pictures of each row, in order; empty for a row of text alone. Rows with and without do not mix.

    Raises:
        ValueError: a model or processor without pictures, a question with an image token of its own, rows of both kinds, or a
            prompt that is longer than the model's positions.
    """
    anatomy: Any = anatomy_of(model)
    if anatomy.vision_encoder is None:
        raise ValueError(f"{anatomy.config.model_type} reads text alone: choose a vision-language model")
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            "the checkpoint has no processor for pictures: save it there with processor.save_pretrained(...)"
        )
    if len(questions) != len(pictures):
        raise ValueError(
            f"expected pictures for each of the {len(questions)} questions, got {len(pictures)} rows of them"
        )
    if len({bool(row) for row in pictures}) > 1:
        raise ValueError("rows with pictures and rows without go apart: processors do not mix them")
    sign = getattr(processor, "image_token", "<image>")
    if strange := next((question for question in questions if sign in question), None):
        raise ValueError(f"{sign!r} stands in the question {strange[:60]!r}: leave it out, pictures are put in front")
    texts = [question_prompt(processor, question, len(row)) for question, row in zip(questions, pictures, strict=True)]
    made = processed(
        processor,
        texts,
        [[picture.convert("RGB") for picture in row] for row in pictures],
        padding=True,
        padding_side="left",
    )
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    found = {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in made.items()
        if isinstance(tensor, Tensor)
    }
    length, room = found["input_ids"].shape[1], anatomy.text_config.max_position_embeddings
    if length > room:
        raise ValueError(
            f"a prompt of {length} tokens, its pictures included, does not fit into the model's {room}: "
            "shorten the question, or use fewer or smaller pictures"
        )
    return found
