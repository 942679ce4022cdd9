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
# weight_change: norms are Frobenius; relative_norm is against the unedited matrix.
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
                "neuron_scores", "state case:int layer:int neuron:int candidate", "contribution:float coefficient:float"
            ),
            _contract(
                "lens",
                "state case:int layer:int site position:int candidate",
                "token logprob:float prob:float rank:int",
            ),
            _contract(
                "trace",
                "case:int layer:int site position:int",
                "token p_clean:float p_corrupt:float p_restored:float effect:float",
            ),
            _contract("attention", "state case:int layer:int head:int segment", "mass:float"),
            _contract("weight_change", "layer:int site", "kind norm:float relative_norm:float rank:int parameters:int"),
            _contract("generations", "state case:int prompt_kind prompt", "text"),
            _contract("tokens", "case:int position:int", "token is_subject:bool"),
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
