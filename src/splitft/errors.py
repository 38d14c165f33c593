"""Every error a user of splitft can meet, as one tree.

    SplitftError
    ├── ConfigError        the configuration file or a key=value override cannot be used
    │   └── PluginError    a plug-in that cannot be found, loaded or added
    ├── GeometryError      spans, cuts or ranks that do not fit the model
    ├── ModelError         a model that cannot be found, read or split
    ├── DataError          text that cannot be read, or not enough of it
    ├── WireError          bytes that are not the message that was expected
    │   ├── ProtocolError  a well-formed message that may not follow the one before
    │   │   └── SiteFailureError  a site reports that it could not do what it was asked
    │   └── RepeatError    a message under a number that was used, or is not due yet
    ├── AdapterError       adapter states that do not fit together
    │   └── FailedRoundError  a round's updates that cannot be used; the run can go on without them
    ├── ScheduleError      profiles, costs or cuts that are impossible
    ├── RunError           a run folder that cannot be used, resumed or written
    │   ├── ReplicaError   a process of the server has ended
    │   ├── DamagedError   a file that is not as it was written
    │   └── BusyError      a run folder that another process is training into
    ├── MethodError        a method that cannot run as configured
    └── DeployError        a federation that cannot be set up, reached or kept running
        ├── ForbiddenError the data owner's own file forbids what the run asks of its site
        ├── AwayError      the federation's server does not answer
        ├── TransportError a message could not be delivered: the other side is away, or it timed out
        └── PausedError    too few sites are there to go on with the round

Each message says what was found, what would fit, and what to do next. The command line turns any of
them into one line on stderr and exit status 2.
"""

from __future__ import annotations

from splitft.foreign_text import printable


class SplitftError(Exception):
    """Root of all errors that splitft raises on purpose."""


class ConfigError(SplitftError):
    """The configuration cannot be used; the message lists every fault, one a line."""


class PluginError(ConfigError):
    """A plug-in cannot be found, loaded or added."""


class GeometryError(SplitftError):
    """A span, cut or rank does not fit the model."""


class ModelError(SplitftError):
    """A model cannot be found, read or split."""


class DataError(SplitftError):
    """Text cannot be read, or there is too little of it."""


class WireError(SplitftError):
    """Bytes are not the message that was expected; what the error quotes of them is made printable."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ProtocolError(WireError):
    """A well-formed message that may not follow the one before."""


class SiteFailureError(ProtocolError):
    """A site reports that it could not do what it was asked; the message is its reason."""


class RepeatError(WireError):
    """A message comes under a number that was used for another, or is not due yet."""


class AdapterError(SplitftError):
    """Adapter states do not fit together."""


class FailedRoundError(AdapterError):
    """The updates of a round cannot be used; the run goes back to the state before it."""


class ScheduleError(SplitftError):
    """A profile, cost or cut is impossible."""


class RunError(SplitftError):
    """A run folder cannot be used, resumed or written."""


class DamagedError(RunError):
    """A file is not as it was written."""


class ReplicaError(RunError):
    """A process that holds the server's blocks has ended."""


class BusyError(RunError):
    """Another process is training into the run folder."""


class MethodError(SplitftError):
    """A method cannot run as configured."""


class DeployError(SplitftError):
    """A federation cannot be set up, reached or kept running."""


class ForbiddenError(DeployError):
    """What a run asks of a site is forbidden by its data owner; the message says each reason."""


class AwayError(DeployError):
    """The federation's server does not answer."""


class TransportError(DeployError):
    """A message could not be delivered, or its reply did not come in time."""


class PausedError(DeployError):
    """Too few sites are there to go on with the round."""
