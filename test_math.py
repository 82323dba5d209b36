"""Tests of the math in mm_grpo.py: advantages, token logprobs, token weights, losses and their gradients.

    pytest test_math.py

Read from the top they are a tutorial. First comes the method in small numbers, worked by hand. Then an oracle in plain
Python: float64, loops over rows and tokens, written from the papers and not from the code. Values are held against it,
gradients against its central differences. The rest are properties: what must not matter (padding, row order, the split
into micro-batches, masked tokens, the level of the rewards), what must be exactly zero, and what must stay finite.
Drawn numbers are multiples of 1/64: float32 holds them exactly, so that code and oracle see the same inputs and a
tolerance has to cover the rounding of the arithmetic alone.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mm_grpo
from mm_grpo import (
    group_advantages,
    grpo_loss,
    k3,
    masked_mean,
    policy_term,
    row_ratio,
    token_logprobs,
    token_weights,
)

# A float32 operation rounds by up to 6e-8 of its result. The longest chain here (subtract, exp, clip, two products, a
# sum of 20) is about 30 of them: 2e-6 of the summed size of the terms.
ROUNDING = 2e-6


def evaluate(loss_type, arguments):
    """(loss, gradient with respect to logprobs, metrics)."""
    logprobs = arguments["logprobs"].clone().requires_grad_()
    loss, metrics = grpo_loss(**(arguments | {"logprobs": logprobs}), loss_type=loss_type)
    assert loss.shape == ()
    loss.backward()
    return loss.item(), logprobs.grad, {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------- the method in small numbers, by hand


def test_advantages_of_one_success_in_four_by_hand():
    """Mean 1/4, unbiased std 1/2: (1 - 1/4) / (1/2 + 1e-4). A biased std, or no epsilon, is another number."""
    mean = (1 + 0 + 0 + 0) / 4
    std = math.sqrt(((1 - mean) ** 2 + 3 * (0 - mean) ** 2) / (4 - 1))  # sqrt(3/4 / 3) = 1/2
    success = (1 - mean) / (std + 1e-4)  # 0.75 / 0.5001, about 1.5
    failure = (0 - mean) / (std + 1e-4)  # -0.25 / 0.5001, about -0.5
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), None)
    assert advantages.tolist() == pytest.approx([success, failure, failure, failure], rel=1e-6)  # float32 output


# One row and its tokens, each of logprob -2 and of advantage +1: the completion was better than its group.


def row_of(ratios, loss_type, advantage=1.0, **knobs):
    """[loss, gradient of each token] of one row of tokens with these ratios. The weight of each of n tokens is 1/n."""
    logprobs = torch.full((1, len(ratios)), -2.0)
    arguments = {
        "logprobs": logprobs,
        "behavior_logprobs": logprobs - torch.tensor([ratios]).log(),  # ratio = exp(logprob - behaviour's logprob)
        "advantages": torch.tensor([advantage]),
        "weights": torch.full_like(logprobs, 1 / len(ratios)),
    }
    loss, gradient, _ = evaluate(loss_type, arguments | knobs)
    return [loss, *gradient[0].tolist()]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_a_clipped_token_by_hand(loss_type):
    """The policy already finds the token 1.5 times as likely as when it was sampled. Above 1.2 there is no gain."""
    ratio, A = 1.5, 1.0
    clipped = 1.2  # 1.5, held between 1 - 0.2 and 1 + 0.2
    loss = -min(ratio * A, clipped * A)  # -1.2
    gradient = 0.0  # -1.2 is a constant: no change of the logprob moves it
    assert row_of([1.5], loss_type) == pytest.approx([loss, gradient], rel=ROUNDING, abs=0.0)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_a_bad_token_that_grew_by_hand(loss_type):
    """The same token in a completion worse than its group: nothing stops the way back."""
    ratio, A, clipped = 1.5, -1.0, 1.2
    loss = -min(ratio * A, clipped * A)  # min(-1.5, -1.2) = -1.5: the unclipped side
    gradient = -ratio * A  # d ratio / d logprob = ratio, as ratio = exp(logprob - behaviour's logprob)
    assert row_of([1.5], loss_type, advantage=A) == pytest.approx([loss, gradient], rel=ROUNDING)


def test_one_ratio_a_row_by_hand():
    """GSPO judges rows, not tokens: ratios 2.2 and 0.55 multiply to 1.21, which is 1.1 for each of the two tokens."""
    row = math.sqrt(2.2 * 0.55)  # exp of the mean of the logs: the geometric mean, 1.1, inside [0.8, 1.2]
    loss = -row  # (row + row) / 2
    gradient = -row / 2  # each token is half of the mean in the exponent, and stands in both terms of weight 1/2
    assert row_of([2.2, 0.55], "gspo") == pytest.approx([loss, gradient, gradient], rel=ROUNDING)
    loss = -(1.2 + 0.55) / 2  # GRPO clips the first token and leaves the second
    assert row_of([2.2, 0.55], "grpo") == pytest.approx([loss, 0.0, -0.55 / 2], rel=ROUNDING, abs=0.0)


def test_a_token_of_cispo_by_hand():
    """CISPO bounds the factor and keeps the gradient: the token is trained on as by REINFORCE, times 1.2."""
    factor, A, logprob = 1.2, 1.0, -2.0  # min(1.5, 1 + 0.2), a constant
    loss = -factor * A * logprob  # 2.4
    gradient = -factor * A  # -1.2: of the logprob alone
    assert row_of([1.5], "cispo") == pytest.approx([loss, gradient], rel=ROUNDING)


def test_a_token_of_masked_by_hand():
    """Nothing clips; d ratio / d logprob = ratio, so loss and gradient are the same number."""
    ratio, A = 1.5, 1.0
    loss, gradient = -ratio * A, -ratio * A
    assert row_of([1.5], "masked") == pytest.approx([loss, gradient], rel=ROUNDING)


def test_the_kl_penalty_of_one_token_by_hand():
    """The reference's logprob is -1, the policy's -2: a gap of 1. The advantage is 0, so the penalty stands alone."""
    gap = -1.0 - -2.0
    penalty = math.exp(gap) - gap - 1  # e - 2 = 0.718
    gradient = 1 - math.exp(gap)  # a larger logprob is a smaller gap: -(exp(gap) - 1) = -1.718, towards the reference
    row = row_of([1.0], "dapo", advantage=0.0, beta=0.5, ref_logprobs=torch.tensor([[-1.0]]))
    assert row == pytest.approx([0.5 * penalty, 0.5 * gradient], rel=ROUNDING)


def test_weights_of_a_short_and_a_long_row_by_hand():
    """A row of 1 token and a row of 3: rows can count the same, or tokens, or neither: then a constant divides."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])

    def weights(loss_type):
        return token_weights(mask, loss_type, max_tokens=5).flatten().tolist()

    # grpo: the mean over a row's tokens, then over 2 rows. Both rows weigh 1/2.
    short, long = 1 / 1 / 2, 1 / 3 / 2
    assert weights("grpo") == weights("gspo") == pytest.approx([short, 0, 0, long, long, long])
    # dapo: the mean over the 4 tokens of the batch. The long row weighs three times the short one.
    each = 1 / 4
    assert weights("dapo") == weights("cispo") == weights("masked") == pytest.approx([each, 0, 0, each, each, each])
    # dr_grpo: 2 rows of at most 5 tokens, however many there are. Shorter rows make a smaller loss.
    each = 1 / (2 * 5)
    assert weights("dr_grpo") == pytest.approx([each, 0, 0, each, each, each])


def test_a_banned_token_by_hand():
    """Three equal logits, the last one banned: the other two share all, and it is 100 / temperature nats below them."""
    for temperature in (1.0, 0.5):
        logprobs, entropies = token_logprobs(torch.zeros(3, 3), torch.tensor([0, 1, 2]), temperature, banned_ids=[2])
        half = -math.log(2)
        assert logprobs.tolist() == pytest.approx([half, half, half - 100 / temperature], rel=1e-6)  # float32
        assert entropies.tolist() == pytest.approx(3 * [math.log(2)], rel=1e-6)


def test_one_update_by_hand():
    """From rewards to the gradient of logits. Two tokens of probability 1/2; the right one was sampled once in four."""
    logits = torch.zeros(2, requires_grad=True)
    sampled, rewards = torch.tensor([[0], [1], [1], [1]]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    logprobs, _ = token_logprobs(logits.expand(4, 1, 2), sampled)  # (4, 1): four completions of one token
    weights = token_weights(torch.ones(4, 1), "dapo")  # 1/4 each
    loss, _ = grpo_loss(logprobs, logprobs.detach(), group_advantages(rewards), weights)  # on policy: every ratio is 1
    loss.backward()
    success, failure = 0.75 / 0.5001, -0.25 / 0.5001
    # d logprob / d logit of the right token: 1 - 1/2 where it was sampled, 0 - 1/2 where the other one was
    right = -(success * (1 - 1 / 2) + 3 * failure * (0 - 1 / 2)) / 4  # -0.375: descent makes it likelier
    assert logits.grad.tolist() == pytest.approx([right, -right], rel=ROUNDING)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)  # the advantages add up to 0; its gradient is what counts


# ---------------------------------------------------------------- what is drawn from

INF, NAN = math.inf, math.nan
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "masked")
MIN_CLIPPED = ("grpo", "dr_grpo", "dapo", "gspo")  # -min(ratio * A, clip(ratio) * A)
CLIPS = ((0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4))  # PPO's, DAPO's, GSPO's
MASK_RANGES = ((0.0, INF), (0.5, 2.0), (0.1, 10.0))
MAX_ROWS, MAX_TOKENS = 4, 5

# Logits over the temperature reach 40, where float32 rounds by 40 * 6e-8 = 2.4e-6; a log-softmax has a few such steps.
LOGIT_ROUNDING = 1e-5

# No drawn ratio may lie at a bound: code and oracle, or the two ends of a finite difference, could stand on two sides
# of it. Drawn log-ratios are multiples of 1/64 and the mean of n of them is one of 1/64/n. Each of these is further
# from the logarithm of every bound than a step of the finite differences (1e-5 / n) and a rounding (1e-7) can carry it.
BOUNDS = [1 - low for low, _ in CLIPS] + [1 + high for _, high in CLIPS] + [0.5, 2.0, 0.1, 10.0]
for log_bound in map(math.log, BOUNDS):
    for n in range(1, MAX_TOKENS + 1):
        assert abs(log_bound - round(log_bound * 64 * n) / 64 / n) > 1e-5 / n + 1e-6


def test_every_loss_type_is_tested_here():
    assert mm_grpo.LOSS_TYPES == LOSS_TYPES


# ---------------------------------------------------------------- the oracle: float64, math only


@dataclass(frozen=True)
class Case:
    """Arguments of grpo_loss as nested lists: (B, T), except advantages (B,). A weight of 0 means: not trained."""

    logprobs: list
    behavior: list
    ref: list
    weights: list
    advantages: list
    clip: tuple = (0.2, 0.2)
    mask_range: tuple = (0.0, INF)
    beta: float = 0.0

    def trained(self):
        """(row, token) of each token that is trained."""
        return [(b, t) for b, row in enumerate(self.weights) for t, weight in enumerate(row) if weight]


def mean(values):
    return math.fsum(values) / len(values)


def sample_std(values):
    return math.sqrt(math.fsum((x - mean(values)) ** 2 for x in values) / (len(values) - 1))


def oracle_advantages(rewards, group_ids, scale):
    """Group-relative advantage, arXiv 2402.03300 section 4.1.2; undivided: 2503.20783; the batch's std: 2508.08221."""
    advantages = []
    for reward, group_id in zip(rewards, group_ids):
        group = [r for r, g in zip(rewards, group_ids) if g == group_id]
        advantage = reward - mean(group) if max(group) > min(group) else 0.0
        if scale != "none" and advantage:
            advantage /= sample_std(group if scale == "group" else rewards) + 1e-4
        advantages.append(advantage)
    return advantages


def oracle_softmax(logits, target, temperature):
    """(log p(target), entropy in nats) of softmax(logits / temperature) over one position's V logits."""
    scaled = [x / temperature for x in logits]
    log_z = max(scaled) + math.log(math.fsum(math.exp(x - max(scaled)) for x in scaled))
    return scaled[target] - log_z, -math.fsum(math.exp(x - log_z) * (x - log_z) for x in scaled)


def oracle_weight(mask, row, loss_type, max_tokens):
    """Weight of a trained token of `row`. GRPO 2402.03300 eq. 3 and GSPO 2507.18071 eq. 5: mean over the row's tokens,
    then over rows. Dr. GRPO 2503.20783: a constant. DAPO 2503.14476 eq. 8, CISPO 2506.13585 eq. 4: mean over all."""
    if loss_type in ("grpo", "gspo"):
        return 1 / sum(mask[row]) / len(mask)
    if loss_type == "dr_grpo":
        return 1 / (len(mask) * max_tokens)
    return 1 / sum(map(sum, mask))


def oracle_k3(gap):
    """Schulman's estimator of KL(policy || other), gap = log other - log policy; GRPO, arXiv 2402.03300 eq. 4."""
    return math.exp(gap) - gap - 1


def oracle_policy_term(loss_type, ratio, A, logprob, clip):
    """(what is minimised for one token, whether its clip binds).

    PPO's clipped surrogate as in GRPO 2402.03300 eq. 3, DAPO 2503.14476 eq. 8 (two clip bounds), Dr. GRPO 2503.20783,
    and with the row's ratio in GSPO 2507.18071 eq. 5. CISPO 2506.13585 eq. 4-5, with an upper bound only.
    """
    low, high = 1 - clip[0], 1 + clip[1]
    if loss_type == "cispo":
        return -min(ratio, high) * A * logprob, ratio > high
    if loss_type == "masked":
        return -ratio * A, False
    clipped = min(max(ratio, low), high)
    return -min(ratio * A, clipped * A), clipped * A < ratio * A


def oracle_row_ratio(log_ratios):
    """GSPO 2507.18071 eq. 7: the ratio of the whole row's probabilities, to the power of 1 / length."""
    return math.exp(mean(log_ratios))


def oracle_ratio(loss_type, case, b, t, moved):
    """The ratio that the loss of token t of row b is made of. `moved` are the logprobs of the policy in training."""
    if loss_type == "gspo":
        return oracle_row_ratio([moved[b][u] - case.behavior[b][u] for row, u in case.trained() if row == b])
    if loss_type == "cispo":
        moved = case.logprobs  # CISPO's stop-gradient: however the logprobs are moved, its ratio stays where it was
    return math.exp(moved[b][t] - case.behavior[b][t])


def in_range(case, ratio):
    return case.mask_range[0] <= ratio <= case.mask_range[1]


def oracle_loss(case, loss_type, moved=None):
    """The loss, one token after the other. `moved` takes the place of case.logprobs, for finite differences."""
    moved = moved or case.logprobs
    loss = 0.0
    for b, t in case.trained():
        ratio = oracle_ratio(loss_type, case, b, t, moved)
        term, _ = oracle_policy_term(loss_type, ratio, case.advantages[b], moved[b][t], case.clip)
        penalty = oracle_k3(case.ref[b][t] - moved[b][t])
        loss += case.weights[b][t] * ((term if in_range(case, ratio) else 0.0) + case.beta * penalty)
    return loss


def oracle_gradient(case, loss_type, step=1e-5):
    """d loss / d logprobs by central differences: in float64 a step of 1e-5 leaves an error of about 1e-10."""

    def loss_at(b, t, shift):
        moved = [list(row) for row in case.logprobs]
        moved[b][t] += shift
        return oracle_loss(case, loss_type, moved)

    T = range(len(case.logprobs[0]))
    return [[(loss_at(b, t, step) - loss_at(b, t, -step)) / (2 * step) for t in T] for b in range(len(case.logprobs))]


def oracle_metrics(case, loss_type):
    """Means over the trained tokens, every token the same; the least and the largest ratio are those of tokens."""
    seen = []
    for b, t in case.trained():
        log_ratio = case.logprobs[b][t] - case.behavior[b][t]
        ratio = oracle_ratio(loss_type, case, b, t, case.logprobs)
        _, binds = oracle_policy_term(loss_type, ratio, case.advantages[b], case.logprobs[b][t], case.clip)
        kl = oracle_k3(case.ref[b][t] - case.logprobs[b][t])
        seen.append((oracle_k3(log_ratio), abs(log_ratio), math.exp(log_ratio), binds, not in_range(case, ratio), kl))
    mismatch, gaps, ratios, binding, dropped, kls = zip(*seen) if seen else ([0], [0], [1], [0], [0], [0])
    metrics = {
        "mismatch_kl": mean(mismatch),
        "logprob_difference": mean(gaps),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "clip_fraction": mean(binding),
        "masked_fraction": mean(dropped),
    }
    return metrics | ({"kl": mean(kls)} if case.beta else {})


def rounding(case, loss_type):
    """How far float32 may be off in a case's loss and gradient: ROUNDING times the size of all that is summed."""
    size = 0.0
    for b, t in case.trained():
        A, gap = case.advantages[b], case.ref[b][t] - case.logprobs[b][t]
        ratio = oracle_ratio(loss_type, case, b, t, case.logprobs)
        term, _ = oracle_policy_term(loss_type, ratio, A, case.logprobs[b][t], case.clip)
        of_k3 = math.exp(gap) + abs(gap) + 1
        size += case.weights[b][t] * (abs(term) + abs(A) * (1 + ratio) + case.beta * of_k3)
    return ROUNDING * size


# ---------------------------------------------------------------- drawn inputs


def grid(low, high):
    return st.integers(round(low * 64), round(high * 64)).map(lambda k: k / 64)


def table(rows, tokens, elements):
    return st.lists(st.lists(elements, min_size=tokens, max_size=tokens), min_size=rows, max_size=rows)


LOG_RATIOS = grid(-0.4, 0.4) | grid(-3, 3)  # about the clip bounds, and far beyond them and the mask range


@st.composite
def cases(draw):
    """Ragged batches: any token may be untrained, so may a whole row; weights are arbitrary, of no loss type."""
    B, T = draw(st.integers(1, MAX_ROWS)), draw(st.integers(1, MAX_TOKENS))
    logprobs = draw(table(B, T, grid(-8, -3)))

    def shifted():  # another policy's logprobs of the same tokens
        return [[x - d for x, d in zip(*rows)] for rows in zip(logprobs, draw(table(B, T, LOG_RATIOS)))]

    weights = draw(table(B, T, st.just(0.0) | grid(1 / 64, 1)))
    advantages = draw(st.lists(grid(-3, 3), min_size=B, max_size=B))
    knobs = (draw(st.sampled_from(choices)) for choices in (CLIPS, MASK_RANGES, (0.0, 0.04, 1.0)))
    return Case(logprobs, shifted(), shifted(), weights, advantages, *knobs)


def masks():
    sizes = st.tuples(st.integers(1, MAX_ROWS), st.integers(1, MAX_TOKENS))
    return sizes.flatmap(lambda size: table(*size, st.integers(0, 1)))


def reward_lists():
    return st.lists(grid(-4, 4) | st.sampled_from([0.1, 0.7, 1e6]), min_size=1, max_size=8)


SCALES = st.sampled_from(["group", "batch", "none"])
GROUP_IDS = st.lists(st.sampled_from([7, -3, 0, 10**12]), min_size=8, max_size=8)  # no order, no neighbours
NOTHING_TRAINED = Case([[-1.0, -2.0]], [[-1.0, -1.0]], [[-2.0, -2.0]], [[0.0, 0.0]], [1.0], beta=1.0)
OUT_OF_RANGE = dict(mask_range=(0.5, 2.0), beta=1.0)
ALL_OUT_OF_RANGE = Case([[-3.0, -1.0]], [[-6.0, -4.0]], [[-3.5, -1.0]], [[0.5, 0.5]], [1.0], **OUT_OF_RANGE)
ROW_WITHOUT_TOKENS = Case([[-3.0], [-3.0]], [[-3.5], [-3.0]], [[-3.0], [-3.0]], [[0.0], [1.0]], [5.0, -1.0])


# ---------------------------------------------------------------- the code under test, called one way


def tensors(case):
    """The arguments of grpo_loss for a case. ref_logprobs is always there: with beta = 0 it must not matter."""
    return {
        "logprobs": torch.tensor(case.logprobs),
        "behavior_logprobs": torch.tensor(case.behavior),
        "advantages": torch.tensor(case.advantages),
        "weights": torch.tensor(case.weights),
        "clip_low": case.clip[0],
        "clip_high": case.clip[1],
        "mask_ratio_low": case.mask_range[0],
        "mask_ratio_high": case.mask_range[1],
        "ref_logprobs": torch.tensor(case.ref),
        "beta": case.beta,
    }


def one_token(loss_type, log_ratio, advantage, **knobs):
    """Loss, gradient and metrics of one token of weight 1 and logprob -2, as plain numbers."""
    case = Case([[-2.0]], [[-2.0 - log_ratio]], [[-2.0]], [[1.0]], [advantage])
    loss, gradient, metrics = evaluate(loss_type, tensors(case) | knobs)
    return loss, gradient.item(), metrics


def per_token(arguments, change):
    """The arguments with `change` applied to each (B, T) tensor."""
    return {k: change(v) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in arguments.items()}


def per_row(arguments, rows):
    """The arguments of these rows alone."""
    return {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def only(arguments, b, tokens):
    """The arguments of row b alone, and of its tokens those where `tokens` (T,) is True: (1, number of these)."""
    return per_token(per_row(arguments, [b]), lambda x: x[:, tokens])


def with_weights_of(loss_type, case):
    """The case with this loss type's own weights over its mask; rows without a token stay."""
    mask = torch.tensor(case.weights) > 0
    return replace(case, weights=token_weights(mask, loss_type, max_tokens=MAX_TOKENS).tolist())


def assert_agree(loss_type, case, one, other):
    """Two (loss, gradient, ...) of a case agree, up to the rounding of sums that were taken in another order."""
    tolerance = rounding(case, loss_type)
    assert one[0] == pytest.approx(other[0], rel=0, abs=tolerance)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=tolerance)


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(rewards=reward_lists(), ids=GROUP_IDS)
@example(rewards=[3.0], ids=[0] * 8)  # one row: no standard deviation exists
@example(rewards=[1.0, 2.0, 5.0], ids=[7, -3, 0, 0, 0, 0, 0, 0])  # one-row groups only
@settings(max_examples=60)
def test_advantages_match_the_oracle(scale, rewards, ids):
    rewards, ids = torch.tensor(rewards), torch.tensor(ids[: len(rewards)])
    advantages = group_advantages(rewards, ids, scale)
    expected = oracle_advantages(rewards.tolist(), ids.tolist(), scale)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)  # float64 within, one rounding to float32
    one_group = group_advantages(rewards, None, scale)
    assert torch.equal(one_group, group_advantages(rewards, torch.zeros_like(ids), scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1e6, -0.3])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(reward, scale, dtype):
    """Exact, whatever the value and the size: a mean that is off by a rounding becomes a real advantage once it is
    divided (and the float64 mean of six times 0.1 is not 0.1). The second group has spread: so has the batch."""
    for size in range(1, 12):
        rewards, ids = torch.tensor([reward] * size + [0.0, 1.0], dtype=dtype), torch.tensor([5] * size + [2, 2])
        advantages = group_advantages(rewards, ids, scale)
        assert advantages[:size].tolist() == [0.0] * size
        assert advantages[-1] > 0.0 > advantages[-2]
        assert group_advantages(rewards[:size], None, scale).tolist() == [0.0] * size


@given(st.lists(grid(-4, 4), min_size=1, max_size=8), GROUP_IDS, st.integers(-(2**16), 2**16), SCALES)
def test_a_constant_added_to_all_rewards_changes_no_advantage(rewards, ids, shift, scale):
    rewards, ids = torch.tensor(rewards), torch.tensor(ids[: len(rewards)])
    moved = rewards + shift  # exact: 17 bits + 6 binary places
    before, after = group_advantages(rewards, ids, scale), group_advantages(moved, ids, scale)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)  # float64 within; float32 would be off by 1e-2 here


@given(st.lists(grid(-4, 4), min_size=2, max_size=8, unique=True), st.integers(-3, 10))
def test_rewards_times_a_constant_leave_advantages_over_the_group_std(rewards, exponent):
    """Not quite: A' / A = (s + e) / (s + e / k) with e = 1e-4, which differs from 1 by less than e |1 - 1/k| / s."""
    rewards, k = torch.tensor(rewards), 2.0**exponent
    tolerance = 1e-4 * abs(1 - 1 / k) / sample_std(rewards.tolist()) + 1e-6  # and a rounding to float32
    before, after = group_advantages(rewards, None), group_advantages(k * rewards, None)
    torch.testing.assert_close(after, before, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(group_advantages(k * rewards, None, "none"), k * group_advantages(rewards, None, "none"))


@given(reward_lists(), GROUP_IDS, st.permutations(range(8)), SCALES)
def test_advantages_follow_their_rows_and_ignore_the_names_of_groups(rewards, ids, order, scale):
    B = len(rewards)
    order = [i for i in order if i < B]
    renamed = torch.tensor([{7: 0, -3: 1, 0: -9, 10**12: 44}[i] for i in ids[:B]])
    rewards, ids = torch.tensor(rewards), torch.tensor(ids[:B])
    before, after = group_advantages(rewards, ids, scale), group_advantages(rewards[order], renamed[order], scale)
    torch.testing.assert_close(after, before[order], rtol=1e-6, atol=1e-6)  # another order of the float64 sums


# ---------------------------------------------------------------- token logprobs and entropies

TEMPERATURES = (0.25, 0.6, 1.0, 1.7, 4.0)


@st.composite
def logit_tables(draw):
    """((N, V) logits in [-10, 10], (N,) targets)."""
    N, V = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    return draw(table(N, V, grid(-10, 10))), draw(st.lists(st.integers(0, V - 1), min_size=N, max_size=N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(drawn=logit_tables(), temperature=st.sampled_from(TEMPERATURES))
@settings(max_examples=60)
def test_logprobs_and_entropies_match_the_oracle(dtype, drawn, temperature):
    """bfloat16 logits meet the float32 tolerance too: the log-softmax and the division are float32. In bfloat16 they
    would be off by 1e-2."""
    logits, targets = torch.tensor(drawn[0]).to(dtype), torch.tensor(drawn[1])
    logprobs, entropies = token_logprobs(logits, targets, temperature)
    assert logprobs.dtype == entropies.dtype == torch.float32
    expected = [oracle_softmax(row, target, temperature) for row, target in zip(logits.tolist(), drawn[1])]
    assert logprobs.tolist() == pytest.approx([logprob for logprob, _ in expected], abs=LOGIT_ROUNDING)
    assert entropies.tolist() == pytest.approx([entropy for _, entropy in expected], abs=LOGIT_ROUNDING)


@given(logit_tables(), st.sampled_from(TEMPERATURES))
@settings(max_examples=60)
def test_gradient_of_logprobs_matches_finite_differences(drawn, temperature):
    logits, targets = torch.tensor(drawn[0], requires_grad=True), torch.tensor(drawn[1])
    logprobs, entropies = token_logprobs(logits, targets, temperature)
    assert not entropies.requires_grad  # a metric: it holds no graph
    logprobs.sum().backward()
    for row, target, gradient in zip(drawn[0], drawn[1], logits.grad.tolist()):
        for j, value in enumerate(gradient):
            up, down = (row[:j] + [row[j] + shift] + row[j + 1 :] for shift in (1e-5, -1e-5))
            slope = (oracle_softmax(up, target, temperature)[0] - oracle_softmax(down, target, temperature)[0]) / 2e-5
            # probabilities carry the logits' rounding, relatively; 1 / temperature is at most 4
            assert value == pytest.approx(slope, abs=4 * LOGIT_ROUNDING)


@given(logit_tables())
def test_entropy_lies_between_zero_and_log_v_and_grows_with_temperature(drawn):
    logits, targets = torch.tensor(drawn[0]), torch.tensor(drawn[1])
    ladder = torch.stack([token_logprobs(logits, targets, t)[1] for t in TEMPERATURES])  # (temperatures, N)
    assert ladder.min() >= -LOGIT_ROUNDING
    assert ladder.max() <= math.log(logits.shape[-1]) + LOGIT_ROUNDING
    assert (ladder.diff(dim=0) >= -LOGIT_ROUNDING).all()


def test_entropy_is_log_v_for_equal_logits_and_zero_for_a_certain_token():
    targets = torch.tensor([0, 0])
    for V in (2, 7, 1000):
        certain = [200.0] + [0.0] * (V - 1)  # exp(-200) is 0 in float32
        logprobs, entropies = token_logprobs(torch.tensor([[3.0] * V, certain]), targets)
        # one rounding of log V, at most 7, and for V = 1000 a sum of that many terms: 1e-5 is generous for both
        assert entropies.tolist() == pytest.approx([math.log(V), 0.0], abs=1e-5)
        assert logprobs.tolist() == pytest.approx([-math.log(V), 0.0], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_extreme_logits_give_finite_numbers_and_gradients(dtype, temperature):
    """Exponentials of 1e4 overflow, those of -1e4 are 0 and meet a logarithm: neither may show."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], dtype=dtype)
    logits.requires_grad_()
    logprobs, entropies = token_logprobs(logits, torch.tensor([0, 1, 2, 0]), temperature)
    gap = (logits[0, 1] - logits[0, 0]).item()  # exact also in bfloat16: 2 x one value
    assert logprobs.tolist() == pytest.approx([0.0, gap / temperature, -math.log(3), -math.log(3)], rel=1e-6)  # float32
    assert entropies.tolist() == pytest.approx([0.0, 0.0, math.log(3), math.log(3)], abs=1e-6)  # float32, values near 1
    (logprobs.sum() + (entropies.sum() if entropies.requires_grad else 0.0)).backward()
    assert logits.grad.isfinite().all()


def test_each_position_of_any_leading_shape_is_scored_alone():
    logits = torch.arange(2 * 3 * 5, dtype=torch.float32).mul(0.7).sin().view(2, 3, 5)
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    logprobs, entropies = token_logprobs(logits, targets, 0.6)
    assert logprobs.shape == entropies.shape == (2, 3)
    for b, t in ((b, t) for b in range(2) for t in range(3)):
        logprob, entropy = token_logprobs(logits[b, t], targets[b, t], 0.6)
        assert logprob.shape == entropy.shape == ()
        assert logprob.item() == pytest.approx(logprobs[b, t].item(), abs=1e-6)  # the rounding of values near 1
        assert entropy.item() == pytest.approx(entropies[b, t].item(), abs=1e-6)


BANS = st.sets(st.integers(0, 7), max_size=8)


@given(logit_tables(), st.sampled_from((0.5, *TEMPERATURES)), BANS)
@settings(max_examples=60)
def test_a_ban_takes_100_from_a_logit_before_the_temperature_divides(drawn, temperature, banned):
    """As a server does with logit_bias -100. So a banned id is exp(-100 / temperature) times as likely as it would be;
    it can still be scored, and its gradient is a number."""
    (rows, targets), V = drawn, len(drawn[0][0])
    banned = [i for i in banned if i < V - 1]  # the last id is always there to be sampled
    logits = torch.tensor(rows, requires_grad=True)
    logprobs, entropies = token_logprobs(logits, torch.tensor(targets), temperature, banned)
    logprobs.sum().backward()
    for b, target in enumerate(targets):
        biased = [x - 100 if i in banned else x for i, x in enumerate(rows[b])]
        logprob, entropy = oracle_softmax(biased, target, temperature)
        # relative: a banned logit is as far down as 110 / 0.25 = 440, which float32 rounds by 440 * 6e-8 = 2.6e-5
        assert logprobs[b].item() == pytest.approx(logprob, rel=1e-6, abs=LOGIT_ROUNDING)
        assert entropies[b].item() == pytest.approx(entropy, abs=LOGIT_ROUNDING)
        probabilities = [math.exp(oracle_softmax(biased, i, temperature)[0]) for i in range(V)]
        slopes = [((i == target) - p) / temperature for i, p in enumerate(probabilities)]
        assert logits.grad[b].tolist() == pytest.approx(slopes, abs=4 * LOGIT_ROUNDING)  # 1 / temperature: at most 4


@given(logit_tables(), st.sampled_from((0.5, *TEMPERATURES)), BANS)
@settings(max_examples=60)
def test_the_others_are_scored_as_if_the_banned_ids_were_not_there(drawn, temperature, banned):
    """What is left to 8 banned ids, at most 20 above the others, is 8 * exp((20 - 100) / 4) = 2e-8: below rounding."""
    logits, V = torch.tensor(drawn[0]), len(drawn[0][0])
    allowed = [i for i in range(V) if i not in banned or i == V - 1]
    targets = torch.tensor(drawn[1]) % len(allowed)  # places among the allowed ids
    banned = [i for i in range(V) if i not in allowed]
    with_ban = token_logprobs(logits, torch.tensor(allowed)[targets], temperature, banned)
    without = token_logprobs(logits[:, allowed], targets, temperature)
    torch.testing.assert_close(with_ban, without, rtol=0, atol=LOGIT_ROUNDING)


# ---------------------------------------------------------------- token weights


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(mask=masks(), max_tokens=st.integers(1, 9))
@example(mask=[[0, 0], [0, 0]], max_tokens=3)  # nothing to train on: zeros, no division by zero
@example(mask=[[0, 0, 0], [1, 1, 1]], max_tokens=3)  # an empty row adds nothing and still counts as a row
@settings(max_examples=40)
def test_weights_match_the_oracle(loss_type, mask, max_tokens):
    for dtype in (torch.bool, torch.long, torch.float32):
        weights = token_weights(torch.tensor(mask, dtype=dtype), loss_type, max_tokens=max_tokens)
        assert weights.dtype == torch.float32
        for b, (row, trained) in enumerate(zip(weights.tolist(), mask, strict=True)):
            expected = [oracle_weight(mask, b, loss_type, max_tokens) if on else 0.0 for on in trained]
            assert row == pytest.approx(expected, rel=1e-6, abs=0.0)  # two float32 divisions; zeros are exact


# ---------------------------------------------------------------- the parts of a loss, each by itself


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(log_ratio=LOG_RATIOS, A=grid(-3, 3), logprob=grid(-8, -3), clip=st.sampled_from(CLIPS))
@settings(max_examples=60)
def test_the_policy_term_of_a_token_and_its_slopes_match_the_oracle(loss_type, log_ratio, A, logprob, clip):
    """The slopes are those of the ratio and of the logprob, each by itself: CISPO has the second alone, the others have
    the first. Terms are piecewise linear, so that a small step of the finite differences loses nothing but rounding."""
    ratio, x = torch.tensor([[math.exp(log_ratio)]], requires_grad=True), torch.tensor([[logprob]], requires_grad=True)
    term, binds = policy_term(loss_type, ratio, torch.tensor([[A]]), x, *clip)
    slopes = torch.autograd.grad(term.sum(), (ratio, x), materialize_grads=True)

    def oracle(ratio_step=0.0, logprob_step=0.0):
        ratio_step = 0.0 if loss_type == "cispo" else ratio_step  # a constant factor: its gradient is stopped
        return oracle_policy_term(loss_type, ratio.item() + ratio_step, A, logprob + logprob_step, clip)

    of_ratio = (oracle(ratio_step=1e-6)[0] - oracle(ratio_step=-1e-6)[0]) / 2e-6
    of_logprob = (oracle(logprob_step=1e-6)[0] - oracle(logprob_step=-1e-6)[0]) / 2e-6
    assert (term.item(), binds.item()) == (pytest.approx(oracle()[0], rel=1e-6, abs=0.0), oracle()[1])  # 3 roundings
    # 1e-7: float64 rounds a term of 60 by 7e-15, divided by the step
    assert [slope.item() for slope in slopes] == pytest.approx([of_ratio, of_logprob], rel=1e-6, abs=1e-7)


@given(mask=masks(), drawn=table(MAX_ROWS, MAX_TOKENS, LOG_RATIOS))
@example(mask=[[0, 0], [1, 1]], drawn=[[1.0] * MAX_TOKENS] * MAX_ROWS)  # a row without a token has ratio 1
@settings(max_examples=60)
def test_the_ratio_of_a_row_is_the_geometric_mean_of_its_tokens_in_each_column(mask, drawn):
    trained = torch.tensor(mask) > 0
    log_ratio = torch.tensor(drawn)[: len(mask), : len(mask[0])].where(trained, 0.0)  # as grpo_loss hands it over
    ratios = row_ratio(log_ratio, trained)
    assert ratios.shape == trained.shape
    for b, row in enumerate(ratios.tolist()):
        log_ratios = [x for x, on in zip(drawn[b], mask[b]) if on]
        expected = oracle_row_ratio(log_ratios) if log_ratios else 1.0
        assert row == pytest.approx([expected] * len(row), rel=ROUNDING)  # float32, log-ratios up to 3


@given(st.lists(grid(-20, 20), min_size=1, max_size=8))
@example([0.0])  # equal policies: exactly 0
def test_k3_matches_the_oracle_over_its_whole_range(gaps):
    """Up to 20, where grpo_loss cuts the gap off. On the grid a gap that is not 0 is at least 1/64 and its k3 1e-4, so
    that what cancels in the oracle's own float64 is 1e-12 of it."""
    values = k3(torch.tensor(gaps))
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx([oracle_k3(gap) for gap in gaps], rel=1e-6, abs=0.0)  # one rounding


@given(mask=masks(), drawn=table(MAX_ROWS, MAX_TOKENS, LOG_RATIOS), junk=st.sampled_from([0.0, 1.0, NAN, INF, -INF]))
@example(mask=[[0, 0]], drawn=[[1.0] * MAX_TOKENS] * MAX_ROWS, junk=NAN)  # the mean of nothing is 0
@settings(max_examples=40)
def test_a_masked_mean_is_that_of_the_values_under_the_mask_whatever_stands_elsewhere(mask, drawn, junk):
    mask = torch.tensor(mask) > 0
    values = torch.tensor(drawn)[: len(mask), : mask.shape[1]].where(mask, junk).requires_grad_()
    result = masked_mean(values, mask)
    assert not result.requires_grad
    assert result.item() == pytest.approx(mean(values[mask].tolist() or [0.0]), rel=0, abs=3 * ROUNDING)  # values to 3


# ---------------------------------------------------------------- losses: value, gradient, metrics


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(case=cases())
@example(case=NOTHING_TRAINED)  # no token: loss 0, gradient 0, a backward that runs
@example(case=ALL_OUT_OF_RANGE)  # the policy term is gone, the KL term stays
@example(case=ROW_WITHOUT_TOKENS)  # GSPO's mean over no token
@settings(max_examples=60)
def test_loss_gradient_and_metrics_match_the_oracle(loss_type, case):
    loss, gradient, metrics = evaluate(loss_type, tensors(case))
    tolerance = rounding(case, loss_type)
    assert loss == pytest.approx(oracle_loss(case, loss_type), rel=0, abs=tolerance)
    slopes = torch.tensor(oracle_gradient(case, loss_type))
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=tolerance + 1e-9)  # 1e-9: the finite differences
    # ratios reach exp(3) = 20, which float32 rounds by 2e-6
    assert metrics == pytest.approx(oracle_metrics(case, loss_type), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_where_nothing_is_trained_ratios_are_one_and_every_other_metric_is_zero(loss_type, beta):
    """Whatever stands there: a run that reports means of nothing reports the numbers of a policy that has not moved."""
    case = Case([[-1.0, NAN]], [[-5.0, INF]], [[-2.0, NAN]], [[0.0, 0.0]], [1.0], mask_range=(0.5, 2.0), beta=beta)
    loss, gradient, metrics = evaluate(loss_type, tensors(case))
    assert loss == 0.0 and not gradient.any()
    zero = {"mismatch_kl", "logprob_difference", "clip_fraction", "masked_fraction"} | ({"kl"} if beta else set())
    assert metrics == {"ratio_min": 1.0, "ratio_max": 1.0} | dict.fromkeys(zero, 0.0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(case=cases())
@settings(max_examples=20)
def test_zero_advantage_gives_zero_gradient(loss_type, case):
    arguments = tensors(replace(case, advantages=[0.0] * len(case.advantages), beta=0.0))
    loss, gradient, _ = evaluate(loss_type, arguments)
    assert loss == 0.0 and not gradient.any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(case=cases())
@settings(max_examples=20)
def test_ratio_one_gives_the_reinforce_gradient(loss_type, case):
    """On policy every loss type is REINFORCE: d loss / d logprob = -A * weight."""
    case = with_weights_of(loss_type, replace(case, behavior=case.logprobs, beta=0.0))
    arguments = tensors(case)
    _, gradient, metrics = evaluate(loss_type, arguments)
    # exp(0) is 1 without rounding; GSPO sums and divides the weights of a row
    torch.testing.assert_close(gradient, -arguments["advantages"][:, None] * arguments["weights"], rtol=1e-6, atol=0.0)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0
    assert metrics["mismatch_kl"] == metrics["clip_fraction"] == metrics["masked_fraction"] == 0.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("log_ratio", [0.5, -0.5])
def test_clipping_stops_the_gradient_on_the_side_that_binds_only(loss_type, advantage, log_ratio):
    """A good token is pushed up only to 1 + clip_high, a bad one down only to 1 - clip_low; on the other sides the
    policy has to come back and the gradient is whole. CISPO keeps every gradient, bounded; `masked` clips nothing."""
    _, gradient, metrics = one_token(loss_type, log_ratio, advantage)
    ratio, binds = math.exp(log_ratio), log_ratio * advantage > 0
    if loss_type == "cispo":
        ratio, binds = min(ratio, 1.2), log_ratio > 0
    elif loss_type in MIN_CLIPPED and binds:
        ratio = 0.0
    assert gradient == pytest.approx(-ratio * advantage, rel=ROUNDING, abs=0.0)
    assert metrics["clip_fraction"] == (1.0 if binds and loss_type != "masked" else 0.0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("log_ratio", [1.0, -1.0])
def test_a_ratio_out_of_range_loses_the_policy_term_and_keeps_the_kl_term(loss_type, advantage, log_ratio):
    knobs = dict(mask_ratio_low=0.5, mask_ratio_high=2.0)
    loss, gradient, metrics = one_token(loss_type, log_ratio, advantage, **knobs)
    assert (loss, gradient, metrics["masked_fraction"]) == (0.0, 0.0, 1.0)
    knobs |= dict(beta=0.5, ref_logprobs=torch.tensor([[-1.0]]))  # the policy's logprob is -2: gap 1
    loss, gradient, metrics = one_token(loss_type, log_ratio, advantage, **knobs)
    expected = (0.5 * (math.e - 2), 0.5 * (1 - math.e), math.e - 2)
    assert (loss, gradient, metrics["kl"]) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_ratio_on_a_bound_is_in_range_and_not_clipped(loss_type):
    for bounds in (dict(mask_ratio_low=1.0), dict(mask_ratio_high=1.0), dict(clip_high=0.0)):
        _, gradient, metrics = one_token(loss_type, 0.0, 1.5, **bounds)
        assert (gradient, metrics["masked_fraction"], metrics["clip_fraction"]) == (-1.5, 0.0, 0.0)


@given(logprob=grid(-8, -3), gap=grid(-3, 3))
@example(logprob=-3.0, gap=0.0)  # equal policies: exactly 0
def test_kl_is_zero_only_where_the_policies_agree_and_positive_elsewhere(logprob, gap):
    knobs = dict(logprobs=torch.tensor([[logprob]]), ref_logprobs=torch.tensor([[logprob + gap]]), beta=1.0)
    loss, gradient, metrics = one_token("dapo", 0.0, 0.0, **knobs)
    # a gap that is not 0 is at least 1/64 and its k3 1e-4, far above float32's rounding of exp(gap)
    assert min(loss, metrics["kl"]) > 0.0 if gap else loss == gradient == metrics["kl"] == 0.0
    assert (gradient > 0) == (gap < 0)  # descent moves the policy towards the reference


@pytest.mark.parametrize("gap", [1e-2, -1e-3, 1e-4, -1e-5, 1e-7])
def test_kl_of_two_nearly_equal_policies_is_not_lost_in_rounding(gap):
    """In float32 exp(gap) - gap - 1 cancels to noise of either sign, just where an on-policy check has to look."""
    case = Case([[0.0]], [[-gap]], [[gap]], [[1.0]], [0.0], beta=1.0)  # about 0 the gap is not rounded away
    loss, gradient, metrics = evaluate("dapo", tensors(case))
    expected = gap**2 / 2 + gap**3 / 6 + gap**4 / 24  # the next term is 1e-8 of it at most
    assert (loss, metrics["kl"], metrics["mismatch_kl"]) == pytest.approx(3 * (expected,), rel=1e-6, abs=0.0)  # float32
    assert gradient.item() == pytest.approx(-math.expm1(gap), abs=1.2e-7)  # 1 - exp(gap): two float32 roundings of 1


# ---------------------------------------------------------------- losses: what must not matter


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(case=cases(), junk=st.sampled_from([NAN, INF, -INF, 1e30, -1e4]))
@example(case=NOTHING_TRAINED, junk=NAN)  # all junk
@settings(max_examples=20)
def test_whatever_stands_on_untrained_tokens_has_no_influence(loss_type, case, junk):
    clean = tensors(case)
    dirty, trained = dict(clean), clean["weights"] > 0
    for name in ("logprobs", "behavior_logprobs", "ref_logprobs"):
        dirty[name] = clean[name].where(trained, junk)
    (loss, gradient, metrics), (loss_2, gradient_2, metrics_2) = evaluate(loss_type, clean), evaluate(loss_type, dirty)
    assert (loss_2, metrics_2) == (loss, metrics)  # exactly: the same operations on the same numbers
    assert torch.equal(gradient_2, gradient) and not gradient_2[~trained].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(case=cases())
@example(case=ROW_WITHOUT_TOKENS)  # a row of which nothing is left
@settings(max_examples=30)
def test_masked_tokens_can_be_deleted_physically(loss_type, case):
    """Each row alone, without its masked tokens, adds up to the padded batch; the gradients are those of the batch."""
    arguments = tensors(case)
    whole = evaluate(loss_type, arguments)
    total, summed = 0.0, torch.zeros_like(whole[1])
    for b, trained in enumerate(arguments["weights"] > 0):
        if trained.any():
            loss, gradient, _ = evaluate(loss_type, only(arguments, b, trained))
            total, summed[b, trained] = total + loss, gradient[0]
    assert_agree(loss_type, case, whole, (total, summed))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(case=cases(), labels=st.lists(st.integers(0, 2), min_size=MAX_ROWS, max_size=MAX_ROWS))
@settings(max_examples=30)
def test_micro_batches_sum_to_the_whole_batch(loss_type, case, labels):
    """With weights made over the whole batch; any partition of the rows, not only equal slices."""
    case = with_weights_of(loss_type, case)
    arguments, labels = tensors(case), torch.tensor(labels[: len(case.weights)])
    whole = evaluate(loss_type, arguments)
    total, summed = 0.0, torch.zeros_like(whole[1])
    for rows in (labels == label for label in labels.unique()):
        loss, gradient, _ = evaluate(loss_type, per_row(arguments, rows))
        total, summed[rows] = total + loss, gradient
    assert_agree(loss_type, case, whole, (total, summed))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(case=cases(), left=st.integers(0, 3), right=st.integers(0, 3))
@settings(max_examples=20)
def test_padding_never_changes_weights_loss_gradient_or_metrics(loss_type, case, left, right):
    case = with_weights_of(loss_type, case)
    arguments = tensors(case)
    padded = per_token(arguments, lambda x: torch.nn.functional.pad(x, (left, right)))
    assert torch.equal(token_weights(padded["weights"] > 0, loss_type, MAX_TOKENS), padded["weights"])
    whole, (loss, gradient, metrics) = evaluate(loss_type, arguments), evaluate(loss_type, padded)
    assert_agree(loss_type, case, whole, (loss, gradient[:, left : gradient.shape[1] - right]))
    assert metrics == pytest.approx(whole[2], rel=1e-5, abs=1e-6)  # sums of exp(3) = 20 in another order


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(case=cases(), order=st.permutations(range(MAX_ROWS)))
@settings(max_examples=20)
def test_row_order_never_matters(loss_type, case, order):
    case = with_weights_of(loss_type, case)
    arguments, order = tensors(case), [b for b in order if b < len(case.weights)]
    moved = per_row(arguments, order)
    assert torch.equal(token_weights(moved["weights"] > 0, loss_type, MAX_TOKENS), moved["weights"])
    (loss, gradient, _), there = evaluate(loss_type, arguments), evaluate(loss_type, moved)
    assert_agree(loss_type, case, (loss, gradient[order]), there)


# ---------------------------------------------------------------- extremes, side effects, errors


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("log_ratio", [1e3, -1e3, 85.0, -85.0, 3e38])
def test_extreme_log_ratios_stay_finite_and_are_clipped_like_any_other(loss_type, advantage, log_ratio):
    """exp(1e3) is infinite in float32 and 0 * inf is NaN; an ordinary second token in the row must not catch it."""
    behavior, ref = [[-2.0 - log_ratio, -2.0]], [[-2.0 + log_ratio, -2.5]]
    case = Case([[-2.0, -2.0]], behavior, ref, [[0.5, 0.5]], [advantage], beta=0.5)
    for mask_range in MASK_RANGES:
        loss, gradient, metrics = evaluate(loss_type, tensors(replace(case, mask_range=mask_range)))
        assert all(map(math.isfinite, [loss, *gradient.flatten().tolist(), *metrics.values()]))
    loss, gradient, _ = one_token(loss_type, log_ratio, advantage)
    if loss_type in MIN_CLIPPED and log_ratio * advantage > 0:
        assert (loss, gradient) == (pytest.approx(-advantage * (1.2 if log_ratio > 0 else 0.8), rel=1e-6), 0.0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_token_that_became_impossible_is_dropped_and_leaves_no_nan(loss_type):
    """Its logprob is -inf, and so is CISPO's term: to lose it is to replace it, as 0 * inf is NaN."""
    knobs = dict(logprobs=torch.tensor([[-INF]]), mask_ratio_low=0.1)
    loss, gradient, metrics = one_token(loss_type, 0.0, 1.5, **knobs)
    assert (loss, gradient, metrics["masked_fraction"]) == (0.0, 0.0, 1.0)
    assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_log_ratio_counts_in_full_up_to_20_and_as_20_beyond(loss_type, sign):
    """exp(20) is 5e8, beyond every clip: from there on the size says no more than that the policies have parted."""
    for log_ratio, counted in ((19.0, 19.0), (20.0, 20.0), (21.0, 20.0), (1e3, 20.0)):
        knobs = dict(beta=1.0, ref_logprobs=torch.tensor([[-2.0 + sign * log_ratio]]))
        _, _, metrics = one_token(loss_type, sign * log_ratio, 1.0, **knobs)
        expected = {"logprob_difference": counted, "ratio_max": math.exp(sign * counted)}
        expected |= dict.fromkeys(("mismatch_kl", "kl"), oracle_k3(sign * counted))
        # float32 holds these numbers but for exp(20), which it rounds relatively
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_function_modifies_its_inputs_and_metrics_carry_no_graph(loss_type):
    case = replace(ALL_OUT_OF_RANGE, weights=[[0.5, 0.0]], mask_range=(0.0, INF))
    arguments = tensors(case) | {"logprobs": torch.tensor([[-3.0, NAN]], requires_grad=True)}
    arguments["behavior_logprobs"][0, 1] = INF
    rewards, ids = torch.tensor([1.0, 0.0]), torch.tensor([4, 4])
    mask, logits = torch.tensor([[1, 0]]), torch.eye(3)[None, :2]  # (1, 2), (1, 2, 3)
    inputs = [*arguments.values(), rewards, ids, mask, logits]
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    _, metrics = grpo_loss(**arguments, loss_type=loss_type)
    for scale in ("group", "batch", "none"):
        group_advantages(rewards, ids, scale)
    token_weights(mask, loss_type, max_tokens=2)
    token_logprobs(logits, mask, 0.5)
    torch.testing.assert_close(inputs, copies, rtol=0, atol=0, equal_nan=True)
    assert not any(getattr(value, "requires_grad", False) for value in metrics.values())


ROW, ZEROS = torch.tensor([[-1.0, -2.0]]), torch.zeros(2)
REFUSED = [  # what the message must name, and the call
    ("rewards", lambda: group_advantages(torch.tensor([0.0, NAN]), None)),
    ("rewards", lambda: group_advantages(torch.tensor([0.0, -INF]), None)),
    ("group_ids", lambda: group_advantages(ZEROS, torch.zeros(3, dtype=torch.long))),
    ("best", lambda: group_advantages(ZEROS, None, "best")),
    ("temperature", lambda: token_logprobs(ROW, torch.tensor([0]), 0.0)),
    ("temperature", lambda: token_logprobs(ROW, torch.tensor([0]), -1.0)),
    ("ppo", lambda: token_weights(ROW, "ppo")),
    ("reinforce", lambda: grpo_loss(ROW, ROW, torch.ones(1), ROW.abs(), loss_type="reinforce")),
    ("max_tokens", lambda: token_weights(ROW, "dr_grpo")),
    ("max_tokens", lambda: token_weights(ROW, "dr_grpo", max_tokens=0)),
    ("ref_logprobs", lambda: grpo_loss(ROW, ROW, torch.ones(1), ROW.abs(), beta=0.1)),
]


@pytest.mark.parametrize(("named", "call"), REFUSED)
def test_an_impossible_argument_is_refused_by_name(named, call):
    with pytest.raises(ValueError, match=named):
        call()
