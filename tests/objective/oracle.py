"""The objective again, in float64 numpy with loops, written from the papers' formulas and not from the implementation.

Gradients are by hand, term by term. Slow and plain on purpose.
"""

from __future__ import annotations

import math

import numpy as np

PAPER = {  # ratio, surrogate, averaging, bounds
    "grpo": ("token", "clip", "sequence", 0.2, 0.2),
    "bnpo": ("token", "clip", "token", 0.2, 0.2),
    "dr_grpo": ("token", "clip", "constant", 0.2, 0.2),
    "dapo": ("token", "clip", "token", 0.2, 0.28),
    "gspo": ("sequence", "clip", "sequence", 3e-4, 4e-4),
    "gspo_token": ("sequence_token", "clip", "sequence", 3e-4, 4e-4),
    "cispo": ("token", "cispo", "token", None, None),
    "sapo": ("token", "sapo", "sequence", None, None),
    "luspo": ("sequence", "clip", "sum", 2e-3, 2.5e-3),
    "vespo": ("token", "vespo", "token", None, None),
    "gmpo": ("token", "gmpo", "sequence", 0.4, 0.4),
    "dppo": ("token", "dppo", "token", 0.15, 0.15),
    "reinforce++": ("token", "reinforce", "token", None, None),
    "rloo": ("token", "reinforce", "token", None, None),
}


def weights(mask: np.ndarray, averaging: str, longest: int) -> np.ndarray:
    """`mask` is 1 on the tokens that count; every row, whatever is left of it, was sampled and is one of N."""
    out = np.zeros_like(mask)
    rows, tokens = len(mask), mask.sum()
    for i in range(rows):
        length = mask[i].sum()
        for t in range(mask.shape[1]):
            if mask[i, t]:
                out[i, t] = {
                    "sequence": 1 / (rows * max(length, 1)),
                    "token": 1 / max(tokens, 1),
                    "constant": 1 / (rows * longest),
                    "sum": 1 / rows,
                }[averaging]
    return out


def highest_entropy(entropies: np.ndarray, mask: np.ndarray, fraction: float) -> np.ndarray:
    """The mask cut down to that fraction of its tokens, rounded up; no two entropies are equal."""
    places = sorted(((entropies[i, t], i, t) for i, t in np.argwhere(mask)), reverse=True)
    out = np.zeros_like(mask)
    for _, i, t in places[: math.ceil(fraction * len(places) - 1e-9)]:
        out[i, t] = 1
    return out


def clip_term(r: float, a: float, low: float, high: float, delta: float | None) -> tuple[float, float]:
    """-min(min(r, δ) A, clip(r) A) and its derivative with respect to r."""
    first, d_first = (r, 1.0) if delta is None or r < delta else (delta, 0.0)
    second, d_second = (r, 1.0) if low < r < high else (min(max(r, low), high), 0.0)
    if first * a < second * a:
        return -first * a, -d_first * a
    if first == second:
        return -first * a, -max(d_first, d_second) * a
    return -second * a, -d_second * a


def loss_and_gradient(name: str, lp, batch: dict, settings: dict) -> tuple[float, np.ndarray]:
    """The loss of one batch whose `weights` are given, and its gradient with respect to each current logprob."""
    ratio_kind, surrogate, _, eps, eps_high = PAPER[name]
    ratio_kind = settings.get("ratio", ratio_kind)
    symmetric = eps == eps_high
    eps = settings.get("epsilon", eps)
    eps_high = settings.get("epsilon_high", eps if symmetric else eps_high)
    mask, w, adv = batch["mask"], batch["weights"], batch["advantages"]
    old = batch.get("anchor", lp)
    sampled = batch.get("sampler", batch.get("behaviour"))
    start = np.where(np.isnan(sampled), old, sampled) if surrogate == "dppo" else old  # what ratios are to
    total, grad = 0.0, np.zeros_like(lp)
    for i in range(len(mask)):
        valid = [t for t in range(mask.shape[1]) if mask[i, t]]
        if not valid:
            continue
        a, n = float(adv[i]), len(valid)
        logr = {t: lp[i, t] - start[i, t] for t in valid}
        mean_logr, sum_logr = sum(logr.values()) / n, sum(logr.values())
        keep = 1.0
        if (threshold := settings.get("off_policy_mask_threshold")) is not None:
            behaviour = batch.get("behaviour", old)
            gaps = [behaviour[i, t] - lp[i, t] for t in valid]
            drift = sum(0.0 if math.isnan(gap) else gap for gap in gaps) / n
            keep = 0.0 if (drift > threshold and a < 0) else 1.0
        log_w = {t: 0.0 for t in valid}
        form = settings.get("importance_sampling_correction", "none")
        if form != "none":
            for t in valid:
                gap = old[i, t] - sampled[i, t]
                log_w[t] = 0.0 if math.isnan(gap) else gap
            if form.startswith("sequence"):
                log_w = dict.fromkeys(valid, sum(log_w.values()))
        cap, floor = settings.get("importance_sampling_cap", 3.0), settings.get("importance_sampling_floor", 0.0)
        correction = {}
        for t in valid:
            w_t = math.exp(log_w[t])
            inside = floor <= w_t <= cap
            correction[t] = min(w_t, cap) if form.endswith("truncate") else w_t if inside or form == "none" else 0.0
        if surrogate == "vespo":  # the weights go into W, with a floor of 1e-8 each and in all
            sum_logr += sum(math.log(max(w_t, 1e-8)) for w_t in correction.values())
            sum_logr = max(sum_logr, math.log(1e-8))
            correction = dict.fromkeys(valid, 1.0)
        for t in valid:
            factor = correction[t] * keep
            value, d_token, d_all = token_term(
                surrogate,
                ratio_kind,
                lp[i, t],
                start[i, t],
                logr[t],
                mean_logr,
                sum_logr,
                logr,
                n,
                a,
                eps,
                eps_high,
                settings,
            )
            total += w[i, t] * factor * value
            grad[i, t] += w[i, t] * factor * d_token
            for u, d in d_all.items():
                grad[i, u] += w[i, t] * factor * d
            if (beta := settings.get("beta", 0.0)) > 0:
                d = batch["reference"][i, t] - lp[i, t]
                kl, d_kl = {
                    "k1": (-d, 1.0),
                    "k2": (d * d / 2, -d),
                    "k3": (math.exp(d) - d - 1, 1 - math.exp(d)),
                }[settings.get("kl_estimator", "k3")]
                if settings.get("kl_importance"):
                    r = math.exp(logr[t])
                    kl, d_kl = r * kl, r * (kl + d_kl)
                total += w[i, t] * beta * kl
                grad[i, t] += w[i, t] * beta * d_kl
    return total, grad


def token_term(surrogate, ratio_kind, lp, old, logr, mean_logr, sum_logr, every, n, a, eps, eps_high, settings):
    """A token's loss, its derivative through the token's own logprob, and through all of the sequence's."""
    r = math.exp(logr)
    if surrogate == "clip":
        seen = r if ratio_kind == "token" else math.exp(mean_logr)
        value, d = clip_term(seen, a, 1 - eps, 1 + eps_high, settings.get("delta"))
        if ratio_kind == "sequence":
            return value, 0.0, {u: d * seen / n for u in every}
        return value, d * seen, {}
    if surrogate == "cispo":
        r = r if ratio_kind == "token" else math.exp(mean_logr)
        capped = min(r, settings.get("epsilon_max", 5.0))
        return -capped * a * lp, -capped * a, {}
    if surrogate == "sapo":
        tau = settings.get("sapo_temperature_pos", 1.0) if a > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * r * a, {}
    if surrogate == "vespo":
        k, lam = (settings.get("vespo_k_pos", 2.0), 3.0) if a >= 0 else (3.0, settings.get("vespo_lambda_neg", 2.0))
        phi = math.exp(lam) * math.exp(sum_logr) ** k * math.exp(-lam * math.exp(sum_logr))
        return -phi * a * lp, -phi * a, {}
    if surrogate == "gmpo":
        bounded = {u: (min(x, eps_high) if a > 0 else max(x, -eps)) for u, x in every.items()}
        geometric = math.exp(sum(bounded.values()) / n)
        free = {u: (every[u] < eps_high if a > 0 else every[u] > -eps) for u in every}
        return -a * geometric, 0.0, {u: -a * geometric / n * free[u] for u in every}
    if surrogate == "dppo":
        moved = math.exp(lp) - math.exp(old)
        gone = (a > 0 and moved > eps_high) or (a <= 0 and moved < -eps)
        weight = 0.0 if gone else min(r, 20.0)
        c = settings.get("dppo_penalty", 0.0)
        return -weight * a * lp + c * logr**2, -weight * a + 2 * c * logr, {}
    return -a * lp, -a, {}


def advantages(rewards: np.ndarray, w: np.ndarray, size: int, baseline: str, scale: str) -> np.ndarray:
    out = np.zeros(len(rewards))
    total = np.full(len(rewards), np.nan)
    for i, row in enumerate(rewards):
        known = [w[f] * row[f] for f in range(len(w)) if w[f] != 0 and not np.isnan(row[f])]
        if known:
            total[i] = sum(known)
    scored = total[~np.isnan(total)]
    batch_sd = np.std(scored, ddof=1) if len(scored) > 1 else 0.0
    if baseline == "gdpo":
        summed = np.full(len(rewards), np.nan)
        for g in range(0, len(rewards), size):
            for f in range(len(w)):
                column = rewards[g : g + size, f]
                known = column[~np.isnan(column)]
                if w[f] == 0 or not len(known):
                    continue
                sd = np.std(known, ddof=1) if len(known) > 1 else 0.0
                for j in range(size):
                    if not np.isnan(column[j]):
                        z = 0.0 if np.ptp(known) == 0 else (column[j] - known.mean()) / (sd + 1e-4)
                        summed[g + j] = np.nansum([summed[g + j], 0.0]) + w[f] * z
        known = summed[~np.isnan(summed)]
        for i, value in enumerate(summed):
            if not np.isnan(value) and np.ptp(known) > 0:
                out[i] = (value - known.mean()) / (np.std(known, ddof=1) + 1e-4)
        return out
    if baseline == "batch":
        for i, value in enumerate(total):
            if not np.isnan(value) and np.ptp(scored) > 0:
                out[i] = (value - scored.mean()) / (batch_sd + 1e-4)
        return out
    for g in range(0, len(rewards), size):
        group = total[g : g + size]
        known = group[~np.isnan(group)]
        if len(known) == 0 or np.ptp(known) == 0:
            continue
        sd = np.std(known, ddof=1)
        for j, value in enumerate(group):
            if np.isnan(value):
                continue
            a = value - known.mean()
            if baseline == "maxrl":
                out[g + j] = a / known.mean() if known.mean() > 0 else 0.0
                continue
            if baseline == "leave_one_out":
                a = value - (known.sum() - value) / (len(known) - 1)
            out[g + j] = a / {"group": sd + 1e-4, "batch": batch_sd + 1e-4, "none": 1.0}[scale]
    return out
