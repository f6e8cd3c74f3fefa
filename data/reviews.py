"""Short film reviews with a known gold reward and a known entropy: the embedded default data.

A review is drawn from a weighted context-free grammar without recursion. Its weights depend on the
genre, which the prompt names, and on a latent mood, which the prompt's opening words hint at:

    prompt      "The Quiet Harbor (western). To my delight,"
    completion  " the horses were truly magnificent. The ending never bored me."

What is known about it, so that results can be held against theory:

- `sentiment` is the gold reward, a function of the text alone, of any text.
- `log_prob` is the exact log-probability of a completion, so the floor of the SFT loss is known.
- Preference labels are drawn with probability sigma((gold_a - gold_b) / TAU), so the best possible
  accuracy of a reward model is known.

Run `python data/reviews.py` to write data/reviews/ (a few seconds, the same bytes every time):

    sft_train_more.jsonl.gz         prompt, completion: what sft.py reads
    sft_{train,test}.jsonl          its first rows, to look at; held-out ones
    preferences_train_more.jsonl.gz prompt, chosen, rejected: what reward.py and dpo.py read
    preferences_{train,test}.jsonl  its first rows; held-out ones, which also have chosen_gold,
                                    rejected_gold and the probability that this label came out
    prompts_{train,test}.jsonl      prompt
    tokenizer/                      byte-level BPE, trained with the tokenizers package
    facts.json                      floor, best accuracy, spreads of the gold, lengths in tokens
"""

# ruff: noqa: SIM905 (word lists read better as text than as one string a line)

import functools
import gzip
import json
import math
import random
import re
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent / "reviews"
PLAIN_ROWS = 5_000  # at most so many in a file that is not zipped: enough to look at
VOCAB_SIZE = 1264  # enough that nearly every word is one token
TAU = 0.08  # temperature of the preference labels, in units of the gold reward
MOODS = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
MOOD_SPREAD = 0.6  # standard deviation of the mood around what the prompt says
WORD_TILT = 0.7  # how strongly the mood favours words by their valence

# ---------------------------------------------------------------- prompts

GENRES = {  # genre -> what it adds to the mood
    "western": 0.4, "comedy": 0.2, "horror": -0.4, "romance": -0.2, "mystery": 0.0,
}  # fmt: skip
OPENINGS = {  # opening -> the mood it announces
    "To my delight,": 1.6, "Happily,": 1.5, "I am glad to say,": 1.4, "To my great joy,": 1.7,
    "To my surprise,": 0.7, "Against all odds,": 0.9, "I must admit,": 0.5, "On the whole,": 0.2,
    "In the end,": 0.0, "In short,": -0.1, "To be honest,": -0.5, "Despite its fame,": -0.9,
    "Strangely,": -0.7, "Sadly,": -1.4, "To my regret,": -1.5, "I am sorry to say,": -1.4,
    "Alas,": -1.6,
}  # fmt: skip
TITLES = "The {} {}, {} {}, Beyond the {} {}, Return to the {} {}, A Night at the {} {}".split(", ")
TITLE_ADJECTIVES = """Quiet Last Broken Golden Silent Hidden Lost Long Crooked Distant Burning Empty
    Scarlet Winter Secret Second Blue Wild Iron Paper""".split()
TITLE_NOUNS = """Harbor River Garden Road Mirror Bridge Island Train Window Tower Valley Orchard
    Lantern Station Street House Key Door Forest Lake""".split()

# ---------------------------------------------------------------- words
# Singular | plural nouns: the things of each genre, and what every film has.

NOUNS = {
    "western": "desert sheriff showdown outlaw | horses shootouts duels cowboys",
    "comedy": "timing slapstick banter wit | jokes gags sketches pranks",
    "horror": "monster suspense ghost cellar | scares shadows zombies screams",
    "romance": "chemistry kiss wedding proposal | lovers letters vows glances",
    "mystery": "detective puzzle culprit alibi | clues twists suspects secrets",
    "craft": "plot story script premise opening ending pacing tone cast acting hero villain lead "
    "narrator score soundtrack photography lighting camera editing | scenes subplots dialogues "
    "actors characters performances extras sets props costumes colors effects",
    "film": "film movie | details ideas",
}

# Words with a valence; in a phrase the starred word carries it. Those of "any" go with every noun,
# those of the other lines with the nouns of the same name.

ADJECTIVES = {
    "any": "decent .3, solid .3, good .4, nice .4, strong .5, lovely .5, great .6, memorable .6, "
    "wonderful .8, excellent .8, brilliant .8, superb .8, magnificent .8, ordinary -.3, bland -.3, "
    "weak -.4, bad -.4, dull -.5, poor -.5, lifeless -.6, boring -.6, terrible -.8, dreadful -.8, "
    "awful -.8, horrible -.8, pathetic -.8",
    "craft": "natural .4, coherent .4, clever .5, convincing .5, vivid .5, haunting .6, "
    "satisfying .6, stunning .7, gripping .7, slow -.4, cheap -.4, muddled -.5, wooden -.5, "
    "lazy -.5, tedious -.6, ugly -.6, pointless -.7, hideous -.7",
    "film": "respectable .3, original .5, touching .6, unforgettable .7, shapeless -.4, messy -.4, "
    "soulless -.6, unbearable -.7",
    "western": "authentic .5, thrilling .7, dated -.4, dusty -.6",
    "comedy": "playful .5, hilarious .7, stale -.4, unfunny -.6",
    "horror": "eerie .5, terrifying .7, tame -.4, laughable -.6",
    "romance": "sweet .5, passionate .7, cold -.4, corny -.6",
    "mystery": "intricate .5, ingenious .7, obvious -.4, absurd -.6",
}
VERBS = {
    "any": "*worked .4, *surprised me .4, *held my attention .5, *impressed me .6, "
    "*won me over .6, *delighted me .7, *dragged -.4, *missed the mark -.5, *let me down -.5, "
    "*bored me -.6, *fell flat -.6, *ruined the evening -.8",
    "craft": "*intrigued me .5, *sparkled .5, *touched me .6, *confused me -.4, "
    "*distracted me -.4, *irritated me -.5",
    "film": "*captivated me .6, *exhausted me -.6",
    "western": "*excited me .6, lacked *grit -.5",
    "comedy": "made me *laugh .6, made me *cringe -.5",
    "horror": "gave me *chills .6, made me *yawn -.5",
    "romance": "*warmed my heart .6, lacked *passion -.5",
    "mystery": "kept me *guessing .6, lacked *logic -.5",
}
REACTIONS = {
    "liked": "*liked .4, *enjoyed .5, *admired .5, *loved .7, *disliked -.4, *resented -.5, "
    "*detested -.7, *hated -.7",
    "would": "watch it *again .5, *buy it .5, *recommend it .6, *praise it .6, *skip it -.5, "
    "*avoid it -.6, *forget it -.5, *mock it -.6",
    "outcome": "I left the cinema *smiling .5, it is *worth your time .5, it *deserves a crowd .5, "
    "the evening *flew by .5, it *brightened my week .6, my friends *cheered .6, "
    "I *checked the clock -.4, I nearly fell *asleep -.6, I nearly *walked out -.7, "
    "it *wasted my evening -.7, I wanted my *money back -.7, my friends *groaned -.5",
}
INTENSITY = {
    "slightly": 0.5, "somewhat": 0.5, "fairly": 0.75, "rather": 0.75, "quite": 0.75,
    "really": 1.25, "truly": 1.25, "simply": 1.25, "absolutely": 1.25, "utterly": 1.25,
}  # fmt: skip

# ---------------------------------------------------------------- grammar
# An alternative is (weight, tilt, expansion): at mood m its weight is weight * exp(tilt * m).
# The rules are those of the good side; with + and - swapped they are those of the bad side. TOPIC
# stands for thing (of the genre), craft or film.

CHOICES = {
    "but": "but but yet", "although": "although although though", "negation": "not never hardly",
    "small+": "fairly rather really", "small-": "slightly somewhat rather",
    "big+": "truly simply absolutely", "big-": "truly simply utterly",
    "felt": "felt seemed looked",
}  # fmt: skip
REVIEW = [
    (2, 0, "<about thing> ."),
    (5, 0, "<about thing> . <about craft> ."),
    (2, 0, "<about thing> . <verdict> ."),
    (1, 0, "<verdict> . <about thing> ."),
    (7, 0, "<about thing> . <about craft> . <verdict> ."),
]
ABOUT = [  # for thing and craft; without a sign: these alternatives and their mirror images
    (5, 1.0, "<TOPIC+>"),
    (1, 1.0, "<TOPIC+> , and <craft+>"),
    (0.6, -0.3, "<TOPIC+> , <but> <craft->"),
    (0.6, -0.3, "<although> <TOPIC+> , <craft->"),
]
VERDICT = [  # likewise
    (2, 1.0, "I <liked+> it"),
    (1, 1.0, "I really <liked+> it"),
    (2, 1.0, "<film+>"),
    (3, 1.0, "it is a <how film+> <kind>"),
    (1, 0.5, "it is not a <mild film-> <kind>"),
    (2, 1.0, "I would <would+>"),
    (1, 0.5, "I would never <would->"),
    (3, 1.0, "<outcome+>"),
]
CLAUSES = {  # with a sign, for each topic
    "TOPIC+": [
        (3, 0, "the <TOPIC singular> was <quality TOPIC+>"),
        (3, 0, "the <TOPIC plural> were <quality TOPIC+>"),
        (2, 0, "the <TOPIC noun> <felt> <how TOPIC+>"),
        (4, 0, "the <TOPIC noun> <did TOPIC+>"),
        (1, 0, "I <liked+> the <TOPIC noun>"),
        (1, 0, "I really <liked+> the <TOPIC noun>"),
    ],
    "quality TOPIC+": [
        (6, 0.2, "<how TOPIC+>"),
        (2, -0.2, "<negation> <mild TOPIC->"),
        (1, -0.2, "far from <strong TOPIC->"),
    ],
    "how TOPIC+": [
        (3, -0.2, "<mild TOPIC+>"),
        (3, -0.2, "<small+> <mild TOPIC+>"),
        (3, 0.2, "<strong TOPIC+>"),
        (2, 0.2, "<big+> <strong TOPIC+>"),
        (5, 0, "<any+> and <own TOPIC+>"),
    ],
    "did TOPIC+": [
        (5, 0.1, "<verb TOPIC+>"),
        (1, 0.1, "really <verb TOPIC+>"),
        (1, 0.1, "truly <verb TOPIC+>"),
        (1, -0.2, "never <verb TOPIC->"),
        (0.5, -0.2, "hardly <verb TOPIC->"),
    ],
}
KINDS = {"horror": "horror film"}  # "a good horror" is no English; the other genres stand alone


def read_words(line):
    """'*won me over .6, good .4' -> [('won me over', 'won', .6), ('good', 'good', .4)]."""
    words = []
    for entry in line.split(", "):
        phrase, valence = entry.rsplit(" ", 1)
        key = re.search(r"\*(\w+)", phrase)
        words.append((phrase.replace("*", ""), key[1] if key else phrase, float(valence)))
    return words


def word_rules(sign, line, own="", own_weight=1, strength=None):
    """Alternatives for a line's words of one sign and its `own` ones; mild (up to .5) or strong."""
    rules = []
    for weight, words in ((1, line), (own_weight, own)):
        for phrase, _, valence in read_words(words) if words else []:
            fits = strength in (None, "mild" if abs(valence) <= 0.5 else "strong")
            if fits and (valence > 0) == (sign == "+"):
                rules.append((weight, WORD_TILT * valence, phrase))
    return rules


def mirror(alternatives):
    """The same alternatives for the other side: + and - change places, tilts change sign."""
    swap = str.maketrans("+-", "-+")
    return [(weight, -tilt, text.translate(swap)) for weight, tilt, text in alternatives]


def about(topic, alternatives):
    """The same alternatives with this topic's name in the place of TOPIC."""
    return [(weight, tilt, text.replace("TOPIC", topic)) for weight, tilt, text in alternatives]


def topic_rules(topic, name):
    """The rules that speak of one topic, with the words that the tables give under `name`."""
    singular, plural = ([(1, 0, w) for w in words.split()] for words in NOUNS[name].split("|"))
    rules = {"TOPIC singular": singular, "TOPIC plural": plural, "TOPIC noun": singular + plural}
    for sign in "+-":
        # own words weigh more: there are few of them, and each must be seen often enough
        for strength in ("mild", "strong"):
            found = word_rules(sign, ADJECTIVES["any"], ADJECTIVES[name], 4, strength)
            rules[f"{strength} TOPIC{sign}"] = found
        rules[f"own TOPIC{sign}"] = word_rules(sign, ADJECTIVES[name])
        rules[f"verb TOPIC{sign}"] = word_rules(sign, VERBS["any"], VERBS[name], 5)
    for symbol, found in CLAUSES.items():
        rules |= {symbol: found, symbol[:-1] + "-": mirror(found)}
    return {symbol.replace("TOPIC", topic): about(topic, found) for symbol, found in rules.items()}


def list_rules(genre):
    """Every symbol's alternatives for one genre: symbol -> [(weight, tilt, expansion)]."""
    rules = {symbol: [(1, 0, w) for w in words.split()] for symbol, words in CHOICES.items()}
    rules |= {"review": REVIEW, "verdict": VERDICT + mirror(VERDICT)}
    rules["kind"] = [(1, 0, "film"), (1, 0, "movie"), (2, 0, KINDS.get(genre, genre))]
    for topic in ("thing", "craft"):
        rules[f"about {topic}"] = about(topic, ABOUT + mirror(ABOUT))
    for topic in ("thing", "craft", "film"):
        rules |= topic_rules(topic, genre if topic == "thing" else topic)
    for sign in "+-":
        rules[f"any{sign}"] = word_rules(sign, ADJECTIVES["any"])
        rules |= {symbol + sign: word_rules(sign, line) for symbol, line in REACTIONS.items()}
    return rules


def normalise(rules):
    """symbol -> [(probabilities [5 moods], items)]; an item is a word or a '<symbol>'."""
    normalised = {}
    for symbol, alternatives in rules.items():
        weights = np.array([weight * np.exp(tilt * MOODS) for weight, tilt, _ in alternatives])
        items = [re.findall(r"<[^>]+>|\S+", text) for _, _, text in alternatives]
        normalised[f"<{symbol}>"] = list(zip(weights / weights.sum(0), items))
    return normalised


@functools.cache
def grammar(genre):
    """The normalised rules of one genre."""
    return normalise(list_rules(genre))


def mood_probabilities(genre, opening):
    """P(mood | prompt), [5]."""
    center = GENRES[genre] + OPENINGS[opening]
    weights = np.exp(-0.5 * ((MOODS - center) / MOOD_SPREAD) ** 2)
    return weights / weights.sum()


# ---------------------------------------------------------------- text
# The grammar makes lower-case words; capitals, spaces and a/an follow from them.


def to_text(words):
    """Words and punctuation as a completion: it goes on after the prompt's comma."""
    text = ""
    for i, word in enumerate(words):
        if word == "a" and i + 1 < len(words) and words[i + 1][0] in "aeiou":
            word = "an"
        if i > 0 and words[i - 1] == ".":
            word = word[0].upper() + word[1:]
        text += word if word in ".," else " " + word
    return text


def to_words(text):
    """The inverse of `to_text`, or None where no words make this text."""
    words = [w if w == "I" else w.lower() for w in re.findall(r"[A-Za-z]+|[.,]", text)]
    words = ["a" if word == "an" else word for word in words]
    return words if to_text(words) == text else None


def read_prompt(prompt):
    """'The Quiet Harbor (western). Sadly,' -> ('western', 'Sadly,')."""
    match = re.fullmatch(r"[A-Za-z ]+ \((\w+)\)\. (.+)", prompt)
    if not match or match[1] not in GENRES or match[2] not in OPENINGS:
        raise ValueError(f"not a prompt of this grammar: {prompt!r}")
    return match[1], match[2]


# ---------------------------------------------------------------- sampling


def choose(rng, probabilities):
    """An index drawn with these probabilities; rng.random() gives the same on every machine."""
    threshold = rng.random()
    for i, probability in enumerate(probabilities):
        threshold -= probability
        if threshold < 0:
            return i
    return len(probabilities) - 1  # rounding left a little over


def sample_prompt(rng):
    """A title, a genre and an opening, each drawn uniformly."""
    title = rng.choice(TITLES).format(rng.choice(TITLE_ADJECTIVES), rng.choice(TITLE_NOUNS))
    return f"{title} ({rng.choice(list(GENRES))}). {rng.choice(list(OPENINGS))}"


def expand(rng, rules, mood, symbol):
    """The words of one random expansion of `symbol` at mood index `mood`."""
    alternatives = rules[symbol]
    _, items = alternatives[choose(rng, [p[mood] for p, _ in alternatives])]
    words = []
    for item in items:
        words += expand(rng, rules, mood, item) if item in rules else [item]
    return words


def sample(rng, prompt):
    """One completion for `prompt`; `rng` is a random.Random."""
    genre, opening = read_prompt(prompt)
    mood = choose(rng, mood_probabilities(genre, opening))
    return to_text(expand(rng, grammar(genre), mood, "<review>"))


# ---------------------------------------------------------------- probability


def inside(rules, symbol, words, start, known):
    """{end: P(symbol expands to words[start:end]) [5 moods]}, summed over all parses.

    `known` keeps what was computed for these words: (symbol, start) -> that dict.
    """
    if symbol not in rules:  # a word
        matches = start < len(words) and words[start] == symbol
        return {start + 1: np.ones(len(MOODS))} if matches else {}
    if (symbol, start) not in known:
        total = {}
        for probabilities, items in rules[symbol]:
            reached = {start: probabilities}
            for item in items:
                reached_next = {}
                for middle, before in reached.items():
                    for end, probability in inside(rules, item, words, middle, known).items():
                        reached_next[end] = reached_next.get(end, 0) + before * probability
                reached = reached_next
            for end, probability in reached.items():
                total[end] = total.get(end, 0) + probability
        known[symbol, start] = total
    return known[symbol, start]


def log_prob(prompt, completion):
    """Exact log P(completion | prompt) of the string; -inf if the grammar cannot make it."""
    genre, opening = read_prompt(prompt)
    words = to_words(completion)
    if not words:
        return -math.inf
    whole = inside(grammar(genre), "<review>", words, 0, {}).get(len(words), np.zeros(len(MOODS)))
    probability = float(mood_probabilities(genre, opening) @ whole)
    return math.log(probability) if probability > 0 else -math.inf


# ---------------------------------------------------------------- gold reward

NEGATIONS = """not never hardly far cannot can't couldn't don't doesn't didn't isn't wasn't aren't
    weren't won't wouldn't""".split()
NEGATION = -0.5  # "not boring" is mildly good, "not superb" mildly bad
BOUNDARIES = {",": "clause", "and": "clause", "but": "but", "yet": "but", "although": "although"}
BOUNDARIES |= {"though": "although", ".": "end", "!": "end", "?": "end"}


def list_roles():
    """What each word means to `score`: word -> (kind, value); all other words mean nothing."""
    lines = [line for table in (ADJECTIVES, VERBS, REACTIONS) for line in table.values()]
    roles = [(word, "opinion", value) for line in lines for _, word, value in read_words(line)]
    roles += [(word, "aspect", 0) for nouns in NOUNS.values() for word in re.findall(r"\w+", nouns)]
    roles += [(word, "intensity", value) for word, value in INTENSITY.items()]
    roles += [(word, "negation", NEGATION) for word in NEGATIONS]
    roles += [(word, kind, 0) for word, kind in BOUNDARIES.items()]
    return {word: (kind, value) for word, kind, value in roles}


ROLES = list_roles()


def score(text):
    """The gold reward of one text: sum of its sentences' valences / (number of sentences + 1).

    A word's valence is scaled by the intensifier before it, and by NEGATION after a negation in
    its clause. A sentence's valence is the mean over its opinions, where those after "but" and
    those outside an "although" clause weigh double. An opinion is worth nothing if its word was
    used before or if its clause names an aspect that was named before. A sentence of one or two
    words, or one without its final mark (a text that was cut off), is worth nothing; like a
    repeated one it still counts in the number of sentences.
    """
    total, sentences, length = 0.0, 0, 0  # length: words in this sentence
    valence, weights = 0.0, 0.0  # of this sentence's finished clauses
    opinions, count, stale = 0.0, 0, False  # of this clause: sum, number, known aspect?
    weight, negation, intensity = 2.0, 1.0, 1.0
    named, used = set(), set()
    for word in re.findall(r"[a-z]+(?:'[a-z]+)?|[.!?,]", text.lower()):
        role = ROLES.get(word)
        length += 1
        if role is None:  # most words: this is what keeps it fast
            continue
        kind, value = role
        if kind == "opinion":
            if word not in used:
                used.add(word)
                opinions += max(-1.0, min(1.0, value * intensity)) * negation
            count += 1
            intensity = 1.0
        elif kind == "aspect":
            stale = stale or word in named
            named.add(word)
        elif kind == "intensity":
            intensity = value
        elif kind == "negation":
            negation = value
        else:  # a clause ends
            if count:
                valence += 0.0 if stale else weight * opinions
                weights += weight * count
            opinions, count, stale, negation, intensity = 0.0, 0, False, 1.0, 1.0
            length -= kind == "clause"  # a comma is no word, and "and" need not be one
            weight = 2.0
            if kind == "but":
                valence, weights = valence / 2, weights / 2
            elif kind == "although":
                weight = 1.0
            elif kind == "end":
                if length > 1:
                    sentences += 1
                if length > 3 and weights:
                    total += valence / weights
                length, valence, weights = 0, 0.0, 0.0
    if length:
        sentences += 1
    return total / (sentences + 1)


def sentiment(prompts, completions, **_):
    """The gold reward in [-1, 1] of each completion, whatever the text; TRL's signature."""
    return [score(completion) for completion in completions]


# ---------------------------------------------------------------- files


def make_prompts(rng, rows, taken=()):
    """Random prompts, none of them in `taken`."""
    prompts = []
    while len(prompts) < rows:
        prompt = sample_prompt(rng)
        if prompt not in taken:
            prompts.append(prompt)
    return prompts


def make_preference(rng, prompt):
    """Two draws for one prompt, labelled by a Bradley-Terry coin at temperature TAU."""
    first, second = sample(rng, prompt), sample(rng, prompt)
    first_gold, second_gold = (round(gold, 6) for gold in (score(first), score(second)))
    if rng.random() >= 1 / (1 + math.exp(-(first_gold - second_gold) / TAU)):
        first, second, first_gold, second_gold = second, first, second_gold, first_gold
    return {
        "prompt": prompt,
        "chosen": first,
        "rejected": second,
        "chosen_gold": first_gold,
        "rejected_gold": second_gold,
        "probability": round(1 / (1 + math.exp(-(first_gold - second_gold) / TAU)), 6),
    }


def make_completion(rng, prompt):
    return {"prompt": prompt, "completion": sample(rng, prompt)}


MAKERS = {"sft": make_completion, "preferences": make_preference}


def make_rows():
    """All files' rows: name -> list of dicts. Each file has a random stream of its own."""
    files, taken = {}, set()
    for split, sft_rows, prompt_rows in (("train", 10_000, 2_000), ("test", 1_000, 500)):
        drawn = set()
        for kind, rows in (("sft", sft_rows), ("preferences", sft_rows), ("prompts", prompt_rows)):
            rng = random.Random(f"reviews {kind} {split}")
            prompts = make_prompts(rng, rows, taken)
            drawn.update(prompts)
            if kind == "prompts":
                found = [{"prompt": p} for p in prompts]
            else:
                found = [MAKERS[kind](rng, p) for p in prompts]
            files[f"{kind}_{split}"] = found
        taken = drawn  # no test prompt is in a train file
    # More rows, from streams of their own, so that all that stands above stays as it was.
    for kind, rows in (("sft", 20_000), ("preferences", 17_000)):
        rng = random.Random(f"reviews {kind} more")
        more = [MAKERS[kind](rng, prompt) for prompt in make_prompts(rng, rows, taken)]
        files[f"{kind}_train_more"] = files[f"{kind}_train"] + more
    for row in files["preferences_train_more"]:
        del row["chosen_gold"], row["rejected_gold"], row["probability"]  # known in the test only
    return files


def train_tokenizer(texts, folder):
    """A byte-level BPE vocabulary in GPT-2's manner: 256 bytes, merges in order, two specials."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])  # after the merges, as GPT-2 has it
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2TokenizerFast", "pad_token": "<|pad|>"}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


def lengths(texts, count_tokens):
    """Mean, 95th percentile and maximum of the texts' numbers of tokens."""
    counts = [count_tokens(text) for text in texts]
    mean, p95 = float(np.mean(counts)), float(np.percentile(counts, 95))
    return {"mean": round(mean, 3), "p95": p95, "max": max(counts)}


def gold_spread(prompts, samples=32):
    """Mean gold, its standard deviation within prompts, and that of the prompts' means."""
    rng = random.Random("reviews gold_spread")
    gold = np.array([[score(sample(rng, p)) for _ in range(samples)] for p in prompts])
    within = gold.var(axis=1, ddof=1).mean()
    between = gold.mean(axis=1).var(ddof=1) - within / samples  # less the means' own noise
    return float(gold.mean()), math.sqrt(within), math.sqrt(between)


def make_facts(files, count_tokens):
    """What theory says about the files; count_tokens gives a text's number of tokens."""
    rows = [row for found in files.values() for row in found]
    keys = ("completion", "chosen", "rejected")
    completions = [row[key] for row in rows for key in keys if key in row]
    sft, pairs = files["sft_test"], files["preferences_test"]
    entropy = -sum(log_prob(row["prompt"], row["completion"]) for row in sft)
    tokens = sum(count_tokens(row["completion"]) + 1 for row in sft)  # one more for EOS
    p = np.array([row["probability"] for row in pairs])
    mean, within, between = gold_spread([row["prompt"] for row in files["prompts_test"]])
    facts = {
        "sft_test_floor_nats_per_token": entropy / tokens,
        "sft_test_nats_per_review": entropy / len(sft),
        "sft_test_gold_mean": sum(score(row["completion"]) for row in sft) / len(sft),
        "tau": TAU,
        "preferences_test_best_accuracy": np.maximum(p, 1 - p).mean(),  # expected, by the gold
        "preferences_test_gold_accuracy": ((p > 0.5) + 0.5 * (p == 0.5)).mean(),  # these labels'
        "preferences_test_best_nll": -np.log(p).mean(),
        "gold_mean": mean,
        "gold_std_within_prompts": within,
        "gold_std_between_prompts": between,
        "gold_best": 0.75,  # of three sentences of valence 1, which the grammar can make
    }
    return {key: round(float(value), 6) for key, value in facts.items()} | {
        "vocab_size": VOCAB_SIZE,
        "prompt_tokens": lengths([row["prompt"] for row in rows], count_tokens),
        "completion_tokens_with_eos": lengths(completions, lambda text: count_tokens(text) + 1),
        "distinct_words": len({w for c in completions for w in to_words(c)} - {".", ","}),
    }


def main():
    """Write every file of data/reviews/."""
    files = make_rows()
    texts = [text for row in files["sft_train"] for text in row.values()]
    tokenizer = train_tokenizer(texts, FOLDER / "tokenizer")
    facts = make_facts(files, lambda text: len(tokenizer.encode(text).ids))
    for name, rows in files.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        if name.endswith("_more"):
            content = gzip.compress("".join(lines).encode(), mtime=0)
            (FOLDER / f"{name}.jsonl.gz").write_bytes(content)
        else:
            (FOLDER / f"{name}.jsonl").write_text("".join(lines[:PLAIN_ROWS]))
    (FOLDER / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
