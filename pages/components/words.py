"""Sentences and definitions that more than one page shows."""

PRIVACY = "What you type stays on the machine that runs this app; the pages call no other host."

GLOSSARY = {
    "Subject": "Who or what the fact is about: Eiffel Tower.",
    "Prompt template": "The sentence that asks for the fact, with {} for the subject, ending right before the object.",
    "Original object": "What the model says before the edit: Paris.",
    "New object": "What the edit should make it say: Rome.",
    "Base model, edited model": "The model as it was loaded, and the same model while the edit is applied.",
    "Run": "One edit with its measurements, kept under an id made from everything that decides the answer.",
    "Paraphrase": "The same question in other words; used to measure, never to fit.",
    "Neighbour": "A prompt about another subject that must keep its answer.",
    "Contribution": "How much a module's output changes the log-probability of an object when it joins the residual "
    "stream, in nats.",
    "Nat": "A unit of log-probability: +1 nat makes an object 2.7 times as likely.",
    "Margin": "log P(new object) − log P(original object): positive when the new one is preferred.",
    "Works, leaks, narrow, fails": "Works: the prompt, its paraphrases and the neighbours behave. Leaks: neighbours "
    "changed too. Narrow: paraphrases did "
    "not follow. Fails: the edit prompt does not say the new object.",
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
