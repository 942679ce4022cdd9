from __future__ import annotations

import numpy as np
import pytest
import torch

from mega_core.attribution import frozen, logit_lens, look_at, read_view, recording
from mega_core.changes import MatrixDelta, PromptPrefix, WeightDelta
from mega_core.errors import BadInput
from mega_core.events import Note, silent
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest

FRANCE = EditRequest("France", "The capital of {} is", "Rome", "Paris")
TOWER = EditRequest("Eiffel Tower", "{} is in the city of", "London", "Paris")
SHORT = EditRequest("Italy", "{}", "Tokyo")
REQUESTS = (FRANCE, TOWER, SHORT)


def look(lm: ModelAdapter, requests=REQUESTS, view: str = "lens", report=silent):
    (found,) = look_at(lm, [read_view(view)], requests, "before", report).values()
    return found


def ends(lm: ModelAdapter, request: EditRequest) -> tuple[int, int]:
    """The subject's last token and the prompt's last."""
    last = len(tokens.prompt_ids(lm.tokenizer, request.prompt)) - 1
    return tokens.subject_last(lm.tokenizer, request.template, request.subject), last


def plain(lm: ModelAdapter, request: EditRequest) -> dict[tuple[int, str, int], torch.Tensor]:
    """(layer, site, position) -> log-probabilities, through the model's own norm and head, of the prompt alone."""
    sites = [Site(layer, site) for layer, site in logit_lens.places(lm.n_layers)]
    with torch.no_grad(), capture(lm, sites) as got:
        lm.forward(lm.encode([request.prompt]))
        return {
            (site.layer, site.part, position): torch.log_softmax(lm.unembed(row), -1)
            for site in sites
            for position, row in enumerate(got[site][0])
        }


def test_every_row_is_the_models_own_norm_and_head(lm: ModelAdapter) -> None:
    found = look(lm, view="lens?positions=all")["lens"]
    lengths = [len(tokens.prompt_ids(lm.tokenizer, request.prompt)) for request in REQUESTS]
    assert len(found) == (2 * lm.n_layers + 1) * (2 * lengths[0] + 2 * lengths[1] + lengths[2])
    expected = [plain(lm, request) for request in REQUESTS]
    known = [recording.candidates(lm, request) for request in REQUESTS]
    for row in found.itertuples():
        log_p = expected[row.case][row.layer, row.site, row.position]
        own = log_p[known[row.case][row.candidate]]
        assert row.logprob == pytest.approx(float(own), abs=1e-4)
        assert row.prob == pytest.approx(float(own.exp()), abs=1e-4)
        sure = (log_p > own + 1e-4).sum(), (log_p > own - 1e-4).sum()  # ties may be broken by rounding
        assert sure[0] + 1 <= row.rank <= sure[1]


@pytest.mark.parametrize("norm", ["own", "frozen"])
def test_the_last_state_is_the_models_own_answer(lm: ModelAdapter, norm: str) -> None:
    found = look(lm, view=f"lens?positions=all&norm={norm}")["lens"]
    last = found[(found["layer"] == lm.n_layers - 1) & (found["site"] == "block_out")]
    with torch.no_grad():
        logits = lm.logits(lm.encode([request.prompt for request in REQUESTS]))
    own = torch.log_softmax(logits, -1)
    for row in last.itertuples():
        token = recording.candidates(lm, REQUESTS[row.case])[row.candidate]
        assert row.logprob == pytest.approx(float(own[row.case, row.position, token]), abs=1e-4)


def test_the_frozen_norm_makes_the_steps_of_module_scores(lm: ModelAdapter) -> None:
    lens, scores = (
        look(lm, REQUESTS[:2], view)[frame]
        for view, frame in (("lens?positions=last&norm=frozen", "lens"), ("module_scores", "module_scores"))
    )
    keys = ["case", "candidate"]
    steps = lens.groupby(keys)["logprob"].diff().dropna().to_numpy()
    order = scores.sort_values([*keys, "layer", "module"])
    np.testing.assert_allclose(np.sort(steps), np.sort(order["contribution"]), atol=2e-5)


def test_positions(tiny_lm) -> None:
    lm = tiny_lm("llama")
    subject, last = ends(lm, FRANCE)
    for which, wanted in (("last", {last}), ("subject", {subject}), ("last subject", {subject, last})):
        found = look(lm, [FRANCE], f"lens?positions={which}")
        assert set(found["lens"]["position"]) == wanted
        assert len(found["lens_crossing"]) == 1
    labels = tokens.token_strings(lm.tokenizer, tokens.prompt_ids(lm.tokenizer, FRANCE.prompt))
    assert {(row.position, row.token) for row in found["lens"].itertuples()} == {
        (subject, labels[subject]),
        (last, labels[last]),
    }
    with pytest.raises(BadInput):
        read_view("lens?positions=first")


def test_batches_slices_and_groups_change_nothing(lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = look(lm)["lens"]
    alone = [look(lm, [request])["lens"] for request in REQUESTS]
    monkeypatch.setattr(frozen, "LOGITS_AT_ONCE", 10_000)
    monkeypatch.setattr(recording, "CAPTURE_BYTES", 1)
    sliced = look(lm)["lens"]
    np.testing.assert_allclose(sliced["logprob"], whole["logprob"], atol=1e-4)
    np.testing.assert_allclose(np.concatenate([frame["logprob"] for frame in alone]), whole["logprob"], atol=1e-4)
    # Ranks may differ where two tokens are as likely to the last bit.
    assert (sliced["rank"] == whole["rank"]).mean() > 0.98


@pytest.mark.parametrize(
    ("lead", "first", "lasting", "stays"),
    [
        ([-1, -1, -1, -1, -1], (-1, ""), (-1, ""), False),
        ([-1, -1, -1, -1, 1], (1, "block_out"), (1, "block_out"), True),
        ([-1, 1, -1, 1, 1], (0, "resid_mid"), (1, "resid_mid"), False),
        ([1, 1, 1, 1, 1], (0, "block_in"), (0, "block_in"), True),
        ([-1, 0, 0, 2, 0], (1, "resid_mid"), (-1, ""), False),  # as likely is not likelier
        ([1, -1, -1, -1, -1], (0, "block_in"), (-1, ""), False),
    ],
)
def test_crossings(lead: list[int], first: tuple[int, str], lasting: tuple[int, str], stays: bool) -> None:
    found = logit_lens.crossing(np.array(lead, float), logit_lens.places(2))
    assert (found["layer"], found["site"]) == first
    assert (found["lasting_layer"], found["lasting_site"]) == lasting
    assert found["overtakes"] == (first != (-1, ""))
    assert found["stays"] is stays


def test_the_crossing_is_read_off_the_curves(lm: ModelAdapter) -> None:
    found = look(lm)
    assert list(found["lens_crossing"]["case"]) == [0, 1]  # SHORT has no true object
    for row in found["lens_crossing"].itertuples():
        _, last = ends(lm, REQUESTS[row.case])
        mine = found["lens"][(found["lens"]["case"] == row.case) & (found["lens"]["position"] == last)]
        curves = mine.pivot_table(index=["layer", "site"], columns="candidate", values="logprob", sort=False)
        ahead = (curves["new"] > curves["true"]).reindex(logit_lens.places(lm.n_layers))
        assert row.overtakes == ahead.any()
        if row.overtakes:
            assert (row.layer, row.site) == ahead.idxmax()
            assert row.stays == ahead.loc[ahead.idxmax() :].all()
        assert (row.lasting_layer >= 0) == ahead.iloc[-1]
        if ahead.iloc[-1]:
            assert ahead.loc[(row.lasting_layer, row.lasting_site) :].all()


def test_an_edit_shows_from_its_layer_on(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(lm.d_model, 1, generator=draw), torch.randn(lm.d_mlp, 1, generator=draw)
    before = look(lm, [FRANCE])["lens"]
    with WeightDelta((MatrixDelta(1, "mlp_down", left, right, 1.0),)).applied(lm):
        after = look(lm, [FRANCE])["lens"]
    early = (before["layer"] < 1) | ((before["layer"] == 1) & (before["site"] == "resid_mid"))
    assert before[early].equals(after[early])
    assert not np.allclose(before.loc[~early, "logprob"], after.loc[~early, "logprob"])


def test_behind_a_text_positions_are_the_prompts_own(lm: ModelAdapter) -> None:
    plain_rows = look(lm, [TOWER])["lens"]
    with PromptPrefix("Tokyo is in the country of Japan. ").applied(lm):
        found = look(lm, [TOWER])["lens"]
        with torch.no_grad():
            own = torch.log_softmax(lm.last_logits(lm.encode([TOWER.prompt])), -1)[0]
    keys = ["layer", "site", "position", "candidate", "token"]
    assert found[keys].equals(plain_rows[keys])
    assert not np.allclose(found["logprob"], plain_rows["logprob"], atol=1e-2)
    last = found[(found["layer"] == lm.n_layers - 1) & (found["site"] == "block_out")]
    last = last[last["position"] == ends(lm, TOWER)[1]].set_index("candidate")["logprob"]
    for candidate, token in recording.candidates(lm, TOWER).items():
        assert last[candidate] == pytest.approx(float(own[token]), abs=1e-4)


def test_a_shared_first_token_is_said(tiny_lm) -> None:
    said: list[object] = []
    found = look(tiny_lm("gpt2"), [EditRequest("France", "{} is", "Paris, Texas", "Paris")], report=said.append)
    assert [event for event in said if isinstance(event, Note)]
    assert not found["lens_crossing"]["overtakes"].iloc[0]
