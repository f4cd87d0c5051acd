"""transformers' caches over virtual memory."""
