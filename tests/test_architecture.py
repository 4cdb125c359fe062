"""The house: imports run downward, model classes stay in `anatomy`, files stay small."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "sparing"

# What each room may import. Written out, because half of the rooms do not see all that lies below them.
BASE = {"tokens", "plan", "anatomy", "execute"}
METHODS = {"policies", "ablate", "surgery", "lens"}
MAY_IMPORT = {
    "worlds": set(),
    "tokens": set(),
    "plan": {"tokens"},
    "anatomy": {"tokens", "plan"},
    "execute": {"tokens", "plan", "anatomy"},
    "policies": {"tokens", "plan"},
    "ablate": {"tokens", "plan", "anatomy"},
    "surgery": {"tokens", "plan", "anatomy"},
    "lens": BASE,
    "checkpoint": BASE | {"policies", "sparing"},
    "decode": BASE,
    "train": BASE | METHODS | {"checkpoint", "decode", "worlds"},
    "evaluate": BASE | METHODS | {"checkpoint", "decode", "train", "worlds"},
    "study": BASE | METHODS | {"checkpoint", "decode", "train", "evaluate", "worlds", "zoo"},
    "zoo": BASE | METHODS | {"checkpoint", "decode", "train", "evaluate", "worlds"},
}
MAY_IMPORT["cli"] = {*MAY_IMPORT, "sparing"}
# The package's own `__init__` shows the public names of all rooms, to import it is an upward edge.
MAY_IMPORT["sparing"] = set(MAY_IMPORT)

MODEL_CLASS = re.compile(
    r"(?!Auto|PreTrained)[A-Z]\w*(ForCausalLM|ForConditionalGeneration|Model|DecoderLayer|Attention|RMSNorm)"
)
MODEL_HEAD = re.compile(r"(?!Auto)[A-Z]\w*(ForCausalLM|ForConditionalGeneration)")
EMPTY_NAME = re.compile(r"(.*_)?(utils?|helpers?|managers?|engines?)")


def room_of(module: str) -> str:
    """`sparing.plan.cost` is in `plan`; the package itself is in `sparing`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "sparing"


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each module imported anywhere, in functions and under TYPE_CHECKING too.

    `from sparing import plan` counts as `sparing.plan`, and `from sparing import load` as `sparing`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                is_room = base == "sparing" and alias.name in MAY_IMPORT
                yield node.lineno, f"{base}.{alias.name}" if is_room else base


def upward_edges(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a file imports from rooms that its own room must not see."""
    room = room_of(module)
    if room not in MAY_IMPORT:
        return [f"{module}: there is no room {room!r}; rooms are {', '.join(MAY_IMPORT)}"]
    package = module if is_package else module.rpartition(".")[0]
    return [
        f"{module}:{line}: {room} must not import {name}"
        for line, name in imported_modules(ast.parse(source), package)
        if name.split(".")[0] == "sparing" and room_of(name) not in MAY_IMPORT[room] | {room}
    ]


def model_classes(source: str) -> list[str]:
    """Where a file names a model class of transformers: imported, as an attribute, or in a string."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("transformers.models")]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.startswith("transformers.models"):
                names = [module]
            elif module.startswith("transformers"):
                names = [a.name for a in node.names if a.name == "models" or MODEL_CLASS.fullmatch(a.name)]
        elif isinstance(node, ast.Attribute) and MODEL_HEAD.fullmatch(node.attr):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODEL_HEAD.fullmatch(node.value):
            names = [node.value]
        found += [f"line {node.lineno}: {name}" for name in names]
    return found


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_run_downward():
    assert files(), f"no source under {SOURCE}"
    wrong = []
    for path in files():
        wrong += upward_edges(path.read_text(), module_of(path), is_package=path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


def test_only_anatomy_names_model_classes():
    wrong = [
        f"{module_of(path)}, {found}"
        for path in files()
        if room_of(module_of(path)) != "anatomy"
        for found in model_classes(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_names_say_what_is_inside():
    wrong = [str(p) for p in SOURCE.rglob("*") if EMPTY_NAME.fullmatch(p.stem)]
    assert not wrong, wrong


def test_files_are_small():
    long = {str(p): n for p in files() if (n := len(p.read_text().splitlines())) > 500}
    assert not long, long


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sparing.tokens.token_map", "from sparing.plan import LayerPlan"),
        ("sparing.plan.cost", "import sparing.anatomy.llama"),
        ("sparing.policies.vica", "from sparing import lens"),
        ("sparing.policies.vica", "from sparing.anatomy import Anatomy"),
        ("sparing.lens.record", "from ..policies import ViCA"),
        ("sparing.surgery.width", "def cut():\n    from sparing.lens import record"),
        ("sparing.surgery.width", "from sparing import load"),
        ("sparing.execute.dense", "if TYPE_CHECKING:\n    from sparing.policies.vica import ViCA"),
        ("sparing.worlds.scenes", "from sparing.tokens import TokenMap"),
        ("sparing.zoo.train", "from ..cli import record"),
        ("sparing.misc.things", ""),
    ],
)
def test_the_check_finds_upward_edges(module, source):
    assert len(upward_edges(source, module)) == 1


def test_the_check_lets_downward_edges_pass():
    assert not upward_edges("import torch\nfrom sparing.tokens import TokenMap", "sparing.plan.cost")
    assert not upward_edges("from . import cost\nfrom .cost import flops", "sparing.plan.ledger")
    assert not upward_edges("from .cost import flops", "sparing.plan", is_package=True)
    assert not upward_edges("import sparing\nfrom sparing import study", "sparing.cli.study")


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.models.llama.modeling_llama import apply_rotary_pos_emb",
        "import transformers.models.qwen3",
        "from transformers import LlamaForCausalLM",
        "from transformers import Qwen2Model",
        "transformers.LlavaForConditionalGeneration",
        "type(model).__name__ == 'LlamaForCausalLM'",
    ],
)
def test_the_check_finds_model_classes(source):
    assert len(model_classes(source)) == 1


def test_the_check_lets_auto_classes_pass():
    assert not model_classes("from transformers import AutoModelForCausalLM, PreTrainedModel, LlamaConfig")
    assert not model_classes('"""Loads a LlamaForCausalLM, say."""')


@pytest.mark.parametrize("name", ["utils", "image_utils", "helper", "manager", "gpu_engine"])
def test_the_check_finds_empty_names(name):
    assert EMPTY_NAME.fullmatch(name)
    assert not EMPTY_NAME.fullmatch("token_map")
