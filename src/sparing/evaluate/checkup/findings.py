"""What a check found, and what all checks of a model found together."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Verdict = Literal["ok", "slow", "fails", "not applicable"]
MODEL = "the model"
"""The subject of checks that are about no policy."""
MEANINGS = {
    "loads": "a known family; weights and logits are finite numbers",
    "pictures": "the processor makes pictures that the model reads",
    "apply without a policy": "an empty plan changes no bit and leaves nothing on the model",
    "both executors, everything computed": "sparing's own arithmetic is the stock model's",
    "padding": "a row answers alike alone and in a padded batch",
    "generate()": "greedy, sampled and beam search find the same tokens under both executors",
    "save and load": "a saved model comes back as it was",
    "fits": "the policy has a place on this model",
    "text alone": "without pictures a vision policy changes no bit",
    "dense = gathered": "the fast executor computes what the plain one defines",
    "cached decoding": "token by token through the cache equals one pass over everything",
    "saved": "what a checkpoint stores of the policy makes the same tokens again",
    "speed and memory": "time, key and value bytes and peak memory against the stock model here",
    "under dense": "an ablation changes the result, is marked, and counts as no speed-up",
}
"""What each check says, in a line."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        verdict: `ok`; `slow` (right, but slower than the stock model here); `fails`; `not applicable`.
        sentence: the result in plain words.
        numbers: what was measured, with what was allowed.
        cure: what to do about it; empty where nothing is to be done.
        subject: the policy that it is about, or `the model`.
        seconds: that it took.
    """

    name: str
    verdict: Verdict
    sentence: str
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    cure: str = ""
    subject: str = MODEL
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Checkup:
    """All findings about a model.

    Attributes:
        model: name, family, layers, parameters, dtype, device, whether it sees pictures.
        inputs: what it was run on.
        tolerance: largest difference of logits that counts as rounding, as a share of the largest logit.
        settings: how each policy was set, by subject.
        findings: in the order of the checks.
        seconds: for all.
        code: how to use each policy at its first setting, by subject; empty where there is no such line.
        untrained: subjects with fresh routers.
    """

    model: dict[str, Any]
    inputs: dict[str, Any]
    tolerance: float
    settings: dict[str, list[str]]
    findings: list[Finding]
    seconds: float
    code: dict[str, str] = dataclasses.field(default_factory=dict)
    untrained: tuple[str, ...] = ()

    def of(self, subject: str) -> list[Finding]:
        """The findings about a policy, or about the model."""
        return [finding for finding in self.findings if finding.subject == subject]

    def verdict(self, subject: str) -> Verdict:
        """The worst verdict about a subject; `not applicable` if nothing but that was found."""
        found = {finding.verdict for finding in self.of(subject)}
        order: tuple[Verdict, ...] = ("fails", "slow", "ok", "not applicable")
        return next(verdict for verdict in order if verdict in {*found, order[-1]})

    @property
    def safe(self) -> bool:
        """Whether nothing fails."""
        return all(finding.verdict != "fails" for finding in self.findings)

    def policies(self, verdict: Verdict) -> list[str]:
        """The policies with this verdict."""
        return [subject for subject in self.settings if self.verdict(subject) == verdict]

    def words(self) -> list[str]:
        """The answer: what is safe here, what is slow, what fails, what has nothing to do."""
        said = []
        if self.verdict(MODEL) == "fails":
            wrong = ", ".join(finding.name for finding in self.of(MODEL) if finding.verdict == "fails")
            said.append(f"Do not use sparing on this model yet: {wrong} fails without any policy.")
        groups: tuple[tuple[Verdict, str, str], ...] = (
            ("fails", "Not safe: ", "; see the checks that fail."),
            ("ok", "Safe to use on this model: ", "."),
            ("slow", "Right, but slower than the stock model here: ", "."),
            ("not applicable", "Nothing to do on this model: ", "."),
        )
        for verdict, lead, end in groups:
            if names := self.policies(verdict):
                said.append(lead + ", ".join(names) + end)
        return said

    def next_step(self, subject: str) -> str:
        """What to do about a policy now, in words; `code` has the lines to type."""
        verdict = self.verdict(subject)
        if verdict == "fails":
            strict = "" if self.model.get("dtype") == "float32" else " --dtype float32"
            what = f" --policies {subject}" if self.code.get(subject, "").startswith("import sparing\nfrom") else ""
            return f"Keep to the stock model. To look closer: sparing check {self.model['name']}{what}{strict}"
        if verdict == "not applicable":
            return "Leave it out: it changes nothing on this model."
        train = "Train its router first: a fresh one decides at random. " if subject in self.untrained else ""
        if any(finding.name == "under dense" for finding in self.of(subject)):
            return "Use it to learn what the model needs; it makes nothing faster."
        if verdict == "slow":
            cures = [finding.cure for finding in self.of(subject) if finding.verdict == "slow"]
            return f"{train}Right, but {cures[0]}."
        return f"{train}Use it, and measure what the answers lose on your own tasks."

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and the page."""
        return {
            "model": self.model,
            "inputs": self.inputs,
            "tolerance": self.tolerance,
            "safe": self.safe,
            "words": self.words(),
            "policies": {
                name: {
                    "verdict": self.verdict(name),
                    "settings": made,
                    "next": self.next_step(name),
                    "code": self.code.get(name, ""),
                }
                for name, made in self.settings.items()
            },
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "seconds": self.seconds,
        }
