"""Phase 2, the model: what your gpt2.py does."""

import dataclasses

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from course import expect

import gpt2

RNG = np.random.default_rng(0)
CONFIG = gpt2.GPT2Config(vocab_size=17, n_positions=24, n_embd=8, n_layer=2, n_head=2)
B, T, D, H = 2, 5, 8, 2


def weights(*shape, scale=0.5):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def layer(*shape):
    return {"kernel": weights(*shape), "bias": weights(*shape[1:])}


def norm():
    return {"scale": 1 + weights(D, scale=0.1), "bias": weights(D)}


ATTENTION = {"c_attn": layer(D, 3, H, D // H), "c_proj": layer(D, D)}
X = weights(B * T, D, scale=1.0)
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # the first row is padded on the left
CAUSAL = np.tril(np.ones((T, T), bool))
BIAS = np.where(CAUSAL & (MASK[:, None] > 0), 0.0, -1e9).astype(np.float32)[:, None]  # [B, 1, T, T]


def attend(x, bias=BIAS, cache=None, column=0):
    apply = jax.jit(gpt2.Attention(CONFIG).apply, static_argnums=4)
    return apply({"params": ATTENTION}, x, bias, cache, column)


def attention_in_loops(allowed):
    """The definition, one number at a time."""
    kernel, bias = ATTENTION["c_attn"]["kernel"], ATTENTION["c_attn"]["bias"]
    qkv = np.einsum("nd,dchk->nchk", X, kernel) + bias  # [B * T, 3, H, D/H]
    out = np.zeros((B, T, H, D // H))
    for b in range(B):
        for h in range(H):
            q, k, v = (qkv[b * T : (b + 1) * T, i, h] for i in range(3))  # [T, D/H] each
            for t in range(T):
                seen = [s for s in range(T) if allowed[b, t, s]] or list(range(T))
                scores = np.array([q[t] @ k[s] / np.sqrt(D / H) for s in seen])
                share = np.exp(scores - scores.max())
                out[b, t, h] = (share / share.sum()) @ v[seen]
    return out.reshape(B * T, D) @ ATTENTION["c_proj"]["kernel"] + ATTENTION["c_proj"]["bias"]


def test_2_1_shape():
    y, cache = attend(X)
    assert y.shape == X.shape, f"y has x's shape {X.shape}, found {y.shape}"
    assert cache is None, "without a cache the second result is None"


def test_2_1_start():
    config = dataclasses.replace(CONFIG, n_embd=64)
    x, bias = np.zeros((B * T, 64), np.float32), BIAS
    made = jax.jit(gpt2.Attention(config).init, static_argnums=4)(
        jax.random.key(0), x, bias, None, 0
    )
    found = made["params"]["c_proj"]["kernel"].std() / made["params"]["c_attn"]["kernel"].std()
    hint = "c_proj adds to the residual stream and starts with less weight: residual=True"
    assert abs(found - 0.5) < 0.1, hint  # 1 / sqrt(2 n_layer)


def test_2_1_bfloat16():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    cache = (jnp.zeros((B, H, T, D // H), "bfloat16"),) * 2
    apply = jax.jit(gpt2.Attention(config).apply, static_argnums=4)
    hint = "`dense` gives float32: bring q, k and v to self.config.dtype, the cache's type"
    try:
        _, cache = apply({"params": ATTENTION}, X, BIAS, cache, 0)
    except TypeError as error:
        raise AssertionError(f"{hint} ({error})") from None
    assert cache[0].dtype == jnp.bfloat16, hint


def test_2_1_sees_nothing_later():
    changed = X.reshape(B, T, D).copy()
    changed[:, -1] += 1
    before, after = (np.asarray(attend(x.reshape(-1, D))[0]).reshape(B, T, D) for x in (X, changed))
    hint = (
        "a later position changes an earlier one: add bias to the scores, before the softmax (and "
    )
    hint += "if it is there: the softmax is over the keys, axis=-1, or T and the heads are mixed "
    hint += "up where the heads are joined again)"
    expect(after[1, :-1], before[1, :-1], hint)


def test_2_1_sees_no_padding():
    changed = X.reshape(B, T, D).copy()
    changed[0, :2] += 1
    before, after = (np.asarray(attend(x.reshape(-1, D))[0]).reshape(B, T, D) for x in (X, changed))
    hint = "padding (mask 0, in bias) changes the real positions: add bias before the softmax"
    expect(after[0, 2:], before[0, 2:], hint)


def test_2_1_values():
    found = np.asarray(attend(X)[0]).reshape(B, T, D)[1]
    allowed = CAUSAL & (MASK[:, None] > 0)
    wanted = attention_in_loops(allowed).reshape(B, T, D)[1]
    first = "even position 0, which sees only itself, is wrong: look at v, the heads' order, c_proj"
    expect(found[0], wanted[0], first)
    hint = "the weights are softmax over the keys of q·k / sqrt(D/H), and multiply v"
    expect(found, wanted, hint)


def test_2_1_cache():
    empty = (jnp.zeros((B, H, T, D // H)),) * 2
    wanted = np.asarray(attend(X)[0]).reshape(B, T, D)
    x = X.reshape(B, T, D)
    y, cache = attend(x[:, :3].reshape(-1, D), BIAS[:, :, :3], empty, 0)
    hint = "with a cache, the first positions give what they give without one"
    assert cache is not None, "with a cache the second result is the new cache"
    expect(np.asarray(y).reshape(B, 3, D)[1], wanted[1, :3], hint)
    y, _ = attend(x[:, 3:].reshape(-1, D), BIAS[:, :, 3:], cache, 3)
    hint = "positions 3 and 4 must find the keys and values of 0 to 2 in the cache, and at `column`"
    expect(np.asarray(y).reshape(B, 2, D)[1], wanted[1, 3:], hint)


def layer_norm(x, params):
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    normed = (x - mean) / np.sqrt(variance + CONFIG.layer_norm_epsilon)
    return normed * params["scale"] + params["bias"]


def test_2_2_values():
    mlp = {"c_fc": layer(D, 4 * D), "c_proj": layer(4 * D, D)}
    params = {"ln_1": norm(), "ln_2": norm(), "attn": ATTENTION, "mlp": mlp}
    try:
        y, cache = jax.jit(gpt2.Block(CONFIG).apply)({"params": params}, X, BIAS, None, 0)
    except Exception as error:
        assert "ScopeParamNotFound" not in type(error).__name__, (
            f"the parts' names are ln_1, attn, ln_2 and mlp: {error}"
        )
        raise
    assert cache is None, "the second result is attention's cache, None if there was none"
    attended, _ = attend(layer_norm(X, params["ln_1"]))
    middle = X + np.asarray(attended)
    hidden = gpt2.MLP(CONFIG).apply({"params": mlp}, layer_norm(middle, params["ln_2"]))
    hint = "x + attention(ln_1(x)), then that + mlp(ln_2(that)): norms before, additions after"
    expect(y, middle + np.asarray(hidden), hint, tolerance=1e-4)


def test_2_2_size_of_the_norm():
    tiny = 1e-3 * X  # so small that epsilon matters
    params = {"ln_1": norm(), "ln_2": norm(), "attn": ATTENTION}
    params["mlp"] = {"c_fc": layer(D, 4 * D), "c_proj": layer(4 * D, D)}
    y, _ = jax.jit(gpt2.Block(CONFIG).apply)({"params": params}, tiny, BIAS, None, 0)
    middle = tiny + np.asarray(attend(layer_norm(tiny, params["ln_1"]))[0])
    normed = layer_norm(middle, params["ln_2"])
    wanted = middle + np.asarray(gpt2.MLP(CONFIG).apply({"params": params["mlp"]}, normed))
    hint = f"layer norms have the config's epsilon, {CONFIG.layer_norm_epsilon}, not Flax's 1e-6"
    expect(y, wanted, hint, tolerance=1e-3)


def apply(params, *inputs, **options):
    model = gpt2.GPT2(CONFIG)
    return jax.jit(lambda params: model.apply({"params": params}, *inputs, **options))(params)


class Trunk(nn.Module):
    config: gpt2.GPT2Config

    @nn.compact
    def __call__(self, tokens, mask):
        return gpt2.trunk(self.config, tokens, mask)[0]


def random_model(config):
    """(params, hidden states [2, 6, D], tokens, mask) of a model with random weights."""
    tokens, mask = RNG.integers(0, 17, (2, 6)), np.ones((2, 6), int)
    params = jax.jit(Trunk(config).init)(jax.random.key(0), tokens, mask)["params"]
    params = jax.tree.map(lambda x: np.asarray(x) + weights(*x.shape, scale=0.2), params)
    return params, jax.jit(Trunk(config).apply)({"params": params}, tokens, mask), tokens, mask


def test_2_3_tied_head():
    params, hidden, tokens, mask = random_model(CONFIG)
    try:
        logits = apply(params, tokens, mask)
    except flax.errors.ScopeParamNotFoundError:
        pytest.fail("the head has parameters of its own, such as lm_head's: tied, it is wte itself")
    assert not isinstance(logits, tuple), "without a cache the result is the logits alone"
    assert logits.shape == (2, 6, 17), f"logits are [B, T, V] = (2, 6, 17), found {logits.shape}"
    assert logits.dtype == jnp.float32, f"logits are float32, found {logits.dtype}"
    hint = "a logit is the product of a position's vector with a token's row of wte, no bias"
    expect(logits, hidden @ params["wte"]["embedding"].T, hint)


def test_2_3_logits_from():
    params, hidden, tokens, mask = random_model(CONFIG)
    logits = apply(params, tokens, mask, logits_from=4)
    wanted = (hidden @ params["wte"]["embedding"].T)[:, 4:]
    expect(logits, wanted, "logits_from=4: the logits of the positions from 4 on")


def test_2_3_untied_head():
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    params, hidden, tokens, mask = random_model(config)
    params = params | {"lm_head": {"embedding": weights(17, D)}}
    logits = gpt2.GPT2(config).apply({"params": params}, tokens, mask)
    hint = "tie_word_embeddings=False: the head is another nn.Embed, named lm_head"
    expect(logits, hidden @ params["lm_head"]["embedding"].T, hint)


def test_2_3_read():
    params, hidden, tokens, mask = random_model(CONFIG)
    read = (gpt2.token_logprobs, tokens[:, 1:])
    wanted = gpt2.token_logprobs((hidden @ params["wte"]["embedding"].T)[:, :-1], tokens[:, 1:])
    hint = "with read: what read_in_blocks(config, table, x, *read) gives"
    expect(apply(params, tokens, mask, read=read), wanted, hint, tolerance=1e-4)


def test_2_3_cache():
    params, _, tokens, mask = random_model(CONFIG)
    cache = [(jnp.zeros((2, H, 6, D // H)),) * 2 for _ in range(2)]
    result = apply(params, tokens, mask, cache=cache)
    hint = "with a cache the result is (logits, new cache)"
    assert isinstance(result, tuple) and len(result) == 2, hint
    assert len(result[1]) == 2 and result[1][0] is not None, "the new cache is that of trunk"
    assert np.any(np.asarray(result[1][0][0]) != 0), "the new cache, not the old one, comes back"


EOS, P, R = 3, 4, 7


@pytest.fixture(scope="module")
def sampled():
    """One call for most tests: (params, what generate was given, what it gave)."""
    params, *_ = random_model(CONFIG)
    tokens = np.array([[0, 0, 5, 9], [1, 2, 4, 8]])
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    sampling = {"max_new_tokens": R, "temperature": 0.7, "eos_id": EOS, "num_samples": 8}
    result = gpt2.generate(params, CONFIG, tokens, mask, jax.random.key(1), **sampling)
    return params, (tokens, mask), tuple(np.asarray(x) for x in result)


def test_2_4_shapes_and_groups(sampled):
    _, (prompts, prompt_mask), (tokens, mask, logprobs) = sampled
    assert tokens.shape == mask.shape == (16, P + R), "tokens and mask are [B * num_samples, P + R]"
    assert logprobs.shape == (16, R), f"logprobs are [B * num_samples, R], found {logprobs.shape}"
    hint = "the samples of one prompt stand side by side: jnp.repeat, not jnp.tile"
    expect(tokens[:, :P], np.repeat(prompts, 8, axis=0), hint)
    expect(mask[:, :P], np.repeat(prompt_mask, 8, axis=0), hint)


def test_2_4_ends(sampled):
    _, _, (tokens, mask, logprobs) = sampled
    tokens, mask = tokens[:, P:], mask[:, P:]
    is_eos = tokens == EOS
    before = np.cumsum(is_eos, axis=1) - is_eos > 0  # [N, R]: EOS came earlier
    ended = is_eos.any(axis=1)
    assert ended.any() and not ended.all(), "some of these rows should end, and some not"
    assert (mask[is_eos & ~before] == 1).all(), "EOS itself is a drawn token: its mask is 1"
    hint = "the first EOS has its own log-probability: set `ended` after writing"
    assert (logprobs[is_eos & ~before] < 0).all(), hint
    for name, x in (("tokens", tokens), ("mask", mask), ("logprobs", logprobs)):
        assert (x[before] == 0).all(), f"{name} are 0 after EOS"
    assert (mask[~before] == 1).all(), "mask is 1 up to and including EOS"


def test_2_4_logprobs(sampled):
    params, _, (tokens, mask, logprobs) = sampled
    logits = apply(params, tokens, mask)[:, P - 1 : -1]
    wanted = gpt2.token_logprobs(logits / 0.7, tokens[:, P:]) * mask[:, P:]
    hint = "logprobs are those of one pass over the whole text, of log_softmax(logits / 0.7)"
    expect(logprobs, wanted, hint, tolerance=1e-4)


def test_2_4_each_step_and_row_draws_anew(sampled):
    _, _, (tokens, _, _) = sampled
    assert len({tuple(row) for row in tokens[:8, P:]}) > 4, "samples of one prompt are too alike"
    zeros = jax.tree.map(jnp.zeros_like, sampled[0])  # every token is as likely as the others
    prompt = np.array([[1, 2]]), np.array([[1, 1]])
    drawn, _, _ = gpt2.generate(zeros, CONFIG, *prompt, jax.random.key(0), 8, 1.0, -1, 4)
    hint = "a step draws what the step before drew: a new key for each, by jax.random.fold_in"
    assert all(len(set(row)) > 2 for row in np.asarray(drawn)[:, 2:]), hint


def test_2_4_temperature_0():
    params, *_ = random_model(CONFIG)
    prompt = np.array([[5, 9]]), np.array([[1, 1]])
    tokens, mask, logprobs = gpt2.generate(params, CONFIG, *prompt, jax.random.key(0), 6, 0, -1)
    logits = apply(params, tokens, mask)[:, 1:-1]
    expect(tokens[:, 2:], logits.argmax(axis=-1), "temperature 0 takes the likeliest token")
    wanted = gpt2.token_logprobs(logits, tokens[:, 2:])
    hint = "at temperature 0 the log-probabilities are those of the logits themselves"
    expect(logprobs, wanted, hint, tolerance=1e-4)


def test_2_4_padding_changes_nothing():
    params, *_ = random_model(CONFIG)
    key, tokens = jax.random.key(0), np.array([[5, 9]])
    one, *_ = gpt2.generate(params, CONFIG, tokens, np.array([[1, 1]]), key, 6, 0, -1)
    padded, mask = np.array([[0, 0, 5, 9]]), np.array([[0, 0, 1, 1]])
    other, *_ = gpt2.generate(params, CONFIG, padded, mask, key, 6, 0, -1)
    hint = "a prompt padded on the left gives other tokens: pass the mask, and write 1s into it"
    expect(np.asarray(other)[:, 4:], np.asarray(one)[:, 2:], hint)


def test_2_4_filter():
    params, *_ = random_model(CONFIG)
    prompt = np.array([[5, 9]]), np.array([[1, 1]])

    def only_6_and_7(logits):
        return jnp.where((jnp.arange(17) == 6) | (jnp.arange(17) == 7), logits, -jnp.inf)

    sampling = {"temperature": 1.0, "eos_id": -1, "filter_logits": only_6_and_7}
    tokens, mask, logprobs = gpt2.generate(
        params, CONFIG, *prompt, jax.random.key(0), max_new_tokens=6, **sampling
    )
    hint = "filter_logits takes tokens away from what is drawn"
    assert set(np.asarray(tokens)[0, 2:].tolist()) <= {6, 7}, hint
    logits = apply(params, tokens, mask)[:, 1:-1]
    wanted = gpt2.token_logprobs(logits, tokens[:, 2:])
    hint = "log-probabilities are those before filter_logits"
    expect(logprobs, wanted, hint, tolerance=1e-4)
