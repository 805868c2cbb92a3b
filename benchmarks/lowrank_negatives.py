"""Negative second moments that truncation leaves: what to do with them, in float64.

python -m benchmarks.lowrank_negatives
"""

import numpy as np

B1, B2, EPS, STEPS, P, Q = 0.9, 0.999, 1e-8, 150, 96, 128
LEAST = (1 - B2) * (1 - B1**2 / B2) / (1 - B1) ** 2
WAYS = {
    "zero": lambda v, size: np.maximum(v, 0),
    "mean in place of negatives (MLorc)": lambda v, size: np.where(v < 0, size, v),
    "nothing below the mean": lambda v, size: np.maximum(v, size),
}


def truncated(x, rank):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def run(way, rank, sparse, bounded):
    """Median relative error of the update against Adam's, and its largest element."""
    rng = np.random.default_rng(1)
    scales = np.exp(rng.normal(size=(P, 1))) * np.exp(rng.normal(size=(1, Q)))
    left, right = rng.normal(size=(P, 4)), rng.normal(size=(4, Q))
    low_m = low_v = m = v = np.zeros((P, Q))
    errors, largest = [], 0.0
    for t in range(1, STEPS + 1):
        g = rng.normal(size=(P, Q)) + (left * rng.normal(size=4)) @ right / 2
        g = g * scales * (rng.random((P, 1)) < 0.1 if sparse else 1)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        low_m = B1 * truncated(low_m, rank) + (1 - B1) * g
        low_v = truncated(low_v, rank)
        negative = low_v[low_v < 0]
        size = -negative.mean() if negative.size else 0.0
        low_v = B2 * WAYS[way](low_v, size) + (1 - B2) * g * g
        if bounded:
            low_v = np.maximum(low_v, LEAST * low_m**2)
        c1, c2 = 1 - B1**t, 1 - B2**t
        u = m / c1 / (np.sqrt(v / c2) + EPS)
        low_u = low_m / c1 / (np.sqrt(low_v / c2) + EPS)
        if t > 20:
            errors.append(np.linalg.norm(low_u - u) / np.linalg.norm(u))
            largest = max(largest, np.abs(low_u).max())
    return np.median(errors), largest


def main():
    print("| gradients | rank | negatives | Cauchy-Schwarz bound | error | largest |")
    print("|---|---|---|---|---|---|")
    for sparse in (False, True):
        for rank in (4, 16):
            for way in WAYS:
                for bounded in (False, True):
                    error, largest = run(way, rank, sparse, bounded)
                    print(
                        f"| {'sparse rows' if sparse else 'dense'} | {rank} | {way} | "
                        f"{'yes' if bounded else 'no'} | {error:.3g} | {largest:.3g} |"
                    )


if __name__ == "__main__":
    main()
