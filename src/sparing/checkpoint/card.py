"""The `README.md` of a checkpoint: what was done to the model, how to load it, what it costs, what was measured."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from sparing.checkpoint.counted import Counted, of_bytes, table

CARD = "README.md"
LONGEST = 400
"""Characters of a text that others wrote."""
_SIGNED = re.compile(r"\n<!-- written by sparing\.save, sha256 ([0-9a-f]{64}) -->\n\Z")


def write_card(
    folder: Path,
    earlier: Path,
    *,
    name: str,
    base: Mapping[str, Any],
    policies: Sequence[str],
    counted: Counted,
    figures: Mapping[str, Any],
) -> None:
    """Write the card; beside the owner's `README.md`, if the earlier folder has one that was written or edited by hand."""
    text = card(name=name, base=base, policies=policies, counted=counted, figures=figures)
    text += f"\n<!-- written by sparing.save, sha256 {_digest(text)} -->\n"
    # The name under which it goes beside somebody else's; that one is then carried over with the rest of the folder.
    (folder / (CARD if _is_ours(earlier / CARD) else "README.sparing.md")).write_text(text, encoding="utf-8")


def card(
    *,
    name: str,
    base: Mapping[str, Any],
    policies: Sequence[str],
    counted: Counted,
    figures: Mapping[str, Any],
) -> str:
    """The text of a card; what others wrote (names, arguments, figures) stays text in it.

    Args:
        name: of the checkpoint.
        base: `license`, `base_model`, `pipeline_tag` and `tags`, as far as they are known.
        policies: as constructed; none for an ordinary checkpoint.
        counted: its sizes, and what its plan costs.
        figures: what was measured, by name.
    """
    kinds = sorted({_plain(policy).partition("(")[0] for policy in policies})
    front = {"library_name": "sparing" if policies else "transformers", **base}
    front["tags"] = ["sparing", *base.get("tags", ()), *(kind.lower() for kind in kinds)]
    lines = ["---", *(f"{key}: {_yaml(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {_markdown(name)}", ""]
    of = f" of {_code(str(base['base_model']))}" if isinstance(base.get("base_model"), str) else ""
    call = f"model, processor = sparing.load({json.dumps(_plain(name), ensure_ascii=False)})"
    if policies:
        lines += [f"The weights{of}, with the policies that the model follows:", ""]
        lines += [f"- {_code(policy)}" for policy in policies]
        lines += [
            "",
            "Stock `from_pretrained` refuses this folder: without its policies it would be another model.",
            "",
        ]
        lines += ["```python", "import sparing", "", call]
        lines += ["out = model.generate(**inputs)      # follows the policies", "```", ""]
        lines += ["`sparing.release(model)` takes them off, and returns them.", ""]
    else:
        lines += [f"An ordinary Hugging Face checkpoint{of}, saved by sparing.", ""]
        lines += ["```python", "import sparing", "", call, "```", ""]
    lines += _costs(counted)
    if figures:
        lines += ["## Measured", "", "| figure | value |", "| --- | --- |"]
        lines += [
            f"| {_markdown(key)} | {f'{value:.4g}' if isinstance(value, float) else _markdown(value)} |"
            for key, value in figures.items()
        ]
        lines += [""]
    return "\n".join(lines)


def _costs(counted: Counted) -> list[str]:
    """What is known without a measurement."""
    lines = ["## What it computes", ""]
    policies = f", and {counted.policy_parameters:,} of the policies" if counted.policy_parameters else ""
    lines += [f"{counted.parameters:,} parameters{policies}.", ""]
    if counted.reason:
        lines += [f"What the plan costs was not counted: {_markdown(counted.reason)}.", ""]
    if rows := table(counted):
        lines += [
            f"Counted from the plan, not timed: the decoder on {counted.prompt}, then while decoding.",
            "",
            "| part | prefill FLOPs | of dense | decode FLOPs | of dense |",
            "| --- | --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
        size, share = of_bytes(counted)
        lines += [f"Keys and values at the end: {size:,} bytes, {share} of dense.", ""]
    return lines


def base_of(model: Any, license: str | None, *, vision: bool) -> dict[str, Any]:
    """Licence, base model, task and family: from the argument, the hub id, or the card of the folder that the model came from."""
    origin = str(getattr(model, "name_or_path", "") or "")
    found: dict[str, Any] = {}
    if origin and (Path(origin) / CARD).is_file():
        try:
            front = metadata_load(Path(origin) / CARD) or {}
        except (OSError, ValueError, yaml.YAMLError):
            front = {}
        for key in ("license", "license_name", "license_link", "base_model", "language"):
            value = front.get(key)
            if value and (
                isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
            ):
                found[key] = value
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", origin) and not Path(origin).exists():
        found["base_model"] = origin
    if license is not None:
        found = {key: value for key, value in found.items() if not key.startswith("license")} | {"license": license}
    found["pipeline_tag"] = "image-text-to-text" if vision else "text-generation"
    found["tags"] = [str(model.config.model_type)]
    return found


def _plain(value: Any) -> str:
    """One printable line of bounded length."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _yaml(value: Any) -> str:
    """A value for the front matter: JSON is YAML, once nothing unprintable is left."""
    plain = [_plain(v) for v in value] if isinstance(value, (list, tuple)) else _plain(value)
    return json.dumps(plain, ensure_ascii=False)


def _markdown(value: Any) -> str:
    """Text that is neither mark-up, nor HTML, nor the end of a table's cell."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _plain(value)).replace("&", "&amp;")


def _code(value: str) -> str:
    """A code span that ends where it should, whatever is in it."""
    text = _plain(value)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _is_ours(path: Path) -> bool:
    """Whether there is nothing, or what sparing wrote and nobody has touched since."""
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    signed = _SIGNED.search(text)
    return signed is not None and signed.group(1) == _digest(text[: signed.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
