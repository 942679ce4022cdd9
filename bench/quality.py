"""Random counterfactual edits: do they take, reach paraphrases, spare neighbours, and leave the model bit-identical?"""

from __future__ import annotations

from statistics import fmean

from bench.common import Row, embedded_models, random_plans, temporary_service

SHOWN = (
    ("argmax", "accuracy", "Acc: new object is the most likely answer"),
    ("rome", "ES", "efficacy score: new over true"),
    ("rome", "PS", "paraphrase success: new over true"),
    ("argmax", "paraphrase_accuracy", "paraphrase Acc"),
    ("rome", "NS", "neighbourhood success: true over new"),
    ("argmax", "neighbourhood_accuracy", "neighbourhood Acc"),
)


def measure(quick: bool) -> list[Row]:
    """Means over edits, each edit's own mean first, with the unedited model beside it."""
    rows: list[Row] = []
    with temporary_service(max_models=2) as service:
        for model in embedded_models(service):
            plans = random_plans(service, model, 10 if quick else 100, seed=2)
            base = service.condition(model)
            values: dict[tuple[str, str, str], list[float]] = {}
            clean = 0
            for plan in plans:
                report = service.run(plan, fresh=True)
                clean += service.condition(model) == base and base.hooks == 0 and report.receipt.restored
                for row in report.frames["metrics"].itertuples():
                    values.setdefault((str(row.protocol), str(row.metric), str(row.state)), []).append(float(row.value))
            for protocol, metric, title in SHOWN:
                after = values.get((protocol, metric, "after"), [])
                before = values.get((protocol, metric, "before"), [])
                if after:
                    rows.append(
                        Row(
                            "quality",
                            f"{model} {title}",
                            100 * fmean(after),
                            "%",
                            f"before {100 * fmean(before):.1f} %, {len(after)} edits",
                        )
                    )
            rows.append(Row("quality", f"{model} digest identical and 0 hooks after", clean, f"of {len(plans)}"))
    return rows
