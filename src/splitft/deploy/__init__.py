"""The same run over a network: sites send requests, a server answers, a transport carries the messages."""
