"""The draw of the next token of each row of logits."""
