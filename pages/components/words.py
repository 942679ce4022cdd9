"""Sentences and definitions that more than one page shows."""

PRIVACY = "What you type stays on the machine that runs this app; the pages call no other host."

GLOSSARY = {
    "Subject": "Who or what the fact is about: Eiffel Tower.",
    "Prompt template": "The sentence that asks for the fact, with {} for the subject, ending right before the object.",
    "Original object": "What the model says before the edit: Paris.",
    "New object": "What the edit should make it say: Rome.",
    "Base model, edited model": "The model as it was loaded, and the same model while the edit is applied.",
    "Run": "One edit with its measurements, kept under an id made from everything that decides the answer.",
    "Receipt": "The digests of all parameters before and after a run: equal digests prove that the model is restored.",
    "Stack": "Edits applied one after the other, kept in a folder; each can be taken out again.",
    "Paraphrase": "The same question in other words; used to measure, never to fit.",
    "Neighbour": "A prompt about another subject that must keep its answer.",
    "Contribution": "How much a module's output changes the log-probability of an object when it joins the residual "
    "stream, in nats.",
    "Nat": "A unit of log-probability: +1 nat makes an object 2.7 times as likely.",
    "Logit": "A token's score before it is turned into a probability; one logit more makes it 2.7 times as likely "
    "against the others.",
    "Margin": "log P(new object) − log P(original object): positive when the new one is preferred.",
    "Works, leaks, narrow, fails": "Works: the prompt, its paraphrases and the neighbours behave. Leaks: neighbours "
    "changed too. Narrow: paraphrases did "
    "not follow. Fails: the edit prompt does not say the new object.",
    "Efficacy": "Share of edit prompts after which the new object is preferred, or comes first.",
    "Generalisation": "Efficacy on paraphrases.",
    "Specificity": "Share of neighbours that keep their answer; also called locality.",
    "Portability": "Whether what follows from the new fact follows too: questions one step further, another name of "
    "the subject, the reversed question.",
    "Fluency": "How varied the written text is: entropy of its pairs and triples of words. Falls when a model repeats "
    "itself.",
    "Protocol": "A fixed way of asking and counting, such as that of CounterFact or zsRE; figures of two protocols are "
    "not comparable.",
    "Perplexity": "How surprised the model is by a fixed text: 1 is not at all. Rises when a model is damaged.",
    "Residual stream": "The vector that passes from layer to layer; every attention and MLP adds its output to it.",
    "Attention, head": "The part of a layer that moves information between positions; each head decides for itself "
    "from where.",
    "MLP, neuron": "The part of a layer that works on one position; a neuron is one input of its last matrix.",
    "Key": "What an MLP's last matrix receives at the subject's last token; editors write new facts under such keys.",
    "Value": "What an MLP's last matrix writes for a key; editors choose a value that makes the model say the new "
    "object.",
    "Value neuron": "A neuron whose output promotes an object directly, mostly in upper layers.",
    "Query neuron": "A neuron in lower layers that makes value neurons active: it helps the object through them.",
    "Second moment of keys": "How the keys of ordinary text are spread: E[k kᵀ]. Editors use it to spare other keys.",
    "C, D, K (contrasts)": "Three ways to compare the contributions of many edits by module. D: what edits that "
    "work moved, after minus before. C: edits that work minus edits that fail, both after. K: what the former moved "
    "minus what the latter moved. Intervals are 95 %, by drawing edits anew.",
    "Leverage": "How much a layer's attention promotes the new object and suppresses the original one, read from C, D "
    "or K and averaged over editors.",
    "Region": "The layers in which attention has most leverage; where MEGA steers.",
    "Over-attention": "After an edit, attention heads say the new object far more strongly than they say facts that "
    "were always known.",
    "Causal trace": "Noise is put on the subject, then single states are put back: how much of the answer returns.",
    "Logit lens": "Reading a middle layer as if it were the last one.",
    "Ablation": "A part of the network is silenced, to see what is lost without it.",
    "Patching": "A state of one run is put into another run, to see what it carries.",
    "Multi-hop question": "A question that takes two facts in a row: the river of the city of the tower.",
    "Bridge": "The object of the first hop, which is the subject of the second.",
    "Gate": "The check whether a prompt asks about the edited fact; an edit that steers acts only where it says yes.",
    "Alpha": "How strongly a steering edit pushes; 0 leaves the model alone.",
    "Transport map": "The map with least movement that turns states of one sort into states of another; steering edits "
    "use it to carry the original object's states to the new one's.",
    "Null space": "Directions that ordinary keys hardly use; AlphaEdit writes only there.",
    "In-context edit": "No weight changes: a text with the new fact stands before every prompt.",
    "Mask": "One choice of weights of one matrix that are set to zero, the same for all edits.",
    "RSR": "Reversal success rate: the share of edits that a mask undoes, of those that took.",
    "Degenerate layer": "A layer whose matrix can be removed whole at no price: undoing edits there shows nothing.",
    "Low-rank change": "A change of a matrix made of few directions, as editors write it; training changes many.",
    "Control": "The same measurement on something of the same size that was chosen by chance or by a simple rule.",
    "Confidence interval": "The range in which a figure stays in 95 of 100 redraws of the cases.",
    "Seed": "The number that decides everything drawn by chance; the same seed gives the same result.",
}

LIMITS = (
    "Attribution shows where log-probability changes along the network; it does not prove cause.",
    "Contributions explain an object's first token; probabilities in the evidence are of whole objects.",
    "Reading middle layers through the unembedding is approximate.",
    "Metrics count the prompts given; a handful of prompts says little about a method in general.",
    "The embedded models know a few thousand facts and little else: they are for learning and testing.",
    "The same question gives the same numbers on one device; another device or library version may differ in the last "
    "digits.",
)
