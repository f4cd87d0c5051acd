"""kv_append: write new tokens behind each sequence's last one, in place."""
