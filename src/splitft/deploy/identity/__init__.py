"""Certificates of a federation: who is who, for how long, and who is no longer.

authority.py     root, requests, approvals and startup kits     certificates.py  read and check them
revocation.py    list of certificates that were withdrawn       probe.py         explain a failed connection
"""
