"""The conversation between a client and the server: its messages, and the terms they travel on."""

from splitft.protocol.messages import (
    MESSAGES,
    Activations,
    AdapterUpload,
    CutGradient,
    Evaluation,
    GlobalAdapters,
    HeadGradient,
    HeldOutLoss,
    LastHidden,
    Message,
    RoundReady,
    RoundStart,
    expect,
)
from splitft.protocol.terms import Terms

__all__ = [
    "MESSAGES",
    "Activations",
    "AdapterUpload",
    "CutGradient",
    "Evaluation",
    "GlobalAdapters",
    "HeadGradient",
    "HeldOutLoss",
    "LastHidden",
    "Message",
    "RoundReady",
    "RoundStart",
    "Terms",
    "expect",
]
