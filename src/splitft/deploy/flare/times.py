"""The engine's time-outs that we set, in one place; the user's own are in the section `deploy`.

FLARE has more than a hundred. Ours are few because of how a message travels: a request is answered within
HOLD_S or told to ask again, and one that is not answered within TRY_S is sent again, under the same number
and so without harm. None of these ends a run: what ends a round for a site is `deploy.silence_s`, and what
ends a site's patience with the server is GIVE_UP_S.
"""

TRY_S = 8.0
"""A request that is not answered in this time is sent again: the gap that a short cut of the network leaves.
It must be longer than `desk.HOLD_S`, for which the server may keep a request, and a large message's time."""
GIVE_UP_S = 900.0
"""A site leaves the job when the server has not answered for so long; it is back with the next link."""
START_S = 180.0
"""How long the processes of a federation on one machine may take until all sites are connected."""
STOP_S = 20.0
"""After so long without leaving by itself, a process is killed."""
