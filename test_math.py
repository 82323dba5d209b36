"""Tests of the math in mm_grpo.py: advantages, token logprobs, token weights, losses and their gradients.

    pytest test_math.py

Values are held against an oracle in plain Python: float64, loops over rows and tokens, written from the papers and not
from the code. Gradients are held against central differences of that oracle. The rest are properties: what must not
matter (padding, row order, the split into micro-batches, masked tokens, the level of the rewards), what must be exactly
zero, and what must stay finite. Drawn numbers are multiples of 1/64: float32 holds them exactly, so that code and oracle
see the same inputs and a tolerance has to cover the rounding of the arithmetic alone.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mm_grpo import group_advantages, grpo_loss, token_logprobs, token_weights

INF, NAN = math.inf, math.nan
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "masked")
MIN_CLIPPED = ("grpo", "dr_grpo", "dapo", "gspo")  # -min(ratio * A, clip(ratio) * A)
CLIPS = ((0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4))  # PPO's, DAPO's, GSPO's
MASK_RANGES = ((0.0, INF), (0.5, 2.0), (0.1, 10.0))
MAX_ROWS, MAX_TOKENS = 4, 5

# A float32 operation rounds by up to 6e-8 of its result. The longest chain here (subtract, exp, clip, two products, a sum of
# 20) is about 30 of them: 2e-6 of the summed size of the terms.
ROUNDING = 2e-6
# Logits divided by the temperature reach 40, where float32 rounds by 40 * 6e-8 = 2.4e-6; a log-softmax has a few such steps.
LOGIT_ROUNDING = 1e-5


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


def mean(values):
    return math.fsum(values) / len(values)


def sample_std(values):
    return math.sqrt(math.fsum((x - mean(values)) ** 2 for x in values) / (len(values) - 1))


def k3(gap):
    """Schulman's estimator of KL(policy || other), gap = log other - log policy; used by GRPO, arXiv 2402.03300 eq. 4."""
    return math.exp(gap) - gap - 1


def oracle_advantages(rewards, group_ids, scale):
    """Group-relative advantage, arXiv 2402.03300 section 4.1.2; no division: 2503.20783; the batch's spread: 2508.08221."""
    advantages = []
    for reward, group_id in zip(rewards, group_ids):
        group = [r for r, g in zip(rewards, group_ids) if g == group_id]
        advantage = reward - mean(group) if max(group) > min(group) else 0.0
        if scale != "none" and advantage:
            advantage /= sample_std(group if scale == "group" else rewards) + 1e-4
        advantages.append(advantage)
    return advantages


def oracle_weight(mask, row, loss_type, max_tokens):
    """Weight of a trained token of `row`. GRPO 2402.03300 eq. 3 and GSPO 2507.18071 eq. 5: mean over the row's tokens, then
    over rows. Dr. GRPO 2503.20783: a constant. DAPO 2503.14476 eq. 8 and CISPO 2506.13585 eq. 4: mean over all tokens."""
    if loss_type in ("grpo", "gspo"):
        return 1 / sum(mask[row]) / len(mask)
    if loss_type == "dr_grpo":
        return 1 / (len(mask) * max_tokens)
    return 1 / sum(map(sum, mask))


def oracle_loss(case, loss_type, moved=None):
    """(loss, metrics, size), one token after the other; size sums the magnitudes of all terms, to scale tolerances.

    PPO's clipped surrogate as in GRPO 2402.03300 eq. 3, DAPO 2503.14476 eq. 8 (two clip bounds), Dr. GRPO 2503.20783; GSPO
    2507.18071 eq. 5-7 (one length-normalised ratio a row); CISPO 2506.13585 eq. 4-5, with an upper bound only. `moved` takes
    the place of case.logprobs for finite differences; CISPO's ratio stays where it was: its gradient is stopped.
    """
    moved = moved or case.logprobs
    clip_low, clip_high = case.clip
    loss, size, seen = 0.0, 0.0, []
    for b, A in enumerate(case.advantages):
        trained = [t for t, weight in enumerate(case.weights[b]) if weight]
        for t in trained:
            log_ratio = moved[b][t] - case.behavior[b][t]
            ratio = math.exp(log_ratio)
            if loss_type == "gspo":
                ratio = math.exp(mean([moved[b][u] - case.behavior[b][u] for u in trained]))
            if loss_type == "cispo":
                ratio = math.exp(case.logprobs[b][t] - case.behavior[b][t])
                policy, binds = -min(ratio, 1 + clip_high) * A * moved[b][t], ratio > 1 + clip_high
            elif loss_type == "masked":
                policy, binds = -ratio * A, False
            else:
                clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
                policy, binds = -min(ratio * A, clipped * A), clipped * A < ratio * A
            kept = case.mask_range[0] <= ratio <= case.mask_range[1]
            gap = case.ref[b][t] - moved[b][t]
            loss += case.weights[b][t] * ((policy if kept else 0.0) + case.beta * k3(gap))
            size += case.weights[b][t] * (abs(policy) + abs(A) * (1 + ratio) + case.beta * (math.exp(gap) + abs(gap) + 1))
            seen.append((k3(log_ratio), abs(log_ratio), math.exp(log_ratio), binds, not kept, k3(gap)))
    mismatch, gaps, ratios, binding, dropped, kl = zip(*seen) if seen else ([0], [0], [1], [0], [0], [0])
    metrics = {"mismatch_kl": mean(mismatch), "logprob_difference": mean(gaps), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    metrics |= {"clip_fraction": mean(binding), "masked_fraction": mean(dropped)} | ({"kl": mean(kl)} if case.beta else {})
    return loss, metrics, size


def oracle_gradient(case, loss_type, step=1e-5):
    """d loss / d logprobs by central differences: in float64 a step of 1e-5 leaves an error of about 1e-10."""

    def loss_at(b, t, shift):
        moved = [list(row) for row in case.logprobs]
        moved[b][t] += shift
        return oracle_loss(case, loss_type, moved)[0]

    T = range(len(case.logprobs[0]))
    return [[(loss_at(b, t, step) - loss_at(b, t, -step)) / (2 * step) for t in T] for b in range(len(case.logprobs))]


def oracle_softmax(logits, target, temperature):
    """(log p(target), entropy in nats) of softmax(logits / temperature) over one position's V logits."""
    scaled = [x / temperature for x in logits]
    log_z = max(scaled) + math.log(math.fsum(math.exp(x - max(scaled)) for x in scaled))
    return scaled[target] - log_z, -math.fsum(math.exp(x - log_z) * (x - log_z) for x in scaled)


# ---------------------------------------------------------------- drawn inputs


def grid(low, high):
    return st.integers(round(low * 64), round(high * 64)).map(lambda k: k / 64)


def table(rows, tokens, elements):
    return st.lists(st.lists(elements, min_size=tokens, max_size=tokens), min_size=rows, max_size=rows)


LOG_RATIOS = grid(-0.4, 0.4) | grid(-3, 3)  # about the clip bounds, and far beyond them and the mask range


@st.composite
def cases(draw):
    """Ragged batches: any token may be untrained, so may a whole row; weights are arbitrary, not those of a loss type."""
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
ALL_OUT_OF_RANGE = Case([[-3.0, -1.0]], [[-6.0, -4.0]], [[-3.5, -1.0]], [[0.5, 0.5]], [1.0], mask_range=(0.5, 2.0), beta=1.0)
ROW_WITHOUT_TOKENS = Case([[-3.0], [-3.0]], [[-3.5], [-3.0]], [[-3.0], [-3.0]], [[0.0], [1.0]], [5.0, -1.0])


# ---------------------------------------------------------------- the code under test, called one way


def tensors(case):
    """The arguments of grpo_loss for a case. ref_logprobs is always there: with beta = 0 it must not matter."""
    values = [torch.tensor(x) for x in (case.logprobs, case.behavior, case.ref, case.weights, case.advantages)]
    arguments = dict(zip(("logprobs", "behavior_logprobs", "ref_logprobs", "weights", "advantages"), values), beta=case.beta)
    arguments |= {"clip_low": case.clip[0], "clip_high": case.clip[1]}
    return arguments | {"mask_ratio_low": case.mask_range[0], "mask_ratio_high": case.mask_range[1]}


def evaluate(loss_type, arguments):
    """(loss, gradient with respect to logprobs, metrics)."""
    logprobs = arguments["logprobs"].clone().requires_grad_()
    loss, metrics = grpo_loss(**(arguments | {"logprobs": logprobs}), loss_type=loss_type)
    assert loss.shape == ()
    loss.backward()
    return loss.item(), logprobs.grad, {name: float(value) for name, value in metrics.items()}


def one_token(loss_type, log_ratio, advantage, **knobs):
    """Loss, gradient and metrics of one token of weight 1 and logprob -2, as plain numbers."""
    case = Case([[-2.0]], [[-2.0 - log_ratio]], [[-2.0]], [[1.0]], [advantage])
    loss, gradient, metrics = evaluate(loss_type, tensors(case) | knobs)
    return loss, gradient.item(), metrics


def per_token(arguments, change):
    """The arguments with `change` applied to each (B, T) tensor."""
    return {k: change(v) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in arguments.items()}


def per_row(arguments, rows):
    return {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def with_weights_of(loss_type, case):
    """The case with this loss type's own weights over its mask; rows without a token stay."""
    mask = torch.tensor(case.weights) > 0
    return replace(case, weights=token_weights(mask, loss_type, max_tokens=MAX_TOKENS).tolist())


def assert_agree(loss_type, case, one, other):
    """Two (loss, gradient, ...) of a case agree, up to the rounding of sums that were taken in another order."""
    tolerance = ROUNDING * oracle_loss(case, loss_type)[2]
    assert one[0] == pytest.approx(other[0], rel=0, abs=tolerance)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=tolerance)


# ---------------------------------------------------------------- advantages


def test_advantages_of_one_success_in_four_by_hand():
    """Mean 1/4, unbiased std 1/2: (1 - 1/4) / (1/2 + 1e-4). A biased std, or no epsilon, is another number."""
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), None)
    assert advantages.tolist() == pytest.approx([0.75 / 0.5001] + 3 * [-0.25 / 0.5001], rel=1e-6)  # float32 output


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
    """Exact, whatever the value and the size: a mean that is off by a rounding becomes a real advantage once it is divided
    (and the float64 mean of six times 0.1 is not 0.1). The second group has spread: the batch's std is not zero."""
    for size in range(1, 12):
        rewards, ids = torch.tensor([reward] * size + [0.0, 1.0], dtype=dtype), torch.tensor([5] * size + [2, 2])
        advantages = group_advantages(rewards, ids, scale)
        assert advantages[:size].tolist() == [0.0] * size
        assert advantages[-1] > 0.0 > advantages[-2]
        assert group_advantages(rewards[:size], None, scale).tolist() == [0.0] * size


@given(st.lists(grid(-4, 4), min_size=1, max_size=8), GROUP_IDS, st.integers(-(2**16), 2**16), SCALES)
def test_a_constant_added_to_all_rewards_changes_no_advantage(rewards, ids, shift, scale):
    rewards, ids = torch.tensor(rewards), torch.tensor(ids[: len(rewards)])
    before, after = (group_advantages(r, ids, scale) for r in (rewards, rewards + shift))  # exact: 17 bits + 6 binary places
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
    """bfloat16 logits meet the float32 tolerance too: the log-softmax and the division are float32. In bfloat16 they would
    be off by 1e-2."""
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
    token_logprobs(logits, targets, temperature)[0].sum().backward()
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
    low = (logits[0, 1] - logits[0, 0]).item() / temperature  # the differences are exact also in bfloat16: 2 x one value
    assert logprobs.tolist() == pytest.approx([0.0, low, -math.log(3), -math.log(3)], rel=1e-6)  # float32
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
        assert (logprob.item(), entropy.item()) == pytest.approx((logprobs[b, t].item(), entropies[b, t].item()), abs=1e-6)


# ---------------------------------------------------------------- token weights


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(mask=masks(), max_tokens=st.integers(1, 9))
@example(mask=[[0, 0], [0, 0]], max_tokens=3)  # nothing to train on: zeros, no division by zero
@example(mask=[[0, 0, 0], [1, 1, 1]], max_tokens=3)  # an empty row adds nothing and still counts as a row
@settings(max_examples=40)
def test_weights_match_the_oracle(loss_type, mask, max_tokens):
    expected = [[oracle_weight(mask, b, loss_type, max_tokens) if on else 0.0 for on in row] for b, row in enumerate(mask)]
    for dtype in (torch.bool, torch.long, torch.float32):
        weights = token_weights(torch.tensor(mask, dtype=dtype), loss_type, max_tokens=max_tokens)
        assert weights.dtype == torch.float32
        for row, expected_row in zip(weights.tolist(), expected, strict=True):
            assert row == pytest.approx(expected_row, rel=1e-6, abs=0.0)  # two float32 divisions; zeros are exact


# ---------------------------------------------------------------- losses: value, gradient, metrics


def test_drawn_ratios_keep_clear_of_every_clip_and_mask_bound():
    """What lets the tests below compare on both sides of a bound without a filter: the mean of n <= 5 log-ratios, all on
    the grid, is further than a finite-difference step (1e-5 / n) and a rounding (1e-7) from the logarithm of each bound."""
    bounds = [1 - low for low, _ in CLIPS] + [1 + high for _, high in CLIPS] + [0.5, 2.0, 0.1, 10.0]
    for spacing in (1 / (64 * n) for n in range(1, MAX_TOKENS + 1)):
        for place in (math.log(bound) / spacing for bound in bounds):
            assert abs(place - round(place)) * spacing > 64 * spacing * 1e-5 + 1e-6


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(case=cases())
@example(case=NOTHING_TRAINED)  # no token: loss 0, gradient 0, a backward that runs
@example(case=ALL_OUT_OF_RANGE)  # the policy term is gone, the KL term stays
@example(case=ROW_WITHOUT_TOKENS)  # GSPO's mean over no token
@settings(max_examples=60)
def test_loss_gradient_and_metrics_match_the_oracle(loss_type, case):
    loss, gradient, metrics = evaluate(loss_type, tensors(case))
    expected, expected_metrics, size = oracle_loss(case, loss_type)
    assert loss == pytest.approx(expected, rel=0, abs=ROUNDING * size)
    slopes = torch.tensor(oracle_gradient(case, loss_type))
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=ROUNDING * size + 1e-9)  # 1e-9: the finite differences
    assert {name: metrics.get(name) for name in expected_metrics} == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5)
    assert ("kl" in metrics) == (case.beta > 0)  # above: ratios reach exp(3) = 20, which float32 rounds by 2e-6


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
    """A good token is pushed up only to 1 + clip_high, a bad one down only to 1 - clip_low; on the other sides the policy has
    to come back and the gradient is whole. CISPO keeps every token's gradient, bounded; `masked` clips nothing."""
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
    arguments = tensors(Case([[0.0]], [[-gap]], [[gap]], [[1.0]], [0.0], beta=1.0))  # about 0 the gap is not rounded away
    loss, gradient, metrics = evaluate("dapo", arguments)
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
            row = per_token(per_row(arguments, [b]), lambda x: x[:, trained])  # (1, number of trained tokens)
            loss, gradient, _ = evaluate(loss_type, row)
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
    """exp(1e3) is infinite in float32 and 0 * inf is NaN; an ordinary second token in the row must not catch it either."""
    behavior, ref = [[-2.0 - log_ratio, -2.0]], [[-2.0 + log_ratio, -2.5]]
    case = Case([[-2.0, -2.0]], behavior, ref, [[0.5, 0.5]], [advantage], beta=0.5)
    for mask_range in MASK_RANGES:
        loss, gradient, metrics = evaluate(loss_type, tensors(replace(case, mask_range=mask_range)))
        assert all(map(math.isfinite, [loss, *gradient.flatten().tolist(), *metrics.values()]))
    loss, gradient, _ = one_token(loss_type, log_ratio, advantage)
    if loss_type in MIN_CLIPPED and log_ratio * advantage > 0:
        assert (loss, gradient) == (pytest.approx(-advantage * (1.2 if log_ratio > 0 else 0.8), rel=1e-6), 0.0)


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
