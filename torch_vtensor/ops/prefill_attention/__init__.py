"""prefill_attention: many new tokens of each sequence over its prefix and themselves."""
