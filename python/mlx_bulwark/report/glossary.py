"""What the words of the field mean, for somebody who meets them in a report for the first time."""

import re
from collections.abc import Iterator

from .parts import Section

WORDS: dict[str, tuple[str, str]] = {
    # the term, where it is meant (a regular expression), and what it means
    "Abstained": (r"abstain", "Inputs for which no answer was sure enough to be given."),
    "Activation clustering": (
        r"activation clustering",
        "Splits the rows of a class in two by what the model makes of them: planted rows gather in the smaller part.",
    ),
    "Activation ranges": (
        r"activation ?range",
        "Units of the model that an input drives further than trusted inputs do.",
    ),
    "Adversarial training": (r"adversarial training|hardened", "Training on inputs that were changed to mislead."),
    "Anomaly index": (
        r"anomaly index",
        "How far a class stands apart from the others, in robust standard deviations; above 2 is unusual.",
    ),
    "Attack AUC": (r"\bauc\b", "How well guesses tell members from others: 0.5 is chance, 1 is always right."),
    "Attack success": (r"attack success", "Share of inputs that get the answer the attacker wants."),
    "Audit log": (
        r"audit log",
        "A file of what was done, in which every line holds a hash of all before it, so that changes show.",
    ),
    "Backdoor": (
        r"backdoor",
        "A model that answers as usual until a trigger is in the input, such as a patch of pixels, and then as an "
        "attacker wants.",
    ),
    "Baseline": (r"baseline", "What was measured while all was known to be well; later figures are held against it."),
    "Canary": (r"canar(y|ies)", "An example put into training to see whether the model gives it away."),
    "Certified accuracy": (
        r"certif|proof|proven",
        "Share of inputs whose right answer is proven not to change, whatever is done to them within the radius.",
    ),
    "Class mixture, odd part": (
        r"class mixture|odd part of",
        "Whether a class is made of two groups: rows of its odd part look like another group than the rest, as planted "
        "rows do.",
    ),
    "Clipping norm": (
        r"clipping norm|gradients clipped",
        "The most that one example may move the model in a step of private training.",
    ),
    "Confidence": (r"confidences?\b", "The probability that a model gives to its own answer."),
    "CUSUM, EWMA, Shewhart": (
        r"cusum|ewma|shewhart",
        "Control charts. A Shewhart chart finds sudden changes; CUSUM and EWMA add up what is small but stays.",
    ),
    "Deep k-NN": (
        r"deep k-?nn|deep knn|input knn|neighbours contradict",
        "Looks at the rows nearest to a row, by what the model makes of them or by the inputs: poisoned rows keep "
        "other company than their label says.",
    ),
    "Differential privacy": (
        r"differential privacy|privately|private (model|training)",
        "Training with noise, so that the model says next to nothing about whether any one example was there.",
    ),
    "Drift": (r"drift", "Data, or what a model makes of them, are no longer distributed as they were."),
    "Effect": (
        r"\beffect\b",
        "The size of a difference, whatever the number of rows; a large sample finds differences too small to matter.",
    ),
    "Embeddings": (r"embedding", "What a model has made of its inputs just before it decides."),
    "Epsilon, delta": (
        r"epsilon",
        "What private training may give away of one example: the odds of any outcome change by a factor of at most "
        "e to the epsilon, but for the probability delta. Smaller is safer; 1 is a strong promise, 10 hardly one.",
    ),
    "KS, chi2, MMD": (
        r"\bks\b|\bchi2\b|\bmmd\b",
        "Tests of whether two sets of rows come from one source: of numbers, of classes, of all columns together.",
    ),
    "L-infinity, L2, L1": (
        r"\bl-?inf|l∞|\bl[12]\b",
        "How much an input was changed: by its most changed value, by the root of the sum of squares, or by the sum.",
    ),
    "Label noise": (r"label noise", "Rows whose label nearly all rows like them contradict."),
    "Log odds": (r"log odds", "How strongly something speaks for one answer: 0 is not at all, 7 is about 1,100 to 1."),
    "Manifest": (
        r"manifest",
        "A list of files with their hashes. Its Merkle root is one hash over all of them: it changes with any byte.",
    ),
    "McNemar, Fisher": (
        r"mcnemar|fisher's",
        "Tests of whether one share of right answers is smaller than another: on the same inputs, and on others.",
    ),
    "Noise multiplier": (
        r"noise multiplier",
        "Strength of the noise in private training, in parts of the most that one example may do.",
    ),
    "Out of control": (
        r"out of control|in control",
        "A point of a control chart that chance hardly explains while all is as it was at the baseline.",
    ),
    "p, p-value": (
        r"\bp-values?\b|\bp = |\bp\b",
        "How often chance alone would show as much where nothing is amiss. Small values are hard to explain by chance.",
    ),
    "PGD, APGD, FGSM": (
        r"\ba?pgd\b|\bfgsm\b",
        "Attacks that follow the model's gradients to the change of the input that misleads it most; FGSM takes one "
        "step, the others take many.",
    ),
    "Poison": (
        r"poison",
        "Training rows that somebody planted or changed to teach the model what it should not do.",
    ),
    "Pruning check": (
        r"\bpruning\b",
        "Whether units that clean inputs leave idle speak for one class, as a backdoor's do.",
    ),
    "PSI": (r"\bpsi\b", "Population stability index: how much a distribution moved; under 0.1 is little."),
    "Pull on the last layer": (
        r"pull on the last layer|self.influence",
        "How strongly a row bends the model towards its own label: mislabelled rows pull hardest.",
    ),
    "Recall, precision": (
        r"recall|precision",
        "Of what should be found, the share that was; and of what was named, the share that is right.",
    ),
    "Robust accuracy": (
        r"robust accuracy|under attack|accuracy left",
        "Share of inputs that are answered rightly after the attacks have done their worst.",
    ),
    "Robust whitening": (
        r"robust whitening|spectre",
        "Measuring distances in units of how the bulk of the rows varies, so that a few odd rows stand out.",
    ),
    "Score": (
        r"\bscores?\b",
        "How odd or suspect a row is, beside the others of its table. It is no probability.",
    ),
    "Spectral signature": (
        r"spectral signature",
        "How far a row lies along the direction in which its class varies most, where planted rows gather.",
    ),
    "STRIP, Neural Cleanse": (
        r"\bstrip\b|neural cleanse",
        "Searches for a backdoor: whether answers stand firm when inputs are blended, and whether a small patch leads "
        "to one class.",
    ),
    "Telling values": (
        r"telling values|values (that )?(by themselves )?tell",
        "Values at one place of the inputs that come with one label alone, such as the pixels of a trigger.",
    ),
}


def explained(sections: list[Section]) -> list[tuple[str, str]]:
    """The terms that sections use, each with what it means, in the order of the alphabet."""
    text = "\n".join(t for s in sections for t in _texts(s)).lower()
    return [(term, meaning) for term, (where, meaning) in WORDS.items() if re.search(where, text)]


def _texts(section: Section) -> Iterator[str]:
    yield from (section.title, section.verdict, section.sure, section.advice, *section.notes)
    yield from (f"{f.name} {f.meaning}" for f in section.figures)
    yield from (p.caption for p in section.plots)
    yield from (g.caption for g in section.galleries)
    for table in section.tables:
        yield from (table.caption, *table.columns)
        yield from (cell for row in table.rows for cell in row)
