"""Phase 1, JAX: what your jax_basics.py does."""

import jax
import jax.numpy as jnp
import numpy as np
from course import expect

import jax_basics as basics

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 3)).astype(np.float32)
Y = RNG.normal(size=(5, 2)).astype(np.float32)
PARAMS = {
    "w": RNG.normal(size=(3, 2)).astype(np.float32),
    "b": RNG.normal(size=2).astype(np.float32),
}


def test_1_1_shapes():
    params = basics.init_linear(jax.random.key(0), 3, 2)
    assert set(params) == {"w", "b"}, f'the keys are {set(params)}, they should be "w" and "b"'
    assert params["w"].shape == (3, 2), f"w is {params['w'].shape}, not [n_in, n_out] = (3, 2)"
    assert params["b"].shape == (2,), f"b is {params['b'].shape}, not [n_out] = (2,)"
    expect(params["b"], np.zeros(2), "b starts at 0")


def test_1_1_size_of_the_weights():
    w = np.asarray(basics.init_linear(jax.random.key(0), 400, 300)["w"])
    assert abs(w.mean()) < 0.001, f"the mean of w is {w.mean():.4f}, it should be about 0"
    wanted = 400**-0.5
    hint = "the standard deviation is 1 / sqrt(n_in): the root, of the inputs' number"
    assert abs(w.std() / wanted - 1) < 0.05, f"{hint}; found {w.std():.4f}, wanted {wanted:.4f}"


def test_1_1_keys_matter():
    one, other = (basics.init_linear(jax.random.key(i), 3, 2)["w"] for i in (0, 1))
    assert not np.allclose(one, other), "two keys give the same w: draw with the key you are given"


def test_1_1_linear():
    expect(basics.linear(PARAMS, X), X @ PARAMS["w"] + PARAMS["b"], "linear is x w + b")
    expect(basics.linear(PARAMS, X[0]), X[0] @ PARAMS["w"] + PARAMS["b"], "one row works, too")


def test_1_2_loss():
    squares = (X @ PARAMS["w"] + PARAMS["b"] - Y) ** 2
    hint = "the mean over all elements of the squared difference, without a factor 1/2"
    expect(basics.mean_squared_error(PARAMS, X, Y), squares.mean(), hint)


def test_1_2_gradients():
    loss, grads = basics.loss_and_gradients(PARAMS, X, Y)
    errors = X @ PARAMS["w"] + PARAMS["b"] - Y
    expect(loss, (errors**2).mean(), "the first result is the loss")
    wanted = {"w": 2 * X.T @ errors / errors.size, "b": 2 * errors.sum(axis=0) / errors.size}
    hint = "gradients are a tree like params: differentiate with respect to params"
    assert isinstance(grads, dict) and set(grads) == {"w", "b"}, hint
    for name in wanted:
        hint = f"the gradient with respect to {name} is that of the mean of squares"
        expect(grads[name], wanted[name], hint)


def test_1_3_a_step():
    errors = X @ PARAMS["w"] + PARAMS["b"] - Y
    result = basics.train_step(PARAMS, X, Y, 0.1)
    hint = "return (new params, loss): a dict like params, and one number"
    assert isinstance(result, tuple) and isinstance(result[0], dict), hint
    params, loss = result
    expect(loss, (errors**2).mean(), "return the loss of the parameters before the step")
    for name, grad in (("w", 2 * X.T @ errors), ("b", 2 * errors.sum(axis=0))):
        grad = grad / errors.size
        moved = np.asarray(params[name]) - PARAMS[name]
        hint = f"{name} moves by -learning_rate * gradient: against the gradient, and that far"
        expect(moved, -0.1 * grad, hint)


def test_1_3_learning_rate():
    hint = "a step goes as far as learning_rate says: with 0.03 it has 0.3 times that with 0.1"
    one, other = (basics.train_step(PARAMS, X, Y, rate)[0]["w"] for rate in (0.1, 0.03))
    expect(np.asarray(other) - PARAMS["w"], 0.3 * (np.asarray(one) - PARAMS["w"]), hint)


def test_1_3_descends():
    params, losses = PARAMS, []
    for _ in range(50):
        params, loss = basics.train_step(params, X, Y, 0.1)
        losses.append(float(loss))
    assert losses[-1] < losses[0], f"the loss rose from {losses[0]:.3f} to {losses[-1]:.3f}"


def test_1_4_each_row():
    squares = (X @ PARAMS["w"] + PARAMS["b"] - Y) ** 2
    losses = basics.per_example_losses(PARAMS, X, Y)
    assert losses.shape == (5,), f"one loss for each of the 5 rows, found the shape {losses.shape}"
    hint = "each row's own mean over n_out; do not mix the rows"
    expect(losses, squares.mean(axis=1), hint)


def test_1_5_against_the_sum():
    rewards = RNG.normal(size=(2, 6)).astype(np.float32)
    wanted = np.zeros_like(rewards)
    for t in range(6):
        for k in range(t, 6):
            wanted[:, t] += 0.9 ** (k - t) * rewards[:, k]
    found = basics.discounted_returns(rewards, 0.9)
    assert found.shape == (2, 6), f"the result is [B, T] = (2, 6), found {found.shape}"
    hint = "at the last step the return is the reward itself: nothing comes after it"
    expect(found[:, -1], rewards[:, -1], hint)
    hint = "G_t = r_t + gamma * G_{t+1}: r_t itself is not discounted, later ones are"
    expect(found, wanted, hint)


def test_1_5_is_a_scan():
    def size(length):
        program = jax.make_jaxpr(lambda x: basics.discounted_returns(x, 0.9))(jnp.ones((1, length)))
        return len(str(program))

    hint = "a longer input makes a longer program: use lax.scan, not a Python loop"
    assert size(200) < 1.5 * size(20), hint
