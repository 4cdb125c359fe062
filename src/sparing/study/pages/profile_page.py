"""The profile's `report.html`: one file that asks for nothing, with the ledger painted over the text, or over pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparing.study.pages import profile_charts as charts
from sparing.study.pages.document import page_environment, write_page
from sparing.study.pages.profile_pictures import picture_view

PARTS = {
    "attention_projections": ("attention: Q and O", "a"),
    "attention_kv": ("attention: K and V", "b"),
    "attention_scores": ("attention: scores", "c"),
    "mlp": ("MLP", "d"),
    "router": ("router", "e"),
    "lm_head": ("output matrix (lm_head)", "f"),
    "encoder": ("vision encoder", "g"),
}
MODULE_NAMES = {"attention": "attention", "mlp": "MLP"}
IMAGE_NAMES = {"image_attention": "attention", "image_mlp": "MLP", "image_read": "read"}


def write_report(
    figures: Mapping[str, Any],
    run: Mapping[str, Any],
    path: Path,
    *,
    pictures: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
) -> None:
    """Write the report so that `path` holds all of it or what it held before.

    Args:
        figures: `Profile.as_dict()`, or the `figures` of a profile's `run.json`.
        run: the run's record: command, versions, hardware.
        path: the `.html` file.
        pictures: what `PictureMaterial.shown` found; without them their grids are painted alone.
        links: other pages to name: words -> address.
    """
    write_page(render(figures, run, pictures=pictures, links=links), path)


def render(
    figures: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    pictures: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """The report as HTML. Everything that comes from a model, a text or a file name is escaped."""
    # Through JSON, so that a fresh profile and one read from run.json are the same.
    f = json.loads(json.dumps(figures, default=str))
    modules, entries = _layers(f["modules"]), _layers(f["entries"])
    reading = {"added loss": {len(p["plan"]["image_attention"]): p["added"][0] for p in f["reading"]}}
    most = max(
        [charts.QUIET, *(v for rows in (modules, entries, reading) for row in rows.values() for v in row.values())]
    )
    plan = f["planned"]["plan"]
    environment = page_environment()
    environment.filters.update(nats=charts.nats, count=_count, size=_size, digits=_digits)

    def module_map(names: Mapping[str, str]) -> dict[str, Any]:
        return charts.heat_map(
            {label: modules[m] for m, label in names.items()},
            {label: set(plan[m]) for m, label in names.items()},
            most=most,
        )

    page = picture_view(f, pictures or {}) if f["pictures"] else _text_view(f)
    return environment.get_template("profile.html.j2").render(
        f=f,
        run=run,
        run_json=json.dumps({k: v for k, v in run.items() if k != "figures"}, indent=2, default=str),
        links=dict(links or {}),
        module_map=module_map(MODULE_NAMES),
        image_map=module_map(IMAGE_NAMES) if f["pictures"] else None,
        entry_map=charts.heat_map(entries, {kind: {layer} for kind, layer in plan["entry"].items()}, most=most),
        reading_map=charts.heat_map(reading, {}, most=most) if f["reading"] else None,
        legend=charts.legend(most),
        pareto=charts.pareto(f["path"], f["controls"], f["settings"]["budget"], f["dense"]["held_out"]),
        bars=charts.bars(f["flops"]),
        part_names=PARTS,
        speeds=charts.speeds(f["timings"]),
        sentence=plan_in_words(plan),
        total={arm: sum(parts.values()) for arm, parts in f["flops"].items()},
        **page,
    )


def _text_view(f: Mapping[str, Any]) -> dict[str, Any]:
    """The painted page: its tokens, their shares of modules run, and what its script reads."""
    painting, depth = f["painting"], f["model"]["layers"]
    strongest = max(
        [0.5, *(abs(b - a) for a, b in zip(painting["dense"], painting["planned"], strict=True) if a is not None)]
    )
    shares = [sum(p[m].count("3") for m in MODULE_NAMES) / (2 * depth) for p in painting["patterns"]]
    tokens = _tokens(painting, shares, strongest)
    data = {"layers": depth, "patterns": painting["patterns"], "tokens": tokens}
    return {"tokens": tokens, "shares": shares, "data": data}


def plan_in_words(plan: Mapping[str, Any]) -> str:
    """What a plan leaves out, as a phrase."""
    said = [
        f"{name} in {_in_layers(plan[module])}"
        for module, name in (("attention", "attention"), ("mlp", "the MLP"))
        if plan[module]
    ]
    phrases = ["leaves out " + " and ".join(said)] if said else []
    said = [
        f"{name} {_in_layers(plan[module])}"
        for module, name in (("image_attention", "attention in"), ("image_mlp", "the MLP in"))
        if plan.get(module)
    ]
    if said:
        phrases.append("lets image tokens skip " + " and ".join(said))
    if plan.get("image_read"):
        whom = "them" if said else "image tokens"
        phrases.append(f"hides {whom} from attention in {_in_layers(plan['image_read'])}")
    phrases += [f"lets {_KIND_WORDS[kind]} enter at layer {layer}" for kind, layer in plan["entry"].items()]
    return ", ".join(phrases) or "leaves out nothing"


_KIND_WORDS = {
    "first": "the first token",
    "digits": "digits",
    "letters": "letters",
    "signs": "signs",
    "image": "pictures",
}


def _in_layers(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {_runs(layers)}"


def _runs(layers: Sequence[int]) -> str:
    """`[0, 2, 3, 4]` -> `0, 2–4`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def _layers(rows: Mapping[str, Mapping[Any, float]]) -> dict[str, dict[int, float]]:
    return {name: {int(layer): float(value) for layer, value in values.items()} for name, values in rows.items()}


def _tokens(painting: Mapping[str, Any], shares: Sequence[float], strongest: float) -> list[dict[str, Any]]:
    """The page's tokens with their colours."""
    starts, found = set(painting["starts"]), []
    for i, text in enumerate(painting["text"]):
        dense, planned = painting["dense"][i], painting["planned"][i]
        added = None if dense is None else planned - dense
        found.append(
            {
                # A line break inside a token would end the line before its colour is seen.
                "text": text.replace("\n", "⏎\n") if text else "▯",
                "starts": i in starts,
                "pattern": painting["pattern"][i],
                "share": round(100 * shares[painting["pattern"][i]]),
                "kind": painting["kind"][i],
                "dense": dense,
                "planned": planned,
                "heat": 0 if added is None else charts.intensity(added, strongest),
            }
        )
    return found


def _count(value: float) -> str:
    """1234567 -> 1.23 M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"


def _size(value: float) -> str:
    """Bytes in binary units."""
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _digits(value: float, figures: int = 3) -> str:
    """A number to so many significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (figures - 1) else f"{value:.{figures}g}"
