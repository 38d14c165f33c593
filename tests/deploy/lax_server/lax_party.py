"""A server that is not ours: FLARE's own process, which has every command and checks what its files say."""

import importlib
import sys

from nvflare.fuel.f3.mpm import MainProcessMonitor

sys.argv.pop(1)
module = importlib.import_module("nvflare.private.fed.app.server.server_train")
arguments = module.parse_arguments()
sys.exit(MainProcessMonitor.run(main_func=module.main, run_dir=arguments.workspace, args=arguments))
