"""States on disk and in other forms: checkpoints, formats, stock optax, safetensors."""
