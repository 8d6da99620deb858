"""Two readers of reports that know nothing of the thesaurus, to tell whether a rewording says the same.

`meaning` reads what a report says of each finding; `differences` compares two reports by it. `frame` is stricter: in a sentence
that contrasts two polarities, sides, times, degrees or numbers, it keeps every word for them, in order, and the findings between them.
"""
import itertools
import re
from functools import cache, lru_cache

import numpy as np

FINDINGS = {
    "cardiomegaly": ["cardiomegaly", "enlarg* + heart", "enlarg* + cardiac"],
    "heart failure": ["chf", "heart failure", "cardiac failure", "decompensation"],
    "congestion": ["congestion"], "edema": ["edema"], "fluid overload": ["overload", "hypervolemia"],
    "effusion": ["effusion*", "pleural fluid", "pericardial fluid"],
    "pneumothorax": ["pneumothora*", "pleural air", "pleural gas"],
    "opacity": ["opaci*", "densit*"], "airspace disease": ["airspace", "air-space", "air space", "alveolar"],
    "consolidation": ["consolidation*"], "infiltrate": ["infiltrate*"], "pneumonia": ["pneumonia*", "bronchopneumonia"],
    "infection": ["infection*", "infecti*"], "tuberculosis": ["tubercul*", "tb"], "granuloma": ["granuloma*"],
    "atelectasis": ["atelecta*", "folded"], "collapse": ["collaps*"], "volume loss": ["volume + loss"],
    "hyperinflation": ["hyperinflat*", "overinflat*", "hyperexpan*"], "hypoinflation": ["hypoinflat*", "underinflat*"],
    "low volumes": [f"{low} + volumes" for low in ("low", "small", "reduced", "decreased", "diminished")],
    "gas in tissue": ["emphysem*", "subcutaneous air", "subcutaneous gas", "pneumomediastinum", "mediastinal air"],
    "copd": ["copd", "chronic obstructive"], "fibrosis": ["fibro*", "mucoviscidosis"], "scar": ["scar*", "cicatri*"],
    "nodule": ["nodul*"], "mass": ["mass", "masses"], "lesion": ["lesion*"], "tumor": ["tumor*", "neoplas*"],
    "cancer": ["cancer*", "carcinoma*"], "malignancy": ["malignan*"], "metastasis": ["metasta*"],
    "adenopathy": ["adenopathy", "lymphadenopathy", "enlarge* + node*"], "thickening": ["thick*", "cuffing"],
    "calcification": ["calcif*"], "atherosclerosis": ["athero*"], "tortuosity": ["tortuo*"], "aneurysm": ["aneurysm*"],
    "fracture": ["fracture*", "broken"], "dislocation": ["dislocat*", "luxation*"], "hernia": ["hernia*"],
    "degeneration": ["degenerat*", "osteoarthr*"], "osteophyte": ["osteophyt*", "spur*"], "scoliosis": ["scolio*"],
    "abnormality": ["abnormal*", "disease*", "process*", "finding*", "infection*", "malignan*", "degenerat*", "osteoarthr*", "copd",
                    "ild", "cad"],
}
ORGANS = {"heart": ["heart", "cardi*"], "lungs": ["lung*", "pulmonary"], "mediastinum": ["mediastin*"],
          "bones": ["bone*", "bony", "osseous", "clavic*", "collar*"]}
WELL = {"clear", "normal", "unremarkable", "intact", "limits"}
DENIES_NEXT = {"no", "not", "without", "nor", "neither", "never", "none", "negative", "free", "absence", "lack"}
DENIES_BEFORE = {"resolved", "absent", "removed", "excluded", "unlikely", "cleared"}
SEEN = {"seen", "noted", "observed", "identified", "visualized", "demonstrated", "appreciated", "present"}
IDLE = SEEN | {"a", "an", "the", "is", "are", "was", "were", "be", "been", "being", "there", "this", "these", "has", "have"}
DOUBTS = set("""possible possibly potential potentially perhaps probable probably likely may could might cannot suspicious suspected
suspicion concerning concern worrisome suggest suggests suggesting suggestive question questionable equivocal consider
considerations versus vs differential presumed presumably indicate""".split())
WHERE = {"left": r"left\b|leftward|levo", "right": r"right\b|rightward|dextro", "both": r"bilateral|both$|bibas|biapic|bihil",
         "top": r"upper$|apic|apex|biapic", "middle": r"mid$|middle$|midlung|lingul", "bottom": r"lower$|bas(e|es|al|ilar)$|bibas"}
CLAUSE = re.compile(r"[.;:!?]+(?=\s|$)|\n|\b(?:but|however|although|though|whereas|while|except|otherwise|which)\b")
FIXED = {  # phrases whose words do not mean what they mean alone
    r"\b(?:no|without)(?: significant| interval| definite| acute)* (?:change|progression|increase)\b": "unchanged",
    r"\b(?:small|reduced) lung volumes": "low lung volumes", r"\bchronic obstructive": "copd", r"\bclear space": "space",
}
TIMES = {"new": r"new", "now": r"now|current|today", "before": r"prior|previous|former|earlier|last|past|old|remote", "acute": r"acute",
         "chronic": r"chronic|long", "again": r"again|redemonstrat|still|persist|continu|remain|resid|recur", "same": r"stable|unchanged|stability",
         "more": r"increas|worse|progress|larger|bigger|greater", "less": r"decreas|diminish|reduc|improv|smaller|regress|resolving",
         "ended": r"resolved|resolution|gone|clear|removed", "past": r"was$|were$|had$"}
DEGREES = {"little": r"mild|slight|minimal|tiny|minute|subtle|faint|small|trace", "much": r"large|marked|pronounced|massive|huge|severe|extensive",
           "medium": r"moderate"}


@cache
def classes(word: str, table: str) -> frozenset[str]:
    "The names of the rows of TIMES, DEGREES or WHERE that a word fits."
    rows = {"times": TIMES, "degrees": DEGREES, "where": WHERE}[table]
    return frozenset(name for name, pattern in rows.items() if re.match(pattern, word))


def told(words: list[str], table: str) -> str:
    "The names of the rows that words fit."
    return " ".join(sorted(set().union(*(classes(word, table) for word in words))))


def fits(word: str, pattern: str) -> bool:
    "Is it this word, or one with this beginning?"
    return word.startswith(pattern[:-1]) if pattern[-1] == "*" else word == pattern


def matches(
    words: list[str],  # of a part of a clause
    wanted: str,  # "a b": b follows a; "a + b": anywhere in the part; "a*": a word that begins so
) -> set[int]:  # the places of the words that fit; empty if one is missing
    "Where the words of a finding are."
    places = set()
    for run in wanted.split(" + "):
        first, *rest = run.split()
        starts = [k for k, word in enumerate(words) if fits(word, first) and len(words) - k > len(rest)
                  and all(map(fits, words[k + 1 :], rest))]
        if not starts:
            return set()
        places |= {k + j for k in starts for j in range(1 + len(rest))}
    return places


def denied_words(
    words: list[str],  # of a clause, with its commas
) -> set[int]:  # places
    "The words in the scope of a negation."
    denied = set()
    for k, word in enumerate(words):
        if word in DENIES_NEXT:
            denied |= set(range(k, len(words)))
        if word in DENIES_BEFORE or (word == "not" and SEEN & set(words[k + 1 : k + 2])):
            denied |= set(range(k))
    return denied


def clause_parts(
    words: list[str],  # of a clause, with its commas
) -> list[range]:  # places
    "A clause cut at commas, `and` and `or`, and before a negation's findings."
    ends = [-1, *(k for k, word in enumerate(words) if word in (",", "/", "and", "or", "no", "without")), len(words)]
    return [range(a + 1, b) for a, b in zip(ends, ends[1:], strict=False) if b > a + 1]


@lru_cache(maxsize=100_000)
def findings_in(
    words: tuple[str, ...],  # of a part of a clause
) -> dict[str, set[int]]:  # finding -> its words' places
    "The findings of a part, and what is normal in it."
    found = {name: set().union(*(matches(words, wanted) for wanted in ways)) for name, ways in FINDINGS.items()}
    well = {k for k, word in enumerate(words) if word in WELL}
    organs = [organ for organ, ways in ORGANS.items() if any(matches(words, wanted) for wanted in ways)]
    if well:
        found |= {f"{organ} normal": well for organ in organs or ["all"]}
    return {name: places for name, places in found.items() if places}


def meaning(
    text: str,  # a report
) -> frozenset[tuple[str, str, str, str, str]]:  # (finding, affirmed | denied | possible, sides, times, degrees)
    "What a report affirms and denies, on which side, since when and how much, by a simple rule."
    said = set()
    text = text.lower()
    for pattern, plain in FIXED.items():
        text = re.sub(pattern, plain, text)
    for clause in CLAUSE.split(text):
        words = re.findall(r"[a-z]+(?:['-][a-z]+)*|[,/]", clause)
        denied, doubt = denied_words(words), not DOUBTS.isdisjoint(words)
        for part in clause_parts(words):
            here = [words[k] for k in part]
            found = dict(findings_in(tuple(here))) or ({"something": set(range(len(here)))} if set(here) - IDLE else {})
            if denied:  # then it matters what is called seen
                found |= {word: {k} for k, word in enumerate(here) if word in SEEN}
            for finding, places in found.items():
                no = any(part[place] in denied for place in places)
                said.add((finding, "denied" if no else "possible" if doubt else "affirmed",
                          told(here, "where"), told(here, "times"), told(here, "degrees")))
    return frozenset(said)


# The stricter reader

SENTENCE = re.compile(r"(?<=[.!?])(?<!\b[lr]t\.)(?<!\bvs\.)\s+")
TOKEN = re.compile(r"w/o|\w+(?:['\u2019.-]\w+)*|[,;:/]")
STRICT = {name: re.compile(pattern) for name, pattern in {
    "denied": r"no|not|non|without|w/o|absent|absence|negative|free|never|none|nor|neither|cannot|\w+n['\u2019]t|resolve[ds]?|resolving"
              r"|resolution|remov\w+|gone|clear\w*|exclud\w+|unlikely|disappear\w*|lack\w*|longer|normal\w*|unremarkable|intact|fails?|failed",
    "seen": r"present|seen|noted|observed|identified|visuali[sz]ed|demonstrated|appreciated|visible|evident|found|detected",
    "side": r"(?:left|right)(?:-?sided|ward)?|bilateral(?:ly)?|both|unilateral(?:ly)?|[rl][uml]l|bibasilar|biapical",
    "place": r"upper|lower|middle|apical|basal|bases?|apex|apices|lingula\w*|medial|lateral|anterior|posterior",
    "time": r"new\w*|now|current\w*|today|old\w*|prior|previous\w*|former\w*|earlier|again|still|interval|since|acute|chronic|recent\w*|remote"
            r"|stable|unchanged|persist\w*|remain\w*|increas\w*|decreas\w*|improv\w*|wors\w*|progress\w*|larger|smaller|developed|healed|was|were",
    "degree": r"mild\w*|slight\w*|minimal\w*|moderate\w*|severe\w*|tiny|small|large|massive|huge|minute|marked|pronounced|more|less|most|least",
    "number": r"\w*\d\S*|one|two|three", "border": r"and|or|but|while|whereas|however|although|though|yet|except|which|than|rather|[,;:/]",
}.items()}


@cache
def mark(token: str) -> str:
    "The kind of a word that says whether, where, when or how much; or nothing."
    return next((kind for kind, pattern in STRICT.items() if pattern.fullmatch(token)), "")


def contrasts(sentence: str) -> str:
    "What the sentence has two of: polarities, sides, times, degrees or numbers; or nothing."
    words = {kind: {token for token in TOKEN.findall(sentence.lower()) if mark(token) == kind} for kind in STRICT}
    doubt, again = not DOUBTS.isdisjoint(sentence.lower().split()), sentence.lower().count("there ") > 1
    if (words["denied"] and (words["border"] or again or len(words["denied"]) > 1)) or ((words["denied"] or doubt) and words["seen"]):
        return "polarities"
    return next((f"{kind}s" for kind in ("side", "place", "time", "degree", "number") if len(words[kind]) > 1), "")


def frame(sentence: str) -> list:
    "The marks of a sentence to the letter, and the findings between them."
    read = []
    for is_mark, run in itertools.groupby(TOKEN.findall(sentence.lower()), lambda token: bool(mark(token))):
        tokens = tuple(run)
        read += tokens if is_mark else [frozenset(findings_in(tokens))]
    return [item for item in read if item]


def contrast_frames(one: str, other: str) -> tuple[list, list]:
    "The frames of the sentences that contrast in the first text, and of those at the same places in the second."
    sentences = SENTENCE.split(one), SENTENCE.split(other)
    chosen = [k for k, sentence in enumerate(sentences[0]) if contrasts(sentence)]
    return tuple([frame(part) for k, part in enumerate(parts) if k in chosen] for parts in sentences)


def differences(
    one: str,  # a report
    other: str,  # its rewording
) -> set[str]:  # of "negation", "side", "time", "degree", "finding", "contrast", "anything"
    "In which ways the two do not say the same."
    said = meaning(one), meaning(other)
    names = [{what[0] for what in meant} for meant in said]
    both = names[0] & names[1] - {"something"}
    pairs = {way: [{(what[0], what[k]) for what in meant if what[0] in both} for meant in said]
             for way, k in (("negation", 1), ("side", 2), ("time", 3), ("degree", 4))}
    pairs |= {"finding": names, "contrast": contrast_frames(one, other)}
    ways = {way for way, (before, after) in pairs.items() if before != after}
    return ways | ({"anything"} if ways or said[0] != said[1] else set())


# As many sentences that contrast as one likes

NAMES = ("effusion", "pleural effusion", "pneumothorax", "cardiomegaly", "pulmonary edema", "opacity", "airspace disease", "lung nodule",
         "pleural thickening", "rib fracture", "atelectasis", "granulomatous disease", "infiltrate", "tuberculosis", "osteophytes", "mass")
PATTERNS = """
{A} is absent on the {s} and present on the {t}.
{A} is present on the {s} and absent on the {t}
{A} not seen on {e} is now seen.
{A} seen on {e} is no longer seen.
No {A} on the {s}, but {q} {B} on the {t}.
No {A} and a {B} on the {t}.
There is no {A} there is a {B}.
The {A} has resolved while the {B} persists.
New {s} {A} and old {t} {B}.
Acute {A} on the {s}, chronic {B} on the {t}.
Old {A}, no new {B}.
{q} {A} on the {s} and {r} {B} on the {t}.
{q} {A} {r} {B} without {C}.
{s} {A} {t} {B} no {C}
The {s} {A} is larger than the {t} one.
{A} has increased on the {s} and decreased on the {t}.
{s} {A} is stable; {t} {A} has worsened.
{A} was present on {e} and is gone now.
The {A} is again seen, the {B} is not.
{A} is not absent on the {s}.
Not {A} but {B}.
Not only {A} but also {B}.
It is not true that there is no {A}.
{s} 3rd rib {A} and {t} 5th rib {B}.
{A} at T12 and {B} at L1, 2 cm and 14 mm.
Two {A} on the {s}, three {B} on the {t}.
Interval improvement of {s} {A}, interval worsening of {t} {B}.
{A} is seen in the upper lobe and not in the lower lobe.
{A} remains on the {s} although it has cleared on the {t}.
Possible {A}, {B} is seen.
{A} is still seen, it was larger before.
{A} w/o {B}, {C} present.
The {s} lung is clear whereas {A} is noted on the {t}.
{q} {A} formerly, {r} {A} today.
{s} {A} isn't seen, {t} {A} is.
{A} absent on lt. present on rt.
No longer {q} {A}, still {r} {B}.
Less {A} than before and more {B}.
Neither {A} nor {B} is present, {C} is.
{A} is seen only on the {s} not the {t}.
Without {A} on the {s} with {B} on the {t}
Recent {A}, healed {B}.
{A} previously demonstrated is not appreciated, {B} is newly present.
{A} appreciated on the {s} and not appreciated on the {t}.
""".strip().splitlines()


def built(
    count: int,
    seed: int = 0,
) -> list[str]:  # sentences
    "Sentences with two polarities, sides, times, degrees or numbers."
    rng, made = np.random.default_rng(seed), []
    for k in range(count):
        a, b, c = (NAMES[i] for i in rng.permutation(len(NAMES))[:3])
        s, t = ("left", "right")[:: int(rng.choice([1, -1]))]
        q, r = ("mild", "large", "small", "minimal", "tiny", "severe", "massive")[int(rng.integers(4)) :: 3][:2]
        text = PATTERNS[k % len(PATTERNS)].format(A=a, B=b, C=c, s=s, t=t, q=q, r=r, e=("prior", "the previous study")[int(rng.integers(2))])
        made.append(text[0].upper() + text[1:] if rng.integers(2) else text)
    return made
