"""Deployment over NVIDIA FLARE: its certificates, connections and jobs. Needs the extra `deploy`.

provisioning.py  certificates and startup kits     processes.py  run the process of one kit
transport.py     messages between job cells        job.py        one session of a run as a job
admin.py         submit, watch, stop               engine.py     the federation for the supervisor
poc.py           all of it on this machine
"""
