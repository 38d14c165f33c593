"""Deployment over NVIDIA FLARE: its certificates, its connections, its jobs. Needs the extra `deploy`.

kits.py     certificates and startup kits for named sites      service.py  run one kit, and keep it running
job.py      one link of a run as a FLARE job                   console.py  submit, watch, stop a federation
carrier.py  messages, sent again until they are answered       poc.py      all of it on this machine
times.py    the engine's time-outs, in one place
"""
