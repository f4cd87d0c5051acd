"""decode_attention: one or a few query tokens a sequence over all of its tokens."""
