"""What leaves a client, what can be read from it, and what is done about that."""
