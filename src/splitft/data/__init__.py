"""Text: read it, divide it among clients, tokenise it and batch it."""
