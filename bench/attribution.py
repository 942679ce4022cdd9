"""Which neurons promote a fact: our search against a plain enumeration of all of them, in the shape of GPT-2 small.

One look (layers, modules, heads, the certified 100 best MLP neurons and the 20 worst, for both objects) against the
plain way, which for every layer makes the logits of all neurons over the whole vocabulary, their log-softmax, and
differences (forward pass, layers and heads not counted there). Random weights may make bounds tighter or looser than
trained ones: the share of neurons that had to be evaluated is also measured on the embedded models. Times are the
process's CPU time, so that other work on the machine does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import process_time
from typing import Any

from bench.common import Row, Unmeasured, open_model, peak_bytes
from bench.quality import test_split
from mega_core.events import silent
from mega_core.records import EditRequest

MIB = 2**20
TOGETHER = ("module_scores", "heads", "neurons")
PASSES = ("module_scores", "heads", "neurons", "attention_neurons")


def measure(quick: bool, models: Sequence[str] = ()) -> list[Row]:
    """Seconds each way, their ratio, peak memory, shares evaluated and certified, and forwards counted."""
    import torch

    from tests.reference.plain_optimise import gpt2_small_shape

    with torch.no_grad():
        rows = _against_plain(gpt2_small_shape(), 1 if quick else 3, quick)
        found = [row for name in models or _embedded() for row in _on(name, 3 if quick else 50)]
    return [*rows, *found]


def _against_plain(lm: Any, repeats: int, quick: bool) -> list[Row]:
    import torch

    from mega_core.attribution import look_at, read_view
    from mega_core.attribution.recording import record
    from tests.reference.neuron_reference import whole_layer

    request = EditRequest("The Eiffel Tower", "{} is in the city of", "Rome", "Paris")
    asked = [read_view(view) for view in TOGETHER]
    look_at(lm, asked[:1], [request], "before", silent)  # imports
    times = []
    for _ in range(repeats):
        start = process_time()
        tables = look_at(lm, asked, [request], "before", silent)
        times.append(process_time() - start)
    ours = median(times)
    _, peak = peak_bytes(lambda: look_at(lm, asked, [request], "before", silent))

    recording = record(lm, [request], ("mlp_down_in",))
    ids = list(recording.candidates[0].values())

    def plain(layer: int) -> torch.Tensor:
        values = lm.read_weight(layer, "mlp_down").T
        base, coefficients = recording.base(layer, "ffn")[0], recording.last(layer, "mlp_down_in")[0]
        return whole_layer(base, coefficients, values, recording.states[-1, 0], lm.final_norm, lm.head_weight, ids)

    layers = range(1 if quick else lm.n_layers)
    start = process_time()
    every = [plain(layer) for layer in layers]
    enumeration = (process_time() - start) * lm.n_layers / len(layers)
    _, plain_peak = peak_bytes(lambda: plain(0))

    scores = tables["neurons"]["neuron_scores"]
    listed = scores[scores["layer"].isin(layers)]
    wrong = [
        abs(float(every[row.layer][row.neuron, list(recording.candidates[0]).index(row.candidate)]) - row.contribution)
        for row in listed.itertuples()
    ]
    shape = f"{lm.n_layers} layers, {lm.d_model} wide, vocabulary {lm.vocab_size}, random weights"
    told = f"{len(layers)} of {lm.n_layers} layers enumerated"
    rows = [
        Row("attribution", "one look: layers, modules, heads, certified neurons", ours, "s", shape),
        Row("attribution", "every neuron over the whole vocabulary, plain", enumeration, "s", told),
        Row("attribution", "plain / ours", enumeration / ours, "x"),
        Row("attribution", "one look, peak memory", peak / MIB, "MiB", "beside the model"),
        Row("attribution", "plain, peak memory of one layer", plain_peak / MIB, "MiB", "beside the model"),
        Row("attribution", "greatest difference of a listed contribution", max(wrong), "nats", f"{len(wrong)} rows"),
    ]
    if not quick:
        whole = torch.stack(every)  # (layer, neuron, candidate)
        missed = 0
        for j, candidate in enumerate(recording.candidates[0]):
            best = whole[..., j].flatten().topk(100).indices
            true = {(int(i) // lm.d_mlp, int(i) % lm.d_mlp) for i in best}
            mine = scores[(scores["candidate"] == candidate) & (scores["rank"] > 0)]
            missed += len(true - set(mine[["layer", "neuron"]].itertuples(index=False, name=None)))
        rows.append(Row("attribution", "neurons of the plain best 100 that are missing", missed, "", "both objects"))
    return rows + _shares("gpt2 shape", lm, [request])


def _on(name: str, count: int) -> list[Row]:
    """Shares on the reported edits, and the forwards that views of two states cost."""
    lm = open_model(name)
    requests = test_split(count)
    return [*_shares(name, lm, requests), *_forwards(name, lm, requests[0])]


def _shares(name: str, lm: Any, requests: Sequence[EditRequest]) -> list[Row]:
    """How many vectors are evaluated, and how many rows are certified."""
    import torch

    from mega_core.attribution import attention_neurons, neurons
    from mega_core.attribution.recording import record
    from mega_core.attribution.settings import NeuronsParams

    rows = []
    for label, kind, module in (("MLP neurons", "ffn", neurons), ("attention neurons", "attn", attention_neurons)):
        evaluated, vectors_of_all, sure, least = [], 0, [], []
        start = process_time()
        for request in requests:
            recording = record(lm, [request], ("mlp_down_in", "pattern", "value"))
            vectors = module.of_prompt(recording, 0)
            states = torch.stack([recording.base(layer, kind)[0] for layer in range(lm.n_layers)])
            found, _ = neurons.searched(recording, 0, states, vectors, NeuronsParams(), lambda: None)
            evaluated.append(found.evaluated)
            vectors_of_all += len(vectors)
            sure += [bool(one) for flags in found.sure_top for one in flags]
            least += [bool(one) for flags in found.sure_tail for one in flags]
        seconds = (process_time() - start) / len(requests)
        note = f"{len(requests)} prompts, {sum(evaluated) / len(requests):.0f} of {vectors_of_all // len(requests)}"
        label = f"{name}, {label}"
        rows += [
            Row("attribution", f"{label}: evaluated", 100 * sum(evaluated) / vectors_of_all, "%", note),
            Row("attribution", f"{label}: best 100 certified", 100 * sum(sure) / len(sure), "%"),
            Row("attribution", f"{label}: worst 20 certified", 100 * sum(least) / len(least), "%"),
            Row("attribution", f"{label}: forward and search", 1000 * seconds, "ms"),
        ]
    return rows


def _forwards(name: str, lm: Any, request: EditRequest) -> list[Row]:
    """Forward passes of the edit prompt that all views of both states cost, together and one view at a time."""
    from mega_core.attribution import look_at, read_view
    from mega_core.changes import PromptPrefix

    asked = [read_view(view) for view in PASSES]

    def count(groups: Sequence[Sequence[Any]]) -> int:
        counter = _Counter()
        with lm.reading(counter):
            for group in groups:
                look_at(lm, group, [request], "before", silent)
            with PromptPrefix("It is said that ").applied(lm):
                for group in groups:
                    look_at(lm, group, [request], "after", silent)
        return counter.forwards

    note = f"{', '.join(PASSES)}; before and after"
    return [
        Row("attribution", f"{name}: forwards, views together", count([asked]), "", note),
        Row("attribution", f"{name}: forwards, one view at a time", count([[one] for one in asked])),
    ]


class _Counter:
    """Counts forwards, as a reader of the model."""

    def __init__(self) -> None:
        self.forwards = 0

    def begin(self, batch: object) -> None:
        """One more."""
        self.forwards += 1

    def advance(self, ids: object) -> None:
        """Nothing is generated here."""


def _embedded() -> list[str]:
    from mega_core.settings import Settings

    names = [entry.name for entry in Settings.read().available() if entry.embedded]
    if not names:
        raise Unmeasured("no embedded model is here")
    return names
