"""Defences of what leaves a client, their differential privacy, and what audits have found."""
