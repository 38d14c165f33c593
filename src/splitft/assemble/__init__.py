"""From a configuration to a run: with the command line, the one place that sees the whole of it.

RunConfig --parties--> clients, server --training--> run folder --results--> text, PEFT, merged model
"""

from splitft.assemble.evaluating import Trial, evaluate
from splitft.assemble.folder import Run
from splitft.assemble.parties import Prepared, prepare
from splitft.assemble.plan import plan
from splitft.assemble.results import export, generate
from splitft.assemble.sharing import shares
from splitft.assemble.training import train

__all__ = ["Prepared", "Run", "Trial", "evaluate", "export", "generate", "plan", "prepare", "shares", "train"]
