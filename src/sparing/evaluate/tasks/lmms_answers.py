"""What lmms-eval's requests ask for, without lmms-eval: conversations as chat templates take them, and settings of generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparing.evaluate.task import NotApplicable

# What lmms-eval's own models write at most where a task does not say.
MAX_NEW_TOKENS = 1024


def turns_of_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A task's messages, as chat templates take them: a picture's `url` is the picture.

    Raises:
        NotApplicable: a message holds something other than pictures and texts.
    """
    return [
        {"role": message["role"], "content": [_content(content) for content in message["content"]]}
        for message in messages
    ]


def turns_of_visuals(visuals: Any, text: str) -> list[dict[str, Any]]:
    """One turn: a document's pictures, if any, and the text after them.

    Raises:
        NotApplicable: one of them is no picture.
    """
    pictures = [_content({"type": "image", "url": visual}) for visual in visuals or ()]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def _content(content: Mapping[str, Any]) -> dict[str, Any]:
    from PIL import Image

    if content["type"] == "text":
        return {"type": "text", "text": content["text"]}
    if content["type"] == "image":
        picture = content.get("url", content.get("image"))
        if isinstance(picture, str) and not picture.startswith(("http:", "https:", "data:")):
            try:
                picture = Image.open(picture)
            except OSError as error:
                raise NotApplicable(f"a document's picture cannot be read: {picture}") from error
        if isinstance(picture, Image.Image):
            # Palettes, grey and transparent pictures: what a document holds, no processor wants.
            return {"type": "image", "image": picture.convert("RGB")}
    raise NotApplicable("the task shows something other than pictures and texts, which this adapter does not pass on")


def generation_settings(given: Mapping[str, Any], max_new_tokens: int | None = None) -> dict[str, Any]:
    """A request's settings of generation, as `PictureAnswers.write` takes them.

    Args:
        given: lmms-eval's `generation_kwargs`. What speaks of pictures there is for models with code of their own.
        max_new_tokens: in place of the task's.

    Raises:
        NotApplicable: the task wants beams.
    """
    if (given.get("num_beams") or 1) != 1:
        raise NotApplicable(
            f"the task searches with num_beams={given['num_beams']}; policies decide for one answer a row"
        )
    until = given.get("until") or ()
    temperature = given.get("temperature")
    sampling: dict[str, Any] = {}
    # Like lmms-eval's models: without a temperature above 0 all is greedy.
    if temperature is not None and temperature > 0 and given.get("do_sample", True):
        sampling = {"do_sample": True, "temperature": float(temperature), "top_k": 0}
        if given.get("top_p") is not None:
            sampling["top_p"] = float(given["top_p"])
    return {
        "max_new_tokens": max_new_tokens
        or int(given.get("max_new_tokens") or given.get("max_gen_toks") or MAX_NEW_TOKENS),
        "stop": tuple(text for text in ((until,) if isinstance(until, str) else until) if text),
        "sampling": sampling,
    }
