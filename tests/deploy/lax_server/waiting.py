"""A controller that gives every site a task and waits a while: long enough for a site to refuse."""

import time

from nvflare.apis.controller_spec import Task
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable


class Waiting(Controller):
    def start_controller(self, fl_ctx):
        pass

    def control_flow(self, abort_signal, fl_ctx):
        self.broadcast(task=Task(name="splitft", data=Shareable()), fl_ctx=fl_ctx)
        until = time.monotonic() + 30
        while time.monotonic() < until and not abort_signal.triggered and self.get_num_standing_tasks():
            time.sleep(0.2)

    def stop_controller(self, fl_ctx):
        pass

    def process_result_of_unknown_task(self, *args, **kwargs):
        pass
