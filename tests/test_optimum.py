"""Where each algorithm's own loss leads, on a problem so small that its optimum is known.

The vocabulary has four tokens, and token 0 ends a sequence: there are 13 sequences of one or two
tokens. A policy is a table of logits, of the first token and of the second given the first. Every
expectation is an exact sum over all sequences (pairs, groups), so what is left of an algorithm is
the gradient that it follows on average. It must come to rest at

    pi* = pi_ref * exp(r / beta) / Z,    which maximises E[r] - beta * KL(pi || pi_ref),

or, where the algorithm maximises something else, at the optimum of that. The mistakes in the second
half come to rest elsewhere, or nowhere.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo
import grpo
import ppo

pytestmark = pytest.mark.usefixtures("float64")

V, BETA, CLIP, UPDATES = 4, 0.4, 0.2, 2000
SEQUENCES = np.array([[0, 0], *itertools.product(range(1, V), range(V))])  # [N, 2]
N = len(SEQUENCES)
MASK = np.array([[1.0, 0.0]] + [[1.0, 1.0]] * (N - 1))  # [N, 2]
LENGTHS = MASK.sum(axis=1)  # [N]

rng = np.random.default_rng(3)
SCORES = rng.uniform(-1, 1, size=N)
PREFERRED = 1 / (1 + np.exp(SCORES - SCORES[:, None]))  # [N, N], Bradley and Terry's P(i over j)
REF = {"first": rng.normal(size=V), "second": rng.normal(size=(V, V))}
EXPLORE = rng.dirichlet(np.full(N, 3.0))  # [N], of a sampler that is no policy of ours

NEAR, FAR = 1e-8, 0.1  # total variation of a policy that is at an optimum, and of one that is not


def log_policy(table, temperature=1.0):
    """Log-probabilities [N, 2] of the tokens of all sequences."""
    first = jnp.broadcast_to(table["first"], (N, V))
    logits = jnp.stack([first, table["second"][SEQUENCES[:, 0]]], axis=1)  # [N, 2, V]
    return dpo.token_logprobs(logits / temperature, SEQUENCES)


def probabilities(logprobs):
    """Of the sequences, [N], from the log-probabilities of their tokens, [N, 2]."""
    return jnp.exp((logprobs * MASK).sum(axis=1))


def closed_form(rewards=SCORES, temperature=1.0):
    """pi_ref * exp(r / beta) / Z, [N]; with a temperature, pi_ref is the tempered one."""
    ref = probabilities(log_policy(REF, temperature))
    return jax.nn.softmax(jnp.log(ref) + rewards / BETA)


def optimise(loss, updates_per_rollout=1):
    """The table to which UPDATES steps of Adam on loss(table, sampler) lead from the reference.

    The sampler is the table as it was when the rollout began, and is not differentiated.
    """
    adam = optax.adam(optax.cosine_decay_schedule(0.1, UPDATES))

    def rollout(carry, _):
        sampler = carry[0]

        def update(carry, _):
            table, state = carry
            changes, state = adam.update(jax.grad(loss)(table, sampler), state)
            return (optax.apply_updates(table, changes), state), None

        return jax.lax.scan(update, carry, length=updates_per_rollout)[0], None

    @jax.jit
    def run(table):
        carry = table, adam.init(table)
        return jax.lax.scan(rollout, carry, length=UPDATES // updates_per_rollout)[0][0]

    return run(jax.tree.map(jnp.asarray, REF))


def distance(table, optimum, temperature=1.0):
    """Total variation between the policy that a table samples from and the optimum [N]."""
    return 0.5 * jnp.abs(probabilities(log_policy(table, temperature)) - optimum).sum()


def has_collapsed(table):
    """Whether the policy gives the best sequence only: nothing holds it near the reference."""
    return probabilities(log_policy(table))[SCORES.argmax()] > 0.99


def expected_loss(loss_fn, weights, *batches):
    """Sum of weights [M] times the losses of M batches; arrays [M, rows of a batch, ...]."""
    losses, _ = jax.vmap(loss_fn)(*batches)
    return jnp.sum(weights * losses)


# ------------------------------------------------------------------------- the three algorithms


def pair_objective(loss_fn, table, weights, *smoothing, ref=REF, mask=MASK, divisor=1.0):
    """Expectation of a loss of dpo.py over ordered pairs, i the chosen and j the rejected.

    weights, smoothing [N, N]: the probability of the pair, and that its label is wrong.
    """
    i, j = np.indices((N, N)).reshape(2, -1)
    policy, ref = (dpo.response_logprobs(log_policy(x), mask) / divisor for x in (table, ref))

    def loss(*pairs):
        return loss_fn(*pairs[:4], BETA, *pairs[4:])

    pairs = policy[i], policy[j], ref[i], ref[j], *(x.reshape(-1) for x in smoothing)
    return expected_loss(loss, weights.reshape(-1), *(x[:, None] for x in pairs))


def iterative_dpo_objective(table, sampler, wrong=1 - PREFERRED, ref_moves=False, mask=MASK):
    """Two completions from the sampler; `wrong` is the probability that the second one is better.

    Their order is that in which they were drawn, so the label stands in label_smoothing alone.
    """
    sampled = probabilities(log_policy(sampler))
    weights, ref = jnp.outer(sampled, sampled), sampler if ref_moves else REF
    return pair_objective(dpo.dpo_loss, table, weights, wrong, ref=ref, mask=mask)


def no_values(rewards, sampled):
    return jnp.zeros_like(rewards)


def exact_values(rewards, sampled):
    """[N, 2]: the expected return at the start, and after the first token."""
    returns = jnp.stack([rewards.sum(axis=1), rewards[:, 1]], axis=1)
    same_first = (SEQUENCES[:, :1] == SEQUENCES[:, 0]) + 0.0  # [N, N]
    after_first = same_first @ (sampled * returns[:, 1]) / (same_first @ sampled)
    return jnp.stack([jnp.full(N, sampled @ returns[:, 0]), after_first], axis=1)


def ppo_objective(
    table,
    sampler,
    values_of=no_values,
    lam=1.0,
    penalty=ppo.compute_kl_divergence,
    ref_moves=False,
    mask=MASK,
):
    """ppo.py's rewards, advantages and loss, with each sequence as a batch of one.

    A batch's loss is a mean over its tokens: times their number, a sequence counts in a batch of
    one as it does in a large batch.
    """
    logprobs, old, ref = map(log_policy, (table, sampler, sampler if ref_moves else REF))
    sampled = probabilities(old)
    rewards = ppo.compute_rewards(SCORES, penalty(old, ref), mask, BETA)
    advantages, _ = ppo.compute_gae(rewards, values_of(rewards, sampled), mask, 1.0, lam)
    batches = (x[:, None] for x in (logprobs, old, advantages, mask))
    loss = functools.partial(ppo.ppo_policy_loss, clip_eps=CLIP)
    return expected_loss(loss, sampled * LENGTHS, *batches)


def exact_advantage(rewards, sampled):
    """Groups of one, with the expected reward as baseline."""
    return np.arange(N)[:, None], (rewards - sampled @ rewards)[:, None]


def grouped(advantage, group_size):
    """All groups of sequences [N ** G, G] and their advantages."""
    groups = np.array(list(itertools.product(range(N), repeat=group_size)))
    advantage = functools.partial(advantage, group_size=group_size)
    return lambda rewards, sampled: (groups, jax.vmap(advantage)(rewards[groups]))


group_mean = functools.partial(grpo.group_relative_advantage, scale=False)


def grpo_objective(
    table,
    sampler,
    kl_in="reward",
    advantage_of=exact_advantage,
    aggregation="constant",
    ratio_level="token",
    penalty=grpo.compute_kl_divergence,
    ref_moves=False,
    mask=MASK,
    temperature=1.0,
    update_temperature=None,
):
    """grpo.py's advantages and loss, each group being a batch; the KL penalty is a sequence's."""
    logprobs = log_policy(table, update_temperature or temperature)
    old, ref = (log_policy(x, temperature) for x in (sampler, sampler if ref_moves else REF))
    sampled = probabilities(old)
    kl = (penalty(old, ref) * mask).sum(axis=1)
    groups, advantages = advantage_of(SCORES - BETA * kl * (kl_in == "reward"), sampled)

    def loss(*batch):
        kl_coef = BETA if kl_in == "loss" else 0.0
        return grpo.grpo_loss(*batch, CLIP, CLIP, kl_coef, aggregation, ratio_level, 2)

    rows = (x[groups] for x in (logprobs, old, ref))
    return expected_loss(loss, sampled[groups].prod(axis=1), *rows, advantages, mask[groups])


# --------------------------------------------------------------------------- they reach the optimum

# The labels of dpo.py's pairs are Bradley and Terry's, on pairs that have nothing to do with the
# policy; iterative_dpo.py's pairs are its own, with the reference where it was. For ppo.py, k1 is
# in the reward, and with exact values any lambda does; clipping may slow, but not mislead.
#
# In grpo.py, pi* gives every sequence the same r - beta * k1, so there every advantage is 0. With
# one prompt and a table for a policy, dividing advantages by the std, or losses by the lengths,
# therefore moves the way to the optimum, but not the optimum.
LABELLED = np.outer(EXPLORE, EXPLORE) * PREFERRED
dpo_objective = functools.partial(pair_objective, weights=LABELLED)
ppo_with = functools.partial(functools.partial, ppo_objective)
grpo_with = functools.partial(functools.partial, grpo_objective)
RIGHT = {  # the expected loss, and updates to a rollout
    "dpo": (lambda table, _: dpo_objective(dpo.dpo_loss, table), 1),
    "iterative-dpo": (iterative_dpo_objective, 1),
    "ppo": (ppo_objective, 1),
    "ppo-values": (ppo_with(values_of=exact_values), 1),
    "ppo-one-step": (ppo_with(values_of=exact_values, lam=0.0), 1),
    "ppo-four-updates": (ppo_with(values_of=exact_values, lam=0.95), 4),
    "grpo": (grpo_objective, 1),
    "grpo-four-updates": (grpo_objective, 4),
    "grpo-sequence-mean": (grpo_with(aggregation="sequence"), 1),
    "grpo-sequence-ratio": (grpo_with(ratio_level="sequence"), 1),
    "grpo-mean": (grpo_with(advantage_of=grouped(group_mean, 2)), 1),
    "grpo-std": (grpo_with(advantage_of=grouped(grpo.group_relative_advantage, 2)), 1),
    "grpo-others": (
        grpo_with(
            advantage_of=grouped(grpo.leave_one_out_advantage, 2),
            aggregation="token",
            ratio_level="sequence",
        ),
        1,
    ),
}


def test_the_problem_is_not_trivial():
    """pi* is far from the reference and from the best sequence alone, and leaves nothing out."""
    optimum = closed_form()
    np.testing.assert_allclose([probabilities(log_policy(REF)).sum(), optimum.sum()], 1)
    assert distance(REF, optimum) > 0.3 and 1 - optimum[SCORES.argmax()] > 0.3
    assert optimum.min() > 1e-3


@pytest.mark.parametrize("name", RIGHT)
def test_the_optimum_is_reached(name):
    assert distance(optimise(*RIGHT[name]), closed_form()) < NEAR


def test_ipo():
    """Azar et al. 2024, eq. 7: pi_ref * exp(E[P(y over another)] / beta) / Z.

    h = log(pi / pi_ref) of one less that of the other; for a pair alone, the optimum would be
    h = (P - 1/2) / beta. Least squares over all pairs gives the mean over the other answer.
    """
    table = optimise(lambda table, _: dpo_objective(dpo.ipo_loss, table))
    assert distance(table, closed_form(PREFERRED @ EXPLORE)) < NEAR
    assert distance(table, closed_form()) > FAR  # not the same as DPO's


def test_grpo_at_a_temperature():
    """Policy and reference are both the tempered ones, as sampled from.

    With log-probabilities at 1 in the update, it comes to rest elsewhere.
    """
    for changes, reached in (({}, True), ({"update_temperature": 1.0}, False)):
        table = optimise(grpo_with(temperature=0.5, **changes))
        found = distance(table, closed_form(temperature=0.5), temperature=0.5)
        assert found < NEAR if reached else found > FAR


def one_step_with_k3(ref, rewards, beta):
    """beta * pi_ref / (lambda - r) over the last axis, lambda such that it sums to 1.

    At rest, the gradient pi * (r - E[r]) of the reward and that of k3 on-policy, which is
    beta * (pi_ref - pi), that of the forward KL(pi_ref || pi), cancel for each token.
    """
    low, high = rewards.max(), rewards.max() + beta
    for _ in range(60):
        middle = (low + high) / 2
        too_low = (beta * ref / (middle - rewards)).sum() > 1
        low, high = (middle, high) if too_low else (low, middle)
    return beta * ref / (high - rewards)


def closed_form_with_k3(beta):
    """[N]: first the second tokens, then the first token with the mean rewards E[r | first]."""
    first, second = (np.array(jax.nn.softmax(REF[x])) for x in ("first", "second"))
    rewards = SCORES[1:].reshape(V - 1, V)
    second = np.stack([one_step_with_k3(*step, beta) for step in zip(second[1:], rewards)])
    means = np.append(SCORES[0], (second * rewards).sum(axis=1))
    first = one_step_with_k3(first, means, beta)
    return np.append(first[0], first[1:, None] * second)


@pytest.mark.parametrize(
    ("advantage_of", "beta"),
    [
        (exact_advantage, BETA),
        (grouped(group_mean, 2), BETA * 2 / 1),
        (grouped(group_mean, 3), BETA * 3 / 2),
        (grouped(grpo.leave_one_out_advantage, 2), BETA),
    ],
    ids=["exact", "mean-of-2", "mean-of-3", "leave-one-out"],
)
def test_grpo_with_kl_in_the_loss(advantage_of, beta):
    """k3 in the loss, as in the paper, has another optimum than the KL-penalised reward.

    A group's mean includes the reward itself, so the advantages are (G - 1) / G of what they should
    be, and the KL counts for G / (G - 1) times its coefficient; leave-one-out has no such factor.
    """
    loss = functools.partial(grpo_objective, kl_in="loss", advantage_of=advantage_of)
    table = optimise(loss)
    assert distance(table, closed_form_with_k3(beta)) < NEAR
    assert distance(table, closed_form()) > FAR


# ------------------------------------------------------------------------------- mistakes do not


def k3(logprobs, ref_logprobs):
    difference = ref_logprobs - logprobs
    return jnp.expm1(difference) - difference


def k1_in_the_loss(table, sampler):
    k1 = grpo.compute_kl_divergence(log_policy(table), log_policy(REF)) * MASK
    mean = jnp.sum(probabilities(log_policy(sampler)) * k1.sum(axis=1))
    return grpo_objective(table, sampler, kl_in=None) + BETA * mean / 2  # 2 is max_length


OBJECTIVES = {"dpo": iterative_dpo_objective, "ppo": ppo_objective, "grpo": grpo_objective}
NO_FIRST_TOKEN, NO_LAST_TOKEN = MASK * [0, 1], np.pad(MASK[:, 1:], ((0, 0), (0, 1)))
WRONG = {
    "dpo-of-mean-logprobs": lambda table, _: dpo_objective(dpo.dpo_loss, table, divisor=LENGTHS)
}
COLLAPSES = {  # labels without noise: of any two, the better one is to be infinitely more likely
    "best-against-worst": functools.partial(
        iterative_dpo_objective, wrong=np.heaviside(SCORES - SCORES[:, None], 0.5)
    ),
}
for name, objective in OBJECTIVES.items():
    COLLAPSES[f"{name}-reference-moves"] = functools.partial(objective, ref_moves=True)
    WRONG[f"{name}-no-first-token"] = functools.partial(objective, mask=NO_FIRST_TOKEN)
    WRONG[f"{name}-no-last-token"] = functools.partial(objective, mask=NO_LAST_TOKEN)


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_do_not_reach_it(name):
    """Masks that are off by one, and DPO divided by the lengths, which are 1 and 2 here."""
    assert distance(optimise(WRONG[name]), closed_form()) > FAR


@pytest.mark.parametrize("name", COLLAPSES)
def test_mistakes_that_have_no_optimum(name):
    table = optimise(COLLAPSES[name])
    assert distance(table, closed_form()) > FAR and has_collapsed(table)


def test_k1_in_the_loss_is_no_penalty_at_all():
    """Its mean gradient is 0: the policy is that of a run without KL."""
    table = optimise(k1_in_the_loss)
    assert distance(table, closed_form()) > FAR and has_collapsed(table)
    without = optimise(grpo_with(kl_in=None))
    assert distance(table, probabilities(log_policy(without))) < NEAR


@pytest.mark.parametrize("loss", [ppo_objective, grpo_objective])
def test_k3_in_the_reward_does_not_reach_it(loss):
    """It fines a sequence for being rarer than in the reference, and so makes it rarer still."""
    table = optimise(functools.partial(loss, penalty=k3))
    assert distance(table, closed_form()) > FAR
    assert probabilities(log_policy(table)).min() < 1e-20
