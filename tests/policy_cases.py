"""Every policy in every variant, made with the same seeded weights each time."""

import dataclasses
from collections.abc import Callable

import torch

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
    WaitKMask,
)
from sparing.tokens import Group, TokenMap


@dataclasses.dataclass(frozen=True)
class PolicyCase:
    """How to make a policy for a model.

    Attributes:
        name: of the variant.
        make: model -> policy.
        regroup: what to do to the token map, for policies that need other groups than a processor's.
        pictures: whether the policy does something only where there are pictures.
    """

    name: str
    make: Callable[..., Policy]
    regroup: Callable[[TokenMap], TokenMap] | None = None
    pictures: bool = False


def streamed(tokens):
    """The second half of each row becomes target; segments of 1 to 3 tokens, numbered from 0 in both halves."""
    group, segment = tokens.group.clone(), torch.full_like(tokens.group, -1, dtype=torch.long)
    for r, valid in enumerate(tokens.valid):
        where = valid.nonzero().flatten()
        half = len(where) // 2
        for name, part in ((Group.SOURCE, where[:half]), (Group.TARGET, where[half:])):
            group[r, part] = int(name)
            segment[r, part] = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10])[: len(part)]
    return dataclasses.replace(tokens, group=group, segment=segment, present=frozenset())


def interleaved(tokens):
    """In order of arrival: two source tokens, one target token, and so on; three tokens a source word, one a target word."""
    group, segment = tokens.group.clone(), torch.full_like(tokens.group, -1, dtype=torch.long)
    for r, valid in enumerate(tokens.valid):
        for place, i in enumerate(valid.nonzero().flatten().tolist()):
            target = place % 3 == 2
            group[r, i] = int(Group.TARGET if target else Group.SOURCE)
            segment[r, i] = place // 3 if target else place * 2 // 9
    return dataclasses.replace(tokens, group=group, segment=segment, present=frozenset())


def wide(tokens):
    """Scattered tokens, a function of a row's own text: every third valid one, the first never."""
    place = tokens.valid.long().cumsum(1)
    return tokens.valid & (place % 3 == 2)


def seeded(build):
    """Make it with the same random weights each time, and routers decided enough that rounding flips none."""

    def make(model):
        torch.manual_seed(5)
        policy = build(model)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.3)
        return policy

    return make


def calibrated(model):
    """MoD with thresholds near where its random routers score."""
    policy = MoD.for_model(model, capacity=0.6, select="topk", decode="threshold")
    policy.thresholds.fill_(0.1)
    return policy


CASES = [
    PolicyCase("skip-modules", lambda m: SkipModules([0, 2], [1])),
    PolicyCase("skip-modules-of-pictures", lambda m: SkipModules([1], [1, 2], groups=[Group.IMAGE]), pictures=True),
    PolicyCase(
        "skip-modules-hiding-pictures", lambda m: SkipModules([0], [1], groups=[Group.IMAGE], hide=[1]), pictures=True
    ),
    PolicyCase("drop-keep", lambda m: DropTokens(wide)),
    PolicyCase("drop-reindex", lambda m: DropTokens(wide, positions="reindex")),
    PolicyCase("enter-late", lambda m: EnterLate(2), pictures=True),
    PolicyCase("enter-and-exit", lambda m: EnterLate(1, 2), pictures=True),
    PolicyCase("vica-update", lambda m: ViCA([0, 2]), pictures=True),
    PolicyCase("vica-freeze", lambda m: ViCA([1], prefix="freeze"), pictures=True),
    PolicyCase("vica-until-1", lambda m: ViCA([0, 2], prefix=1), pictures=True),
    PolicyCase("fastv-last", lambda m: FastV(2, 0.5), pictures=True),
    PolicyCase("fastv-all", lambda m: FastV(1, 0.4, rank_by="all", chunk=5), pictures=True),
    PolicyCase("fastv-text", lambda m: FastV(1, 0.5, groups=[Group.TEXT])),
    PolicyCase("pyramid-drop", lambda m: PyramidDrop([1, 2], [0.7, 0.5]), pictures=True),
    PolicyCase("drop-uniform", lambda m: DropTokens(groups=[Group.IMAGE], keep=0.5, choose="uniform"), pictures=True),
    PolicyCase("div-prune", lambda m: DivPrune(0.5), pictures=True),
    PolicyCase("cd-pruner", lambda m: CDPruner(0.5), pictures=True),
    PolicyCase("vis-pruner", lambda m: VisPruner(0.6, important=0.4), pictures=True),
    PolicyCase("vision-zip", lambda m: VisionZip(0.6, contextual=0.4), pictures=True),
    PolicyCase("v-scan", lambda m: VScan(0.7, 1, 0.6, window=2, local_layer=-1), pictures=True),
    PolicyCase("dart", lambda m: DART(2, 0.6, image_pivots=2, text_pivots=1), pictures=True),
    PolicyCase("sparse-vlm", lambda m: SparseVLM([0, 1], [0.7, 0.4], recycle=0.5, clusters=0.3), pictures=True),
    PolicyCase("sparse-vlm-adaptive", lambda m: SparseVLM.paper([0], adaptive=0.8), pictures=True),
    PolicyCase("skipgpt-linear", seeded(SkipGPT.for_model)),
    PolicyCase("skipgpt-mlp", seeded(lambda m: SkipGPT.for_model(m, "release", sample=False, feed_reads="residual"))),
    PolicyCase("mod-release", seeded(lambda m: MoD.for_model(m, capacity=0.6))),
    PolicyCase("mod-paper", seeded(lambda m: MoD.for_model(m, "paper", capacity=0.5))),
    PolicyCase("mod-threshold", seeded(calibrated)),
    PolicyCase("dllm-evict", seeded(lambda m: DLLM.for_model(m, width=13, start_layer=1, reserve=2, threshold=0.45))),
    PolicyCase("dllm-lrm", seeded(lambda m: DLLM.for_model(m, "lrm-pruning", sample=False))),
    PolicyCase("wait-k", lambda m: WaitKMask(2), regroup=streamed),
    PolicyCase("wait-k-interleaved", lambda m: WaitKMask(1), regroup=interleaved),
    PolicyCase("vica-and-fastv", lambda m: ViCA([0, 1], prefix=1) & FastV(2, 0.5), pictures=True),
    PolicyCase("vica-and-vision-zip", lambda m: ViCA([0, 2]) & VisionZip(0.6, contextual=0.4), pictures=True),
    PolicyCase("skipgpt-and-pyramid", lambda m: seeded(SkipGPT.for_model)(m) & PyramidDrop([1], 0.5), pictures=True),
    PolicyCase("mod-and-drop", lambda m: seeded(MoD.for_model)(m) & DropTokens(wide)),
]
