"""What happens in a run, and what is made of it: events, summary, report, progress on the terminal."""
