"""One contrast of edits on the page: verdict, counts, curves, leverage, region, parts of the published pattern."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from mega_core.service.contrasted import Contrasted
from pages.components import contrast_charts, request_form
from pages.components.figure import About, figure, heading
from pages.components.session import forget_run, service, told
from pages.components.text import MODULES, md, signed

STATISTICS = {"D": "D: moved", "K": "K: controlled", "C": "C: contrast"}
MEANING = {
    "D": "What the edits that worked moved.",
    "K": "The same, less what the edits that failed moved.",
    "C": "After the edits that worked, less after those that failed.",
}
FORMULA = {
    "D": "D = mean over successes of (I after − I before)",
    "K": "K = mean over successes of (I after − I before) − mean over failures of (I after − I before)",
    "C": "C = mean over successes of I after − mean over failures of I after",
}
OBJECTS = {"new": "New object", "true": "Original object"}
HOLDS = {"yes": "✓ holds", "no": "✗ does not hold", "unclear": "? unclear"}
TEACHING = (
    "This is a small teaching model of four million parameters: nothing here is evidence about pretrained models."
)
ABOUT_CURVES = About(
    "By layer, how edits changed what one kind of module contributes to the log-probability of an object, in nats. A "
    "line for each editor; the band holds 95 % of 1,000 draws of edits. The pink layers are the region.",
    "I is a module's contribution (NLKA). C, D and K are the formulas under the choice of statistic; edits are drawn "
    "with replacement, an edit with all its runs. C and K need ten failures; where an editor makes fewer, it is made "
    "worse on purpose, and the line says how (induced).",
    "A contrast of groups, not a cause. Contributions explain first tokens. Induced failures are no natural ones.",
)
ABOUT_LEVERAGE = About(
    "Where attention could be steered: how far it raised the new object and held down the original one, averaged over "
    "editors. Filled points are in the region; the percentage says in how many of 1,000 draws of edits it was.",
    "max(0, X for the new object) + max(0, −X for the original one), X the statistic named below; each editor divided "
    "by its standard deviation over layers, averaged, counted from the lowest layer. The curve is smoothed over three "
    "layers; of the late layers those with most are taken until they hold half. The rules are ours (docs/attribution).",
    "It says where edits that worked moved attention, not that steering there works: MEGA's own run tells.",
)
ABOUT_MAP = About(
    "The leverage of every editor, layer by layer, for attention and MLPs, in nats. Framed: attention of the region.",
    "max(0, X for the new object) + max(0, −X for the original one), not scaled and not averaged over editors.",
    "No intervals: those are in the curves. What MLPs do is shown, not steered.",
)


def layers_of(study: Contrasted) -> str:
    """The region's layers as people write them: "5-7"."""
    return study.region.text().partition(" (")[0]


def teaching(model: str) -> bool:
    """Whether this is one of the small models that come with the app."""
    return any(info.name == model and info.embedded for info in service().models())


def draw(study: Contrasted, shipped: Contrasted | None) -> None:
    """Everything about a study; beside one that was made here stands the one that ships with its model."""
    region = study.region
    st.markdown(f"**{md(study.verdict)}**")
    origin = {"shipped": "Shipped with the model", "drawn": "Made here", "mine": "From your own runs"}
    facts = "runs in your history" if study.source == "mine" else "random facts that the model knows"
    st.caption(
        f"{origin.get(study.source, '')}: {region.edits} edits of {facts}, by {md(', '.join(region.counts))}; a "
        f"success: {_rule(study)}."
    )
    if teaching(region.model):
        st.caption(f":material/school: {TEACHING}")
    _counts(study)
    _curves(study)
    _leverage(study, shipped)
    _claims(study)


def _rule(study: Contrasted) -> str:
    likelier = study.region.rules.get("success") == "likelier"
    return "the new object is likelier than the original one" if likelier else "the new object is the most likely one"


def _counts(study: Contrasted) -> None:
    rows = [
        {
            "editor": name,
            "worked": count.success,
            "failed": count.failure,
            "left out": count.left_out,
            "failures for C and K": count.failures,
            "why left out": ", ".join(f"{why} ({n})" for why, n in study.left_out.get(name, {}).items()),
        }
        for name, count in study.region.counts.items()
    ]
    table = pd.DataFrame(rows)
    if not table["why left out"].any():
        table = table.drop(columns="why left out")
    st.dataframe(table, hide_index=True, key="contrast_counts", alt="What came of every editor's edits")


@st.fragment
@told
def _curves(study: Contrasted) -> None:
    table = study.curves
    has = [name for name in STATISTICS if name in set(table["statistic"])]
    editors = list(dict.fromkeys(table["editor"]))
    with st.container(horizontal=True, gap="medium"):
        statistic = _choice("Statistic", has, STATISTICS, "contrast_statistic")
        module = _choice("Module", ["attn", "ffn"], MODULES, "contrast_module")
        candidate = _choice("Object", ["new", "true"], OBJECTS, "contrast_candidate")
    chosen = st.pills(
        "Editors", editors, selection_mode="multi", default=editors, key=f"contrast_lines_{'_'.join(editors)}"
    )
    st.caption(f"{md(MEANING[statistic])} {md(FORMULA[statistic])}.")
    absent = [name for name in STATISTICS if name not in has]
    if absent:
        st.caption(f"{md(' and '.join(absent))}: absent, no editor has ten failures, also not induced ones.")
    shown = table[
        (table["statistic"] == statistic)
        & (table["module"] == module)
        & (table["candidate"] == candidate)
        & table["editor"].isin(chosen)
    ]
    shown = shown.assign(label=[_label(e, f) for e, f in zip(shown["editor"], shown["failures"], strict=True)])
    if shown.empty:
        missing = f"{', '.join(chosen)} has too few failures for {statistic}." if chosen else "Choose an editor."
        st.info(md(missing), icon=":material/info:")
        return
    what = f"{MODULES[module]} and the {OBJECTS[candidate].lower()}, by layer"
    unit = "Change, nats" if statistic == "D" else "Difference, nats"
    figure(
        f"contrast_curves_{statistic}_{module}_{candidate}",
        contrast_charts.bands(shown, study.region.layers, unit),
        title=what,
        reading=_curves_reading(shown, statistic),
        table=shown.drop(columns="label"),
        file=f"contrast-{study.region.model}-{statistic}-{module}-{candidate}",
        about=ABOUT_CURVES,
    )


def _choice(label: str, options: list[str], words: dict[str, str], key: str) -> str:
    if st.session_state.get(key) not in options:
        st.session_state[key] = options[0]
    return str(
        st.segmented_control(label, options, format_func=lambda one: words.get(one, one), key=key, required=True)
    )


def _label(editor: str, failures: str) -> str:
    return f"{editor} ({failures})" if failures.startswith("induced") else editor


def _curves_reading(shown: pd.DataFrame, statistic: str) -> str:
    parts = []
    for label, rows in shown.groupby("label", sort=False):
        top = rows.loc[rows["mean"].abs().idxmax()]
        n = f"n = {top.n_success}" + ("" if statistic == "D" else f" against {top.n_failure}")
        parts.append(
            f"{label}: most in layer {top.layer}, {signed(top['mean'])} nats ({signed(top.low)} to {signed(top.high)}, "
            f"{n})"
        )
    return "; ".join(parts) + "."


def _leverage(study: Contrasted, shipped: Contrasted | None) -> None:
    region = study.region
    mean = study.leverage[(study.leverage["editor"] == "all") & (study.leverage["module"] == "attn")]
    other = None if shipped is None or study.source == "shipped" else shipped.leverage
    if len(mean):
        figure(
            "contrast_leverage",
            contrast_charts.leverage_profile(mean, region.layers, other),
            title="Leverage of attention, and the region",
            reading=_leverage_reading(study, mean, shipped),
            table=mean,
            file=f"leverage-{region.model}",
            about=ABOUT_LEVERAGE,
        )
    cells = study.map
    top = cells.loc[cells["leverage"].idxmax()]
    figure(
        "contrast_map",
        contrast_charts.leverage_map(cells),
        title="Leverage of every editor",
        reading=f"Most: {top.editor}, layer {top.layer}, {MODULES[str(top.module)]}: {top.leverage:.2f} nats.",
        table=cells,
        file=f"leverage-map-{region.model}",
        about=ABOUT_MAP,
    )


def _leverage_reading(study: Contrasted, mean: pd.DataFrame, shipped: Contrasted | None) -> str:
    region = study.region
    often = {int(row.layer): float(row.chosen) for row in mean.itertuples()}
    least = min(often.get(layer, 0.0) for layer in region.layers)
    share = "all" if least > 0.9995 else f"at least {100 * least:.0f} %"
    text = (
        f"Read from {region.basis}, the region is layers {layers_of(study)}; each of them was chosen in {share} of the "
        "draws of edits."
    )
    if shipped is not None and study.source != "shipped":
        shared = len(set(region.layers) & set(shipped.region.layers))
        text += (
            f" The shipped study (dashed, {shipped.region.edits} edits) has layers {layers_of(shipped)}: "
            f"{shared} of {len(shipped.region.layers)} shared."
        )
    return text


def send(study: Contrasted) -> None:
    """Keep the region under a name and open the edit page with MEGA steering there."""
    region = study.region
    heading("Steer there", level=2)
    st.markdown(
        f"MEGA steers attention in **layers {layers_of(study)}**. Sending keeps the region under a name and opens the "
        "edit form with method MEGA and these layers."
    )
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        name = st.text_input(
            "Name of the region", value=f"{region.model}-{study.id[:8] or 'shipped'}", max_chars=64,
            key=f"contrast_name_{study.id or region.model}", help="Letters, digits, '-', '_' and '.'.",
        )  # fmt: skip
        pressed = st.button("Send to MEGA", type="primary", icon=":material/send:", key="contrast_send")
    if not pressed:
        return
    desk = service()
    desk.studies.keep_region(name, region)
    fact = {}
    if teaching(region.model) and not str(st.session_state.get("edit_subject") or "").strip():
        fact = request_form.draft_of_request(desk.suggest(region.model, 0))
    forget_run()
    request_form.lay_down(
        {**fact, "edit_model": region.model, "edit_method": "mega", "knob_mega_region": region.text()}
    )
    st.switch_page("pages/edit.py")


def _claims(study: Contrasted) -> None:
    heading(
        "The published pattern",
        About(
            "Four findings of MEGA's paper, each tested on every editor: late attention promotes the new object, by "
            "more than everything else together, and both attention and MLPs suppress the original one.",
            "Sums of D over layers with 95 % intervals of their own; it holds where the interval lies above zero, "
            "doesn't where it lies below, else it is unclear. Late: from two fifths of the depth.",
            "Small models and few editors; other label rules and statistics may say otherwise.",
        ),
    )
    table = pd.DataFrame(
        [
            {
                "finding": claim.text,
                "editor": editor,
                "said": f"{HOLDS.get(claim.holds, claim.holds)}: {signed(claim.value)} ({signed(claim.low)} to "
                f"{signed(claim.high)})",
            }
            for editor, claims in study.claims.items()
            for claim in claims
        ],
        columns=["finding", "editor", "said"],
    )
    wide = table.pivot(index="finding", columns="editor", values="said")
    wide = wide.reindex(index=list(dict.fromkeys(table["finding"])), columns=list(dict.fromkeys(table["editor"])))
    st.dataframe(
        wide.reset_index(),
        hide_index=True,
        key="contrast_claims",
        alt="The parts of the published pattern, with a column for each editor: nats and 95 % interval",
    )
    st.caption("Nats, with 95 % intervals; above zero speaks for the finding.")
