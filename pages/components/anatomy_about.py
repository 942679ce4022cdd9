"""What the (i) beside each picture of the Anatomy page says."""

from __future__ import annotations

from pages.components.figure import About

ABOUT: dict[str, About] = {
    "head_scores": About(
        "How much each attention head raises (blue) or lowers (orange) the log-probability of the object, in nats. All "
        "states and objects share one colour scale.",
        "The head's output at the last token is added alone to the stream in front of its layer's attention, and the "
        "change of the log-probability under the final norm of the whole run is read (Yu and Ananiadou, 2024).",
        "Scores of heads don't add up to their module's. It is the direct effect; Verify shows what really happens.",
    ),
    "head_bars": About(
        "The heads of one layer: contribution before (hollow) and after the edit (filled), in nats.",
        "As in the map of heads.",
        "Scores of heads don't add up to their module's.",
    ),
    "head_sources": About(
        "The head's contribution by the token it reads from, before (hollow) and after the edit (filled), in nats.",
        "The head's output is a sum over source tokens; each part is scored alone, as a head is.",
        "Only the strongest heads are split. Position and token are those of the edit prompt.",
    ),
    "head_attention": About(
        "How the head shares the last token's attention among the tokens of the edit prompt, before and after.",
        "Attention weights of the last token; they add up to one.",
        "Where a head looks is not what it takes from there: compare the contributions.",
    ),
    "neuron_scores": About(
        "The MLP neurons with the largest contributions, before (hollow) and after the edit (filled), in nats, with "
        "the token that each raises most.",
        "A neuron's activation times its output vector is added alone to the stream behind attention. The lists are "
        "exact: a bound shows that no other neuron belongs on them (column certified of the run's table).",
        "Promoting and suppressing neurons overlap, so they don't add up to the layer. A missing point means that the "
        "neuron is not on that state's list: its contribution there is smaller than all that are listed.",
    ),
    "attention_neurons": About(
        "Single numbers inside an attention head at one source token (layer, head, number, position), in nats.",
        "Attention weight times value times its row of the output matrix, added alone to the stream.",
        "As for MLP neurons.",
    ),
    "neuron_tokens": About(
        "The tokens whose logits the neuron's output vector raises and lowers most, at the sign that its activation "
        "has on this prompt.",
        "The vector through the final norm and the unembedding, times its activation.",
        "What a vector says in the output vocabulary; later layers may read something else from it.",
    ),
    "query_layers": About(
        "How much of what switches the strongest value neurons on was written by each module below, in nats.",
        "Shares of each component in the neuron's input along its key, weighted by the neurons' scores.",
        "Shares can be negative, and above one where components cancel.",
    ),
    "lens": About(
        "What the model would say if the residual stream ended there: of each object, before and after the edit.",
        "Final norm and unembedding of the stream at each place (logit lens). The vertical rule: from there on the new "
        "object is ahead to the end, after the edit.",
        "Middle layers are read through a norm and a basis made for the last one, so trends count more than values.",
    ),
    "residual": About(
        "The dot product of what each module writes with the object's unembedding row, before and after.",
        "No norm is taken, as in the decomposition of One Mask (arXiv 2605.28839): all rows add up to the logit's.",
        "Without the norm, values of different models or states of different length can't be compared.",
    ),
    "attention": About(
        "The share of the last token's attention that each head gives to a part of the prompt: one hue for the share "
        "itself, orange and blue for its change. Over neighbour prompts it is the mean, each with its own subject.",
        "Sum of the attention weights on the tokens of that part. Growth on the subject is called attention drift or "
        "over-attention (arXiv 2502.14838).",
        "Attention weights say where a head looks, not what it takes from there.",
    ),
    "drift": About(
        "A point for each prompt: change of the attention to its subject, mean over the heads of the later half of the "
        "layers, against the change of its margin log P(new) − log P(original) per token.",
        "Both are after minus before the edit. For a neighbour, a margin that rises is damage.",
        "A handful of prompts of one edit shows no correlation.",
    ),
    "trace": About(
        "How much of the object's probability comes back when one state is put back into a run whose subject is noise.",
        "Causal tracing (Meng et al. 2022): noise of three standard deviations on the subject's embeddings; a state, "
        "or a window of module outputs, is restored from the clean run; mean over the draws.",
        "Where a fact is traced to need not be where it is edited best (arXiv 2301.04213).",
    ),
    "trace_profile": About(
        "The same by layer: the largest effect over all tokens, for the stream, attention and MLP outputs.",
        "Maximum over the tokens of the map.",
        "The stream late at the last token always brings everything back.",
    ),
    "weight_spectrum": About(
        "Singular values of the change of one matrix and of the matrix itself, greatest first, on a logarithmic scale.",
        "Singular value decomposition of after minus before.",
        "Values of zero are left out.",
    ),
    "stress": About(
        "Probabilities of both objects behind prefixes that suggest the original one: a statement (wiki), its name "
        "said again (repeat), a question whether it is so (question); none is the prompt alone.",
        "First-token probabilities; after “superficial editing” (arXiv 2505.12636), the wording is ours.",
        "Two of the prefixes name the original object, so part of what they bring back is copying.",
    ),
    "stress_heads": About(
        "How much likelier each head alone makes the original object behind a prefix than without it, after the edit.",
        "The head's output through its own norm and the unembedding.",
        "A head read alone is out of its context.",
    ),
}
