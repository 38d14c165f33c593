"""The file a user writes, as one frozen value: read, overridden, checked, explained and written back.

    run.yaml + "training.rounds=5" --load--> RunConfig --dump--> config.yaml of the run folder

`run` holds the value and what must fit together in it, `reading` gets from text to the value, `faults`
says what is wrong in words of the user's own file, `writing` goes back to text.
"""

from splitft.config.reading import from_mapping, load, load_spec
from splitft.config.run import RunConfig
from splitft.config.writing import commented, dump, json_schema, template

__all__ = ["RunConfig", "commented", "dump", "from_mapping", "json_schema", "load", "load_spec", "template"]
