"""Model folders and tokenizers against transformers, live: what one writes, the other reads."""

import json
import random
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from test_gpt2 import EOS_ID, PAD_ID, TOKENIZER, forward, write_vocab_and_merges

import gpt2
import reward
import sft

pytestmark = [pytest.mark.parity, pytest.mark.slow]
SIZE = PAD_ID + 1
SHAPE = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
ONE = jnp.ones((1, 1), jnp.int32)


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def rows():
    """tokens, mask [3, 12]: rows of 12, 5 and 9 tokens, padded on the right, the last one EOS."""
    tokens = np.random.default_rng(0).integers(0, 300, size=(3, 12)).astype(np.int32)
    mask = (np.arange(12) < np.array([12, 5, 9])[:, None]).astype(np.int32)
    tokens[np.arange(3), mask.sum(axis=1) - 1] = EOS_ID
    return tokens * mask, mask


def left_padded(tokens, mask):
    """The same rows with their padding moved to the left, and their positions."""
    shift = [np.roll(np.arange(mask.shape[1]), mask.shape[1] - int(n)) for n in mask.sum(axis=1)]
    tokens, mask = (np.take_along_axis(x, np.array(shift), axis=1) for x in (tokens, mask))
    return tokens, mask, np.maximum(mask.cumsum(axis=1) - 1, 0)


def torch_model(kind, **changes):
    """A random model of transformers, with biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    changes = {"eos_token_id": EOS_ID} | changes  # 50256, the default, is beyond this vocabulary
    model = kind(transformers.GPT2Config(vocab_size=SIZE, **SHAPE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def torch_logits(model, tokens, mask, positions=None):
    arrays = {"input_ids": tokens, "attention_mask": mask}
    if positions is not None:  # without them, padding on the left would be counted
        arrays["position_ids"] = positions
    with torch.no_grad():
        return model(**{k: torch.tensor(v).long() for k, v in arrays.items()}).logits.numpy()


def loaded(kind, folder):
    """The folder's model in transformers, which finds in it all it wants and nothing else."""
    model, loading = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def assert_equal_logits(model, config, params, rows, largest=5):
    """Of a model of transformers and of one here, padded on the right and on the left."""
    for tokens, mask, *positions in (rows, left_padded(*rows)):
        expected = torch_logits(model, tokens, mask, *positions)
        assert np.abs(expected).max() > largest
        logits = forward(config, params, tokens, mask)
        np.testing.assert_allclose(logits[mask > 0], expected[mask > 0], rtol=0, atol=5e-5)


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
    assert_equal_logits(model.float(), config, params, rows)  # the rounded weights, in float32


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_here_loads_in_transformers(tmp_path, rows, tied):
    ids = {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    changes = {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": tied}
    config = gpt2.GPT2Config(vocab_size=SIZE, **SHAPE, **ids, **changes)
    params = jax.jit(gpt2.GPT2(config).init)(jax.random.key(0), ONE, ONE)["params"]
    noise = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype("float32"), params)
    sft.save_model(tmp_path / "m", config, params, TOKENIZER)
    model = loaded(transformers.GPT2LMHeadModel, tmp_path / "m")
    assert model.dtype == torch.float32 and model.config.eos_token_id == EOS_ID
    assert_equal_logits(model, config, params, rows, largest=4)
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert isinstance(auto, transformers.GPT2LMHeadModel)


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

    def text():
        characters, length = rng.choice(known_in), rng.randrange(0, 30)
        return "".join(
            rng.choice(words if rng.random() < 0.3 else characters) for _ in range(length)
        )

    return [text() for _ in range(count)]


@pytest.fixture(params=["tokenizer.json", "vocab.json and merges.txt"])
def source(request, tmp_path):
    """A folder with the embedded vocabulary, in one file or in the two of older folders."""
    folder = tmp_path / "source"
    text = (TOKENIZER / "tokenizer.json").read_text("utf-8")
    if request.param == "tokenizer.json":
        folder.mkdir()
        (folder / "tokenizer.json").write_text(text, "utf-8")
    else:
        file = json.loads(text)
        merges = [m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]]
        write_vocab_and_merges(folder, file | {"model": file["model"] | {"merges": merges}})
        config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_token_ids_equal_those_of_transformers(tmp_path, source):
    """Of a folder saved here, of the same saved again by transformers, and with an added [PAD]."""
    config = gpt2.GPT2Config(vocab_size=SIZE, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    params = jax.jit(gpt2.GPT2(config).init)(jax.random.key(0), ONE, ONE)["params"]
    source = source if (source / "vocab.json").exists() else TOKENIZER  # with its other files
    sft.save_model(tmp_path / "ours", config, params, source)
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


def random_reward_model(vocab_size=SIZE, **ids):
    config = reward.GPT2Config(vocab_size=vocab_size, **SHAPE, eos_token_id=EOS_ID, **ids)
    params = jax.jit(reward.RewardModel(config).init)(jax.random.key(0), ONE, ONE)["params"]
    return config, params


def assert_transformers_gives_the_same_scores(folder, pad_id, rows, expected):
    model, mask = loaded(transformers.GPT2ForSequenceClassification, folder), rows[1]
    assert model.config.num_labels == 1 and model.config.pad_token_id == pad_id
    assert np.std(expected) > 0.1
    right = np.where(mask > 0, rows[0], pad_id), mask
    for padded in (right, left_padded(*right)):
        scores = torch_logits(model, *padded)[:, 0]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-5)


def test_reward_model_where_pad_would_be_eos(tmp_path, rows, source):
    """It is saved with one more row and an added [PAD]; transformers pads and scores with that."""
    config, params = random_reward_model()
    expected = reward.learned_rewards(params, config, *rows)
    new_params, new_config = reward.add_pad_token(params, config, source, tmp_path / "tokenizer")
    pad_id = new_config.pad_token_id
    assert pad_id == SIZE and new_config.vocab_size == SIZE + 1
    reward.save_model(tmp_path / "m", new_config, new_params, tmp_path / "tokenizer")
    assert_transformers_gives_the_same_scores(tmp_path / "m", pad_id, rows, expected)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    ours = reward.load_tokenizer(tmp_path / "m")
    assert theirs.pad_token_id == ours.encode_single_token("[PAD]") == pad_id
    assert len(theirs) == ours.n_vocab == SIZE + 1
    assert theirs("a good film.")["input_ids"] == ours.encode_ordinary("a good film.")
    again_config, again = reward.load_model(tmp_path / "m")
    np.testing.assert_array_equal(reward.learned_rewards(again, again_config, *rows), expected)


def test_pad_token_of_a_model_with_more_rows_than_tokens(tmp_path):
    """Tables are often padded to a round size: [PAD] must have one id in config and tokenizer."""
    config, params = random_reward_model(SIZE + 50)
    params, config = reward.add_pad_token(params, config, TOKENIZER, tmp_path / "tokenizer")
    assert params["wte"]["embedding"].shape[0] == config.vocab_size > config.pad_token_id
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours = reward.load_tokenizer(tmp_path / "tokenizer")
    assert theirs.pad_token_id == ours.encode_single_token("[PAD]") == config.pad_token_id


def test_a_reward_model_whose_pad_is_eos_is_read_one_token_early(tmp_path, rows):
    """What the added token is for: without it transformers and we disagree."""
    config, params = random_reward_model(pad_token_id=EOS_ID)
    (tokens, mask), ours = rows, reward.learned_rewards(params, config, *rows)
    reward.save_model(tmp_path / "m", config, params, TOKENIZER)
    model = loaded(transformers.GPT2ForSequenceClassification, tmp_path / "m")
    theirs = torch_logits(model, np.where(mask > 0, tokens, EOS_ID), mask)[:, 0]
    assert np.abs(theirs - ours).max() > 0.1


def test_normalised_reward_model_in_transformers(tmp_path, rows):
    """The gain and the shift stand in the weights, so transformers gives the normalised score."""
    config, params = random_reward_model(pad_token_id=PAD_ID)
    raw = np.asarray(reward.learned_rewards(params, config, *rows))
    samples = np.random.default_rng(0).normal(-1.5, 0.4, size=(6, 5)).astype(np.float32)
    samples += np.arange(6, dtype=np.float32)[:, None]  # prompts differ, which must not count
    params, gain, shift = reward.normalise(params, samples)
    expected_gain = 1 / np.sqrt(samples.var(axis=1, ddof=1).mean())
    expected = expected_gain * (raw - samples.mean())
    np.testing.assert_allclose(gain, expected_gain, rtol=1e-5)
    np.testing.assert_allclose(gain * raw + shift, expected, atol=1e-4)
    folder, figures = tmp_path / "m", {"reward_gain": gain, "reward_shift": shift}
    reward.save_model(folder, config, params, TOKENIZER, **figures)
    assert_transformers_gives_the_same_scores(folder, PAD_ID, rows, expected)
    assert figures.items() <= json.loads((folder / "config.json").read_text()).items()
    assert reward.load_model(folder)[0] == config


def test_a_reward_model_of_transformers_loads_here(tmp_path, rows):
    kind, ids = transformers.GPT2ForSequenceClassification, {"num_labels": 1, "pad_token_id": 0}
    model = torch_model(kind, **ids)
    model.save_pretrained(tmp_path)
    tokens, mask = np.where(rows[1] > 0, np.maximum(rows[0], 1), 0), rows[1]  # no PAD inside a row
    config, params = reward.load_model(tmp_path)
    expected = torch_logits(model, tokens, mask)[:, 0]
    assert np.std(expected) > 0.1
    scores = reward.learned_rewards(params, config, tokens, mask)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-5)
