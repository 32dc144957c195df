"""KV of spans that are no prefixes: where they are known, and which of their tokens are computed again."""
