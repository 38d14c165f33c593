"""From a configuration to a run folder: with the studies above it, the lowest room that sees the whole of it.

    RunConfig --inputs, setup--> clients, server --train--> run folder --results--> text, PEFT, merged model

Names are imported from the modules that hold them: a plan needs no torch.
"""
