"""Model folders and tokenizers against transformers, live: what one writes, the other reads."""

import dataclasses
import json
import random
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import gpt2
import reward

pytestmark = pytest.mark.parity
TOKENIZER = Path(__file__).resolve().parent.parent / "data" / "reviews" / "tokenizer"
EOS_ID, PAD_ID = (
    t["id"] for t in json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))["added_tokens"]
)
SIZE = PAD_ID + 1
SHAPE = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def rows():
    """tokens, mask [3, 12]: rows of 12, 5 and 9 tokens, padded on the right."""
    tokens = np.random.default_rng(0).integers(0, 300, size=(3, 12)).astype(np.int32)
    mask = (np.arange(12) < np.array([12, 5, 9])[:, None]).astype(np.int32)
    return tokens * mask, mask


def left_padded(tokens, mask):
    """The same rows with their padding moved to the left, and their positions."""
    shift = [np.roll(np.arange(mask.shape[1]), mask.shape[1] - int(n)) for n in mask.sum(axis=1)]
    tokens, mask = (np.take_along_axis(x, np.array(shift), axis=1) for x in (tokens, mask))
    return tokens, mask, np.maximum(mask.cumsum(axis=1) - 1, 0)


def torch_model(kind, seed=0, **changes):
    """A random model of transformers, with biases and norms that are not 0 and 1."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=300, **SHAPE, initializer_range=0.3, **changes)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def torch_logits(model, tokens, mask, positions=None):
    arrays = {"input_ids": tokens, "attention_mask": mask}
    if positions is not None:
        arrays["position_ids"] = positions
    with torch.no_grad():
        return model(**{k: torch.tensor(v).long() for k, v in arrays.items()}).logits.numpy()


def jax_logits(config, params, tokens, mask):
    apply = jax.jit(lambda p: gpt2.GPT2(config).apply({"params": p}, tokens, mask))
    return np.asarray(apply(params))


@pytest.mark.parametrize(
    ("dtype", "tied"),
    [("float32", True), ("float32", False), ("float16", True), ("bfloat16", False)],
)
def test_a_model_of_transformers_loads_here(tmp_path, rows, dtype, tied):
    model = torch_model(transformers.GPT2LMHeadModel, tie_word_embeddings=tied)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    config, params = gpt2.load_model(tmp_path)
    assert config.tie_word_embeddings == tied and ("lm_head" in params) != tied
    tokens, mask = rows
    expected = torch_logits(model.float(), tokens, mask)  # the rounded weights, in float32
    logits = jax_logits(config, params, tokens, mask)
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(logits[mask > 0], expected[mask > 0], rtol=0, atol=5e-5)
    tokens, mask, positions = left_padded(tokens, mask)
    expected = torch_logits(model, tokens, mask, positions)
    logits = jax_logits(config, params, tokens, mask)
    np.testing.assert_allclose(logits[mask > 0], expected[mask > 0], rtol=0, atol=5e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_here_loads_in_transformers(tmp_path, rows, tied):
    config = gpt2.GPT2Config(
        vocab_size=300,
        **SHAPE,
        n_inner=48,
        initializer_range=0.3,
        layer_norm_epsilon=1e-3,
        tie_word_embeddings=tied,
        eos_token_id=299,
        pad_token_id=298,
    )
    tokens, mask = rows
    params = jax.jit(gpt2.GPT2(config).init)(jax.random.key(0), tokens, mask)["params"]
    noise = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype("float32"), params)
    gpt2.save_model(tmp_path / "m", config, params, TOKENIZER)
    model, loading = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32 and model.config.eos_token_id == 299
    expected = torch_logits(model.eval(), tokens, mask)
    logits = jax_logits(config, params, tokens, mask)
    np.testing.assert_allclose(logits[mask > 0], expected[mask > 0], rtol=0, atol=5e-5)
    assert isinstance(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        transformers.GPT2LMHeadModel,
    )


# --------------------------------------------------------------------------------------- tokenizer


def random_unicode(count, seed=0):
    """Strings of assigned characters: words and spaces, one script each, or anything at all."""
    rng = random.Random(seed)
    blocks = [(32, 127), (32, 127), (0, 256), (0x300, 0x370), (0x400, 0x500), (0x590, 0x700)]
    blocks += [(0x900, 0xA00), (0x2000, 0x2100), (0x3000, 0x3100), (0x4E00, 0x4F00)]
    blocks += [(0xFE00, 0xFFF0), (0x1F300, 0x1F700), (0, 0x20000)]
    words = ["the", " film", " is", "n't", " I'll", "'s", " good", ".", "\n", "  ", " 10", "\t"]
    known = [chr(i) for i in range(0x20000) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
    known_in = [[c for c in known if low <= ord(c) < high] for low, high in blocks]
    texts = []
    for _ in range(count):
        characters = rng.choice(known_in)
        pieces = [
            rng.choice(words if rng.random() < 0.3 else characters)
            for _ in range(rng.randrange(0, 30))
        ]
        texts.append("".join(pieces))
    return texts


def write_vocab_and_merges(folder):
    """The embedded vocabulary in the two files of older folders."""
    file = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
    vocabulary = file["model"]["vocab"] | {t["content"]: t["id"] for t in file["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_token_ids_equal_those_of_transformers(tmp_path, files):
    """Of a folder saved here, of the same saved again by transformers, and with an added [PAD]."""
    source = TOKENIZER if files == "tokenizer.json" else write_vocab_and_merges(tmp_path / "source")
    config = gpt2.GPT2Config(vocab_size=SIZE, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    one = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(gpt2.GPT2(config).init)(jax.random.key(0), one, one)["params"]
    gpt2.save_model(tmp_path / "ours", config, params, source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    ours = gpt2.load_tokenizer(tmp_path / "ours")
    texts = random_unicode(2000)
    ids = [ours.encode_ordinary(text) for text in texts]
    assert ids == theirs(texts, add_special_tokens=False)["input_ids"]
    assert theirs.eos_token_id == ours.eot_token == EOS_ID and len(theirs) == ours.n_vocab

    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(tmp_path / "theirs")
    again = gpt2.load_tokenizer(tmp_path / "theirs")
    assert again.encode_single_token("[PAD]") == theirs.pad_token_id == SIZE
    assert [again.encode_ordinary(text) for text in texts] == ids


# ------------------------------------------------------------------------------------ reward models


def scores_here(config, params, tokens, mask):
    """The score of each row, as reward.py and ppo.py compute it."""

    @jax.jit
    def score(params, tokens, mask):
        scores = reward.RewardModel(config).apply({"params": params}, tokens, mask)
        return reward.sequence_scores(scores, mask)

    return np.asarray(score(params, tokens, mask))


def assert_transformers_gives_the_same_scores(folder, pad_id, tokens, mask, expected):
    """Right-padded, and left-padded with position_ids, without which padding would be counted."""
    model, loading = transformers.GPT2ForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(loading.values()), loading
    model.eval()
    assert model.config.num_labels == 1 and model.config.pad_token_id == pad_id
    padded = np.where(mask > 0, tokens, pad_id)
    scores = torch_logits(model, padded, mask)[:, 0]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-5)
    tokens, mask, positions = left_padded(padded, mask)
    scores = torch_logits(model, tokens, mask, positions)[:, 0]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-5)


def random_reward_model(vocab_size, **ids):
    config = reward.GPT2Config(vocab_size=vocab_size, **SHAPE, initializer_range=0.3, **ids)
    one = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(reward.RewardModel(config).init)(jax.random.key(0), one, one)["params"]
    return config, params


def ending_in(tokens, mask, eos_id):
    """The rows with EOS as their last real token."""
    tokens, last = tokens.copy(), mask.sum(axis=1) - 1
    tokens[np.arange(len(tokens)), last] = eos_id
    return tokens


def test_reward_model_with_a_pad_token_of_its_own(tmp_path, rows):
    config, params = random_reward_model(SIZE, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    tokens, mask = ending_in(*rows, EOS_ID), rows[1]
    reward.save_model(tmp_path / "m", config, params, TOKENIZER)
    expected = scores_here(config, params, tokens, mask)
    assert expected.std() > 0.1
    assert_transformers_gives_the_same_scores(tmp_path / "m", PAD_ID, tokens, mask, expected)


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_reward_model_where_pad_would_be_eos(tmp_path, rows, files):
    """It is saved with one more row and an added [PAD]; transformers pads and scores with that."""
    source = tmp_path / "source"
    write_vocab_and_merges(source)
    if files == "tokenizer.json":
        file = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
        for path in source.iterdir():
            path.unlink()
        (source / "tokenizer.json").write_text(json.dumps(file), "utf-8")
    config, params = random_reward_model(SIZE, eos_token_id=EOS_ID)
    tokens, mask = ending_in(*rows, EOS_ID), rows[1]
    expected = scores_here(config, params, tokens, mask)
    new_params, new_config = reward.add_pad_token(params, config, source, tmp_path / "tokenizer")
    pad_id = new_config.pad_token_id
    assert pad_id == SIZE and new_config.vocab_size == SIZE + 1
    reward.save_model(tmp_path / "m", new_config, new_params, tmp_path / "tokenizer")
    assert_transformers_gives_the_same_scores(tmp_path / "m", pad_id, tokens, mask, expected)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    ours = reward.load_tokenizer(tmp_path / "m")
    assert theirs.pad_token_id == ours.encode_single_token("[PAD]") == pad_id
    assert len(theirs) == ours.n_vocab == SIZE + 1
    assert theirs("a good film.")["input_ids"] == ours.encode_ordinary("a good film.")
    loaded_config, loaded = reward.load_model(tmp_path / "m")
    np.testing.assert_array_equal(scores_here(loaded_config, loaded, tokens, mask), expected)


def test_pad_token_of_a_model_with_more_rows_than_tokens(tmp_path):
    """Tables are often padded to a round size: [PAD] must have one id in config and tokenizer."""
    config, params = random_reward_model(SIZE + 50, eos_token_id=EOS_ID)
    params, config = reward.add_pad_token(params, config, TOKENIZER, tmp_path / "tokenizer")
    assert params["wte"]["embedding"].shape[0] == config.vocab_size > config.pad_token_id
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours = reward.load_tokenizer(tmp_path / "tokenizer")
    assert theirs.pad_token_id == ours.encode_single_token("[PAD]") == config.pad_token_id


def test_a_reward_model_whose_pad_is_eos_is_read_one_token_early(tmp_path, rows):
    """What the added token is for: without it transformers and we disagree."""
    config, params = random_reward_model(SIZE, eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    tokens, mask = ending_in(*rows, EOS_ID), rows[1]
    reward.save_model(tmp_path / "m", config, params, TOKENIZER)
    model = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    theirs = torch_logits(model, np.where(mask > 0, tokens, EOS_ID), mask)[:, 0]
    assert np.abs(theirs - scores_here(config, params, tokens, mask)).max() > 0.1


def test_normalised_reward_model_in_transformers(tmp_path, rows):
    """The gain and the shift stand in the weights, so transformers gives the normalised score."""
    config, params = random_reward_model(SIZE, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    tokens, mask = ending_in(*rows, EOS_ID), rows[1]
    raw = scores_here(config, params, tokens, mask)
    samples = np.random.default_rng(0).normal(-1.5, 0.4, size=(6, 5)).astype(np.float32)
    samples += np.arange(6, dtype=np.float32)[:, None]  # prompts differ, which must not count
    params, config = reward.normalise(params, config, samples)
    gain = 1 / np.sqrt(samples.var(axis=1, ddof=1).mean())
    expected = gain * (raw - samples.mean())
    np.testing.assert_allclose(config.reward_gain, gain, rtol=1e-5)
    np.testing.assert_allclose(config.reward_gain * raw + config.reward_shift, expected, atol=1e-4)
    reward.save_model(tmp_path / "m", config, params, TOKENIZER)
    assert_transformers_gives_the_same_scores(tmp_path / "m", PAD_ID, tokens, mask, expected)
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["reward_gain"] == config.reward_gain
    assert dataclasses.replace(reward.load_model(tmp_path / "m")[0]) == config


def test_a_reward_model_of_transformers_loads_here(tmp_path, rows):
    model = torch_model(transformers.GPT2ForSequenceClassification, num_labels=1, pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokens = np.where(rows[1] > 0, np.maximum(rows[0], 1), 0)  # no PAD inside a row
    config, params = reward.load_model(tmp_path)
    expected = torch_logits(model, tokens, rows[1])[:, 0]
    assert np.std(expected) > 0.1
    scores = scores_here(config, params, tokens, rows[1])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-5)
