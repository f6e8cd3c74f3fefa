"""grpo_llama.py: its models, tokenizers and chat templates against Hugging Face's; runs on chats.

What needs transformers is marked `parity`; `real_data` takes the folders that ../shared/models
tells how to make, from $RLHF_MODELS or /tmp/models, and is skipped where they are absent.
"""

import dataclasses
import functools
import json
import os
import random
import shutil
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from conftest import ROOT
from jax.sharding import Mesh, NamedSharding
from test_gpt2 import random_texts
from test_runs import Crash, crash_after_a_checkpoint, metrics_of, write_jsonl
from test_sharded import no_cache_in_old_jax  # noqa: F401

import gpt2
import grpo_llama
from grpo_llama import Llama, LlamaConfig, load_model, load_tokenizer, save_model

MODELS = Path(os.environ.get("RLHF_MODELS", "/tmp/models"))
ARITHMETIC = ROOT / "data" / "arithmetic"
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {  # transformers' name, what its config has besides SIZES
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama, one kv head, biases, tied": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "llama 3": ("Llama", {"num_key_value_heads": 4, "rope_parameters": LLAMA3}),
    "qwen 2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen 3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 20}),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
EOS = (3, 5)


@functools.partial(jax.jit, static_argnames="config")
def forward(config, params, tokens, mask):
    return Llama(config).apply({"params": params}, tokens, mask)


@functools.cache
def toy(dtype="float32", **changes):
    """(config, params) of a small random model, its norms made random too."""
    config = LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16, eos_token_id=EOS, dtype=dtype)
    config = dataclasses.replace(config, **changes)
    one, rng = jnp.ones((1, 1), jnp.int32), np.random.default_rng(0)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), one, one)["params"]
    noise = lambda x: jnp.asarray((x.ndim == 1) + rng.normal(0, 0.2, x.shape), jnp.float32)  # noqa: E731
    return config, jax.tree.map(noise, shapes)


def rows(left, count=3, length=20):
    """(tokens, mask) [count, length], padded on one side; what stands in the padding is random."""
    tokens = np.random.default_rng(1).integers(6, 97, (count, length)).astype(np.int32)
    padding = (length - 1) // count * np.arange(count)  # [count]
    mask = (np.arange(length) >= padding[:, None]).astype(np.int32)
    return tokens, mask if left else mask[:, ::-1]


def assert_close(tree, other, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), tree, other)


# ------------------------------------------------------------------------------ transformers


@functools.cache
def torch_model(family):
    """A random model of transformers; norms and biases random, too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, **more, eos_token_id=list(EOS), pad_token_id=0, bos_token_id=1
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(family) -> transformers' folder of torch_model, in several files."""

    @functools.cache
    def folder(family):
        path = tmp_path_factory.mktemp("model")
        torch_model(family).save_pretrained(path, max_shard_size="100KB")
        assert (path / "model.safetensors.index.json").exists()
        return path

    return folder


def torch_logits(model, tokens, mask):
    import torch

    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    arrays = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return model(**{k: torch.tensor(x.copy()).long() for k, x in arrays.items()}).logits.numpy()


@pytest.mark.parity
@each_family
def test_logits_equal_transformers(family, folders):
    config, params = load_model(folders(family))
    for left in (False, True):
        tokens, mask = rows(left)
        expected = torch_logits(torch_model(family), tokens, mask)
        found = np.asarray(forward(config, params, tokens, mask))
        assert np.abs(expected).max() > 1
        assert np.abs(found - expected)[mask > 0].max() < 1e-4  # measured: 4e-6


@pytest.mark.parity
@each_family
def test_greedy_tokens_equal_transformers(family, folders):
    """At a temperature at which only the likeliest can come; either of two tokens is an end."""
    import torch

    (config, params), (tokens, mask) = load_model(folders(family)), rows(left=True)
    assert config.eos_token_id == EOS
    given = (config, tokens, mask, jax.random.key(0), 16, 1e-5, EOS)
    found, found_mask, _ = grpo_llama.generate(params, *given)
    ids, attention = (torch.tensor(x).long() for x in (tokens, mask))
    more = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = torch_model(family).generate(ids, attention_mask=attention, **more).numpy()
    found = np.where(found_mask > 0, found, 0)[:, 20:]
    np.testing.assert_array_equal(found[:, : expected.shape[1] - 20], expected[:, 20:])


@pytest.mark.parity
@each_family
def test_a_saved_folder_is_the_same_model(family, folders, tmp_path):
    """In transformers, which finds all it wants; in one file or several, which the index names."""
    transformers = pytest.importorskip("transformers")
    config, params = load_model(folders(family))
    for name, size in (("one", 10**9), ("several", 50_000)):
        folder = tmp_path / name / "model"
        save_model(folder, config, params, folders(family), file_size=size)
        kind = transformers.AutoModelForCausalLM
        model, loading = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values()) and type(model) is type(torch_model(family))
        for x, y in zip(model.state_dict().values(), torch_model(family).state_dict().values()):
            np.testing.assert_array_equal(x.numpy(), y.numpy())
        found, expected = (x.config.to_diff_dict() for x in (model, torch_model(family)))
        assert found | {"head_dim": None} == expected | {"head_dim": None}  # some do not name it
        again = load_model(folder)
        assert again[0] == config
        assert_close(again[1], params, rtol=0, atol=0)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {x.name for x in folder.glob("*.safetensors")}
    assert len(index["weight_map"]) == len(jax.tree.leaves(params))


@pytest.mark.parity
def test_bfloat16_files_and_configs_of_old(tmp_path, folders):
    """rope_theta and rope_scaling in place of rope_parameters, as files on the hub have them."""
    from safetensors.flax import load_file, save_file

    config, params = load_model(folders("llama 3"))
    saved = json.loads((folders("llama 3") / "config.json").read_text())
    rotary = saved.pop("rope_parameters")
    saved["rope_theta"] = rotary.pop("rope_theta")
    tensors = {}
    for file in folders("llama 3").glob("*.safetensors"):
        tensors |= {name: x.astype(jnp.bfloat16) for name, x in load_file(file).items()}
    for name in ("rope_type", "type"):
        rotary[name] = rotary.pop("rope_type", "llama3")
        (tmp_path / "config.json").write_text(json.dumps(saved | {"rope_scaling": rotary}))
        save_file(tensors, tmp_path / "model.safetensors")
        found = load_model(tmp_path)
        assert dataclasses.replace(found[0], eos_token_id=EOS) == config
        assert_close(found[1], jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), rtol=0)
        assert {x.dtype for x in jax.tree.leaves(found[1])} == {np.dtype(np.float32)}


@pytest.mark.parity
def test_a_reward_model_scores_as_transformers_does(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_labels=1, pad_token_id=0, eos_token_id=3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    (config, params), (tokens, mask) = load_model(tmp_path), rows(left=False)
    expected = torch_logits(model, tokens * mask, mask)[:, 0]
    found = grpo_llama.learned_rewards(params, config, tokens, mask)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------ sampling, training


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-5), ("bfloat16", 0.02)])
def test_sampling_logprobs_equal_a_full_forward(dtype, bound):
    (config, params), (tokens, mask) = toy(dtype), rows(left=True)
    given = (params, config, tokens, mask, jax.random.key(1), 16, 0.7, EOS)
    tokens, mask, logprobs = map(np.asarray, grpo_llama.generate(*given, num_samples=16))
    assert tokens.shape == (48, 36) and len({tuple(row) for row in tokens}) == 48
    ends = [[i for i, token in enumerate(row[20:]) if token in EOS] for row in tokens]
    real = np.array([np.arange(16) <= (found[0] if found else 16) for found in ends])
    np.testing.assert_array_equal(mask[:, 20:] > 0, real)
    assert {int(row[20 + found[0]]) for row, found in zip(tokens, ends) if found} == set(EOS)
    logits = forward(config, params, tokens, mask)[:, 19:-1] / 0.7
    expected = np.where(real, grpo_llama.token_logprobs(logits, tokens[:, 20:]), 0)
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=bound)
    assert not logprobs[~real].any() and not tokens[:, 20:][~real].any()


def loss_of(config, tokens, mask):
    def loss(params):
        logits = Llama(config).apply({"params": params}, tokens, mask)[:, :-1]
        return -jnp.sum(grpo_llama.token_logprobs(logits, tokens[:, 1:]) * mask[:, 1:])

    return loss


def test_remat_gives_the_same_gradients():
    (config, params), (tokens, mask) = toy(), rows(left=False)
    loss, remat = (
        loss_of(dataclasses.replace(config, remat=x), tokens, mask) for x in (False, True)
    )
    programs = [str(jax.make_jaxpr(x)(params)) for x in (loss, remat)]
    assert ["remat" in p or "checkpoint" in p for p in programs] == [False, True]
    gradients = [jax.jit(jax.grad(x))(params) for x in (loss, remat)]
    assert min(np.abs(x).max() for x in jax.tree.leaves(gradients[0])) > 1e-2
    assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_bfloat16_rounds_weights_and_no_gradients():
    """Those of float32 at the rounded weights, up to what rounded activations change."""
    (config, params), (tokens, mask) = toy("bfloat16"), rows(left=False)
    rounded = grpo_llama.round_matrices(params, jnp.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    half, full = (
        loss_of(dataclasses.replace(config, dtype=x), tokens, mask) for x in ("bfloat16", "float32")
    )
    found, same, exact = (
        jax.jit(jax.grad(loss))(at)
        for loss, at in ((half, params), (half, rounded), (full, rounded))
    )
    assert_close(found, same, rtol=1e-6, atol=1e-6)
    for x, y in zip(*map(jax.tree.leaves, (found, exact))):
        assert x.dtype == jnp.float32
        assert np.abs(x - y).max() < 0.05 * np.abs(y).max()
        # A gradient that was itself rounded would have no digits below these.
        assert (x != x.astype(jnp.bfloat16))[x != 0].mean() > 0.5


MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
P, R, GROUP = 20, 8, 4
ARGS = grpo_llama.Args(
    num_generations=GROUP,
    micro_batch_size=16,
    max_completion_length=R,
    num_minibatches=1,
    kl_in="loss",
    aggregation="token",
)


@functools.cache
def on_mesh(shape, dtype, remat):
    """(Rollout, parameters after an update, metrics) on a mesh, from equal beginnings."""
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    config, params = toy(dtype)
    config = dataclasses.replace(config, mesh=mesh, remat=remat)
    params = jax.tree.map(grpo_llama.put, params, grpo_llama.shardings(params, mesh))
    by_rows = NamedSharding(mesh, grpo_llama.BATCH)
    tokens, mask = (grpo_llama.put(x, by_rows) for x in rows(True, 8))
    key, sampling = jax.random.key(3), (R, 1.0, EOS, GROUP)
    sampled = grpo_llama.sample_on_mesh(params, params, config, tokens, mask, key, sampling, mesh)
    scores = np.random.default_rng(2).normal(size=8 * GROUP).astype(np.float32)
    batch, _ = grpo_llama.make_experience(sampled, scores, ARGS)
    optimizer = optax.sgd(0.1)
    state = grpo_llama.state_on_mesh(params, optimizer, False, mesh)
    state, metrics = grpo_llama.train_step(state, batch, key, config, optimizer, ARGS, mesh)
    for x, place in zip(
        *map(jax.tree.leaves, (state.params, grpo_llama.shardings(state.params, mesh)))
    ):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    return jax.device_get((sampled, state.params, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_does_what_one_device_does(shape):
    """With --remat on the mesh, which changes no number."""
    sampled, params, metrics = on_mesh(shape, "float32", True)
    expected = on_mesh((1, 1, 1), "float32", False)
    np.testing.assert_array_equal(sampled.tokens, expected[0].tokens)
    assert_close(sampled.logprobs, expected[0].logprobs, rtol=0, atol=2e-5)
    assert_close(params, expected[1], rtol=0, atol=2e-5)
    assert_close(metrics, expected[2], rtol=1e-3, atol=1e-5)
    moved = jax.tree.map(lambda x, y: np.abs(x - np.asarray(y)).max(), params, toy()[1])
    assert min(jax.tree.leaves(moved)) > 1e-4
    # Policy and reference are the same model, here and with products in bfloat16.
    half = on_mesh((1, 1, 1), "bfloat16", False)[0]
    for found, bound in ((sampled, 2e-5), (half, 0.05)):
        reference = found.ref_logprobs * found.response_mask
        np.testing.assert_allclose(found.logprobs, reference, rtol=0, atol=bound)


# ------------------------------------------------------------------------------ tokenizers


def train_bpe(pre_tokenizer, normalizer=None, alphabet=True):
    """A tokenizer of `tokenizers` with 400 tokens, from the random texts that test_gpt2.py has."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = (
        pre_tokenizer,
        normalizer or tokenizer.normalizer,
    )
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=letters if alphabet else [x for x in letters if x not in "ÀÁõĄ"],
        show_progress=False,
    )
    texts = [text.replace("\x04", "") for text in random_texts(2000, seed=5)]
    tokenizer.train_from_iterator(texts, trainer)
    whole = functools.partial(tokenizers.AddedToken, normalized=False)
    tokenizer.add_tokens([whole("<think>"), whole("</think>")])
    return tokenizer


LLAMA3_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3_CUT += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_CUT = LLAMA3_CUT.replace("{1,3}", "")


def kinds_of_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    steps, regex = tokenizers.pre_tokenizers, tokenizers.Regex

    def split(pattern):
        plain = steps.ByteLevel(add_prefix_space=False, use_regex=False)
        return steps.Sequence([steps.Split(regex(pattern), "isolated"), plain])

    gpt2_cut = steps.ByteLevel(add_prefix_space=False)
    digits = steps.Sequence([steps.Digits(individual_digits=True), gpt2_cut])
    return {
        "gpt2": (gpt2_cut,),
        "smollm": (digits, None, False),
        "llama3": (split(LLAMA3_CUT),),
        "qwen": (split(QWEN_CUT), tokenizers.normalizers.NFC()),
    }


def hard_texts(count, seed=0):
    """Texts of random_texts with any assigned characters among them, and all that is special."""
    rng, texts = random.Random(seed), random_texts(count, seed)
    more = ["'LL", "12345678", " \n ", "\x04", "\x1d", "\u212b", "\u1100\u1161", "'\u017f"]
    more += ["<think>", "</think>\u0338", "<|im_end|>"]

    def character():
        found = chr(rng.randrange(32, 0x30000))
        return found if unicodedata.category(found) not in ("Cn", "Cs", "Co") else "x"

    def mixed(text):
        cut = rng.randrange(len(text) + 1)
        return text[:cut] + rng.choice([*more, character(), character()]) + text[cut:]

    return [mixed(mixed(text)) for text in texts]


def assert_equal_ids(tokenizer, expected, texts):
    """A special token's name in a text is text here; of `tokenizers` that is asked of, too."""
    expected.encode_special_tokens = True
    for text in texts:
        ids = tokenizer.encode_ordinary(text)
        assert ids == expected.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama3", "qwen"])
def test_ids_equal_those_of_tokenizers(kind, tmp_path):
    expected = train_bpe(*kinds_of_tokenizers()[kind])
    expected.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.absent == set()) == (kind != "smollm")
    assert tokenizer.n_vocab == expected.get_vocab_size()
    assert_equal_ids(tokenizer, expected, hard_texts(1000))
    ids = tokenizer.encode_ordinary("a <think>b</think>")
    assert expected.token_to_id("<think>") in ids and tokenizer.decode(ids) == "a <think>b</think>"
    assert 1 not in tokenizer.encode_ordinary("<|im_end|>")
    row = np.array([[*ids, 1]])  # as TRL decodes: special tokens are no text, <think> is
    texts = grpo_llama.decode_responses(tokenizer, row, np.ones_like(row), 0, (0,))
    assert texts == ["a <think>b</think>"]


def test_all_merges_of_a_token_and_a_token_to_begin_with(tmp_path):
    """As in Llama 3.1's file: each way to split a token is a merge, and texts begin with one."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = train_bpe(*kinds_of_tokenizers()["llama3"])
    trained.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    trained.save(str(tmp_path / "tokenizer.json"))
    saved = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    vocabulary = saved["model"]["vocab"]
    made = sorted(("".join(merge) for merge in saved["model"]["merges"]), key=vocabulary.get)
    splits = [(x[:i], x[i:]) for x in made for i in range(1, len(x))]
    merges = [x for x in splits if x[0] in vocabulary and x[1] in vocabulary]
    assert len(merges) > len(made)
    saved["model"] |= {"merges": merges, "ignore_merges": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert_equal_ids(tokenizer, expected, hard_texts(500))
    row = {"prompt": "good"}
    assert grpo_llama.encode_prompt(tokenizer, row) == expected.encode("good").ids


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "SmolLM2-135M-Instruct",
        *(f"tok-{x}/package/models" for x in ("qwen3", "llama3", "llama3_1")),
    ],
)
def test_ids_of_the_real_files(name):
    tokenizers = pytest.importorskip("tokenizers")
    path = MODELS / name / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"no {path}: ../shared/models/README.md tells how to make it")
    expected = tokenizers.Tokenizer.from_file(str(path))
    assert_equal_ids(load_tokenizer(path.parent), expected, hard_texts(2000, seed=2))


BEGIN = [{"SpecialToken": {"id": "<|endoftext|>"}}, {"Sequence": {"id": "A"}}]
UNEXPRESSED = {  # changes of the embedded tokenizer.json, and a word of the message
    "end token": (
        {"post_processor": {"type": "TemplateProcessing", "single": BEGIN[::-1]}},
        "after",
    ),
    "RoBERTa": ({"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing"),
    "NFKC": ({"normalizer": {"type": "NFKC"}}, "NFKC"),
    "prefix space": ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "GPT-2"),
    "no pattern": ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "GPT-2"),
    "Whitespace": ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    "no cut": ({"pre_tokenizer": None}, "GPT-2"),
    "sentencepiece": ({"model": {"byte_fallback": True}}, "byte-level"),
    "unknown token": ({"model": {"unk_token": "<unk>"}}, "unknown"),
    "WordPiece": ({"model": {"type": "WordPiece"}}, "byte-level"),
    "normalized": (
        {
            "normalizer": {"type": "NFC"},
            "added_tokens": [{"content": "<x>", "id": 9, "normalized": True}],
        },
        "normalized",
    ),
    "lstrip": ({"added_tokens": [{"content": "<x>", "id": 9, "lstrip": True}]}, "lstrip"),
}


@pytest.mark.parametrize(("change", "word"), UNEXPRESSED.values(), ids=UNEXPRESSED)
def test_refuses_a_tokenizer_that_cannot_be_expressed(change, word, tmp_path, error_line):
    saved = json.loads((ROOT / "data/reviews/tokenizer/tokenizer.json").read_text("utf-8"))
    model = saved["model"] | change.get("model", {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved | change | {"model": model}), "utf-8")
    message = error_line(load_tokenizer, tmp_path)
    assert word in message and str(tmp_path) in message


# ------------------------------------------------------------------------------ templates

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
CHATML += "{{ '<|im_end|>' + '\\n' }}{% endfor %}"
TEMPLATES = {  # in the manner of the models' own
    "ChatML": CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "SmolLM": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou help<|im_end|>\\n' }}{% endif %}{{ m.content }}{% endfor %}",
    "Llama 3": "{% for m in messages %}{% set content = '<h>' + m['role'] + '</h>\\n\\n' + "
    "m['content'] | trim + eos_token %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}",
    "Mistral": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '[INST] ' ~ m.content ~ ' [/INST]' }}{% endfor %}",
    "blocks on lines": "{% for m in messages %}\n    {% if m.role == 'user' %}\n"
    "  U: {{ m.content }}\n    {% else %}\n{{- m.content -}}\n    {% endif %}\n{% endfor %}\nA:",
    "namespace": "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}/{{ messages | length }} {{ m.content | upper }}\n{% endfor %}",
    "tojson": "{{ messages | tojson }}\n{{ messages | tojson(indent=2) }}"
    "{{ messages[::-1][0].content }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}",
    "dates and tools": "{{ strftime_now('%d %b %Y') }}{% if tools is not none %}T{% endif %}{% if "
    "documents %}D{% endif %}{{ pad_token is defined }}{{ cls_token is defined }}{% macro f(x) %}"
    "<{{ x }}>{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
    "think": "{% for m in messages %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if not loop.last %}{{ content }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
}
CHATS = [
    [{"role": "user", "content": "What is 7 + 12?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Grüße <b>&\n"}],
    [
        {"role": "user", "content": "1\n"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\n日本", "name": None},
        {"role": "user", "content": " 2\t"},
    ],
]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """chat_folder(template, in_config) -> a folder with the tokenizer and this chat template."""

    def make(template, in_config=True, expected=None):
        folder = tmp_path_factory.mktemp("chat")
        tokenizer = expected or train_bpe(*kinds_of_tokenizers()["qwen"])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        config |= {"bos_token": {"content": "<|endoftext|>", "__type": "AddedToken"}}
        if in_config:
            config["chat_template"] = template
        else:
            (folder / "chat_template.jinja").write_text(template, "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        return folder

    return make


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_by_transformers(name, chat_folder):
    transformers = pytest.importorskip("transformers")
    folder = chat_folder(TEMPLATES[name], in_config=len(name) % 2 == 0)
    tokenizer = load_tokenizer(folder)
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    for chat in CHATS:
        texts = []
        for render in (
            lambda x: grpo_llama.render_chat(tokenizer, x),
            lambda x: expected.apply_chat_template(x, tokenize=False, add_generation_prompt=True),
        ):
            try:
                texts.append(render(chat))
            except (SystemExit, Exception) as error:  # roles that do not alternate, in both
                texts.append(isinstance(error, BaseException))
        assert texts[0] == texts[1]
        if texts[0] is not True:
            ids = expected.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            assert grpo_llama.encode_chat(tokenizer, chat) == ids


@pytest.mark.parity
@pytest.mark.real_data
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "tok-qwen3/package/models"])
def test_templates_of_the_real_files(name):
    transformers = pytest.importorskip("transformers")
    folder = MODELS / name
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"no {folder}: ../shared/models/README.md tells how to make it")
    tokenizer = load_tokenizer(folder)
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    for chat in CHATS:
        given = {"add_generation_prompt": True, "return_dict": False}
        ids = expected.apply_chat_template(chat, **given)
        assert grpo_llama.encode_chat(tokenizer, chat) == ids


def test_special_tokens_in_messages_are_plain_text(chat_folder):
    """Also of one that a message has in two halves, and where the template changes the message."""
    tokenizer = load_tokenizer(
        chat_folder(TEMPLATES["ChatML"].replace("m['content']", "m.content | trim"))
    )
    end = tokenizer.encode_single_token("<|im_end|>")
    for text in ("a<|im_end|>\n", "<|im_end|>", "<|im_<|im_end|>end|>", "<|endoftext|>"):
        ids = grpo_llama.encode_chat(tokenizer, [{"role": "user", "content": text}])
        assert ids.count(end) == 1 and tokenizer.eot_token not in ids
        assert text.strip() in tokenizer.decode(ids)


# ------------------------------------------------------------------------------ runs on chats

TEMPLATE = "{% for m in messages %}{{ '<|pad|>' + m['content'] }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ '=' }}{% endif %}"


def chat_rows(split, count):
    """Sums of data/arithmetic as dialogues: the template writes the sign '='."""
    lines = (ARITHMETIC / f"prompts_{split}.jsonl").read_text().splitlines()[:count]
    found = []
    for row in map(json.loads, lines):
        message = {"role": "user", "content": row["prompt"].removesuffix("=")}
        found.append(row | {"prompt": [message]})
    return found


def right(prompts, completions, answer, **_):
    """1 for the right sum; the completions are TRL's lists of one message of the assistant's."""
    assert all(len(x) == 1 and x[0].keys() == {"role", "content"} for x in completions)
    assert {x[0]["role"] for x in completions} == {"assistant"}
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float(x[0]["content"] == y) for x, y in zip(completions, answer)]


def write_source(folder):
    """The tokenizer of data/arithmetic with a chat template."""
    folder.mkdir(parents=True)
    shutil.copy(ARITHMETIC / "tokenizer" / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def train_on_sums(config, steps):
    """Supervised, on the noisy demonstrations, as the template writes them: the parameters."""
    tokenizer = gpt2.load_tokenizer(ARITHMETIC / "tokenizer")
    lines = map(json.loads, (ARITHMETIC / "sft_train.jsonl").read_text().splitlines())
    pad = tokenizer.encode_single_token("<|pad|>")
    ids = [
        [pad, *tokenizer.encode_ordinary(x["prompt"] + x["completion"]), tokenizer.eot_token]
        for x in lines
    ]
    tokens, mask = grpo_llama.pad_rows(ids, max(map(len, ids)))
    one = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(Llama(config).init)(jax.random.key(0), one, one)["params"]
    adam = optax.adam(optax.linear_schedule(2e-3, 0.0, steps))

    def update(carry, rows):
        params, state = carry

        def loss(params):
            logits = Llama(config).apply({"params": params}, tokens[rows], mask[rows])[:, 6:-1]
            logprobs = grpo_llama.token_logprobs(logits, tokens[rows][:, 7:])
            return -jnp.sum(logprobs * mask[rows][:, 7:]) / mask[rows][:, 7:].sum()

        updates, state = adam.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    order = np.random.default_rng(0).integers(0, len(tokens), (steps, 64))
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    return jax.jit(lambda p: jax.lax.scan(update, (p, adam.init(p)), order)[0][0])(params)


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A folder with a tiny Llama, model/, and dialogues."""
    folder = tmp_path_factory.mktemp("sums")
    config = LlamaConfig(
        vocab_size=258,
        max_position_embeddings=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=(256, 10),
        tie_word_embeddings=True,
    )
    one = jnp.ones((1, 1), jnp.int32)
    params = Llama(config).init(jax.random.key(0), one, one)["params"]
    params = grpo_llama.round_matrices(params, "bfloat16")  # like most models' files
    save_model(folder / "model", config, params, write_source(folder / "source"))
    write_jsonl(folder / "train.jsonl", chat_rows("train", 200))
    write_jsonl(folder / "test.jsonl", chat_rows("test", 64))
    (folder / "rewards.py").write_text(
        "def digits(prompts, completions, **_):\n"
        "    texts = [x[0]['content'] for x in completions]\n"
        "    return [sum(c.isdigit() for c in text) / 4 for text in texts]\n"
    )
    return folder


def run_args(sums, run_dir, **changes):
    """Args of a run of 6 steps, with checkpoints at 3 and 6."""
    common = {"model": str(sums / "model"), "dataset": str(sums / "train.jsonl")}
    common |= {"eval_dataset": str(sums / "test.jsonl"), "reward": (f"{sums}/rewards.py:digits",)}
    common |= {"run_dir": str(run_dir), "steps": 6, "batch_size": 16, "micro_batch_size": 8}
    common |= {"num_generations": 4, "num_minibatches": 2, "epochs": 1, "save_every": 3}
    common |= {"max_prompt_length": 8, "max_completion_length": 4, "eval_every": 3, "data": 1}
    return grpo_llama.Args(**(common | changes))


@pytest.fixture
def one_device(monkeypatch):
    """As on a machine with one: the tests have eight."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    monkeypatch.setattr(grpo_llama, "make_mesh", lambda *_: mesh)


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal(sums, tmp_path, monkeypatch, one_device):
    """In bfloat16; its samples show the question, and its folder is a model again."""
    monkeypatch.setattr(grpo_llama, "make_optimizer", functools.cache(grpo_llama.make_optimizer))
    grpo_llama.main(run_args(sums, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_after_a_checkpoint(grpo_llama, patch)
        grpo_llama.main(run_args(sums, tmp_path / "run"))
    grpo_llama.main(run_args(sums, tmp_path / "run", resume=True))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    for name in ("samples.jsonl", "model/model.safetensors", "model/chat_template.jinja"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    sample = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])
    assert "+" in sample["prompt"] and isinstance(sample["completion"], str)
    assert load_model(tmp_path / "run" / "model")[0] == load_model(sums / "model")[0]
    before, after = (load_model(x / "model")[1] for x in (sums, tmp_path / "run"))
    assert (
        min(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), before, after))) > 1e-4
    )


@pytest.mark.slow
def test_an_adapter_is_trained_and_merged(sums, tmp_path, one_device):
    """Only A and B are state; the model that is written is the base with them merged."""
    args = run_args(sums, tmp_path / "run", lora_rank=2, learning_rate=0.05)
    states, start = [], grpo_llama.RunFolder.start

    def watched(*rest):
        states.append(start(*rest))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_llama.RunFolder, "start", watched)
        grpo_llama.main(args)
    ((state, _),) = states
    names = jax.tree_util.tree_flatten_with_path(state)[0]
    assert all("lora_" in jax.tree_util.keystr(path) for path, x in names if np.ndim(x))
    evaluated = [
        row["eval/objective/kl"] for row in metrics_of(tmp_path / "run") if "eval/reward" in row
    ]
    assert abs(evaluated[0]) < 1e-2 and abs(evaluated[-1]) > 0.05  # B is 0 at first
    base, merged = (load_model(x / "model")[1] for x in (sums, tmp_path / "run"))
    adapter = safetensors.numpy.load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    name = "layers.1", "self_attn", "q_proj"
    a, b = (
        adapter[f"base_model.model.model.{'.'.join(name)}.lora_{x}.weight"] for x in "AB"
    )  # [r, in], [out, r], as PEFT has them
    moved = merged[name[0]][name[1]][name[2]]["kernel"] - base[name[0]][name[1]][name[2]]["kernel"]
    np.testing.assert_allclose(moved, (b @ a).T * args.lora_alpha / 2, rtol=0, atol=1e-6)
    assert np.abs(moved).max() > 1e-3
    assert_close(merged["layers.0"]["mlp"], base["layers.0"]["mlp"], rtol=0, atol=0)
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    kind, (tokens, mask) = transformers.AutoModelForCausalLM, rows(left=False)
    model = peft.PeftModel.from_pretrained(
        kind.from_pretrained(sums / "model"), tmp_path / "run/adapter"
    )
    found = forward(load_model(tmp_path / "run" / "model")[0], merged, tokens, mask)
    expected = torch_logits(model, tokens, mask)
    assert np.abs(expected).max() > 0.3 and np.abs(found - expected)[mask > 0].max() < 1e-4


@pytest.mark.long
def test_grpo_makes_a_noisy_calculator_right(tmp_path, one_device):
    """From scratch to noisy sums (45 % right when sampled), and by GRPO to 95 %, on dialogues."""
    config = LlamaConfig(
        vocab_size=258,
        max_position_embeddings=32,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        eos_token_id=(256,),
    )
    params = train_on_sums(dataclasses.replace(config, dtype="bfloat16"), 2500)
    save_model(tmp_path / "model", config, params, write_source(tmp_path / "source"))
    write_jsonl(tmp_path / "train.jsonl", chat_rows("train", 2000))
    write_jsonl(tmp_path / "test.jsonl", chat_rows("test", 256))
    args = grpo_llama.Args(
        model=str(tmp_path / "model"),
        dataset=str(tmp_path / "train.jsonl"),
        eval_dataset=str(tmp_path / "test.jsonl"),
        reward=(f"{__file__}:right",),
        run_dir=str(tmp_path / "run"),
        steps=140,
        batch_size=512,
        micro_batch_size=256,
        learning_rate=1e-3,
        kl_coef=0.0,
        max_prompt_length=7,
        max_completion_length=4,
        eval_every=140,
        save_every=140,
        log_every=20,
    )
    grpo_llama.main(args)
    evaluated = [row for row in metrics_of(tmp_path / "run") if "eval/rewards/right/mean" in row]
    before, after = (evaluated[i]["eval/rewards/right/mean"] for i in (0, -1))
    print(before, after)
    assert before < 0.6 and after >= 0.95


@pytest.mark.real_data
@pytest.mark.parity
@pytest.mark.slow
def test_a_real_chat_model_answers_as_in_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = MODELS / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no {folder}: ../shared/models/README.md tells how to make it")
    (config, params), tokenizer = load_model(folder), load_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    questions = ["What is the capital of France?", "What is 7 + 12? Answer with the number only."]
    ids = [grpo_llama.encode_chat(tokenizer, [{"role": "user", "content": x}]) for x in questions]
    tokens, mask = grpo_llama.pad_rows(ids, max(map(len, ids)), left=True)
    expected = torch_logits(model, tokens, mask)
    found = np.asarray(forward(config, params, tokens, mask))
    assert np.abs(found - expected)[mask > 0].max() < 1e-3  # of logits up to 39; measured: 2e-4
    given = (tokens, mask, jax.random.key(0), 16, 1e-5, config.eos_token_id)
    answers = grpo_llama.generate(params, config, *given)
    texts = grpo_llama.decode_responses(
        tokenizer, *answers[:2], tokens.shape[1], config.eos_token_id
    )
    assert texts == ["The capital of France is Paris.", "7 + 12 = 19"]


# ------------------------------------------------------------------------------ bad input

CONFIGS = {  # changes of config.json, and words of the message
    "GPT-2": ({"model_type": "gpt2"}, ["grpo.py", "gpt2"]),
    "another family": ({"model_type": "gemma3"}, ["gemma3", "qwen3"]),
    "no family": ({"model_type": None}, ["None"]),
    "Mistral's windows": ({"model_type": "mistral", "sliding_window": 4096}, ["sliding_window"]),
    "Mistral's windows by default": ({"model_type": "mistral"}, ["sliding_window", "4096"]),
    "Qwen's windows": ({"model_type": "qwen2", "use_sliding_window": True}, ["sliding_window"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    "MLP biases": ({"mlp_bias": True}, ["mlp_bias"]),
    "YaRN": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["yarn"]),
    "half of a scaling": ({"rope_parameters": {"rope_type": "llama3"}}, ["low_freq_factor"]),
    "heads that do not divide": ({"num_key_value_heads": 3}, ["num_key_value_heads", "4"]),
    "odd heads": ({"head_dim": 7}, ["7"]),
    "no width": ({"hidden_size": None}, ["hidden_size"]),
    "a text for a number": ({"num_hidden_layers": "2"}, ["num_hidden_layers"]),
    "no heads": ({"num_attention_heads": 0}, ["num_attention_heads"]),
    "EOS beyond the table": ({"eos_token_id": [256, 300]}, ["eos_token_id", "300"]),
    "another width": ({"intermediate_size": 65}, ["mlp", "65"]),
    "untied": ({"tie_word_embeddings": False}, ["lm_head.weight"]),
    "biases": ({"attention_bias": True}, ["_proj.bias"]),
}


@pytest.mark.parametrize(("change", "words"), CONFIGS.values(), ids=CONFIGS)
def test_refuses_another_model(change, words, sums, tmp_path, error_line):
    shutil.copytree(sums / "model", tmp_path / "model")
    saved = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(saved | change))
    message = error_line(load_model, tmp_path / "model")
    assert all(word in message for word in [*words, str(tmp_path)]), message


def test_grpo_names_this_script(sums, error_line):
    assert "grpo_llama.py" in error_line(gpt2.load_model, sums / "model")


FLAGS = {
    "no reward": ({"reward": ()}, ["--reward"]),
    "tensor": ({"data": 1, "tensor": 8, "fsdp": 1}, ["2 key-value heads", "8"]),
    "too long": ({"max_prompt_length": 40}, ["32 positions"]),
}


@pytest.mark.parametrize(("changes", "words"), FLAGS.values(), ids=FLAGS)
def test_bad_flags(changes, words, sums, tmp_path, error_line):
    message = error_line(
        grpo_llama.main, run_args(sums, tmp_path / "run", **{"data": -1} | changes)
    )
    assert all(word in message for word in words), message


def test_a_template_that_fails_and_one_that_is_not_there(sums, tmp_path, error_line):
    shutil.copytree(sums / "model", tmp_path / "model")
    chat = [{"role": "user", "content": "1+1"}]
    for template, words in {
        "{{ raise_exception('System role not supported') }}": ["System role not supported"],
        "{{ messages[0].content + missing }}": ["missing"],
        "{{ ''.__class__.__mro__ }}": ["SecurityError"],
        "{% for m in messages %}": ["chat template", "TemplateSyntaxError"],
        None: ["no chat template"],
    }.items():
        path = tmp_path / "model" / "chat_template.jinja"
        path.write_text(template) if template else path.unlink()

        def encode():
            return grpo_llama.encode_chat(load_tokenizer(tmp_path / "model"), chat)

        message = error_line(encode)
        assert all(word in message for word in [*words, str(tmp_path)]), message


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
        ["1+1"],
        7,
    ],
    ids=str,
)
def test_refuses_a_prompt_that_is_no_dialogue(prompt, tmp_path, error_line):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt}])
    assert "line 1" in error_line(grpo_llama.read_jsonl, str(path), ["prompt"])
