"""The user's configuration file as one frozen value: read, override, check, explain, write.

    run.yaml + "training.rounds=5" --load--> RunConfig --dump--> config.yaml of the run folder

`run` has the value, `compatibility` the requirements between its sections, `reading` parses text, `explain`
turns errors into messages with places in the user's file, `writing` makes text again.
"""

from splitft.config.reading import from_mapping, load, load_spec
from splitft.config.run import RunConfig
from splitft.config.writing import commented, dump, json_schema, template

__all__ = ["RunConfig", "commented", "dump", "from_mapping", "json_schema", "load", "load_spec", "template"]
