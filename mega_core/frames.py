"""The column contract of every table, and the check that holds a frame to it.

One row is one number. `state` is before or after, so a comparison is a group-by and a chart is one encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from types import MappingProxyType

import pandas as pd

from mega_core.errors import FrameError, UnknownName

# Kinds: "text", "int", "float", "bool".
DTYPES = MappingProxyType({"text": "str", "int": "int64", "float": "float64", "bool": "bool"})


@dataclass(frozen=True)
class Contract:
    """Which columns a table has: `keys` name a row, `values` are what it says. Each maps column -> kind."""

    name: str
    keys: Mapping[str, str]
    values: Mapping[str, str]

    @property
    def columns(self) -> dict[str, str]:
        """Every column with its kind, keys first."""
        return {**self.keys, **self.values}


def _contract(name: str, keys: str, values: str) -> tuple[str, Contract]:
    def parse(words: str) -> Mapping[str, str]:
        pairs = (word.partition(":") for word in words.split())
        return MappingProxyType({column: kind or "text" for column, _, kind in pairs})

    return name, Contract(name, parse(keys), parse(values))


# answers: log-probability (nats) of the whole candidate after the prompt; rank (1 = first), is_top: its first token.
# module_scores: contribution = change of log p(candidate's first token) made by that module, nats (NLKA).
# contrast_runs: `edit` is the edit's number in its study; induced: how a failure was brought about, empty for a run as
# it is; probabilities of first tokens. contrast, contrast_sums (nats), leverage: see attribution/contrast; low and high
# bound 95 % of the draws; in_region: the region (attn) or ACE's value layers (ffn) have the layer; chosen: in this
# share of the draws.
# head_scores: head -1 is what attention writes besides its heads: the bias, and what steering adds.
# head_sources: position -1 is a text in front of the prompt; attention is the mass from the last token.
# neuron_scores: coefficient = the neuron's activation; rank 1, 2, ... among the most promoting, -1, -2, ... among the
#   most suppressing; bound >= contribution; certified: no other neuron of the model belongs before it.
# attention_neurons: one number (dim) of a head at one source position; coefficient = attention weight * value.
# neuron_tokens: what a neuron promotes and suppresses at the sign of its coefficient; neuron "12" or "head.dim.pos".
# query_layers: share of a module (or "embedding", layer -1) in what switches the value neurons ("ffn", "attn") on.
# query_neurons: coefficient = activation at `position`, from which the neuron does most; score sums over positions.
# lens: the candidate's probability if the stream there were the last. lens_crossing: first place where new > true,
#   and the place from which on it is so to the end (lasting); layer -1 without.
# trace: probability of the candidate with clean, corrupted, and partly restored subject; effect = restored - corrupted.
# residual: dot of what a module writes with the candidate's unembedding row, no norm; cumulative over layers.
# attention: mass that the last token gives to a segment of the prompt (first, subject, between, last, context).
# stress: the old fact after prefixes that suggest it. stress_heads: p(true) read off a head's output alone.
# verified: effects on log p (nats) of changing the cells named by `cells` (see attribution/verify): predicted by the
#   view's score, direct if nothing behind them reacted (both 0 without has_prediction), actual; control = mean actual
#   effect of `controls` equal-size random sets. layer is the lowest; size counts cells; before and after the change.
# weight_change: norms are Frobenius; relative_norm is against the unedited matrix.
# weight_spectrum: singular values, greatest first, of the change and of the unedited matrix.
# hops, chains, chain_sizes: see evaluation/multihop; `case` is the dataset's own name, chains and hops count from 1; 0
#   hops or edits: any number.
# over_attention, attention_link, attention_failures: see attribution/attention_drift; mass on the subject, change =
#   after - before.
CONTRACTS: Mapping[str, Contract] = MappingProxyType(
    dict(
        (
            _contract(
                "answers",
                "state case:int prompt_kind prompt candidate",
                "token logprob:float mean_logprob:float prob:float first_prob:float "
                "rank:int is_top:bool is_greedy:bool",
            ),
            _contract("next_tokens", "state case:int prompt token_id:int", "token prob:float rank:int"),
            _contract("metrics", "state case:int protocol metric", "value:float n:int"),
            _contract("module_scores", "state case:int layer:int module candidate", "contribution:float"),
            _contract("module_totals", "state case:int candidate", "start:float end:float total:float"),
            _contract("head_scores", "state case:int layer:int head:int candidate", "contribution:float"),
            _contract(
                "head_sources",
                "state case:int layer:int head:int position:int candidate",
                "token attention:float contribution:float",
            ),
            _contract(
                "neuron_scores",
                "state case:int layer:int neuron:int candidate",
                "contribution:float coefficient:float bound:float rank:int certified:bool",
            ),
            _contract(
                "attention_neurons",
                "state case:int layer:int head:int dim:int position:int candidate",
                "token contribution:float coefficient:float bound:float rank:int certified:bool",
            ),
            _contract(
                "neuron_tokens",
                "state case:int kind layer:int neuron direction rank:int",
                "token token_id:int logit:float",
            ),
            _contract("query_layers", "state case:int values layer:int module candidate", "score:float"),
            _contract(
                "query_neurons",
                "state case:int layer:int neuron:int candidate",
                "score:float coefficient:float position:int token rank:int is_value:bool",
            ),
            _contract(
                "lens",
                "state case:int layer:int site position:int candidate",
                "token logprob:float prob:float rank:int",
            ),
            _contract(
                "lens_crossing",
                "state case:int",
                "layer:int site overtakes:bool stays:bool lasting_layer:int lasting_site",
            ),
            _contract(
                "trace",
                "state case:int layer:int site position:int candidate",
                "token p_clean:float p_corrupt:float p_restored:float effect:float",
            ),
            _contract("residual", "state case:int layer:int module candidate", "dot:float cumulative:float"),
            _contract(
                "attention",
                "state case:int prompt_kind prompt layer:int head:int segment",
                "mass:float",
            ),
            _contract(
                "stress",
                "state case:int kind",
                "prompt p_new:float p_true:float says_true:bool prefers_true:bool",
            ),
            _contract("stress_heads", "state case:int kind layer:int head:int", "lens_prob:float contribution:float"),
            _contract(
                "verified",
                "state case:int cells action candidate",
                "kind layer:int size:int token has_prediction:bool predicted:float direct:float actual:float "
                "prob_before:float prob_after:float rank_before:int rank_after:int "
                "control:float control_sd:float controls:int",
            ),
            _contract("weight_change", "layer:int site", "kind norm:float relative_norm:float rank:int parameters:int"),
            _contract("weight_spectrum", "layer:int site index:int", "singular:float base_singular:float"),
            _contract("generations", "state case:int prompt_kind prompt", "text"),
            _contract("tokens", "case:int position:int", "token is_subject:bool"),
            _contract(
                "contrast_runs",
                "editor edit:int induced",
                "success:bool likelier:bool prob_new:float prob_true:float",
            ),
            _contract("run_scores", "editor edit:int induced state layer:int module candidate", "contribution:float"),
            _contract(
                "contrast",
                "editor statistic failures module layer:int candidate",
                "mean:float low:float high:float n_success:int n_failure:int",
            ),
            _contract(
                "contrast_sums",
                "editor statistic failures module span candidate",
                "mean:float low:float high:float",
            ),
            _contract(
                "leverage",
                "editor basis module layer:int",
                "leverage:float low:float high:float smoothed:float in_region:bool chosen:float",
            ),
            _contract(
                "over_attention",
                "case:int prompt_kind prompt layer:int head:int",
                "before:float after:float change:float",
            ),
            _contract("attention_link", "case:int prompt_kind prompt", "change:float top:float failed:bool"),
            _contract("attention_failures", "measure statistic", "value:float low:float high:float n:int"),
            _contract("hops", "case chain:int hop:int", "prompt expected said recalled:bool"),
            _contract(
                "chains",
                "case chain:int",
                "hops:int edits:int recalled:int answered:bool strict:bool old_answer:bool known:bool broke_at",
            ),
            _contract("chain_sizes", "hops:int edits:int metric", "value:float n:int"),
        )
    )
)


def empty(name: str) -> pd.DataFrame:
    """A frame of this contract with no rows."""
    contract = _known(name)
    return pd.DataFrame({column: pd.Series(dtype=DTYPES[kind]) for column, kind in contract.columns.items()})


def check(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the frame with exactly the contract's columns, in its order and dtypes.

    Raises FrameError on missing or extra columns, a value of the wrong kind, NaN, or two rows with one key.
    """
    contract = _known(name)
    missing = [column for column in contract.columns if column not in frame.columns]
    extra = [column for column in frame.columns if column not in contract.columns]
    if missing or extra:
        raise FrameError(f"Table {name!r} lacks {missing} and has unexpected {extra}.")
    ordered = frame[list(contract.columns)].reset_index(drop=True)
    if ordered.isna().any(axis=None):
        bad = [column for column in ordered.columns if ordered[column].isna().any()]
        raise FrameError(f"Table {name!r} has missing values in {bad}.")
    try:
        typed = ordered.astype({column: DTYPES[kind] for column, kind in contract.columns.items()})
    except (TypeError, ValueError) as error:
        raise FrameError(f"Table {name!r} has a value of the wrong kind: {error}.") from error
    if typed.duplicated(subset=list(contract.keys)).any():
        raise FrameError(f"Table {name!r} has two rows with the same {list(contract.keys)}.")
    return typed


def from_rows(rows: list[dict[str, object]], name: str) -> pd.DataFrame:
    """A checked frame from a list of rows; no rows give an empty frame."""
    return check(pd.DataFrame.from_records(rows), name) if rows else empty(name)


def to_parquet(frame: pd.DataFrame) -> bytes:
    """Parquet bytes of a checked frame."""
    buffer = BytesIO()
    frame.to_parquet(buffer, index=False, engine="pyarrow", compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes, name: str) -> pd.DataFrame:
    """Read and check. Raises FrameError when the bytes are not such a table."""
    try:
        frame = pd.read_parquet(BytesIO(data), engine="pyarrow")
    except Exception as error:  # pyarrow raises many kinds on damaged bytes
        raise FrameError(f"The stored table {name!r} can't be read: {type(error).__name__}.") from error
    return check(frame, name)


def _known(name: str) -> Contract:
    if name not in CONTRACTS:
        raise UnknownName("table", name, CONTRACTS)
    return CONTRACTS[name]
