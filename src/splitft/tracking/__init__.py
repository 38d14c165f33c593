"""What happens in a run, and what is made of it.

`events` are small typed facts, one JSON object a line; `summary` folds them into one page of JSON;
`progress` shows them on a terminal as they come; `report` makes one HTML page of them, with `charts`.
"""
