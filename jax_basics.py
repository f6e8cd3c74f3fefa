"""JAX in ten short lessons: what the other files of this repository use.

    python jax_basics.py        # prints every lesson; a few seconds on a CPU

Read it beside its output. First come seven functions, which are also the
reference of the course's phase 1 (exercises/README.md). Then the lessons: each
prints what it claims, so change a line and see what changes. Next: gpt2.py.
"""

import os

if __name__ == "__main__":  # before JAX is imported: four simulated devices for the last lesson
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import functools
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

# --------------------------------------------------------------------------------------- functions


def init_linear(key, n_in, n_out):
    """Parameters of a linear layer: {"w": [n_in, n_out], "b": [n_out]}.

    w is normal with standard deviation 1 / sqrt(n_in), so that outputs are about as large as inputs
    (LeCun et al. 1998, "Efficient BackProp", section 4.6); b is 0.
    """
    w = jax.random.normal(key, (n_in, n_out)) / jnp.sqrt(n_in)
    return {"w": w, "b": jnp.zeros(n_out)}


def linear(params, x):
    """x w + b: [..., n_in] -> [..., n_out]."""
    return x @ params["w"] + params["b"]


def mean_squared_error(params, x, y):
    """Mean of (linear(x) - y)^2 over all elements: x [B, n_in], y [B, n_out] -> a scalar."""
    return jnp.mean((linear(params, x) - y) ** 2)


def loss_and_gradients(params, x, y):
    """(mean_squared_error, its gradient with respect to params: a tree like params)."""
    return jax.value_and_grad(mean_squared_error)(params, x, y)


@jax.jit
def train_step(params, x, y, learning_rate):
    """One step of gradient descent: (new params, the loss before the step)."""
    loss, grads = loss_and_gradients(params, x, y)
    return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads), loss


def per_example_losses(params, x, y):
    """mean_squared_error of each row alone: [B, n_in], [B, n_out] -> [B]."""
    return jax.vmap(mean_squared_error, in_axes=(None, 0, 0))(params, x, y)


def discounted_returns(rewards, gamma):
    """G_t = r_t + gamma * G_{t+1} of each row, backwards in one scan: [B, T] -> [B, T]."""

    def backwards(later, reward):  # [B], [B]
        later = reward + gamma * later
        return later, later

    _, returns = jax.lax.scan(backwards, jnp.zeros(len(rewards)), rewards.T, reverse=True)
    return returns.T


# ----------------------------------------------------------------------------------------- lessons


def pure_functions():
    """What a function of JAX may do: compute its result from its arguments, and nothing else."""
    x = jnp.arange(3.0)
    try:
        x[0] = 7.0
    except TypeError:
        print("an array cannot be changed in place")
    y = x.at[0].set(7.0)
    print(f"x.at[0].set(7.0) is a new array {y}, x is still {x}")


def gradients():
    """jax.grad makes a function of a function."""
    derivative = jax.grad(lambda x: x**3)
    print(f"d/dx x^3 at 2 is 3 * 2^2: {derivative(2.0)}")
    print(f"the derivative of that is 6 * 2: {jax.grad(derivative)(2.0)}")
    both, extra = jax.grad(lambda x: (x**2, "more"), has_aux=True)(3.0)
    print(f"has_aux: the gradient {both}, and what else the function returned: {extra!r}")
    stopped = jax.grad(lambda x: x * jax.lax.stop_gradient(x))(3.0)
    print(f"stop_gradient makes a constant of x: d/dx x * constant(x) at 3 is {stopped}, not 6")


def pytrees():
    """Parameters are nested dicts, lists and tuples of arrays; jax.tree works on their leaves."""
    params = {"layer": init_linear(jax.random.key(0), 3, 2), "scale": jnp.ones(())}
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{len(jax.tree.leaves(params))} arrays, {count} numbers")
    shapes = jax.tree.map(lambda x: x.shape, params)
    print(f"jax.tree.map(shape, params): {shapes}")


def compiled():
    """jit runs the Python of a function once for each kind of arguments: it is traced."""
    traced = []

    @jax.jit
    def double(x):
        traced.append(x)  # a side effect: it happens while tracing, not at each call
        return 2 * x

    double(jnp.ones(3))
    double(jnp.zeros(3))
    print(f"two calls with [3] traced it {len(traced)} time; x was a {type(traced[0]).__name__}")
    double(jnp.ones(4))
    double(jnp.ones(4, jnp.int32))
    print(f"another shape and another type: {len(traced)} times")

    @jax.jit
    def branch(x):
        return x if x > 0 else -x

    try:
        branch(-1.0)
    except jax.errors.TracerBoolConversionError:
        print("`if x > 0` fails under jit: x has no value yet; jnp.where(x > 0, x, -x) works")

    @functools.partial(jax.jit, static_argnames="n")
    def power(x, n):  # n is a Python number: `if` and `range` may use it, each n is compiled anew
        for _ in range(n):
            x = 2 * x
        return x

    print(f"a static argument is known while tracing: power(1, n=3) = {power(1, n=3)}")
    x = jnp.ones((100, 100))
    started = time.perf_counter()
    power(x, n=100).block_until_ready()
    first = time.perf_counter()
    power(x, n=100).block_until_ready()
    second = time.perf_counter()
    print(f"the first call compiles: {first - started:.3f} s, the second: {second - first:.5f} s")


def batched():
    """vmap writes the loop over the rows, as one operation on the batch."""
    params = init_linear(jax.random.key(0), 3, 1)
    x, y = jnp.ones((4, 3)), jnp.arange(4.0)[:, None]
    losses = per_example_losses(params, x, y)
    loop = jnp.stack([mean_squared_error(params, x[i], y[i]) for i in range(4)])
    print(f"a vmap and a loop give the same: {losses} and {loop}")
    grads = jax.vmap(jax.grad(mean_squared_error), in_axes=(None, 0, 0))(params, x, y)
    print(f"one gradient for each row, w: {grads['w'].shape}; PyTorch's .backward() sums them")


def scanned():
    """lax.scan is a loop with a carry that is compiled once, not once for each turn."""
    rewards = jnp.array([[0.0, 0.0, 1.0]])
    print(f"returns of the rewards {rewards[0]}: {discounted_returns(rewards, 0.5)[0]}")
    for length in (10, 1000):
        program = jax.make_jaxpr(discounted_returns)(jnp.ones((1, length)), 0.5)
        print(f"{length} turns: a program of {len(str(program).splitlines())} lines")


def random_keys():
    """A random number is a function of a key: the same key, the same number."""
    key = jax.random.key(0)
    one, again = jax.random.normal(key), jax.random.normal(key)
    print(f"the same key twice: {one:.4f}, {again:.4f}")
    a, b = jax.random.split(key)
    print(f"two keys split off: {jax.random.normal(a):.4f}, {jax.random.normal(b):.4f}")
    third = jax.random.normal(jax.random.fold_in(key, 3))
    print(f"fold_in makes the key of step 3 with no step before it: {third:.4f}")


def trained():
    """All of it together: a line is fitted to noisy points."""
    data_key, noise_key, init_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(data_key, (64, 1))
    y = 3 * x - 1 + 0.1 * jax.random.normal(noise_key, (64, 1))
    params = init_linear(init_key, 1, 1)
    for step in range(101):
        params, loss = train_step(params, x, y, 0.1)
        if step in (0, 10, 100):
            print(f"step {step}: loss {loss:.4f}")
    print(f"y = {params['w'][0, 0]:.2f} x {params['b'][0]:+.2f}; the points are 3 x - 1 and noise")


def donated():
    """A donated argument's memory is used for the result: parameters exist once, not twice."""
    step = jax.jit(lambda params: params + 1, donate_argnums=0)
    params = jnp.zeros(3)
    print(f"the result of a step: {step(params)}; the argument is deleted: {params.is_deleted()}")


def sharded():
    """Sharding in ten lines: the program is written for one device, and its data lie on many."""
    devices = jax.devices()
    mesh = Mesh(devices, ("data",))
    rows, whole = NamedSharding(mesh, Spec("data")), NamedSharding(mesh, Spec())
    x = jax.device_put(jnp.ones((8, 3)), rows)
    params = jax.device_put(init_linear(jax.random.key(0), 3, 1), whole)
    parts = {shard.device.id: shard.data.shape for shard in x.addressable_shards}
    print(f"x {x.shape} lies on {len(devices)} devices: {parts}")
    loss, grads = jax.jit(loss_and_gradients)(params, x, jnp.zeros((8, 1)))
    print(f"the same jit, no new code; the devices' mean of the loss: {loss:.4f}")
    print(f"the gradient of w is whole on each device: {grads['w'].sharding.is_fully_replicated}")


LESSONS = [pure_functions, gradients, pytrees, compiled, batched, scanned, random_keys, trained]
LESSONS += [donated, sharded]

if __name__ == "__main__":
    for number, lesson in enumerate(LESSONS, 1):
        print(f"\n{number}. {lesson.__doc__}")
        lesson()
