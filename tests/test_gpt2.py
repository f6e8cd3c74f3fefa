"""The model, the sampler, the model folders and the tokenizer: gpt2.py against golden numbers."""

import dataclasses
import functools
import itertools
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
from safetensors import safe_open
from safetensors.flax import load_file, save_file

import gpt2
from gpt2 import GPT2, GPT2Config, generate, load_model, load_tokenizer, save_model

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "goldens" / "gpt2_tiny"
REWARD_TINY = ROOT / "tests" / "goldens" / "gpt2_reward_tiny"
TOKENIZER = ROOT / "data" / "reviews" / "tokenizer"
EOS_ID, PAD_ID = (
    t["id"] for t in json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))["added_tokens"]
)
NO_EOS = -1  # an id that no token has: nothing ends


@functools.partial(jax.jit, static_argnums=1)
def forward(params, config, tokens, mask):
    return GPT2(config).apply({"params": params}, tokens, mask)


def log_softmax(logits):
    """In NumPy and float64, to hold JAX's float32 against."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def tiny():
    """(config, params) of the golden model."""
    return load_model(TINY)


@pytest.fixture(scope="module")
def toy():
    """(config, params) of a model with 8 tokens whose distributions are far from uniform."""
    config = GPT2Config(
        vocab_size=8, n_positions=24, n_embd=16, n_layer=1, n_head=2, initializer_range=0.6
    )
    one = jnp.ones((1, 1), jnp.int32)
    return config, jax.jit(GPT2(config).init)(jax.random.key(3), one, one)["params"]


# ------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("case", ["full", "right", "left"])
def test_logits_equal_hugging_face(tiny, goldens, case):
    golden = goldens("gpt2_forward")
    tokens = golden[f"{case}_input_ids"]
    mask = golden.get(f"{case}_attention_mask", np.ones_like(tokens))
    logits = forward(tiny[1], tiny[0], tokens, mask)
    assert logits.dtype == jnp.float32
    real = mask > 0
    error = np.abs(np.asarray(logits) - golden[f"{case}_logits_f32"])[real].max()
    assert error < 2e-5


def test_logits_of_a_row_that_fills_the_context(tiny, goldens):
    golden = goldens("gpt2_forward")
    tokens = golden["context_input_ids"]
    logits = forward(tiny[1], tiny[0], tokens, np.ones_like(tokens))[:, -4:]
    np.testing.assert_allclose(logits, golden["context_last_logits_f64"], rtol=0, atol=2e-5)


def test_left_padding_is_not_counted_as_positions(tiny, goldens):
    """What GPT-2 says when padding is counted is another thing, so the test above can tell."""
    golden = goldens("gpt2_forward")
    real = golden["left_attention_mask"] > 0
    wrong = golden["left_logits_default_positions_f64"]
    assert np.abs(wrong - golden["left_logits_f64"])[real].max() > 0.1


def test_content_of_padding_changes_nothing(tiny, goldens):
    golden = goldens("gpt2_forward")
    for case in ("left", "right"):
        tokens, mask = golden[f"{case}_input_ids"], golden[f"{case}_attention_mask"]
        other = np.where(mask > 0, tokens, (tokens + 101) % 257).astype(np.int32)
        assert (other != tokens).any()
        logits = [np.asarray(forward(tiny[1], tiny[0], t, mask)) for t in (tokens, other)]
        np.testing.assert_array_equal(logits[0][mask > 0], logits[1][mask > 0])


def test_logits_from_leaves_out_the_first_columns(tiny, goldens):
    golden = goldens("gpt2_forward")
    tokens, mask = golden["left_input_ids"], golden["left_attention_mask"]
    apply = jax.jit(lambda p: GPT2(tiny[0]).apply({"params": p}, tokens, mask, logits_from=9))
    logits = apply(tiny[1])
    assert logits.shape == (4, 3, 257)
    real, expected = mask[:, 9:] > 0, golden["left_logits_f32"][:, 9:]
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=2e-5)


def test_remat_gives_the_same_gradients(toy):
    tokens = np.array([[1, 2, 3, 4, 5, 6]], np.int32)
    gradients, programs = [], []
    for remat in (False, True):
        config = dataclasses.replace(toy[0], remat=remat)

        def loss(params, config=config):
            logits = GPT2(config).apply({"params": params}, tokens, np.ones_like(tokens))
            return gpt2.token_logprobs(logits[:, :-1], tokens[:, 1:]).sum()

        gradients.append(jax.jit(jax.grad(loss))(toy[1]))
        programs.append(str(jax.make_jaxpr(loss)(toy[1])))
    assert ["remat" in p or "checkpoint" in p for p in programs] == [False, True]
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradients[0])) > 0.1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, *gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_stays_close(tiny, goldens, dtype, tolerance):
    golden = goldens("gpt2_forward")
    tokens = golden["full_input_ids"]
    config = dataclasses.replace(tiny[0], dtype=dtype)
    logits = forward(tiny[1], config, tokens, np.ones_like(tokens))
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - golden["full_logits_f64"]).max()
    assert 1e-4 < error < tolerance, error  # not 0: the computation is in the other type indeed


# -------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("number", [0, 2])
def test_greedy_tokens_and_logprobs_equal_hugging_face(tiny, goldens, number):
    """The log-probabilities at temperature 0 are those at temperature 1."""
    golden = goldens("gpt2_generate")
    prompt = golden[f"prompt_{number}"][None]
    tokens, mask, logprobs = generate(
        tiny[1], tiny[0], prompt, np.ones_like(prompt), jax.random.key(0), 16, 0.0, NO_EOS
    )
    np.testing.assert_array_equal(tokens[0, : prompt.shape[1]], prompt[0])
    np.testing.assert_array_equal(tokens[0, prompt.shape[1] :], golden[f"greedy_{number}"])
    assert mask.shape == tokens.shape and np.all(mask == 1)
    np.testing.assert_allclose(
        logprobs[0], golden[f"greedy_{number}_token_logps_f64"], rtol=0, atol=1e-5
    )


def test_greedy_batch_equals_hugging_face(tiny, goldens):
    golden = goldens("gpt2_generate")
    prompts, mask = golden["batch_input_ids"], golden["batch_attention_mask"]
    tokens, _, _ = generate(tiny[1], tiny[0], prompts, mask, jax.random.key(0), 16, 0.0, NO_EOS)
    np.testing.assert_array_equal(tokens[:, 9:], golden["batch_greedy"])


def test_greedy_batch_with_eos_equals_hugging_face(tiny, goldens):
    golden = goldens("gpt2_generate")
    prompts, prompt_mask = golden["batch_input_ids"], golden["batch_attention_mask"]
    eos_id, expected = int(golden["eos_token_id"]), golden["batch_greedy_eos"]
    tokens, mask, logprobs = map(
        np.asarray,
        generate(
            tiny[1], tiny[0], prompts, prompt_mask, jax.random.key(0), 16, 0.0, eos_id, pad_id=256
        ),
    )
    np.testing.assert_array_equal(tokens[:, 9:], expected)
    np.testing.assert_array_equal(mask[:, :9], prompt_mask)
    ends = [row.index(eos_id) + 1 if eos_id in row else 16 for row in expected.tolist()]
    assert min(ends) < 16  # at least one row has ended early
    for row, end in enumerate(ends):
        assert mask[row, 9 : 9 + end].all() and not mask[row, 9 + end :].any()
        golden_logprobs = golden[f"greedy_{row}_token_logps_f64"][:end]
        np.testing.assert_allclose(logprobs[row, :end], golden_logprobs, rtol=0, atol=1e-5)
        assert not logprobs[row, end:].any()


def test_sampled_logprobs_equal_a_full_forward(tiny, goldens):
    """With left padding, temperature 0.7 and three samples of each prompt, side by side."""
    golden = goldens("gpt2_generate")
    prompts, prompt_mask = golden["batch_input_ids"], golden["batch_attention_mask"]
    tokens, mask, logprobs = map(
        np.asarray,
        generate(
            tiny[1],
            tiny[0],
            prompts,
            prompt_mask,
            jax.random.key(1),
            16,
            0.7,
            NO_EOS,
            num_samples=3,
        ),
    )
    assert tokens.shape == mask.shape == (9, 25) and logprobs.shape == (9, 16)
    np.testing.assert_array_equal(tokens[:, :9], np.repeat(prompts, 3, axis=0))
    np.testing.assert_array_equal(mask[:, :9], np.repeat(prompt_mask, 3, axis=0))
    assert len({tuple(row) for row in tokens}) == 9
    expected = log_softmax(np.asarray(forward(tiny[1], tiny[0], tokens, mask))[:, 8:-1] / 0.7)
    expected = np.take_along_axis(expected, tokens[:, 9:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)


def test_after_eos_everything_is_filled(toy):
    """Every row up to its own end, and only its end: the rows end at many different places."""
    prompts = np.array([[1, 2, 3]], np.int32)
    tokens, mask, logprobs = map(
        np.asarray,
        generate(
            toy[1],
            toy[0],
            prompts,
            np.ones_like(prompts),
            jax.random.key(2),
            12,
            1.0,
            6,
            pad_id=7,
            num_samples=64,
        ),
    )
    response, response_mask = tokens[:, 3:], mask[:, 3:]
    lengths = [row.index(6) + 1 if 6 in row else 12 for row in response.tolist()]
    assert len(set(lengths)) > 3
    expected = np.arange(12) < np.array(lengths)[:, None]
    np.testing.assert_array_equal(response_mask, expected)
    assert (response[~expected] == 7).all() and (logprobs[~expected] == 0).all()
    assert (logprobs[expected] < 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(toy, temperature):
    """Chi-square test of the first two tokens together: 64 cells, 63 degrees of freedom."""
    count, prompt = 20_000, np.array([[1, 2, 3]], np.int32)
    tokens, _, logprobs = generate(
        toy[1],
        toy[0],
        prompt,
        np.ones_like(prompt),
        jax.random.key(4),
        2,
        temperature,
        NO_EOS,
        num_samples=count,
    )
    pairs = np.array([[1, 2, 3, first] for first in range(8)], np.int32)
    logits = np.asarray(forward(toy[1], toy[0], pairs, np.ones_like(pairs))) / temperature
    joint = log_softmax(logits[:1, 2]).T + log_softmax(logits[:, 3])  # [first, second]
    expected = count * np.exp(joint).ravel()
    observed = np.bincount(np.asarray(tokens[:, 3] * 8 + tokens[:, 4]), minlength=64)
    assert expected.max() > 3 * count / 64  # not nearly uniform
    rare = expected < 5  # pooled, as the test wants at least 5 in each cell
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    first_two = joint[np.asarray(tokens[:, 3]), np.asarray(tokens[:, 4])]
    np.testing.assert_allclose(np.asarray(logprobs).sum(axis=1), first_two, rtol=0, atol=4e-5)


def test_keys_and_padding_of_the_batch(toy):
    """Another key gives other samples; a batch padded more gives the same ones."""

    def sample(prompts, mask, key):
        tokens, _, logprobs = generate(toy[1], toy[0], prompts, mask, key, 8, 1.0, 6, num_samples=8)
        return np.asarray(tokens)[:, prompts.shape[1] :], np.asarray(logprobs)

    prompts = np.array([[0, 4, 5], [1, 2, 3]], np.int32)
    mask = np.array([[0, 1, 1], [1, 1, 1]], np.int32)
    wide, wide_mask = (np.pad(x, ((0, 0), (5, 0))) for x in (prompts, mask))
    tokens, logprobs = sample(prompts, mask, jax.random.key(0))
    again, _ = sample(prompts, mask, jax.random.key(0))
    others, _ = sample(prompts, mask, jax.random.key(1))
    padded, padded_logprobs = sample(wide, wide_mask, jax.random.key(0))
    np.testing.assert_array_equal(tokens, again)
    assert (tokens != others).any()
    np.testing.assert_array_equal(tokens, padded)
    np.testing.assert_allclose(logprobs, padded_logprobs, rtol=0, atol=1e-5)


def test_prompt_and_response_must_fit_the_positions(toy):
    prompts = np.ones((1, 9), np.int32)
    with pytest.raises(ValueError, match="24"):
        generate(toy[1], toy[0], prompts, prompts, jax.random.key(0), 16, 1.0, NO_EOS)


@pytest.mark.parametrize(
    ("k", "p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [1, 3]),
        (1, 1.0, [1]),
        (9, 1.0, [0, 1, 2, 3]),
        (0, 0.5, [1]),  # 0.55 alone holds 0.5
        (0, 0.6, [1, 3]),  # 0.55 does not hold 0.6, 0.55 + 0.25 does
        (0, 0.85, [0, 1, 3]),
        (2, 0.6, [1]),  # among the two that are left, 0.55 / 0.8 = 0.69 holds 0.6
    ],
)
def test_keep_top_by_hand(k, p, kept):
    probabilities = np.array([[0.15, 0.55, 0.05, 0.25]], np.float32)
    logits = jnp.log(probabilities) + 3.0
    filtered = np.asarray(gpt2.keep_top(logits, k, p))[0]
    assert np.flatnonzero(np.isfinite(filtered)).tolist() == kept
    np.testing.assert_array_equal(filtered[kept], np.asarray(logits)[0, kept])


def test_filter_changes_tokens_but_not_what_logprobs_mean(toy):
    """Top-k draws among the k likeliest; log-probabilities stay those of the whole vocabulary."""
    prompt = np.array([[1, 2, 3]], np.int32)
    tokens, mask, logprobs = generate(
        toy[1],
        toy[0],
        prompt,
        np.ones_like(prompt),
        jax.random.key(5),
        8,
        0.8,
        NO_EOS,
        num_samples=32,
        filter_logits=functools.partial(gpt2.keep_top, k=2, p=1.0),
    )
    expected = log_softmax(np.asarray(forward(toy[1], toy[0], tokens, mask))[:, 2:-1] / 0.8)
    response = np.asarray(tokens)[:, 3:, None]
    chosen = np.take_along_axis(expected, response, axis=-1)
    rank = (expected > chosen).sum(axis=-1)
    assert set(np.unique(rank)) == {0, 1}
    np.testing.assert_allclose(logprobs, chosen[..., 0], rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------- model folders


def write_folder(folder, tensors, source=TINY, **changes):
    """A model folder with these tensors and the source's config.json, changed."""
    config = json.loads((source / "config.json").read_text()) | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tensors():
    """The tensors of the golden model's file."""
    return load_file(TINY / "model.safetensors")


def golden_error(folder, goldens):
    """Largest difference between the folder's logits and the golden ones."""
    config, params = load_model(folder)
    tokens = goldens("gpt2_forward")["full_input_ids"]
    logits = forward(params, config, tokens, np.ones_like(tokens))
    return np.abs(np.asarray(logits) - goldens("gpt2_forward")["full_logits_f64"]).max()


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_loads_files_of_each_type(tmp_path, tensors, dtype):
    """As the float32 file that holds the rounded numbers."""
    rounded = {name: x.astype(dtype) for name, x in tensors.items()}
    _, params = load_model(write_folder(tmp_path / "half", rounded))
    exact = {name: x.astype(jnp.float32) for name, x in rounded.items()}
    _, expected = load_model(write_folder(tmp_path / "single", exact))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert_equal_trees(params, expected)


def test_loads_keys_without_the_prefix(tmp_path, tensors, goldens):
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    assert golden_error(write_folder(tmp_path / "m", bare), goldens) < 2e-5


def test_ignores_the_buffers_of_older_files(tmp_path, tensors, goldens):
    """h.0.attn.bias is a causal mask, h.0.attn.c_attn.bias is a parameter."""
    buffers = {}
    for layer in range(2):
        prefix = f"transformer.h.{layer}.attn"
        assert jnp.abs(tensors[f"{prefix}.c_attn.bias"]).max() > 0.1
        buffers[f"{prefix}.bias"] = jnp.tril(jnp.ones((1, 1, 128, 128)))
        buffers[f"{prefix}.masked_bias"] = jnp.float32(-1e4)
    assert golden_error(write_folder(tmp_path / "m", tensors | buffers), goldens) < 2e-5


def test_tied_file_that_carries_a_head(tmp_path, tensors, goldens):
    """The config says that the head is wte, so whatever stands in the file is not read."""
    head = {"lm_head.weight": tensors["transformer.wte.weight"] + 1}
    assert golden_error(write_folder(tmp_path / "m", tensors | head), goldens) < 2e-5


def test_untied_head(tmp_path, tensors, goldens):
    head = np.random.default_rng(0).normal(size=(257, 64)).astype(np.float32)
    both = tensors | {"lm_head.weight": jnp.asarray(head)}
    config, params = load_model(write_folder(tmp_path / "m", both, tie_word_embeddings=False))
    golden = goldens("gpt2_forward")
    tokens = golden["full_input_ids"]
    logits = forward(params, config, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(logits, golden["full_final_hidden_f64"] @ head.T, rtol=0, atol=1e-4)


def test_config_is_hashable_and_read(tiny):
    config = tiny[0]
    assert hash(config) == hash(load_model(TINY)[0])
    assert (config.n_layer, config.n_head, config.n_embd) == (2, 4, 64)
    assert (config.vocab_size, config.n_positions, config.eos_token_id) == (257, 128, 256)


@pytest.mark.parametrize("source", [TINY, REWARD_TINY], ids=["language model", "reward model"])
def test_save_and_load_round_trip(tmp_path, source):
    """The tensors and names of the file they came from; saved a second time, the same bytes."""
    config, params = load_model(source)
    assert ("score" in params) == (source == REWARD_TINY)
    save_model(tmp_path / "a" / "model", config, params, TOKENIZER)
    assert_equal_trees(
        load_file(tmp_path / "a" / "model" / "model.safetensors"),
        load_file(source / "model.safetensors"),
    )
    again = load_model(tmp_path / "a" / "model")
    assert again[0] == config
    assert_equal_trees(again[1], params)
    save_model(tmp_path / "b", *again, tmp_path / "a" / "model")
    files = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert files == sorted(path.name for path in (tmp_path / "a" / "model").iterdir())
    for name in files:
        first, second = (tmp_path / "a" / "model" / name), (tmp_path / "b" / name)
        assert first.read_bytes() == second.read_bytes(), name
    with safe_open(tmp_path / "b" / "model.safetensors", "flax") as file:
        assert file.metadata() == {"format": "pt"}  # some versions of transformers insist on it
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    kind = "GPT2ForSequenceClassification" if source == REWARD_TINY else "GPT2LMHeadModel"
    assert written["architectures"] == [kind]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing half-written


def test_saving_replaces_a_model(tmp_path, tiny):
    save_model(tmp_path / "m", *tiny, TOKENIZER)
    (tmp_path / "m" / "left_over.txt").write_text("old")
    doubled = jax.tree.map(lambda x: 2 * x, tiny[1])
    save_model(tmp_path / "m", tiny[0], doubled, TOKENIZER)
    assert_equal_trees(load_model(tmp_path / "m")[1], doubled)
    assert not (tmp_path / "m" / "left_over.txt").exists()


def test_refuses_a_missing_tensor(tmp_path, tensors, error_line):
    name = "transformer.h.1.mlp.c_fc.weight"
    rest = {key: x for key, x in tensors.items() if key != name}
    assert "h.1.mlp.c_fc.weight" in error_line(load_model, write_folder(tmp_path, rest))


def test_refuses_an_untied_model_without_a_head(tmp_path, tensors, error_line):
    folder = write_folder(tmp_path, tensors, tie_word_embeddings=False)
    assert "lm_head.weight" in error_line(load_model, folder)


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"])
def test_refuses_a_wrong_shape(tmp_path, tensors, error_line, name):
    """Transposed, so that the number of elements is right."""
    message = error_line(load_model, write_folder(tmp_path, tensors | {name: tensors[name].T}))
    assert name.removeprefix("transformer.") in message
    assert str(tuple(tensors[name].T.shape)) in message and str(tensors[name].shape) in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
    ],
)
def test_refuses_what_is_not_implemented(tmp_path, tensors, error_line, key, value):
    message = error_line(load_model, write_folder(tmp_path, tensors, **{key: value}))
    assert key in message and str(value) in message


def test_a_folder_without_safetensors_names_the_conversion(tmp_path, error_line):
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = error_line(load_model, tmp_path)
    assert "model.safetensors" in message and "save_pretrained" in message
    assert str(tmp_path) in message


def test_an_absent_folder_names_the_script_to_run(tmp_path, monkeypatch, error_line):
    monkeypatch.chdir(tmp_path)
    assert "python sft.py" in error_line(load_model, "runs/sft/model")
    assert "python reward.py" in error_line(load_model, "runs/reward/model")
    assert "runs/sft/model" in error_line(load_tokenizer, "runs/sft/model")


def test_a_folder_without_a_model(tmp_path, error_line):
    assert "config.json" in error_line(load_model, tmp_path)


@pytest.mark.real_data
def test_gpt_nano_sort_sorts_every_input(shared_data):
    """A real model with an untied head: six letters, then the same letters in order, greedily."""
    config, params = load_model(shared_data / "gpt-nano-sort")
    with np.load(shared_data / "gpt-nano-sort" / "golden_partials.npz") as golden:
        rows, expected = golden["idx"].astype(np.int32), golden["lm_head"]
    logits = forward(params, config, rows, np.ones_like(rows))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)
    prompts = np.array(list(itertools.product(range(3), repeat=6)), np.int32)  # [729, 6]
    # 11 positions: the sixth letter is read off the last logits and takes no position itself.
    tokens, mask, _ = generate(
        params, config, prompts, np.ones_like(prompts), jax.random.key(0), 5, 0.0, NO_EOS
    )
    last = jnp.argmax(forward(params, config, tokens, mask)[:, -1], axis=-1)
    answers = np.concatenate([tokens[:, 6:], last[:, None]], axis=1)
    np.testing.assert_array_equal(answers, np.sort(prompts, axis=1))


# --------------------------------------------------------------------------------------- tokenizer


def random_texts(count, seed=0):
    """Words, numbers, white space, accents, other scripts and emoji in wild mixtures."""
    rng = random.Random(seed)
    pieces = [
        *(
            "the film",
            " good",
            "n't",
            "'ll",
            " 'S",
            "don\u2019t",
            "<|endoftext|>",
            "[PAD]",
            "__",
            "...",
        ),
        *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "2024", " 3.14", "½", "٣"),
        *(
            "é",
            "e\u0301",
            "ß",
            "日本",
            "русский",
            "العربية",
            "हिन्दी",
            "👩‍👩‍👧",
            "🇨🇭",
            "\u200b",
            "\x00",
            "\x7f",
        ),
    ]

    def piece():
        if rng.random() < 0.6:
            return rng.choice(pieces)
        return chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x2FF), 0x4E00, 0x1F600]))

    return ["".join(piece() for _ in range(rng.randrange(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe_file():
    """The embedded tokenizer.json as it stands in the file."""
    return json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))


def write_tokenizer(folder, file):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(file), "utf-8")
    return folder


def write_vocab_and_merges(folder, file, header="#version: 0.2\n"):
    """The same vocabulary in the two files of older folders, its special tokens in vocab.json."""
    vocabulary = file["model"]["vocab"] | {t["content"]: t["id"] for t in file["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text(header + "\n".join(merges) + "\n", "utf-8")
    return folder


def plain_bpe(file, text):
    """Byte-pair encoding word by word, merge by merge, with the pattern of OpenAI's encoder.py."""
    pattern = (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # as printed
    )
    printable = [b for b in range(256) if chr(b).isprintable() and b not in (32, 127, 160, 173)]
    others = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in file["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    ids = []
    for word in regex.findall(pattern, text):
        parts = [letters[byte] for byte in word.encode("utf-8")]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append("".join(best) if both else parts[i])
                i += 1 + both
            parts = merged
        ids += [file["vocab"][part] for part in parts]
    return ids


def test_ids_equal_plain_byte_pair_encoding(bpe_file):
    tokenizer = load_tokenizer(TOKENIZER)
    for text in random_texts(300):
        ids = tokenizer.encode_ordinary(text)
        assert ids == plain_bpe(bpe_file["model"], text), repr(text)
        assert tokenizer.decode(ids) == text


def test_special_tokens_in_text_are_plain_text():
    tokenizer = load_tokenizer(TOKENIZER)
    eos_id = tokenizer.encode_single_token("<|endoftext|>")
    assert eos_id == tokenizer.eot_token == EOS_ID and tokenizer.n_vocab == PAD_ID + 1
    assert tokenizer.encode_single_token("<|pad|>") == PAD_ID
    ids = tokenizer.encode_ordinary("good.<|endoftext|> bad")
    assert max(ids) < EOS_ID and tokenizer.decode(ids) == "good.<|endoftext|> bad"


@pytest.mark.parametrize("header", ["#version: 0.2\n", "#version: 0.2 - by a library\n", ""])
def test_vocab_and_merges_files(tmp_path, bpe_file, header):
    tokenizer = load_tokenizer(write_vocab_and_merges(tmp_path, bpe_file, header))
    expected = load_tokenizer(TOKENIZER)
    assert tokenizer.n_vocab == expected.n_vocab and tokenizer.eot_token == expected.eot_token
    for text in random_texts(20):
        assert tokenizer.encode_ordinary(text) == expected.encode_ordinary(text)


def with_merge(file, left, right):
    """The file with one more merge, whose token has the next free id."""
    model = file["model"]
    vocabulary = model["vocab"] | {left + right: PAD_ID + 1}
    return file | {
        "model": model | {"vocab": vocabulary, "merges": [*model["merges"], [left, right]]}
    }


def test_merges_as_strings_and_as_pairs(tmp_path, bpe_file):
    model = bpe_file["model"]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    pairs = [merge.split(" ") for merge in merges]
    texts = random_texts(20)
    both = []
    for name, form in (("strings", merges), ("pairs", pairs)):
        folder = write_tokenizer(tmp_path / name, bpe_file | {"model": model | {"merges": form}})
        both.append([load_tokenizer(folder).encode_ordinary(text) for text in texts])
    assert both[0] == both[1]


def test_a_first_merge_of_two_hash_signs_is_no_header(tmp_path, bpe_file):
    characters = [token for token in bpe_file["model"]["vocab"] if len(token) == 1]
    vocabulary = {token: i for i, token in enumerate([*characters, "##", "ab"])}
    assert len(characters) == 256
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (tmp_path / "merges.txt").write_text("# #\na b\n", "utf-8")
    assert load_tokenizer(tmp_path).encode_ordinary("##ab") == [256, 257]


def test_a_vocabulary_rewritten_at_the_same_path_is_read_again(tmp_path, bpe_file):
    text = "qzqz"
    for write in (write_tokenizer, write_vocab_and_merges):
        folder = tmp_path / write.__name__
        before = load_tokenizer(write(folder, bpe_file)).encode_ordinary(text)
        after = load_tokenizer(write(folder, with_merge(bpe_file, "q", "z"))).encode_ordinary(text)
        assert after == [PAD_ID + 1, PAD_ID + 1] and before != after


def test_an_added_pad_token(tmp_path, bpe_file):
    pad = bpe_file["added_tokens"][0] | {"id": PAD_ID + 1, "content": "[PAD]"}
    file = bpe_file | {"added_tokens": [*bpe_file["added_tokens"], pad]}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, file))
    new_id = PAD_ID + 1
    assert tokenizer.n_vocab == new_id + 1 and tokenizer.encode_single_token("[PAD]") == new_id
    assert new_id not in tokenizer.encode_ordinary("[PAD]")
    assert tokenizer.decode([new_id]) == "[PAD]"


def test_refuses_ids_out_of_merge_order(tmp_path, bpe_file, error_line):
    vocabulary = dict(bpe_file["model"]["vocab"])
    first, second = ("".join(bpe_file["model"]["merges"][i]) for i in (10, 11))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file = bpe_file | {"model": bpe_file["model"] | {"vocab": vocabulary}}
    assert "order" in error_line(load_tokenizer, write_tokenizer(tmp_path / "a", file))
    assert "order" in error_line(load_tokenizer, write_vocab_and_merges(tmp_path / "b", file))


@pytest.mark.parametrize("token", ["Q", "Ā", "ÿ"])
def test_refuses_a_vocabulary_that_lacks_a_byte(tmp_path, bpe_file, error_line, token):
    vocabulary = {t: i for t, i in bpe_file["model"]["vocab"].items() if t != token}
    assert len(vocabulary) == len(bpe_file["model"]["vocab"]) - 1
    file = bpe_file | {"model": bpe_file["model"] | {"vocab": vocabulary}}
    assert token in error_line(load_tokenizer, write_tokenizer(tmp_path, file))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "prefix space"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "byte"),
        ({"pre_tokenizer": None}, "byte"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "byte"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "BPE"),
    ],
)
def test_refuses_another_kind_of_tokenizer(tmp_path, bpe_file, error_line, changes, named):
    message = error_line(load_tokenizer, write_tokenizer(tmp_path, bpe_file | changes))
    assert named.lower() in message.lower() and str(tmp_path) in message


def test_refuses_a_folder_without_a_tokenizer(error_line):
    message = error_line(load_tokenizer, TINY)
    assert "tokenizer.json" in message and str(TINY) in message


@pytest.mark.real_data
def test_gpt2_vocabulary(shared_data):
    """Ids that are published, among them those that the real GPT-2 was given."""
    tokenizer = load_tokenizer(shared_data / "gpt2")
    assert tokenizer.n_vocab == 50257 and tokenizer.eot_token == 50256
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995]
    assert tokenizer.encode_ordinary("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert 50256 not in tokenizer.encode_ordinary("<|endoftext|>")
    with np.load(shared_data / "gpt2" / "gpt2_124m_last_token_logits.npz") as golden:
        for k, prompt in enumerate(golden["prompts"]):
            assert tokenizer.encode_ordinary(str(prompt)) == golden[f"ids_{k}"].tolist()
    merges = (shared_data / "gpt2" / "merges.txt").read_text("utf-8").split("\n")[1:-1]
    vocabulary = json.loads((shared_data / "gpt2" / "vocab.json").read_text("utf-8"))
    for text in random_texts(50, seed=1):
        ids = plain_bpe({"vocab": vocabulary, "merges": merges}, text)
        assert tokenizer.encode_ordinary(text) == ids, repr(text)
