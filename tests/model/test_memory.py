"""What a client with 2 of 30 blocks of a real model must hold, in parameters and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitft.geometry import Span
from splitft.model import open_model
from splitft.specs import ModelSpec

pytestmark = pytest.mark.real

MEASURE = """
import json, re, sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from splitft.geometry import Span
from splitft.model import loss_and_gradient, open_model
from splitft.specs import ModelSpec

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
what, folder = sys.argv[1:]
tokens = torch.arange(100, 132).view(1, 32)
model = open_model(ModelSpec(name=folder, dtype="bfloat16"))
model.segment(Span(0, 0))  # modelling code is imported
before = peak()
if what == "whole":
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    parameters = sum(p.numel() for p in whole.parameters())
    with torch.no_grad():
        whole(tokens)
else:
    segment = model.segment(Span(0, 2), embedding=True, head=True)
    parameters = segment.parameter_count()
    with torch.no_grad():
        hidden = segment.run(tokens)
    loss_and_gradient(segment, hidden[0, :-1], tokens[0, 1:])
print(json.dumps({"parameters": parameters, "peak_mib": peak(), "weights_mib": peak() - before}))
"""


def _measured(what: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, what, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_a_client_with_two_blocks_needs_a_fraction_of_the_models_memory(real_model):
    client, whole = _measured("client", real_model), _measured("whole", real_model)
    for what, measured in (("client", client), ("whole", whole)):
        print(what, measured)
    assert client["parameters"] < 0.45 * whole["parameters"]
    assert client["weights_mib"] < 0.6 * whole["weights_mib"]
    assert client["peak_mib"] < whole["peak_mib"]


@torch.no_grad()
def test_the_real_model_split_says_what_it_says_whole(real_model):
    model = open_model(ModelSpec(name="smollm2-135m", dtype="bfloat16"))
    tokens = torch.tensor([model.tokenizer()("The capital of France is").input_ids])
    client, server = model.segment(Span(0, 2), embedding=True, head=True), model.segment(Span(2, 30))
    logits = client.logits(server.run(client.run(tokens))[0])
    whole = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.bfloat16).eval()
    assert torch.equal(logits, whole(tokens).logits[0])
    assert model.tokenizer().decode(logits[-1].argmax()) == " Paris"


MOVE = """
import json, re, sys
import torch
from pathlib import Path
from splitft.geometry import Span
from splitft.model import open_model
from splitft.specs import ModelSpec

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
model = open_model(ModelSpec(name=sys.argv[2], dtype="bfloat16"))
segment = model.segment(Span(0, 2), embedding=True, head=True)
found = []
for cut in (2, 15, 29, 15, 2):
    segment.resize(Span(0, cut))
    with torch.no_grad():
        segment.run(torch.arange(8)[None], Span(0, cut))
    found.append(resident())
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_blocks_that_a_client_gives_up_leave_its_memory(real_model):
    command = [sys.executable, "-c", MOVE, "move", str(real_model)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    shallow, middle, deep, middle_again, shallow_again = json.loads(run.stdout.splitlines()[-1])
    print(f"MiB at cuts 2, 15, 29, 15, 2: {run.stdout.splitlines()[-1]}")
    assert deep - middle > 80  # 14 blocks of 6.75 MiB
    assert abs(middle_again - middle) < 10
    assert abs(shallow_again - shallow) < 10


SHARED = """
import gc, json, re, sys
import torch
from pathlib import Path
from splitft.geometry import Span
from splitft.model import open_model
from splitft.specs import ModelSpec

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
model = open_model(ModelSpec(name=sys.argv[2], dtype="float32"))
model.segment(Span(0, 0))  # modelling code is imported
gc.collect()
before, clients, found = resident(), [], {}
for number in range(1, 9):
    clients.append(model.segment(Span(0, 2), embedding=True, head=True))
    with torch.no_grad():
        clients[-1].logits(clients[-1].run(torch.arange(8)[None])[0, -1:])  # one row: heaps keep holes
    found[number] = resident() - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_eight_clients_of_the_real_model_need_the_memory_of_one(real_model):
    command = [sys.executable, "-c", SHARED, "share", str(real_model)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    print(f"MiB of 1 to 8 clients: {run.stdout.splitlines()[-1]}")
    assert found["1"] > 135  # embedding and two blocks in float32
    assert found["8"] < 1.1 * found["1"]  # module objects included: about 1 MiB a client
