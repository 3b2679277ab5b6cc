"""Models on disk: finding and fetching them, and reading what does not need torch (metadata, tokenizer, template)."""
