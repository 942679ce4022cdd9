"""Ways of looking inside a model. A new view is one function and one entry here."""

from mega_core.attribution.base import VIEWS, View, look_at, read_view
from mega_core.attribution.settings import (
    AttentionParams,
    HeadsParams,
    LensParams,
    NeuronsParams,
    QueryParams,
    SuperficialityParams,
    TraceParams,
)

__all__ = ["VIEWS", "View", "look_at", "read_view"]

VIEWS.add(
    "module_scores",
    View(
        "module_scores",
        "Layer and module contributions (NLKA)",
        "How much each layer's attention and MLP raise or lower the log-probability of the new and the true object.",
        ("module_scores", "module_totals"),
        "mega_core.attribution.nlka:look",
    ),
)

VIEWS.add(
    "heads",
    View(
        "heads",
        "Attention heads",
        "Which attention heads raise or lower the log-probability of the two objects, and from which tokens.",
        ("head_scores", "head_sources"),
        "mega_core.attribution.heads:look",
        reads=("attn_out_in", "pattern", "value"),
        params=HeadsParams,
    ),
)

VIEWS.add(
    "neurons",
    View(
        "neurons",
        "MLP neurons",
        "Which MLP neurons raise or lower the log-probability of the new and the true object most, and what they say.",
        ("neuron_scores", "neuron_tokens"),
        "mega_core.attribution.neurons:look",
        reads=("mlp_down_in",),
        params=NeuronsParams,
    ),
)

VIEWS.add(
    "attention_neurons",
    View(
        "attention_neurons",
        "Attention neurons",
        "Which numbers inside attention heads, read from which token, raise or lower the log-probability of the new "
        "and the true object most.",
        ("attention_neurons", "neuron_tokens"),
        "mega_core.attribution.attention_neurons:look",
        reads=("pattern", "value"),
        params=NeuronsParams,
    ),
)

VIEWS.add(
    "query",
    View(
        "query",
        "What switches the value neurons on",
        "Which earlier layers and MLP neurons make the neurons active that promote the new and the true object.",
        ("query_layers", "query_neurons"),
        "mega_core.attribution.query:look",
        reads=("block_in", "resid_mid", "mlp_down_in", "pattern", "value"),
        params=QueryParams,
    ),
)

VIEWS.add(
    "lens",
    View(
        "lens",
        "Logit lens",
        "What the model would say if the residual stream ended there, and where the new object overtakes the true one.",
        ("lens", "lens_crossing"),
        "mega_core.attribution.logit_lens:look",
        reads=("block_in", "resid_mid", "block_out"),
        params=LensParams,
    ),
)

VIEWS.add(
    "residual",
    View(
        "residual",
        "Direct contributions to the residual stream",
        "Dot products of what each layer's attention and MLP write with each object's unembedding row, without a norm.",
        ("residual",),
        "mega_core.attribution.residual:look",
    ),
)

VIEWS.add(
    "attention",
    View(
        "attention",
        "Attention to the subject",
        "How much of its attention each head spends on the subject and other parts, in edit and neighbour prompts.",
        ("attention",),
        "mega_core.attribution.attention_drift:look",
        reads=("pattern",),
        params=AttentionParams,
    ),
)

VIEWS.add(
    "trace",
    View(
        "trace",
        "Causal trace",
        "Which states bring the answer back once the subject's tokens are unreadable, by layer and token.",
        ("trace",),
        "mega_core.attribution.causal_trace:look",
        reads=("block_out", "attn", "mlp"),
        params=TraceParams,
    ),
)

VIEWS.add(
    "superficiality",
    View(
        "superficiality",
        "Superficial editing",
        "Whether texts that suggest the original object bring it back, and which heads re-inject it.",
        ("stress", "stress_heads"),
        "mega_core.attribution.superficiality:look",
        params=SuperficialityParams,
    ),
)
