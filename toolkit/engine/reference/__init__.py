"""The DPO reference: its log-probs, computed once and proved."""
