"""The same client and server over a network: sites that ask, a server that answers, and what carries it."""
