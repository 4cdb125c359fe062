"""The policies of a check-up, each at a few settings that fit the model's depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing.ablate import knock_out
from sparing.anatomy import anatomy_of
from sparing.plan import Policy
from sparing.policies import (
    DART,
    DLLM,
    CDPruner,
    DivPrune,
    DropTokens,
    EnterLate,
    FastV,
    MoD,
    PyramidDrop,
    SkipGPT,
    SkipModules,
    SparseVLM,
    ViCA,
    VisionZip,
    VisPruner,
    VScan,
)
from sparing.tokens import Group, TokenMap

NAMES = (
    "SkipModules", "DropTokens", "EnterLate", "ViCA", "FastV", "PyramidDrop", "SparseVLM", "DART", "DivPrune",
    "CDPruner", "VisionZip", "VisPruner", "VScan", "SkipGPT", "MoD", "DLLM", "knock_out",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A policy to check.

    Attributes:
        name: of the policy.
        make: one function a setting; each makes the policy, with the same weights every time. The first is timed.
        pictures: whether it does something only where there are pictures.
        ablation: whether it is one: it runs under `dense` alone, and is no speed-up.
        fixed: settings for the padding check, where the others choose at random by the place in the batch.
        code: lines that use the first setting on `model` and `inputs`; empty if there are none to show.
        routed: whether fresh routers decide, which are of use after training only.
    """

    name: str
    make: Sequence[Callable[[], Policy]]
    pictures: bool = False
    ablation: bool = False
    fixed: Sequence[Callable[[], Policy]] = ()
    code: str = ""
    routed: bool = False


def subjects_for(
    model: nn.Module, *, pictures: bool, reindex: bool = True, seed: int = 0, quick: bool = False
) -> list[Subject]:
    """Every policy of the library at settings for this model; routers are random, drawn from `seed`.

    Args:
        model: a Hugging Face model.
        pictures: whether there are pictures to drop.
        reindex: whether gaps in the positions can be closed: not in those of several axes.
        seed: of the routers and of the random choice of tokens.
        quick: one setting a policy.
    """
    depth = len(anatomy_of(model).layers)
    middle, last = depth // 2, depth - 1
    group = Group.IMAGE if pictures else Group.TEXT
    stages = sorted({max(depth // 4, 1), max(middle, 1), max(3 * depth // 4, 1)} & set(range(1, depth))) or [1]
    ranked = min(2, max(last, 1))
    routed: dict[str, Any] = {} if depth > 2 else {"layers": [last]}

    def seeded(build: Callable[[], Policy]) -> Callable[[], Policy]:
        def make() -> Policy:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                policy = build()
                # Some fresh routers begin by running everything, and would check nothing.
                for name, parameter in policy.named_parameters() if isinstance(policy, nn.Module) else ():
                    if name.endswith("bias"):
                        parameter.data.normal_(0, 0.3)
                return policy

        return make

    skips: list[Callable[[], Policy]] = [
        lambda: SkipModules([middle], [last]),
        lambda: SkipModules([last], [0, middle]),
    ]
    if pictures:
        skips.append(lambda: SkipModules([middle], [middle, last], groups=[Group.IMAGE]))

    def third(tokens: TokenMap) -> Tensor:
        return tokens.of(group) & (tokens.valid.long().cumsum(1) % 3 == 2)

    drops: list[Callable[[], Policy]] = [lambda: DropTokens(groups=[group], keep=0.5, seed=seed)]
    fixed: list[Callable[[], Policy]] = [lambda: DropTokens(third)]
    if reindex:
        drops.append(lambda: DropTokens(groups=[group], keep=0.75, positions="reindex", seed=seed))
        fixed.append(lambda: DropTokens(third, positions="reindex"))
    else:
        drops.append(lambda: DropTokens(groups=[group], keep=0.25, seed=seed))
    found = [
        Subject("SkipModules", skips, code=use(f"SkipModules([{middle}], [{last}])")),
        Subject(
            "DropTokens",
            drops,
            fixed=fixed,
            code=use(f"DropTokens(groups=[Group.{group.name}], keep=0.5, seed={seed})"),
        ),
        Subject(
            "EnterLate",
            [lambda: EnterLate(middle), lambda: EnterLate(0, max(middle, 1))],
            pictures=True,
            code=use(f"EnterLate({middle})"),
        ),
        Subject(
            "ViCA",
            [lambda: ViCA(sorted({depth // 4, middle})), lambda: ViCA([middle], prefix="freeze")],
            pictures=True,
            code=use(f"ViCA({sorted({depth // 4, middle})})"),
        ),
        Subject(
            "FastV",
            [lambda: FastV(ranked, 0.5), lambda: FastV(1, 0.25, rank_by="all")],
            pictures=True,
            code=use(f"FastV({ranked}, 0.5)"),
        ),
        Subject(
            "PyramidDrop",
            [lambda: PyramidDrop(stages, 0.5), lambda: PyramidDrop(stages[:1], 0.25)],
            pictures=True,
            code=use(f"PyramidDrop({stages}, 0.5)"),
        ),
        *_rivals(ranked, max(min(middle, last - 1), 0)),
        Subject(
            "SkipGPT",
            [
                seeded(lambda: SkipGPT.for_model(model)),
                seeded(lambda: SkipGPT.for_model(model, "release", sample=False, feed_reads="residual")),
            ],
            code=use("SkipGPT.for_model(model)"),
            routed=True,
        ),
        Subject(
            "MoD",
            [
                seeded(lambda: MoD.for_model(model, capacity=0.5, **routed)),
                seeded(lambda: MoD.for_model(model, "paper", capacity=0.5)),
            ],
            code=use(f"MoD.for_model(model, capacity=0.5{f', layers=[{last}]' if routed else ''})"),
            routed=True,
        ),
        Subject(
            "DLLM",
            [
                seeded(lambda: DLLM.for_model(model, start_layer=min(2, last))),
                seeded(lambda: DLLM.for_model(model, "lrm-pruning", sample=False)),
            ],
            code=use(f"DLLM.for_model(model, start_layer={min(2, last)})"),
            routed=True,
        ),
        Subject(
            "knock_out",
            [
                lambda: knock_out(Group.TEXT, group, layers=[middle]),
                lambda: knock_out(Group.TEXT, group, renormalise=True),
            ],
            ablation=True,
            code=use(f"knock_out(Group.TEXT, Group.{group.name}, layers=[{middle}])"),
        ),
    ]
    return [dataclasses.replace(s, make=s.make[:1]) for s in found] if quick else found


def _rivals(layer: int, stage: int) -> list[Subject]:
    """Methods that drop or merge picture tokens, at one setting each. `layer` has one before it, `stage` has one behind it."""
    made: dict[str, tuple[Callable[[], Policy], str]] = {
        "SparseVLM": (lambda: SparseVLM([stage], [0.5]), f"[{stage}], [0.5]"),
        "DART": (lambda: DART(layer, 0.5), f"{layer}, 0.5"),
        "DivPrune": (lambda: DivPrune(0.5), "0.5"),
        "CDPruner": (lambda: CDPruner(0.5), "0.5"),
        "VisionZip": (lambda: VisionZip(0.5), "0.5"),
        "VisPruner": (lambda: VisPruner(0.5), "0.5"),
        "VScan": (lambda: VScan(0.5, layer), f"0.5, {layer}"),
    }
    return [Subject(name, [make], pictures=True, code=use(f"{name}({how})")) for name, (make, how) in made.items()]


def use(policy: str) -> str:
    """Lines that run `model` on `inputs` under a policy, which is given as an expression."""
    name = policy.split("(")[0].split(".")[0]
    lines = ["import sparing", f"from sparing.{'ablate' if name == 'knock_out' else 'policies'} import {name}"]
    if "Group." in policy:
        lines.append("from sparing.tokens import Group")
    how = ', execute="dense"' if name == "knock_out" else ""
    return "\n".join(
        [*lines, "", f"with sparing.apply(model, {policy}{how}) as run:", "    out = model.generate(**inputs)"]
    )
