"""Runs, from a configuration to a run folder.

    RunConfig --inputs, setup--> clients, server --train--> run folder --folder--> text, PEFT, merged model

Only this room and those above it take the whole configuration.
"""
