"""The `README.md` of a checkpoint: what was done to the model, how to load it, what was measured."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"
_SIGNED = re.compile(r"\n<!-- written by sparing\.save, sha256 ([0-9a-f]{64}) -->\n\Z")


def write_card(
    folder: Path,
    earlier: Path,
    *,
    name: str,
    base: Mapping[str, str],
    policies: Sequence[str],
    figures: Mapping[str, Any],
) -> None:
    """Write the card; beside the owner's `README.md`, if the earlier folder has one that was written or edited by hand."""
    text = card(name=name, base=base, policies=policies, figures=figures)
    text += f"\n<!-- written by sparing.save, sha256 {_digest(text)} -->\n"
    # The name under which it goes beside somebody else's; that one is then carried over with the rest of the folder.
    (folder / (CARD if _is_ours(earlier / CARD) else "README.sparing.md")).write_text(text, encoding="utf-8")


def card(*, name: str, base: Mapping[str, str], policies: Sequence[str], figures: Mapping[str, Any]) -> str:
    """The text of a card.

    Args:
        name: of the checkpoint.
        base: `license` and `base_model`, as far as they are known.
        policies: as constructed; none for an ordinary checkpoint.
        figures: what was measured, by name.
    """
    front = {"library_name": "sparing" if policies else "transformers", **base, "tags": ["sparing"]}
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", ""]
    lines += [f"# {name}", ""]
    of = f" of `{base['base_model']}`" if "base_model" in base else ""
    if policies:
        lines += [f"The weights{of}, with the policies that the model follows:", ""]
        lines += [f"- `{policy}`" for policy in policies]
        lines += [
            "",
            "Stock `from_pretrained` refuses this folder: without its policies it would be another model.",
            "",
        ]
        lines += ["```python", "import sparing", "", f'model, processor = sparing.load("{name}")']
        lines += ["out = model.generate(**inputs)      # follows the policies", "```", ""]
        lines += ["`sparing.release(model)` takes them off, and returns them.", ""]
    else:
        lines += [f"An ordinary Hugging Face checkpoint{of}, saved by sparing.", ""]
        lines += ["```python", "import sparing", "", f'model, processor = sparing.load("{name}")', "```", ""]
    if figures:
        lines += ["## Measured", "", "| figure | value |", "| --- | --- |"]
        lines += [
            f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
            for key, value in figures.items()
        ]
        lines += [""]
    return "\n".join(lines)


def base_of(model: Any, license: str | None) -> dict[str, str]:
    """`license` and `base_model`, from the argument, the hub id, or the card of the folder that the model was loaded from."""
    origin = str(getattr(model, "name_or_path", "") or "")
    found: dict[str, str] = {}
    if (Path(origin) / CARD).is_file() and origin:
        front = re.match(
            r"---\n(.*?)\n---", (Path(origin) / CARD).read_text(encoding="utf-8", errors="replace"), re.DOTALL
        )
        for line in front.group(1).splitlines() if front else ():
            key, _, value = line.partition(":")
            if key in ("license", "base_model") and (value := value.strip().strip("\"'")):
                found[key] = value
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", origin) and not Path(origin).exists():
        found["base_model"] = origin
    if license is not None:
        found["license"] = license
    return found


def _is_ours(path: Path) -> bool:
    """Whether there is nothing, or what sparing wrote and nobody has touched since."""
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    signed = _SIGNED.search(text)
    return signed is not None and signed.group(1) == _digest(text[: signed.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
