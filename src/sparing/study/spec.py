"""A study's YAML: what is written, checked, and what it stands for: models x methods x training x tasks x seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sparing.evaluate.tasks import known_tasks
from sparing.study.controls import Pairs, matched_controls
from sparing.study.methods.known import known_methods, method_maker
from sparing.study.methods.policy import UsePolicy
from sparing.study.names import made, placed, unknown
from sparing.study.shrinking import smaller
from sparing.study.trainings.known import known_trainings
from sparing.study.yaml_lines import Place, line_of, read_yaml

T = TypeVar("T")
SEED = "{seed}"
"""Stands for the seed in a model's path."""
OneOrMore = Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
Name = Annotated[str, Field(pattern=r"^[\w.+@-]+( [\w.+@-]+)*$", max_length=60)]


def _each_once(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed stands there twice; name each once")
    return seeds


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Strict):
    """A checkpoint.

    Attributes:
        path: a folder (relative to the YAML), the name of a model of the zoo, or a hub id. `{seed}` in it stands for the
            study's seeds: one training of the model a seed, so that whatever is measured on it has as many.
        dtype: type of the weights; `auto` keeps the checkpoint's own.
        attention: the attention implementation; the fastest that the model has by default.
        like: a model whose architecture and tokenizer are taken by `--shrink` instead of this one's.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str | None = None
    like: str | None = None

    def of(self, seed: int) -> ModelEntry:
        """The checkpoint of one seed."""
        return self.model_copy(update={"path": self.path.replace(SEED, str(seed))}) if self.seeded else self

    @property
    def seeded(self) -> bool:
        """Is there one checkpoint a seed?"""
        return SEED in self.path


class Entry(_Strict):
    """A method, a training or a task.

    Attributes:
        use: its name.
        settings: its settings (`with` in the YAML).
        over: settings with several values each; every combination is one variant.
        models: the models that it is for; all by default.
        tasks: the tasks that a method is measured on; all by default.
        training: the trainings that a method gets; all by default, `none` among them.
        control: a method that the others must beat; random skipping is one unasked.
        control_of: the methods, one or several, whose matched control this one is: what they choose is compared with it,
            variant by variant (`sparing.study.controls`), beside the comparison with the baseline.
    """

    use: str
    settings: dict[str, Any] = Field(default_factory=dict, alias="with")
    over: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    models: list[str] | None = None
    tasks: list[str] | None = None
    training: list[str] | None = None
    control: bool = False
    control_of: OneOrMore = Field(default_factory=list)


class Question(_Strict):
    """A table of the report.

    Attributes:
        ask: the question that it answers, in words.
        tasks: the tasks to show; all by default.
        methods: the methods to show; all by default.
        figures: the figures to show; each task's main figure by default.
    """

    ask: str
    tasks: list[str] | None = None
    methods: list[str] | None = None
    figures: list[str] | None = None


class StudyFile(_Strict):
    """What a study's YAML may hold.

    Attributes:
        study: its name.
        about: what it is for, in a few sentences; shown in the report.
        paths: names for folders (relative to the YAML), used as `{name}` in any text below.
        baseline: the method that the others are compared with; the first one by default.
        seeds: of the seeded methods, trainings and tasks.
        cores: CPU cores of a cell.
        gpus: GPUs of a cell.
        models: name -> checkpoint.
        methods: name -> method.
        training: name -> training; `none` (no training) is always there unless it is left out of a method's `training`.
        tasks: name -> task.
        questions: the report's tables; one a task by default.
    """

    study: Name
    about: str = ""
    paths: dict[str, str] = Field(default_factory=dict)
    baseline: str | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_each_once)] = [0]
    cores: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    models: Annotated[dict[Name, ModelEntry], Field(min_length=1)]
    methods: Annotated[dict[Name, Entry], Field(min_length=1)]
    training: dict[Name, Entry] = Field(default_factory=dict)
    tasks: Annotated[dict[Name, Entry], Field(min_length=1)]
    questions: list[Question] = Field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One combination of an entry's settings.

    Attributes:
        name: the entry's name in the YAML.
        varied: the settings that differ between the entry's variants.
        does: the method, training or task itself.
        use: the name of its class.
        settings: everything that was set, as JSON knows it.
        line: where the entry is in the YAML.
    """

    name: str
    varied: Mapping[str, Any]
    does: Any
    use: str
    settings: Mapping[str, Any]
    line: int

    @property
    def label(self) -> str:
        """The name with what varies."""
        said = ", ".join(f"{key}={_short(value)}" for key, value in self.varied.items())
        return f"{self.name} ({said})" if said else self.name


@dataclasses.dataclass(frozen=True)
class StudySpec:
    """A study, read and checked.

    Attributes:
        file: what the YAML says.
        path: the YAML.
        models: name -> checkpoint, its path made absolute where it is a folder.
        methods: every variant of every method.
        trainings: every variant of every training, `None` (no training) first.
        tasks: every variant of every task.
        controls: which variant has to beat which: (place in `methods`, place of its control).
    """

    file: StudyFile
    path: Path
    models: Mapping[str, ModelEntry]
    methods: tuple[Variant, ...]
    trainings: tuple[Variant | None, ...]
    tasks: tuple[Variant, ...]
    controls: Pairs = ()

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return self.file.baseline or next(iter(self.file.methods))

    def combinations(self) -> Iterator[tuple[str, Variant, Variant | None, list[Variant]]]:
        """Model, method and training of every subject, whatever its seed, with the tasks that it is for."""
        for model, method, training in itertools.product(self.models, self.methods, self.trainings):
            entry = self.file.methods[method.name]
            name = "none" if training is None else training.name
            if not (_wants(entry.models, model) and _wants(entry.training, name)):
                continue
            if training is not None and not _wants(self.file.training[training.name].models, model):
                continue
            yield (
                model,
                method,
                training,
                [
                    task
                    for task in self.tasks
                    if _wants(entry.tasks, task.name) and _wants(self.file.tasks[task.name].models, model)
                ],
            )


def read_study(path: Path, *, paths: Mapping[str, str | Path] | None = None, shrink: bool = False) -> StudySpec:
    """Read and check a study's YAML.

    Args:
        path: the YAML.
        paths: other folders for some of the names under `paths:`.
        shrink: with little data, see `sparing.study.shrinking`.

    Raises:
        ValueError: anything wrong with it: file, line, what was expected, and the cure.
    """
    raw, lines = read_yaml(path)
    where = _Where(path, lines)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is no study: expected `study:`, `models:`, `methods:` and `tasks:`")
    raw = _substituted(raw, where, paths or {})
    try:
        file = StudyFile.model_validate(raw)
    except ValidationError as error:
        raise where.error(error, ()) from error
    models = {
        name: entry.model_copy(update={"path": _located(entry.path, path.parent, file.seeds[0])})
        for name, entry in file.models.items()
    }
    for name, model in models.items():
        # A shrunk run takes a stand-in for what is not on this machine.
        for folder in [] if shrink else [model.of(seed).path for seed in file.seeds]:
            if Path(folder).is_absolute() and not Path(folder).exists():
                raise where.at(("models", name, "path"), f"the model's folder {folder} does not exist")
    where.shrink = shrink
    methods = _variants("methods", file.methods, where, method_maker)
    trainings = _variants("training", file.training, where, lambda use: _class("training", use, known_trainings()))
    tasks = _variants("tasks", file.tasks, where, lambda use: _class("task", use, known_tasks()))
    for kind, entries in (("methods", file.methods), ("training", file.training), ("tasks", file.tasks)):
        for name, entry in entries.items():
            where.names(entry.models, models, (kind, name, "models"), "model")
            where.names(entry.tasks, file.tasks, (kind, name, "tasks"), "task")
            where.names(entry.training, ["none", *file.training], (kind, name, "training"), "training")
            where.names(entry.control_of, file.methods, (kind, name, "control_of"), "method")
            if entry.control_of and kind != "methods":
                raise where.at((kind, name, "control_of"), "`control_of` is for methods: leave it out here")
    if file.baseline is not None:
        where.names([file.baseline], file.methods, ("baseline",), "method")
    for i, question in enumerate(file.questions):
        where.names(question.tasks, file.tasks, ("questions", i, "tasks"), "task")
        where.names(question.methods, file.methods, ("questions", i, "methods"), "method")
    controls = matched_controls(file.methods, methods, where.at)
    return StudySpec(file, path, models, methods, (None, *trainings), tasks, controls)


class _Where:
    """Words errors with the file and the line."""

    def __init__(self, path: Path, lines: dict[Place, int]) -> None:
        self.path, self.lines, self.shrink = path, lines, False

    def line(self, place: Place) -> int:
        return line_of(place, self.lines) or 1

    def at(self, place: Place, message: str) -> ValueError:
        return ValueError(f"{self.path}, line {self.line(place)}: {message}")

    def names(self, given: list[str] | None, known: Any, place: Place, what: str) -> None:
        for name in given or ():
            if name not in known:
                raise self.at(place, unknown(f"{what} of this study", name, known))

    def error(self, error: ValidationError, prefix: Place, known: Mapping[str, Any] | None = None) -> ValueError:
        first = error.errors(include_url=False)[0]
        # Pydantic adds steps of its own to a place (union members, `[key]`), which are not in the file.
        inside: Place = tuple(part for part in first["loc"] if part != "[key]")
        place = (*prefix, *inside)
        name = ".".join(map(str, place))
        if not inside and first["type"] == "value_error":
            # The settings as a whole: which of them is in the message.
            return self.at(place, first["msg"].removeprefix("Value error, "))
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = unknown("setting", str(inside[-1]), known if known is not None else _fields(inside))
        elif first["type"] in ("missing", "missing_argument"):
            message = f"`{inside[-1]}` is missing: add it"
        else:
            message = f"`{name}`: {first['msg'].removeprefix('Value error, ')}, got {_short(first.get('input'))}"
        return self.at(place, message)


def _fields(place: Place) -> list[str]:
    """The settings that are known at a place of the file, to offer the nearest."""
    if len(place) <= 1:
        fields = StudyFile.model_fields
    else:
        fields = {"models": ModelEntry, "questions": Question}.get(str(place[0]), Entry).model_fields
    return [field.alias or name for name, field in fields.items()]


def _class(what: str, use: str, known: Mapping[str, type[T]]) -> Callable[[Mapping[str, Any]], T]:
    if use not in known:
        raise ValueError(unknown(what, use, known))
    return lambda settings: made(known[use], settings)


def _variants(
    kind: str, entries: Mapping[str, Entry], where: _Where, make: Callable[[str], Callable[[Mapping[str, Any]], Any]]
) -> tuple[Variant, ...]:
    found = []
    for name, entry in entries.items():
        place: Place = (kind, name)
        if kind == "training" and name == "none":
            raise where.at(place, "`none` stands for no training; choose another name")
        if both := sorted(entry.settings.keys() & entry.over.keys()):
            raise where.at((*place, "over", both[0]), f"`{both[0]}` is under `with` and under `over`; keep one")
        try:
            build = make(entry.use)
        except ValueError as error:
            raise where.at((*place, "use"), str(error)) from error
        for values in itertools.product(*entry.over.values()):
            varied = dict(zip(entry.over, values, strict=True))
            settings = {**entry.settings, **varied}
            try:
                does = build(settings)
            except ValidationError as error:
                first = error.errors()[0]["loc"]
                varies = first[0] in entry.over if first else not entry.settings
                under = "over" if varies else "with"
                known = {field.name: field for field in dataclasses.fields(_settings_of(entry.use))}
                raise where.error(error, (*place, under), known) from error
            except ValueError as error:
                raise where.at((*place, "with"), str(error)) from error
            does = placed(smaller(does, where.path.parent) if where.shrink else does, where.path.parent.absolute())
            try:
                does.check()
            except ValueError as error:
                raise where.at((*place, "with"), str(error)) from error
            found.append(Variant(name, varied, does, entry.use, settings, where.line(place)))
    return tuple(found)


def _settings_of(use: str) -> type:
    return {**known_methods(), **known_tasks(), **known_trainings()}.get(use, UsePolicy)


def _substituted(raw: dict[str, Any], where: _Where, given: Mapping[str, str | Path]) -> dict[str, Any]:
    """`{name}` replaced by a folder of `paths:`."""
    named = raw.get("paths") or {}
    if not isinstance(named, dict):
        raise where.at(("paths",), "`paths` must map names to folders")
    if strays := [name for name in given if name not in named]:
        raise ValueError(unknown(f"path of {where.path}", strays[0], map(str, named)))
    folders = {
        str(name): str(Path(given[name]).absolute() if name in given else (where.path.parent / str(value)).absolute())
        for name, value in named.items()
    }

    def walk(value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            return {key: walk(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, (*place, i)) for i, inner in enumerate(value)]
        if isinstance(value, str):
            # A folder itself, or what lies in it: other braces are the text's own.
            for found in re.finditer(r"\{(\w+)\}/|^\{(\w+)\}$", value):
                name = found[1] or found[2]
                if f"{{{name}}}" == SEED and place[:1] == ("models",):
                    continue
                if name not in folders:
                    raise where.at(place, unknown("path", name, folders))
                value = value.replace(f"{{{name}}}", folders[name])
        return value

    return {key: value if key == "paths" else walk(value, (key,)) for key, value in raw.items()}


def _located(path: str, folder: Path, seed: int) -> str:
    """A model's folder made absolute; zoo names and hub ids as they are."""
    if SEED in path and (folder / path.replace(SEED, str(seed))).exists():
        return str((folder / path).absolute())
    here = folder / path
    return str(here.absolute()) if here.exists() or path.startswith((".", "/")) else path


def _wants(names: list[str] | None, name: str) -> bool:
    return names is None or name in names


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else str(value)
    text = str(value)
    # Two long values may begin alike, and a label stands for its variant.
    return text if len(text) <= 60 else f"{text[:50]}… {hashlib.sha256(text.encode()).hexdigest()[:6]}"
