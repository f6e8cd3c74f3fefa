"""The embedded data: its files, its grammar's probabilities and its gold reward."""

import gzip
import json
import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT

DATA = ROOT / "data"
sys.path.insert(0, str(DATA))

import reviews
from reviews import log_prob, sample, score, sentiment

NAMES = [
    f"{kind}_{split}" for kind in ("sft", "preferences", "prompts") for split in ("train", "test")
]
NAMES += ["sft_train_more", "preferences_train_more"]
PROMPT = "The Quiet Harbor (western). To my delight,"


@pytest.fixture(scope="module")
def files():
    """Each committed data file's rows, by name."""
    found = {}
    for name in NAMES:
        (path,) = (DATA / "reviews").glob(f"{name}.jsonl*")
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            found[name] = list(map(json.loads, file))
    return found


@pytest.fixture(scope="module")
def facts():
    return json.loads((DATA / "reviews" / "facts.json").read_text())


@pytest.fixture(scope="module")
def count_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    path = DATA / "reviews" / "tokenizer" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text).ids)


# ---------------------------------------------------------------- files


def test_sizes_and_fields(files):
    rows = {"sft": (5_000, 1_000), "preferences": (5_000, 1_000), "prompts": (2_000, 500)}
    for kind, sizes in rows.items():
        assert (len(files[f"{kind}_train"]), len(files[f"{kind}_test"])) == sizes
    for kind, size in (("sft", 30_000), ("preferences", 27_000)):
        few, more = files[f"{kind}_train"], files[f"{kind}_train_more"]
        assert len(more) == size and more[: len(few)] == few
    assert files["sft_train"][0].keys() == {"prompt", "completion"}
    assert files["prompts_test"][0].keys() == {"prompt"}
    assert files["preferences_train"][0].keys() == {"prompt", "chosen", "rejected"}
    known = {"chosen_gold", "rejected_gold", "probability"}
    assert files["preferences_test"][0].keys() == {"prompt", "chosen", "rejected"} | known


def test_no_test_prompt_is_in_a_train_file(files):
    prompts = {
        split: {row["prompt"] for name in NAMES if f"_{split}" in name for row in files[name]}
        for split in ("train", "test")
    }
    assert not prompts["train"] & prompts["test"]


def test_completions_start_with_a_space_and_end_a_sentence(files):
    for row in files["sft_train_more"]:
        assert row["completion"].startswith(" ") and row["completion"].endswith(".")
        assert 1 <= row["completion"].count(".") <= 3


def test_two_draws_for_one_prompt_differ(files):
    pairs = files["preferences_train_more"] + files["preferences_test"]
    assert np.mean([row["chosen"] == row["rejected"] for row in pairs]) < 0.001


def test_words_are_neither_too_many_nor_too_rare(files):
    rows = files["sft_train_more"]
    counts = Counter(w for row in rows for w in reviews.to_words(row["completion"]))
    assert 250 <= len(counts) <= 600
    assert min(counts.values()) >= 30


def test_lengths_in_tokens(files, facts, count_tokens):
    completions = [count_tokens(row["completion"]) + 1 for row in files["sft_test"]]
    prompts = [count_tokens(row["prompt"]) for row in files["sft_test"]]
    assert 17 <= np.mean(completions) <= 22 and np.percentile(completions, 95) <= 40
    assert facts["completion_tokens_with_eos"]["max"] <= 48
    assert 10 <= np.mean(prompts) <= 12 and facts["prompt_tokens"]["max"] <= 16


# ---------------------------------------------------------------- vocabulary


def test_vocabulary_has_two_special_tokens_and_no_gap(facts):
    """That it is plain byte-level BPE with its ids in merge order, load_tokenizer checks."""
    file = json.loads((DATA / "reviews" / "tokenizer" / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    assert special.keys() == {"<|endoftext|>", "<|pad|>"}
    assert all(token["special"] for token in file["added_tokens"])
    assert {*file["model"]["vocab"].values(), *special.values()} == set(range(facts["vocab_size"]))
    assert facts["vocab_size"] <= 2048


def test_most_words_are_one_token(files, count_tokens):
    words = (w for row in files["sft_test"] for w in reviews.to_words(row["completion"]))
    counts = Counter(word for word in words if word.isalpha())
    whole = sum(n for word, n in counts.items() if count_tokens(" " + word) == 1)
    assert whole / counts.total() > 0.95


# ---------------------------------------------------------------- facts


def test_floor_is_the_mean_of_minus_log_p(files, facts, count_tokens):
    logprobs = [log_prob(row["prompt"], row["completion"]) for row in files["sft_test"]]
    tokens = sum(count_tokens(row["completion"]) for row in files["sft_test"]) + 1_000
    assert facts["sft_test_floor_nats_per_token"] == pytest.approx(
        -sum(logprobs) / tokens, abs=1e-6
    )
    assert facts["sft_test_nats_per_review"] == pytest.approx(-np.mean(logprobs), abs=1e-6)
    assert 20 <= facts["sft_test_nats_per_review"] <= 28


def test_labels_of_the_test_pairs(files, facts):
    best, loss, agree = [], [], []
    for row in files["preferences_test"]:
        chosen, rejected = sentiment(None, [row["chosen"], row["rejected"]])
        assert (row["chosen_gold"], row["rejected_gold"]) == pytest.approx(
            (chosen, rejected), abs=1e-6
        )
        p = 1 / (1 + math.exp((rejected - chosen) / facts["tau"]))
        assert row["probability"] == pytest.approx(p, abs=1e-5)
        best.append(max(p, 1 - p))
        loss.append(-math.log(p))
        agree.append((np.sign(row["chosen_gold"] - row["rejected_gold"]) + 1) / 2)
    assert facts["preferences_test_best_accuracy"] == pytest.approx(np.mean(best), abs=1e-5)
    assert facts["preferences_test_best_nll"] == pytest.approx(np.mean(loss), abs=1e-4)
    assert facts["preferences_test_gold_accuracy"] == pytest.approx(np.mean(agree), abs=1e-6)
    assert 0.84 <= np.mean(best) <= 0.87


@pytest.mark.parametrize(
    "name", ["preferences_train", "preferences_train_more", "preferences_test"]
)
def test_labels_follow_the_stated_probability(files, facts, name):
    """In each band of |gold difference| the better text is chosen as often as tau says."""
    gold = np.array([sentiment(None, [row["chosen"], row["rejected"]]) for row in files[name]])
    difference = gold[:, 0] - gold[:, 1]
    p = 1 / (1 + np.exp(-np.abs(difference) / facts["tau"]))
    for low, high in ((0.0, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 2.0)):
        band = (np.abs(difference) > low) & (np.abs(difference) <= high)
        noise = np.sqrt(np.sum(p[band] * (1 - p[band]))) / band.sum()
        assert abs(np.mean(difference[band] > 0) - np.mean(p[band])) < 4 * noise


def test_prompts_move_the_gold_as_much_as_chance_does(facts):
    rng = random.Random(0)
    prompts = [reviews.sample_prompt(rng) for _ in range(200)]
    gold = np.array([sentiment(None, [sample(rng, p) for _ in range(16)]) for p in prompts])
    within = math.sqrt(gold.var(axis=1, ddof=1).mean())
    between = math.sqrt(gold.mean(axis=1).var(ddof=1) - within**2 / 16)
    assert facts["gold_std_within_prompts"] == pytest.approx(within, rel=0.1)
    assert facts["gold_std_between_prompts"] == pytest.approx(between, rel=0.2)
    assert 0.9 <= facts["gold_std_between_prompts"] / facts["gold_std_within_prompts"] <= 1.2


# ---------------------------------------------------------------- probability


def enumerate_strings(rules, symbol):
    """{words: probability [5]} of everything that `symbol` can become, by brute force."""
    if symbol not in rules:
        return {(symbol,): np.ones(5)}
    strings = Counter()
    for probabilities, items in rules[symbol]:
        found = {(): probabilities}
        for item in items:
            tails = enumerate_strings(rules, item)
            joined = Counter()
            for (head, p), (tail, q) in ((a, b) for a in found.items() for b in tails.items()):
                joined[head + tail] = joined[head + tail] + p * q
            found = joined
        for words, probability in found.items():
            strings[words] = strings[words] + probability
    return strings


def assert_inside_is_exact(rules, symbol):
    strings = enumerate_strings(rules, symbol)
    assert len(strings) > 5
    total = np.zeros(5)
    for words, probability in strings.items():
        found = reviews.inside(rules, symbol, list(words), 0, {})[len(words)]
        np.testing.assert_allclose(found, probability, rtol=1e-12)
        total += found
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_probabilities_of_an_ambiguous_grammar():
    rules = {
        "s": [(1, 0.3, "<a> <b>"), (2, -0.5, "x <b>"), (1, 0, "<a>")],
        "a": [(1, 0, "x"), (3, 0.2, "x y"), (1, 0, "<b> <b>")],
        "b": [(1, 0, "y"), (2, 1.0, "y z"), (1, 0, "x")],
    }
    assert_inside_is_exact(reviews.normalise(rules), "<s>")


def test_probabilities_of_the_grammar_cut_down():
    """The first two alternatives of each symbol, and one alternative for a whole review."""
    rules = {symbol: found[:2] for symbol, found in reviews.list_rules("western").items()}
    rules["review"] = rules["review"][:1]
    rules["about thing"] = [(1, 1.0, "<thing+>"), (1, -1.0, "although <story-> , <thing+>")]
    assert_inside_is_exact(reviews.normalise(rules), "<review>")


@pytest.mark.slow
def test_log_prob_is_the_frequency_of_samples():
    rng = random.Random(1)
    likely = {
        text for text in (sample(rng, PROMPT) for _ in range(2_000)) if log_prob(PROMPT, text) > -11
    }
    expected = sum(math.exp(log_prob(PROMPT, text)) for text in likely)
    drawn = 8_000
    seen = sum(sample(rng, PROMPT) in likely for _ in range(drawn)) / drawn
    assert expected > 0.01
    assert abs(seen - expected) < 4 * math.sqrt(expected / drawn)


def test_every_sample_has_a_probability():
    rng = random.Random(2)
    for _ in range(300):
        prompt = reviews.sample_prompt(rng)
        text = sample(rng, prompt)
        assert -90 < log_prob(prompt, text) < 0
        assert reviews.to_text(reviews.to_words(text)) == text


def test_the_completion_depends_on_genre_and_opening_not_on_the_title():
    text = " the horses were superb."
    here = log_prob(PROMPT, text)
    assert log_prob("Beyond the Iron Road (western). To my delight,", text) == here
    assert log_prob("The Quiet Harbor (comedy). To my delight,", text) == -math.inf
    assert log_prob("The Quiet Harbor (western). Alas,", text) < here


def test_what_the_grammar_cannot_make_has_no_probability():
    texts = ["", " ", " horses.", "the horses were superb.", " The horses were superb."]
    texts += [" the horses were superb", " the horses was superb.", " the horses  were superb."]
    texts += [" the horses were superb!", " the horses were superb. the plot dragged."]
    texts += [" the horses were superb. It is an good film."]
    texts += [" the horses were superb. It is a original film."]
    texts += [" the horses were superb. i loved it."]
    assert [text for text in texts if log_prob(PROMPT, text) != -math.inf] == []


def test_a_and_an():
    for film in ("an ordinary film", "a good film"):
        assert log_prob(PROMPT, f" the horses were superb. It is {film}.") > -math.inf


def test_a_prompt_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="not a prompt"):
        log_prob("Once upon a time", " the horses were superb.")


# ---------------------------------------------------------------- gold reward


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        # one opinion: valence / 2
        (" the horses were superb.", 0.8 / 2),
        (" the horses were dreadful.", -0.8 / 2),
        (" I loved it.", 0.7 / 2),
        (" my friends groaned.", -0.5 / 2),
        # intensifiers, cut at 1
        (" the horses were slightly dull.", -0.25 / 2),
        (" the horses were fairly good.", 0.3 / 2),
        (" the horses were truly superb.", 1.0 / 2),
        (" the horses really delighted me.", 0.875 / 2),
        # negation flips and damps, up to the end of its clause
        (" the horses were not boring.", 0.3 / 2),
        (" the horses were not superb.", -0.4 / 2),
        (" the horses never fell flat.", 0.3 / 2),
        (" the horses hardly touched me.", -0.3 / 2),
        (" the horses were far from dreadful.", 0.4 / 2),
        (" it wasn't a bad film.", 0.2 / 2),
        (" I would never watch it again.", -0.25 / 2),
        (" I would never skip it.", 0.25 / 2),
        (" the horses were not dull, and the plot was good.", (0.25 + 0.4) / 2 / 2),
        # two opinions: their mean; a contrast weighs its second part, or its main clause, double
        (" the horses were superb and thrilling.", 0.75 / 2),
        (" the horses were superb, and the plot was slow.", (0.8 - 0.4) / 2 / 2),
        (" the horses were superb, but the plot was slow.", (0.8 - 2 * 0.4) / 3 / 2),
        (" the horses were superb, yet the plot was slow.", (0.8 - 2 * 0.4) / 3 / 2),
        (" although the plot was slow, the horses were superb.", (2 * 0.8 - 0.4) / 3 / 2),
        (" the horses were superb, though the plot was slow.", (2 * 0.8 - 0.4) / 3 / 2),
        (" the horses were superb and thrilling, but the plot was slow.", (1.5 - 0.8) / 4 / 2),
        # sentences: sum / (number + 1), so the best review has three of them
        (" the horses were superb. The plot was gripping.", (0.8 + 0.7) / 3),
        (" the horses were superb. It was raining that day.", 0.8 / 3),
        (
            " the horses were truly superb. The acting was simply magnificent."
            " It is an absolutely brilliant western.",
            0.75,
        ),
        # repetition earns nothing and counts as a sentence: neither a word nor an aspect twice
        (" the horses were superb. The horses were superb.", 0.8 / 3),
        (" the horses were superb. The plot was superb.", 0.8 / 3),
        (" the horses were superb. The horses were thrilling.", 0.8 / 3),
        (" the horses were great great great.", 0.6 / 3 / 2),
        (" the plot was dull. The plot was thin.", -0.5 / 3),
        # broken text: what was cut off and what is no sentence earns nothing
        ("", 0.0),
        (" ", 0.0),
        ("...", 0.0),
        (" the horses were superb", 0.0),
        (" the horses were superb. The plot was gripping and", 0.8 / 3),
        (" superb.", 0.0),
        (" superb, great.", 0.0),
        ("SUPERB horses here!", 0.8 / 2),
        (" not never not.", 0.0),
        (" but although , and .", 0.0),
    ],
)
def test_gold_of_written_examples(text, gold):
    assert sentiment(["any prompt"], [text]) == [pytest.approx(gold, abs=1e-9)]


@pytest.mark.parametrize("genre", reviews.GENRES)
def test_gold_has_the_sign_that_the_grammar_means(genre):
    """Every clause that a good (bad) symbol becomes has a positive (negative) gold."""
    rng, rules = random.Random(genre), reviews.grammar(genre)
    for symbol in ("thing", "craft", "film", "outcome"):
        for sign, direction in (("+", 1), ("-", -1)):
            for i in range(200):
                words = reviews.expand(rng, rules, i % 5, f"<{symbol}{sign}>")
                assert score(reviews.to_text([*words, "."])) * direction > 0, words


def test_a_word_has_one_meaning():
    meanings = [
        {word for line in table.values() for _, word, _ in reviews.read_words(line)}
        for table in (reviews.ADJECTIVES, reviews.VERBS, reviews.REACTIONS)
    ]
    meanings.append({w for nouns in reviews.NOUNS.values() for w in nouns.split()} - {"|"})
    meanings += [set(reviews.INTENSITY), set(reviews.NEGATIONS), set(reviews.BOUNDARIES)]
    assert sum(map(len, meanings)) == len(set().union(*meanings)) == len(reviews.ROLES)


def test_gold_of_any_text_is_between_minus_one_and_one():
    rng = random.Random(3)
    words = [*reviews.ROLES, "the", "İ", "中", "\x00", "'", "''", "don't't", "\n", "1e9", "�"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(60))) for _ in range(3_000)]
    texts += ["".join(chr(rng.randrange(0x3000)) for _ in range(50)) for _ in range(200)]
    gold = sentiment([""] * len(texts), texts, answer=["column that it does not use"])
    assert len(gold) == len(texts) and all(isinstance(g, float) and abs(g) <= 1 for g in gold)


def test_importing_it_needs_no_more_than_numpy():
    code = (
        "import sys; import reviews; heavy = {'jax', 'flax', 'tokenizers', 'torch', 'tiktoken'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=DATA, check=True)
