"""The leak audit: record what crosses the cut, attack it, and report what was read."""
