"""Time, traffic and memory of every cut, a simulated clock, and the controllers that choose cuts."""
