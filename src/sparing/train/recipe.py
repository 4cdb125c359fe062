"""Recipes: a training at a paper's scale as one YAML file, with its model, its data and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sparing.train.conversations import ConversationFile
from sparing.train.drawn import write_conversations
from sparing.train.fitting import Optimisation
from sparing.train.parts import Lora, Part
from sparing.train.stages import Stage

SHRUNK = {"steps": 2, "batch": 2, "at_once": 2}
SHRUNK_ROWS = 4


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataEntry(_Strict):
    """Conversations of a stage.

    Attributes:
        rows: the file, in LLaVA's format.
        pictures: the folder that its rows' pictures are relative to.
        source: where it comes from (a hub id), for who has to fetch it.
    """

    rows: str
    pictures: str | None = None
    source: str = ""


class StageEntry(_Strict):
    """One stage; see `Stage` and `Optimisation`."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    data: DataEntry
    epochs: float = 1.0
    steps: int | None = None
    batch: int
    at_once: int | None = None
    lr: float
    warmup: float = 0.03
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0
    max_length: int | None = None
    lora: Lora | None = None


class VicaEntry(_Strict):
    """What a ViCA recipe trains under; see `sparing.policies.ViCA`."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    prefix: Literal["update", "freeze"] | int = "update"


class TrainingRecipe(_Strict):
    """A training at a paper's scale.

    Attributes:
        recipe: its name.
        about: what it is, in a few sentences.
        model: a checkpoint's folder, or a hub id.
        like: whose architecture `--shrink` takes where the model is not on this machine.
        language: a text model whose weights take the place of those in the model's decoder, before the first stage.
        fresh: parts that begin with random weights.
        vica: the policy.
        dtype: `auto`, `float32` or `bfloat16`.
        paths: names for folders (relative to the YAML), used as `{name}` in `data`.
        stages: name -> stage, in order.
    """

    recipe: str
    about: str = ""
    model: str
    like: str | None = None
    language: str | None = None
    fresh: tuple[Literal["projector"], ...] = ()
    vica: VicaEntry
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    paths: dict[str, str] = Field(default_factory=dict)
    stages: Annotated[dict[str, StageEntry], Field(min_length=1)]

    @field_validator("stages")
    @classmethod
    def _plain_names(cls, stages: dict[str, StageEntry]) -> dict[str, StageEntry]:
        if wrong := [name for name in stages if not name.replace("-", "").replace("_", "").isalnum()]:
            raise ValueError(f"{wrong[0]!r} names a folder: use letters, digits, - and _")
        return stages

    def made(self, folder: Path, paths: Mapping[str, str] | None = None) -> list[Stage]:
        """The stages with their data.

        Args:
            folder: of the YAML, which `paths` are relative to.
            paths: other folders for some of the names.

        Raises:
            ValueError: data that is not there, or is wrong.
        """
        if strange := [name for name in paths or {} if name not in self.paths]:
            raise ValueError(f"the recipe has no path {strange[0]!r}; it has {', '.join(self.paths) or 'none'}")
        named = {name: str((folder / place).resolve()) for name, place in {**self.paths, **(paths or {})}.items()}

        def placed(text: str) -> Path:
            for name, place in named.items():
                text = text.replace(f"{{{name}}}", place)
            return folder / text

        stages = []
        for name, entry in self.stages.items():
            rows = placed(entry.data.rows)
            if not rows.exists() and entry.data.source:
                raise ValueError(
                    f"stage {name}: the data {rows} is not here: fetch {entry.data.source}, or give --path"
                )
            pictures = None if entry.data.pictures is None else placed(entry.data.pictures)
            stages.append(_stage(name, entry, ConversationFile(rows, pictures), f"{rows} ({entry.data.source})"))
        return stages

    def shrunk(self, folder: Path, seed: int) -> list[Stage]:
        """The stages with two steps each on data that is made here, in `folder`, and read as the real one is."""
        rows = write_conversations(folder, SHRUNK_ROWS, seed, turns=2)
        return [
            _stage(name, entry.model_copy(update=SHRUNK), ConversationFile(rows), "drawn scenes")
            for name, entry in self.stages.items()
        ]


def _stage(name: str, entry: StageEntry, conversations: ConversationFile, source: str) -> Stage:
    how = Optimisation(**{key: getattr(entry, key) for key in Optimisation.__dataclass_fields__})
    return Stage(name, entry.parts, how, conversations, source, entry.max_length, entry.lora)


def read_recipe(path: Path) -> TrainingRecipe:
    """Read and check a recipe.

    Raises:
        ValueError: no such file, no YAML, or a setting that is unknown, missing or wrong; the message names it.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is no recipe: expected recipe:, model:, vica: and stages:")
    try:
        return TrainingRecipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: `{name}`: {first['msg'].removeprefix('Value error, ')}") from error
