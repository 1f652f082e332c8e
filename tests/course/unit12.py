"""Right answers to the exercises of unit 12, written differently from their solutions."""

import math
from itertools import product
from statistics import NormalDist, mean, stdev

import numpy as np

_T_975 = {4: 2.776445, 5: 2.570582, 6: 2.446912}  # Student's t, from a table
_T_950 = {5: 2.015048}


def _fallen_by_convolution(scores):
    best = max([scores[0], scores[:2].mean(), *np.convolve(scores, np.full(3, 1 / 3), "valid")])
    final = scores[-3:].mean()
    return final, best, final / best < 0.7


def _fallen_by_loops(scores):
    means = []
    for i in range(len(scores)):
        part = [float(x) for x in scores[: i + 1]][-3:]
        means.append(sum(part) / len(part))
    return np.array([means[-1], max(means), max(means) * 0.7 > means[-1]])


def _paired_by_table(a, b):
    differences = [x - y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    n = len(differences)
    half = _T_975[n - 1] * stdev(differences) / math.sqrt(n)
    return mean(differences), mean(differences) - half, mean(differences) + half


def _paired_by_covariance(a, b):
    """Var(a − b) = Var(a) + Var(b) − 2 Cov(a, b)."""
    (va, cab), (_, vb) = np.cov(a, b)
    error = np.sqrt((va + vb - 2 * cab) / len(a))
    middle = a.mean() - b.mean()
    return np.array([middle, middle - _T_975[len(a) - 1] * error, middle + _T_975[len(a) - 1] * error])


def _flips_by_product(d):
    reached = [abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-9 for signs in product((1, -1), repeat=len(d))]
    return sum(reached) / len(reached)


def _flips_by_bits(d):
    n, count = len(d), 0
    for pattern in range(2**n):
        total = sum(x if pattern >> i & 1 else -x for i, x in enumerate(d.tolist()))
        count += abs(total) + 1e-9 >= abs(d.sum())
    return count / 2**n


def _wilson_by_roots(k, n):
    """(k/n − p)² = z² p(1 − p)/n as a quadratic in p."""
    z2 = NormalDist().inv_cdf(0.975) ** 2
    roots = np.roots([1 + z2 / n, -(2 * k / n + z2 / n), (k / n) ** 2])
    return sorted(roots.real)


def _wilson_with_counts(k, n):
    z = 1.96
    total, half = n + z * z, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return np.array([k + z * z / 2 - half, k + z * z / 2 + half]) / total


def _equal_by_two_tests(a, b, margin):
    d = a - b
    n, error = len(d), d.std(ddof=1) / math.sqrt(len(d))
    critical = _T_950[n - 1]
    above, below = (d.mean() + margin) / error > critical, (margin - d.mean()) / error > critical
    return d.mean() - critical * error, d.mean() + critical * error, above and below


def _equal_by_farther_end(a, b, margin):
    differences = (a - b).tolist()
    half = _T_950[len(differences) - 1] * stdev(differences) / len(differences) ** 0.5
    low, high = mean(differences) - half, mean(differences) + half
    return low, high, max(abs(low), abs(high)) < margin


def _verdict_by_all_and_any(criteria):
    if any(high < 0 and high < margin for _, high, margin in criteria):
        return "opposite"
    return "reproduced" if all(low > margin for low, _, margin in criteria) else "inconclusive"


def _verdict_by_the_weakest(criteria):
    marks = [2 if low > margin else 0 if high < min(0, margin) else 1 for low, high, margin in criteria]
    return ("opposite", "inconclusive", "reproduced")[min(marks)]


RIGHT = {
    "12.1": (_fallen_by_convolution, _fallen_by_loops),
    "12.2": (_paired_by_table, _paired_by_covariance),
    "12.3": (_flips_by_product, _flips_by_bits),
    "12.4": (_wilson_by_roots, _wilson_with_counts),
    "12.5": (_equal_by_two_tests, _equal_by_farther_end),
    "12.6": (_verdict_by_all_and_any, _verdict_by_the_weakest),
}
