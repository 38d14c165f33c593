"""The events of a run, and what is computed from them.

`events` are small typed records, one JSON object a line of `events.jsonl`; `log` writes and reads them;
`summary` and `history` are computed from them; `evaluations` reads `eval.json`; `table` shows any of them.
"""
