"""A study's statistics, verdicts, costs and page, from JSON made here."""

import math

import numpy as np

CRITERIA = [
    {
        "name": "Memory falls by 20 %",
        "kind": "success",
        "metric": "peak_bytes.live",
        "compare": "relative",
        "at_most": -0.2,
    },
    {
        "name": "Perplexity rises by 1.0 at most",
        "kind": "success",
        "metric": "metrics.perplexity",
        "compare": "difference",
        "at_most": 1.0,
        "models": ["gpt"],
    },
    {
        "name": "Accuracy falls by 1 % at most",
        "kind": "success",
        "metric": "metrics.accuracy",
        "compare": "difference",
        "at_least": -0.01,
        "models": ["resnet"],
    },
    {
        "name": "Throughput falls by 10 % at most",
        "kind": "success",
        "metric": "units_per_second",
        "compare": "relative",
        "at_least": -0.1,
        "needs": "gpu",
        "why": "kernels are for GPUs; on a CPU quantisation is slower",
    },
    {
        "name": "No run diverges",
        "kind": "success",
        "metric": "diverged",
        "compare": "value",
        "at_most": 0,
    },
    {
        "name": "Validation loss rises by more than 5 %",
        "kind": "failure",
        "metric": "val_loss",
        "compare": "relative",
        "at_least": 0.05,
    },
    {
        "name": "Loss above 12 after warmup",
        "kind": "abort",
        "metric": "loss",
        "compare": "value",
        "at_most": 12,
        "after_step": 50,
    },
]
CONDITIONS = {
    "float32": {"title": "float32 (optax.adamw)", "config": {"optimizer": "adamw"}},
    "int8": {
        "title": "8-bit momentum",
        "config": {"optimizer": "adamw@flashoptim", "param_dtype": "bfloat16"},
        "by_model": {"resnet": {"optimizer": "sgd@flashoptim"}},
    },
    "int4": {"title": "4-bit momentum", "config": {"optimizer": "adamw4"}},
}
BYTES = {"float32": (4, 0, 8, 4), "int8": (2, 1, 2.1, 2), "int4": (2, 1, 1.1, 2)}


def study_document(seeds=(0, 1, 2), *, models=("gpt", "resnet"), criteria=None):
    """A finished study on a CPU: 8 bits are harmless, 4 bits cost quality."""
    trainers = {"gpt": "lm", "resnet": "vision"}
    study = {
        "name": "momentum",
        "title": "8- and 4-bit momentum",
        "question": "Does it cut memory?\n\nAnd does it keep quality?",
        "limits": "Two small models.",
        "reference": "float32",
        "presets": {"small": {"seeds": list(seeds), "workers": 2}},
        "models": {
            name: {"trainer": trainers[name], "title": f"{name}, small"}
            for name in models
        },
        "conditions": CONDITIONS,
        "criteria": CRITERIA if criteria is None else criteria,
    }
    return {
        "study": study,
        "preset": "small",
        "command": "python -m benchmarks.study run momentum.toml --preset small",
        "machine": {
            "device": "AMD EPYC",
            "platform": "cpu",
            "cores": 2,
            "jax": "0.10.2",
            "python": "3.11.7",
        },
        "date": "2026-11-22",
        "runs": [
            study_run(model, condition, seed)
            for seed in seeds
            for model in models
            for condition in CONDITIONS
        ],
    }


def study_run(model, condition, seed, points=60, count=1_000_000):
    rng = np.random.default_rng([seed, len(model)])
    own = np.random.default_rng([seed, len(model), len(condition), ord(condition[-1])])
    worse = {"float32": 0.0, "int8": 0.002, "int4": 0.12}[condition]
    steps = np.linspace(10, 600, points).astype(int)
    loss = 1.8 + 2.6 * np.exp(-steps / 90) + rng.normal(0, 0.03, points)
    loss += worse * np.minimum(1, steps / 200) + own.normal(0, 0.004, points)
    norm = 0.9 + np.exp(-steps / 50) + rng.normal(0, 0.02, points)
    norm *= 1 + worse + own.normal(0, 0.03, points)
    final = 1.95 + 0.02 * rng.normal() + worse + 0.004 * own.normal()
    parts = ("weights", "residual", "optimizer state", "gradients")
    bytes_of = {
        part: int(size * count)
        for part, size in zip(parts, BYTES[condition], strict=True)
    }
    seconds = {"float32": 60, "int8": 72, "int4": 75}[condition] + own.normal()
    if model == "gpt":
        metrics = {"perplexity": math.exp(final), "bits_per_byte": final / math.log(2)}
        units = "tokens"
    else:
        metrics = {"accuracy": 0.91 - worse / 4 + 0.003 * own.normal()}
        units = "images"
    return {
        "model": model,
        "condition": condition,
        "seed": seed,
        "status": "done",
        "reason": None,
        "config": {"steps": 600, "seed": seed},
        "summary": {
            "parameters": count,
            "bytes": bytes_of,
            "peak_bytes": {
                "live": sum(bytes_of.values()),
                "compiled": int(2.2 * sum(bytes_of.values())),
                "allocator": None,
            },
            "checkpoint_bytes": bytes_of["weights"] + bytes_of["optimizer state"],
            "seconds": seconds,
            "steps": 600,
            "units": units,
            "units_per_second": 600 * 4096 / seconds,
            "train_loss": float(loss[-3:].mean()),
            "val_loss": final,
            "metrics": metrics,
            "gradient_norm": float(norm.mean()),
            "nonfinite": 0,
            "diverged": False,
            "stopped": None,
        },
        "curve": {
            "step": steps.tolist(),
            "loss": loss.tolist(),
            "grad_norm": norm.tolist(),
        },
        "validation": {
            "step": [200, 400, 600],
            "loss": [final + 0.4, final + 0.1, final],
        },
        "wall_seconds": seconds + 20,
    }
