"""Moments as products of thin factors: LoRA-Pre, its Muon, and low-rank Adam."""
